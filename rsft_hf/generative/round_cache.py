"""Round cache: which candidates of an earlier run can be reused.

`round_facts` lists everything that candidates depend on as JSON values: digests of model, prompts and rewards, options,
seeds. `plan_round` compares them with those of the stored round and tells what is left to do; `open_round` keeps a
stored round, keeps its completions but discards their scores, or moves it aside: candidates of different facts are
never mixed.
"""

import dataclasses
import functools
import hashlib
import inspect
import shutil
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from rsft_hf.engines.generation_config import active_settings
from rsft_hf.generative.candidates import CandidateStore, round_number
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import Generator, Sampling
from rsft_hf.generative.prompts import PromptSet
from rsft_hf.generative.selection import stable_repr
from rsft_hf.rewards.functions import RewardFunctions

logger = logging.get_logger(__name__)

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
    config: CandidateConfig,
    generator: Generator,
    prompts: PromptSet,
    sampling: Sampling,
    digests: Mapping[str, str | None],
) -> dict[str, Any]:
    """Returns the facts of a round.

    Args:
        config: Options.
        generator: Engine, and how prompts become tokens.
        prompts: The prompts.
        sampling: How candidates are drawn.
        digests: Digests of the model that generates, "model", of the prompts, "prompts", and of the round's imported
            candidates, "candidates", None where they are generated.
    """
    reference = config.reference_model
    is_model = isinstance(reference, torch.nn.Module)
    return {
        "model": digests["model"],
        "reference_model": model_fingerprint(reference) if is_model else reference,
        "merge_adapter": config.merge_adapter,
        "engine": generator.engine.facts(),
        "prompts": digests["prompts"],
        "candidates": digests.get("candidates"),
        "encoding": _encoding_digest(generator.encoder, prompts),
        "seed": sampling.run_seed,
        "num_candidates": sampling.num_candidates,
        "generation_config": {
            name: _plain(value) for name, value in active_settings(sampling.generation_config).items()
        },
        "with_log_probs": sampling.with_log_probs,
        "reward_functions": list(config.functions.names),
        "scoring": scoring_digests(config.functions),
        "reward_weights": [float(weight) for weight in config.functions.weights],
        "acceptance": rule_digest(config.acceptance),
        "filters": [rule_digest(rule) for rule in config.filters],
        "dedup": rule_digest(config.dedup),
        "attempts": [config.max_attempts, config.min_accepted_per_prompt, config.on_nothing_accepted],
    }


def _encoding_digest(encoder: Encoder, prompts: PromptSet) -> str:
    """A digest of the tokens of a few prompts: tokenizer, chat template and its arguments all show in them."""
    digest, count = hashlib.blake2b(digest_size=8), min(_NUM_ENCODED, len(prompts))
    for number in range(count):
        digest.update(repr(encoder.prompt_ids(*prompts.row(number * len(prompts) // count))).encode())
    return digest.hexdigest()


def scoring_digests(functions: RewardFunctions) -> list[str]:
    """Returns the digest of each reward function; taken once, as objects may change while they score."""
    if functions.digests is None:
        functions.digests = [source_digest(function) for function in functions.functions]
    return functions.digests


def rule_digest(rule: Any) -> str:
    """Returns the repr of a rule, with a digest of the functions that it is or has."""
    has_functions = isinstance(rule, types.FunctionType) or any(
        isinstance(value, types.FunctionType) for value in getattr(rule, "__dict__", {}).values()
    )
    return f"{stable_repr(rule)} {source_digest(rule)}" if has_functions else stable_repr(rule)


def source_digest(function: Any) -> str:
    """Returns a digest of what a function computes, as far as its own source text shows it.

    Covered are the source text of the function, or of the class of a callable object, with its default values and the
    constants that it encloses; arguments bound by `functools.partial`; attributes of objects that are
    functions or models (by their weights), or constants with the name of an argument of `__init__`. Not
    covered are the functions and globals that it uses, and code that has no file (`exec`, an interactive prompt): a
    warning names such a function.
    """
    digest = hashlib.blake2b(digest_size=8)
    while isinstance(function, functools.partial):
        digest.update(_stable_text(function.args + tuple(sorted(function.keywords.items()))).encode())
        function = function.func
    if isinstance(function, torch.nn.Module):
        return model_fingerprint(function)
    digest.update(stable_repr(function).encode())
    if not isinstance(function, (types.FunctionType, types.MethodType)):
        settings = inspect.signature(type(function).__init__).parameters  # other constants may change as it works
        hidden = {field.name for field in dataclasses.fields(function)} if dataclasses.is_dataclass(function) else set()
        for name, value in sorted(getattr(function, "__dict__", {}).items()):
            if isinstance(value, torch.nn.Module):
                digest.update(f"{name} {model_fingerprint(value)}".encode())
            elif isinstance(value, types.FunctionType):
                digest.update(f"{name} {source_digest(value)}".encode())
            elif isinstance(value, _FIXED) and name in settings and name not in hidden:  # fields are in the repr
                digest.update(f"{name} {_stable_text(value)}".encode())
    defined = function if isinstance(function, (types.FunctionType, types.MethodType)) else type(function)
    try:
        digest.update(textwrap.dedent(inspect.getsource(defined)).encode())
    except (OSError, TypeError):
        logger.warning_once(
            f"The source text of function {defined.__qualname__!r} is not available, so a change of it would go "
            "unnoticed when candidates of an earlier run are reused. Define it in a file."
        )
    called = function.__func__ if isinstance(function, types.MethodType) else function
    if isinstance(called, types.FunctionType):
        enclosed = [cell.cell_contents for cell in called.__closure__ or ()]
        # Lists, dicts and objects are what a function works with, and may change as it works.
        fixed = [value for value in enclosed if isinstance(value, _FIXED)]
        if called.__name__ == "<lambda>":  # its source text is a line, which may hold several
            code = called.__code__
            fixed += [code.co_code, code.co_names, tuple(one for one in code.co_consts if isinstance(one, _FIXED))]
        digest.update(_stable_text([called.__defaults__, called.__kwdefaults__, fixed]).encode())
    return digest.hexdigest()


def _stable_text(value: Any) -> str:
    """A value as text that is equal in every process: sets sorted, addresses left out."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_stable_text(item) for item in value))}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_stable_text(item) for item in value)})"
    if isinstance(value, types.FunctionType):
        return source_digest(value)
    return stable_repr(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list)) else str(value)


# What answers are scored and accepted by; all other facts are what they are generated from.
_JUDGING = {
    "reward_functions", "scoring", "reward_weights", "acceptance", "filters", "dedup", "attempts",
}  # fmt: skip


@dataclass(frozen=True)
class RoundPlan:
    """Work that is left of a round, which may be stored in part.

    Attributes:
        facts: Facts of the round, as `round_facts` returns them.
        changed: Names of the facts in which the stored round differs; None without a stored round.
        generates: Whether completions are missing, or may come to be after a first attempt.

    Example:
        >>> RoundPlan({"seed": 1}, changed=("acceptance",), generates=False).keeps_completions
        True
    """

    facts: Mapping[str, Any]
    changed: tuple[str, ...] | None
    generates: bool

    @property
    def keeps_completions(self) -> bool:
        """Whether the stored completions are those that the round would generate."""
        return self.changed is not None and set(self.changed) <= _JUDGING


def plan_round(store: CandidateStore, facts: Mapping[str, Any], num_shards: int, max_attempts: int) -> RoundPlan:
    """Returns the work that is left of a round.

    Args:
        store: Store of the round.
        facts: Facts of the round, as `round_facts` returns them.
        num_shards: Number of shards of the first attempt.
        max_attempts: Maximum number of attempts; a second one depends on the rewards of the first.
    """
    earlier = store.manifest().get("facts")
    changed = None if earlier is None else tuple(name for name in facts if earlier.get(name) != facts[name])
    plan = RoundPlan(facts, changed, generates=True)
    is_whole = all(store.stage(store.path(0, number)) is not None for number in range(num_shards))
    return replace(plan, generates=not (plan.keeps_completions and is_whole and max_attempts == 1))


def shard_work(store: CandidateStore, path: Path) -> Literal["generate", "score", "nothing"]:
    """Returns the work that is left of a shard before the round is judged.

    A shard for which no reward function answered, or none of those that failed, is scored again: see `is_unjudged`.
    """
    stage = store.stage(path)
    if stage is None:
        return "generate"
    return "score" if stage == "generated" or store.is_unjudged(path) else "nothing"


def open_round(store: CandidateStore, plan: RoundPlan, prompts: PromptSet) -> None:
    """Makes the folder of a round ready: candidates of the same facts stay, all others are moved aside.

    Where only rewards and rules have changed, the completions of the first attempt stay, and are scored and judged
    again; later attempts depend on what was accepted. A round that begins anew moves the rounds after it aside, too.
    """
    if plan.changed == ():
        logger.info(f"Going on with the {len(store.shards())} shards in {store.directory}.")
        first, later = _by_attempt(store)
        is_unfinished = "metrics" not in store.manifest()
        if later and is_unfinished and any(store.is_unjudged(path) for path in first):
            for path in later:
                path.unlink()  # of prompts chosen without the scores that are to come
        return
    if plan.keeps_completions:
        _discard_scores(store, plan.changed or (), prompts)
    else:
        changed = ", ".join(plan.changed or plan.facts)
        set_rounds_aside(store, f"{store.directory.name} differs in {changed}")
    store.directory.mkdir(parents=True, exist_ok=True)
    store.write_manifest({"facts": dict(plan.facts), "reward_names": list(store.reward_names)})


def _by_attempt(store: CandidateStore) -> tuple[list[Path], list[Path]]:
    """The shards of the first attempt, and the files of later ones."""
    first = [path for path in store.shards() if path.name.startswith("attempt-00")]
    return first, [path for path in store.shards() if path not in first]


def _discard_scores(store: CandidateStore, changed: Sequence[str], prompts: PromptSet) -> None:
    aside = _place_aside(store.directory)
    shutil.copytree(store.directory, aside)
    first, later = _by_attempt(store)
    for path in first:
        candidates = store.read_generated(path, lambda candidate: prompts.row(candidate.prompt_id))
        store.write(path, candidates, "generated")
    for path in later:
        path.unlink()
    logger.warning(
        f"{store.directory} held candidates of another run (it differs in {', '.join(changed)}): the answers are "
        f"scored and judged anew. As they were, they are in {aside}."
    )


def set_rounds_aside(first: CandidateStore, reason: str) -> None:
    """Moves the candidates of a round and of those after it to the folder `replaced`, with a warning.

    Args:
        first: Store of the round, which need not exist.
        reason: Why they belong to another run.
    """
    rounds = sorted(first.directory.parent.glob("round-*"), key=round_number)
    for folder in [one for one in rounds if round_number(one) >= round_number(first.directory)]:
        aside = _place_aside(folder)
        folder.rename(aside)
        logger.warning(f"{folder} held candidates of another run ({reason}); they are in {aside.parent} now.")


def _place_aside(folder: Path) -> Path:
    """A free path for the candidates of a round that are moved aside."""
    aside = folder.parent / "replaced"
    aside.mkdir(exist_ok=True)
    return aside / f"{folder.name}-{sum(1 for _ in aside.glob(f'{folder.name}-*'))}"
