"""Round cache: which candidates of an earlier run can be reused.

`round_facts` lists everything that candidates depend on as JSON values: digests of model, prompts and rewards, options,
seeds. Candidates of different facts are never mixed: `open_round` keeps a stored round, keeps its completions but
discards their scores, or moves it aside.
"""

import functools
import hashlib
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from rsft_hf.engines.base import engine_facts
from rsft_hf.engines.generation_config import in_force
from rsft_hf.generative.candidates import CandidateStore, PromptSet
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import Generator, Sampling
from rsft_hf.generative.selection import stable_repr

_NUM_ENCODED = 16

_FIXED = (str, bytes, bool, int, float, tuple, frozenset, types.FunctionType)


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


def round_facts(
    config: CandidateConfig, generator: Generator, prompts: PromptSet, sampling: Sampling, digests: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the facts of a round.

    Args:
        config: Options.
        generator: Engine, and how prompts become tokens.
        prompts: The prompts.
        sampling: How candidates are drawn.
        digests: Digests of the model that generates, "model", and of the prompts, "prompts".
    """
    reference = config.reference_model
    is_model = isinstance(reference, torch.nn.Module)
    return {
        "model": digests["model"],
        "reference_model": model_fingerprint(reference) if is_model else reference,
        "merge_adapter": config.merge_adapter,
        "engine": engine_facts(generator.engine),
        "prompts": digests["prompts"],
        "encoding": _encoding_digest(generator.encoder, prompts),
        "seed": sampling.run_seed,
        "num_candidates": sampling.num_candidates,
        "generation_config": {name: _plain(value) for name, value in in_force(sampling.generation_config).items()},
        "with_log_probs": sampling.with_log_probs,
        "reward_functions": list(config.functions.names),
        "scoring": [code_digest(function) for function in config.functions.functions],
        "reward_weights": [float(weight) for weight in config.functions.weights],
        "acceptance": stable_repr(config.acceptance),
        "filters": [stable_repr(rule) for rule in config.filters],
        "dedup": stable_repr(config.dedup),
        "attempts": [config.max_attempts, config.min_accepted_per_prompt, config.on_nothing_accepted],
    }


def _encoding_digest(encoder: Encoder, prompts: PromptSet) -> str:
    """A digest of the tokens of a few prompts: tokenizer, chat template and its arguments all show in them."""
    digest, count = hashlib.blake2b(digest_size=8), min(_NUM_ENCODED, len(prompts))
    for number in range(count):
        prompt, _ = prompts.row(number * len(prompts) // count)
        digest.update(repr(encoder.prompt_ids(prompt)).encode())
    return digest.hexdigest()


def code_digest(function: Any) -> str:
    """Returns a digest of what a reward function computes, as far as it can be seen.

    Seen are the code of functions and methods with defaults, enclosed constants and arguments bound by
    `functools.partial`, the fields of dataclasses, and the weights of models; not the functions and globals that they
    call upon.
    """
    digest = hashlib.blake2b(digest_size=8)
    while isinstance(function, functools.partial):
        digest.update(_constant(function.args + tuple(sorted(function.keywords.items()))).encode())
        function = function.func
    if isinstance(function, torch.nn.Module):
        return model_fingerprint(function)
    digest.update(stable_repr(function).encode())
    called = function if isinstance(function, (types.FunctionType, types.MethodType)) else type(function).__call__
    called = called.__func__ if isinstance(called, types.MethodType) else called
    if isinstance(called, types.FunctionType):
        enclosed = [cell.cell_contents for cell in called.__closure__ or ()]
        # Lists, dicts and objects are what a function works with, and may change as it works.
        fixed = [value for value in enclosed if isinstance(value, _FIXED)]
        digest.update(_constant([called.__defaults__, called.__kwdefaults__, fixed]).encode())
        _add_code(digest, called.__code__, called.__doc__)
    return digest.hexdigest()


def _add_code(digest: Any, code: types.CodeType, docstring: str | None) -> None:
    digest.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant, None)
        elif constant != docstring or docstring is None:
            digest.update(_constant(constant).encode())


def _constant(value: Any) -> str:
    """A value as text that is equal in every process: sets sorted, addresses left out."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_constant(item) for item in value))}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_constant(item) for item in value)})"
    if isinstance(value, types.FunctionType):
        return code_digest(value)
    return stable_repr(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list)) else str(value)


logger = logging.get_logger(__name__)

# What answers are scored and accepted by; all other facts are what they are generated from.
_JUDGING = {
    "reward_functions", "scoring", "reward_weights", "acceptance", "filters", "dedup", "attempts",
}  # fmt: skip


def open_round(store: CandidateStore, facts: Mapping[str, Any]) -> None:
    """Makes the folder of a round ready: what was made from the same facts stays, all else is put aside.

    Where only rewards and rules have changed, the answers of the first attempt stay, and are scored and judged anew;
    later attempts hang on what was accepted. A round that begins anew takes the rounds after it with it.
    """
    earlier = store.manifest().get("facts")
    changed = [name for name in facts if earlier is None or earlier.get(name) != facts[name]]
    if not changed:
        logger.info(f"Going on with the {len(store.shards())} shards in {store.directory}.")
        return
    if earlier is not None and set(changed) <= _JUDGING:
        _score_anew(store, changed)
    else:
        _begin_anew(store, changed)
    store.directory.mkdir(parents=True, exist_ok=True)
    store.write_manifest({"facts": dict(facts), "reward_names": list(store.reward_names)})


def keeps_answers(store: CandidateStore, facts: Mapping[str, Any]) -> bool:
    """Returns whether `open_round` would leave the answers of the first attempt where they are."""
    earlier = store.manifest().get("facts")
    return earlier is not None and {name for name in facts if earlier.get(name) != facts[name]} <= _JUDGING


def _score_anew(store: CandidateStore, changed: list[str]) -> None:
    aside = _place_aside(store.directory)
    shutil.copytree(store.directory, aside)
    for path in store.shards():
        if not path.name.startswith("attempt-00"):
            path.unlink()
            continue
        answers = store.read(path)
        for answer in answers:
            answer.forget_scores()
        store.write(path, answers, "generated")
    logger.warning(
        f"{store.directory} held candidates of another run (it differs in {', '.join(changed)}): the answers are "
        f"scored and judged anew. As they were, they are in {aside}."
    )


def _begin_anew(store: CandidateStore, changed: list[str]) -> None:
    stale = [folder for folder in store.directory.parent.glob("round-*") if folder.name >= store.directory.name]
    for folder in sorted(stale):
        aside = _place_aside(folder)
        folder.rename(aside)
        logger.warning(
            f"{folder} held candidates of another run ({store.directory.name} differs in {', '.join(changed)}); they "
            f"are in {aside.parent} now, and the round begins anew."
        )


def _place_aside(folder: Path) -> Path:
    """A path that is free, for what is put aside of a round."""
    aside = folder.parent / "replaced"
    aside.mkdir(exist_ok=True)
    return aside / f"{folder.name}-{sum(1 for _ in aside.glob(f'{folder.name}-*'))}"
