"""Acceptance rules: thresholds, top-k, random controls, caps, difficulty ranges, and sequences of rules.

A rule is a frozen dataclass called with `(batch, generator)` that returns a mask of the shape of the batch. No rule
accepts a candidate that is not valid or has no reward, and none depends on the order of candidates. The rules that
sample a target density are in `density.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rsft_hf.acceptance.batch import (
    Acceptance,
    CandidateBatch,
    check_acceptance,
    choose_first,
    read_column,
    row_quantiles,
)
from rsft_hf.checks import check_fraction, check_integer

TieBreak = Literal["random", "shortest"]

Keep = Literal["random", "best"]


@dataclass(frozen=True, repr=False)
class Threshold(Acceptance):
    """Accepts rewards above a threshold: a number, or a quantile of the rewards.

    Exactly one of the four is given. `minimum` and `schedule` accept r > t; the quantiles accept r >= t, so that equal
    rewards are all accepted instead of none. Few distinct rewards make a quantile coarse: among 90 zeros and 10 ones
    the quantile 0.8 is 0, which accepts everything; put Threshold(minimum=0) before it in a `Sequence`.

    Attributes:
        minimum: Accepts r > minimum, in units of reward.
        quantile: Accepts the top fraction 1 - quantile of all candidates of the round, and ties with it. Favours easy
            prompts.
        prompt_quantile: The same within each prompt, which accepts at least its best candidate.
        schedule: Minimum of each round; the last one holds for all later rounds. ReST raises it over its improve
            steps, Gulcehre et al. 2023, arXiv:2308.08998. Without `for_round`, the first one.

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
                check_fraction(name, given[name])

    def for_round(self, round_number: int) -> "Threshold":
        """Returns the threshold of a round, counted from 0; itself without a schedule.

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
        k: Maximum number of accepted candidates per prompt.
        tie_break: Order of equal rewards, which are common with binary rewards: "random", or "shortest", the fewest
            tokens first and at random among those. Never the index.

    Raises:
        TypeError: If `k` is not an integer.
        ValueError: If `k` is below 1 or `tie_break` is neither.
    """

    k: int = 1
    tie_break: TieBreak = "random"

    def __post_init__(self) -> None:
        check_integer("k", self.k, minimum=1)
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
    """Accepts the k largest rewards of the whole round, over all prompts; favours easy prompts.

    Attributes:
        k: Maximum number of accepted candidates in the round.
        tie_break: As in `TopKPerPrompt`.

    Raises:
        TypeError: If `k` is not an integer.
        ValueError: If `k` is below 1 or `tie_break` is neither.
    """

    k: int
    tie_break: TieBreak = "random"

    def __post_init__(self) -> None:
        check_integer("k", self.k, minimum=1)
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


@dataclass(frozen=True, repr=False)
class RandomPerPrompt(Acceptance):
    """Accepts k random candidates of each prompt: the control for the value of the rewards.

    Attributes:
        k: Maximum number of accepted candidates per prompt.

    Raises:
        TypeError: If `k` is not an integer.
        ValueError: If `k` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_integer("k", self.k, minimum=1)

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool: min(k, candidates) in each row.

        Example:
            >>> RandomPerPrompt(2)(CandidateBatch(torch.zeros(1, 3)), torch.Generator().manual_seed(0)).sum().item()
            2
        """
        return choose_first(batch.is_candidate, self.k, generator)


@dataclass(frozen=True, repr=False)
class RandomLike(Acceptance):
    """Accepts as many candidates of each prompt as `rule`, but at random: the control matched per prompt.

    Attributes:
        rule: The rule to match.

    Raises:
        TypeError: If `rule` is not a rule.
    """

    rule: Acceptance

    def __post_init__(self) -> None:
        check_acceptance(self.rule, "the rule of RandomLike()")

    @property
    def requires(self) -> frozenset[str]:
        """Log-probabilities that the matched rule reads."""
        return self.rule.requires

    def for_round(self, round_number: int) -> "RandomLike":
        """Returns the control of the rule of that round."""
        return RandomLike(self.rule.for_round(round_number))

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool, with the row sums of the rule.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
            >>> RandomLike(Threshold(minimum=0.5))(batch, torch.Generator().manual_seed(0)).sum(dim=1).tolist()
            [2, 0]
        """
        counts = self.rule(batch, generator).sum(dim=1, keepdim=True)
        return choose_first(batch.is_candidate, counts, generator)


@dataclass(frozen=True, repr=False)
class PerPromptCap(Acceptance):
    """Accepts at most k candidates of each prompt, so that easy prompts do not fill the round.

    ReST-EM keeps at most 10 solutions per problem (Singh et al. 2023, arXiv:2312.06585). Use it as the last rule of a
    `Sequence`.

    Attributes:
        k: Maximum number of accepted candidates per prompt.
        keep: Candidates to keep: "random", or "best" by reward with ties at random.

    Raises:
        TypeError: If `k` is not an integer.
        ValueError: If `k` is below 1 or `keep` is neither.
    """

    k: int
    keep: Keep = "random"

    def __post_init__(self) -> None:
        check_integer("k", self.k, minimum=1)
        if self.keep not in get_args(Keep):
            raise ValueError(f"`keep`={self.keep!r} must be 'random' or 'best'.")

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool: min(k, candidates) in each row.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 3.0, 2.0]]))
            >>> PerPromptCap(2, keep="best")(batch, torch.Generator().manual_seed(0)).tolist()
            [[False, True, True]]
        """
        keys = (-batch.rewards,) if self.keep == "best" else ()
        return choose_first(batch.is_candidate, self.k, generator, *keys)


@dataclass(frozen=True, repr=False)
class DifficultyRange(Acceptance):
    """Accepts all candidates of the prompts of medium difficulty.

    The fraction of a prompt's candidates with a reward above `solved_above` must lie in [low, high]. Put it first in a
    `Sequence`: after a threshold, every remaining prompt looks solved. Candidates that are filtered or without reward
    are not counted.

    Attributes:
        low: Smallest solved fraction, in [0, 1].
        high: Largest solved fraction, in [low, 1].
        solved_above: Reward above which a candidate solves its prompt.

    Raises:
        ValueError: If not 0 <= low <= high <= 1, or if `solved_above` is NaN.
    """

    low: float
    high: float
    solved_above: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"`low`={self.low} and `high`={self.high} must satisfy 0 <= low <= high <= 1.")
        if self.solved_above != self.solved_above:
            raise ValueError("`solved_above` is NaN, which no reward exceeds. Give a reward.")

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool; the generator is not used.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))  # solved: 1, 1/2, 0
            >>> DifficultyRange(0.25, 0.75)(batch, torch.Generator()).tolist()
            [[False, False], [True, True], [False, False]]
        """
        is_candidate = batch.is_candidate
        num_solved = (is_candidate & (batch.rewards > self.solved_above)).sum(dim=1, keepdim=True).double()
        fractions = num_solved / is_candidate.sum(dim=1, keepdim=True)  # NaN without candidates, which is in no range
        # With a tolerance of 1e-9, so that one of three candidates lies in a range that ends at 1/3 or .333333333.
        return is_candidate & (fractions >= self.low - 1e-9) & (fractions <= self.high + 1e-9)


@dataclass(frozen=True, init=False, repr=False)
class Sequence(Acceptance):
    """Sequence of rules, each applied to the candidates that the one before accepted.

    Attributes:
        rules: The rules.

    Raises:
        TypeError: If one of them is not a rule.
        ValueError: If no rule is given, or if more than one reads log-probabilities: both would compare with the same
            u, which accepts with the smaller of the two probabilities instead of their product.
    """

    rules: tuple[Acceptance, ...]

    def __init__(self, *rules: Acceptance) -> None:
        if not rules:
            raise ValueError("Sequence() needs at least one rule, such as Sequence(Threshold(0.5), PerPromptCap(4)).")
        for rule in rules:
            check_acceptance(rule, "a rule of Sequence()")
        if sum(bool(rule.requires) for rule in rules) > 1:
            raise ValueError(
                f"Sequence() got more than one rule that reads log-probabilities, {rules}: both would use each "
                "candidate's one u. Put all of the target into one DensityRatio."
            )
        object.__setattr__(self, "rules", rules)

    @property
    def requires(self) -> frozenset[str]:
        """Log-probabilities that any of the rules reads."""
        return frozenset[str]().union(*(rule.requires for rule in self.rules))

    def for_round(self, round_number: int) -> "Sequence":
        """Returns the sequence of the rules of that round."""
        return Sequence(*(rule.for_round(round_number) for rule in self.rules))

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the candidates that every rule accepted, shape (P, n), bool.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[1.0, 3.0, 2.0]]))
            >>> Sequence(Threshold(minimum=1), PerPromptCap(1, "best"))(batch, torch.Generator()).tolist()
            [[False, True, False]]
        """
        accepted = batch.is_candidate
        for rule in self.rules:
            accepted = accepted & rule(batch.restricted_to(accepted), generator)
        return accepted

    def __repr__(self) -> str:
        """The rules in order."""
        return f"Sequence({', '.join(map(repr, self.rules))})"


def _keys(batch: CandidateBatch, rule: TopKPerPrompt | TopKOverall) -> tuple[torch.Tensor, ...]:
    """Sort keys of the candidates, smallest first: the negative rewards, then the lengths if they break ties."""
    if rule.tie_break == "random":
        return (-batch.rewards,)
    return -batch.rewards, read_column(batch, "lengths", repr(rule))


def _check_tie_break(tie_break: str) -> None:
    if tie_break not in get_args(TieBreak):
        raise ValueError(f"`tie_break`={tie_break!r} must be 'random' or 'shortest'.")
