"""What the candidates of a round depend on, as values that can be written down and compared.

A model and the options enter, JSON values leave. Candidates of one set of facts are never mixed with those of another.
"""

import hashlib
import inspect
import re
import types
from typing import TYPE_CHECKING, Any

import torch

from rsft_hf.generative.settings import in_force

if TYPE_CHECKING:
    from rsft_hf.generative.resampler import CandidateResampler
    from rsft_hf.generative.rounds import RoundRunner

_NUM_ENCODED = 16


def model_fingerprint(model: torch.nn.Module) -> str:
    """Returns a digest of all parameters and buffers, which changes when training has changed them."""
    digest = hashlib.blake2b(digest_size=8)
    for name, values in sorted(model.state_dict().items()):
        if isinstance(values, torch.Tensor):
            digest.update(f"{name}{tuple(values.shape)}".encode())
            if values.is_floating_point():
                total = values.sum(dtype=torch.float64), torch.linalg.vector_norm(values, dtype=torch.float64)
                digest.update(torch.stack(total).cpu().numpy().tobytes())
    return digest.hexdigest()


def round_facts(options: "CandidateResampler", runner: "RoundRunner", prompts: str, model: str) -> dict[str, Any]:
    """Returns the facts of a round.

    Args:
        options: The resampler, for its rules.
        runner: Knows how candidates are drawn, and how prompts become tokens.
        prompts: Digest of the prompts.
        model: Digest of the model that generates.
    """
    sampling, reference = runner.sampling, options.reference_model
    is_model = isinstance(reference, torch.nn.Module)
    return {
        "model": model,
        "reference_model": model_fingerprint(reference) if is_model else reference,
        "prompts": prompts,
        "encoding": _encoding_digest(runner),
        "seed": sampling.run_seed,
        "num_candidates": sampling.num_candidates,
        "generation_config": {name: _plain(value) for name, value in in_force(sampling.generation_config).items()},
        "with_log_probs": sampling.with_log_probs,
        "reward_functions": list(options.functions.names),
        "scoring": [code_digest(function) for function in options.functions.functions],
        "reward_weights": [float(weight) for weight in options.functions.weights],
        "acceptance": stable_repr(options.acceptance),
        "filters": [stable_repr(rule) for rule in options.filters],
        "dedup": stable_repr(options.dedup),
        "attempts": [options.max_attempts, options.min_accepted_per_prompt, options.on_nothing_accepted],
    }


def _encoding_digest(runner: "RoundRunner") -> str:
    """A digest of the tokens of a few prompts: tokenizer, chat template and its arguments all show in them."""
    digest, count = hashlib.blake2b(digest_size=8), min(_NUM_ENCODED, len(runner.prompts))
    for number in range(count):
        prompt, _ = runner.prompts.row(number * len(runner.prompts) // count)
        digest.update(repr(runner.generator.encoder.prompt_ids(prompt)).encode())
    return digest.hexdigest()


def code_digest(function: Any) -> str:
    """Returns a digest of what a reward function computes: its code, or the fields and code of an object."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(function, torch.nn.Module):
        return model_fingerprint(function)
    digest.update(stable_repr(function).encode())
    called = function if inspect.isfunction(function) else type(function).__call__
    if inspect.isfunction(called):
        _add_code(digest, called.__code__)
    return digest.hexdigest()


def _add_code(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant)
        elif isinstance(constant, frozenset):  # its order differs from process to process
            digest.update(repr(sorted(map(repr, constant))).encode())
        else:
            digest.update(repr(constant).encode())


def stable_repr(rule: Any) -> str:
    """Returns the repr of a rule without the addresses of functions in it, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(rule))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list)) else str(value)
