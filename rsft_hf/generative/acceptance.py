"""Rules from rewards to accepted candidates: a `CandidateBatch` enters, a mask of the same shape leaves.

Every rule is a frozen dataclass called with `(batch, generator)`. None of them ever accepts a candidate that is not
valid or that nobody could judge, and none looks at the order of candidates. The rules that only rank stand here; those
that follow a law stand in `density.py`, those around other rules in `controls.py`, and all can be imported from here.
How a candidate was generated or scored, and what becomes of it, is not known here.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rsft_hf.generative.batch import (
    Acceptance,
    CandidateBatch,
    check_acceptance,
    check_count,
    check_share,
    choose_first,
    read_column,
    row_quantiles,
)
from rsft_hf.generative.controls import DifficultyRange, PerPromptCap, RandomLike, RandomPerPrompt, Sequence
from rsft_hf.generative.density import RSO, DensityRatio

__all__ = [
    "RSO",
    "Acceptance",
    "CandidateBatch",
    "DensityRatio",
    "DifficultyRange",
    "PerPromptCap",
    "RandomLike",
    "RandomPerPrompt",
    "Sequence",
    "Threshold",
    "TopKOverall",
    "TopKPerPrompt",
    "check_acceptance",
]

TieBreak = Literal["random", "shortest"]


@dataclass(frozen=True, repr=False)
class Threshold(Acceptance):
    """Accepts the rewards above a threshold: a number, or a quantile of the rewards themselves.

    Exactly one of the four is given. `minimum` and `schedule` accept r > t; the quantiles accept r >= t, so that equal
    rewards are all accepted instead of none. Few distinct rewards make a quantile coarse: among 90 zeros and 10 ones
    the quantile 0.8 is 0, which accepts everything; put Threshold(minimum=0) before it in a `Sequence`.

    Attributes:
        minimum: Accepts r > minimum, in units of reward.
        quantile: Accepts the top share 1 - quantile of all candidates of the round, and what ties with it. Favours
            easy prompts.
        prompt_quantile: The same for each prompt, which accepts at least its best candidate.
        schedule: The minimum of each round; the last one serves all later rounds. ReST raises it over its improve
            steps, Gulcehre et al. 2023, arXiv:2308.08998. Without `for_round` it is the first.

    Raises:
        ValueError: If not exactly one is given, a minimum is not finite, `schedule` is empty or a quantile is outside
            [0, 1].
    """

    minimum: float | None = None
    quantile: float | None = None
    prompt_quantile: float | None = None
    schedule: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "Threshold() takes exactly one of `minimum`, `quantile`, `prompt_quantile` and `schedule`, got "
                f"{given or 'none'}. Combine two thresholds by Sequence()."
            )
        if self.schedule is not None:
            object.__setattr__(self, "schedule", tuple(self.schedule))  # a list from a file would not hash
            if not self.schedule:
                raise ValueError("`schedule` is empty. Give the minimum of each round, such as (0.0, 0.5, 0.7).")
        for minimum in (self.minimum, *(self.schedule or ())):
            if minimum is not None and not math.isfinite(minimum):
                raise ValueError(f"A threshold of {minimum} must be finite, in units of reward.")
        for name in ("quantile", "prompt_quantile"):
            if name in given:
                check_share(name, given[name])

    def for_round(self, round_number: int) -> "Threshold":
        """Returns the threshold of that round, counted from 0; itself without a schedule.

        Example:
            >>> Threshold(schedule=(0.0, 0.5)).for_round(7)
            Threshold(minimum=0.5)
        """
        if self.schedule is None:
            return self
        return Threshold(minimum=self.schedule[min(round_number, len(self.schedule) - 1)])

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool; the generator is not used.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            >>> Threshold(minimum=2)(batch, torch.Generator()).tolist()
            [[False, False], [True, True]]
            >>> Threshold(prompt_quantile=0.5)(batch, torch.Generator()).tolist()  # the top one of two
            [[False, True], [False, True]]
        """
        rewards, is_candidate = batch.rewards, batch.is_candidate
        if self.minimum is not None:
            return is_candidate & (rewards > self.minimum)
        if self.quantile is not None:
            reached = row_quantiles(rewards.reshape(1, -1), is_candidate.reshape(1, -1), self.quantile)
            return is_candidate & (rewards >= reached)
        if self.prompt_quantile is not None:
            return is_candidate & (rewards >= row_quantiles(rewards, is_candidate, self.prompt_quantile))
        return self.for_round(0)(batch, generator)


@dataclass(frozen=True, repr=False)
class TopKPerPrompt(Acceptance):
    """Accepts the k largest rewards of each prompt; k = 1 is best-of-n. RAFT, Dong et al. 2023, arXiv:2304.06767.

    Attributes:
        k: Most candidates accepted per prompt.
        tie_break: What decides between equal rewards, which binary rewards make the rule: "random", or "shortest", the
            fewest tokens and at random among those. Never the index.

    Raises:
        TypeError: If `k` is no integer.
        ValueError: If `k` is below 1 or `tie_break` is neither.
    """

    k: int = 1
    tie_break: TieBreak = "random"

    def __post_init__(self) -> None:
        check_count("k", self.k)
        _check_tie_break(self.tie_break)

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool: min(k, candidates) in each row.

        Raises:
            ValueError: If `tie_break` is "shortest" and the batch holds no lengths.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
            >>> TopKPerPrompt(1)(batch, torch.Generator().manual_seed(0)).tolist()
            [[False, True], [True, False]]
        """
        return choose_first(batch.is_candidate, self.k, generator, *_keys(batch, self))


@dataclass(frozen=True, repr=False)
class TopKOverall(Acceptance):
    """Accepts the k largest rewards of the whole round, wherever they stand: it favours easy prompts.

    Attributes:
        k: Most candidates accepted in the round.
        tie_break: As in `TopKPerPrompt`.

    Raises:
        TypeError: If `k` is no integer.
        ValueError: If `k` is below 1 or `tie_break` is neither.
    """

    k: int
    tie_break: TieBreak = "random"

    def __post_init__(self) -> None:
        check_count("k", self.k)
        _check_tie_break(self.tie_break)

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool: min(k, candidates) of them.

        Raises:
            ValueError: If `tie_break` is "shortest" and the batch holds no lengths.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
            >>> TopKOverall(2)(batch, torch.Generator().manual_seed(0)).tolist()
            [[False, True], [False, True]]
        """
        # Flat index f is prompt f // n, candidate f % n.
        keys = [key.reshape(1, -1) for key in _keys(batch, self)]
        chosen = choose_first(batch.is_candidate.reshape(1, -1), self.k, generator, *keys)
        return chosen.reshape(batch.rewards.shape)


def _keys(batch: CandidateBatch, rule: TopKPerPrompt | TopKOverall) -> tuple[torch.Tensor, ...]:
    """What ranks the candidates, smallest first: the rewards reversed, then the lengths if those break ties."""
    if rule.tie_break == "random":
        return (-batch.rewards,)
    return -batch.rewards, read_column(batch, "lengths", repr(rule))


def _check_tie_break(tie_break: str) -> None:
    if tie_break not in get_args(TieBreak):
        raise ValueError(f"`tie_break`={tie_break!r} must be 'random' or 'shortest'.")
