"""What the candidates of a round depend on, as values that can be written down and compared.

A model and the options enter, JSON values leave. Candidates of one set of facts are never mixed with those of another.
"""

import hashlib
import re
from typing import TYPE_CHECKING, Any

import torch

from rsft_hf.generative.settings import in_force

if TYPE_CHECKING:
    from rsft_hf.generative.resampler import CandidateResampler
    from rsft_hf.generative.stages import Sampling


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


def round_facts(options: "CandidateResampler", sampling: "Sampling", prompts: str, model: str) -> dict[str, Any]:
    """Returns the facts of a round.

    Args:
        options: The resampler, for its rules.
        sampling: How candidates are drawn.
        prompts: Digest of the prompts.
        model: Digest of the model that generates.
    """
    return {
        "model": model,
        "prompts": prompts,
        "seed": sampling.run_seed,
        "num_candidates": sampling.num_candidates,
        "generation_config": {name: _plain(value) for name, value in in_force(sampling.generation_config).items()},
        "with_log_probs": sampling.with_log_probs,
        "reward_functions": list(options.functions.names),
        "reward_weights": [float(weight) for weight in options.functions.weights],
        "acceptance": stable_repr(options.acceptance),
        "filters": [stable_repr(rule) for rule in options.filters],
        "dedup": stable_repr(options.dedup),
        "attempts": [options.max_attempts, options.min_accepted_per_prompt, options.on_nothing_accepted],
    }


def stable_repr(rule: Any) -> str:
    """Returns the repr of a rule without the addresses of functions in it, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(rule))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list)) else str(value)
