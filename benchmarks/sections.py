"""The questions of `generation.py`: which model, how much to generate, and who takes part.

Names alone, so that a process that only starts others loads nothing heavy.
"""

from dataclasses import dataclass, field
from typing import Any

OURS = "in_flight"
FORKED = ("generate_batch 16 forked", "generate_batch 32 forked", "generate_batch 64 forked")
ALONE = ("generate_batch 32 alone", "generate_batch 64 alone")
SETTINGS_OF_OURS = (OURS, "in_flight log_probs", "in_flight longest_first")
BATCHES = ("fixed", "sorted")
TRL = ("trl", "trl_rloo", "trl_continuous")
SHARED = {"num_prompts": 4, "num_candidates": 16, "slots": 16, "prompt_mean": 512, "prompt_range": (512, 512)}


@dataclass(frozen=True)
class Section:
    """A question: who generates what, with which model.

    Attributes:
        model: Its name in workloads.py.
        contenders: Names for `rollouts.build_rollout`.
        size: What differs from the defaults of `workloads.Size`.
        has_limits: Whether the framework limit is measured.
    """

    model: str
    contenders: tuple[str, ...]
    size: dict[str, Any] = field(default_factory=dict)
    has_limits: bool = True


def shared_prefill(model: str, length: int) -> Section:
    lengths = {"mean": length, "sigma": 0.0, "longest": length}
    return Section(model, ("fixed", OURS), {**SHARED, **lengths}, has_limits=False)


SECTIONS = {
    "causal": Section("llama", ("naive", *BATCHES, *FORKED, *ALONE, *TRL, "generate_engine", *SETTINGS_OF_OURS)),
    "t5": Section("t5", ("naive", *BATCHES, OURS)),
    "marian": Section("marian", ("naive", *BATCHES, OURS)),
    "shared_prefill": shared_prefill("llama", 1),
    "shared_prefill_32": shared_prefill("llama", 32),
    "milder_tail": Section("llama", ("naive", "fixed", OURS), {"sigma": 0.4}),
    "causal_56m": Section("llama_56m", ("naive", "fixed", *FORKED[1:], OURS), {"num_prompts": 8}),
}
LARGE = {"num_prompts": 256, "slots": 256}
CUDA_SECTIONS = {
    "causal": Section("qwen_half_billion", (*BATCHES, "generate_batch 256 forked", *SETTINGS_OF_OURS), LARGE),
    "shared_prefill": shared_prefill("qwen_half_billion", 1),
    "shared_prefill_32": shared_prefill("qwen_half_billion", 32),
}
SMALL = {"num_prompts": 16, "num_candidates": 4, "slots": 32}
QUICK_SECTIONS = {
    "causal": Section("llama", ("fixed", OURS), SMALL, has_limits=False),
    "t5": Section("t5", ("fixed", OURS), SMALL, has_limits=False),
}
ENCODER_DECODERS = ("t5", "marian")


def kind_of(name: str) -> str:
    """Returns the first word of a contender's name; what follows is its setting."""
    return name.partition(" ")[0]
