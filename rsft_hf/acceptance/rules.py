"""Rules from rewards to accepted candidates: a `CandidateBatch` enters, a mask of the same shape leaves.

Every rule is a frozen dataclass called with `(batch, generator)`. None of them ever accepts a candidate that is not
valid or that nobody could judge, and none looks at the order of candidates. The rules that only rank stand here; those
that follow a law stand in `density.py`, those around other rules in `controls.py`, and all can be imported from here.
How a candidate was generated or scored, and what becomes of it, is not known here.

Rules around rules: random controls of equal size, a cap, the difficulty of prompts, one rule after another.

They take and give what the rules in `acceptance.py` do, and know none of those by name.
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
                check_fraction(name, given[name])

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


def _keys(batch: CandidateBatch, rule: TopKPerPrompt | TopKOverall) -> tuple[torch.Tensor, ...]:
    """What ranks the candidates, smallest first: the rewards reversed, then the lengths if those break ties."""
    if rule.tie_break == "random":
        return (-batch.rewards,)
    return -batch.rewards, read_column(batch, "lengths", repr(rule))


def _check_tie_break(tie_break: str) -> None:
    if tie_break not in get_args(TieBreak):
        raise ValueError(f"`tie_break`={tie_break!r} must be 'random' or 'shortest'.")


Keep = Literal["random", "best"]


@dataclass(frozen=True, repr=False)
class RandomPerPrompt(Acceptance):
    """Accepts k candidates of each prompt at random: the control that shows what the rewards are worth.

    Raises:
        TypeError: If `k` is no integer.
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
    """Accepts as many candidates of each prompt as `rule` would, but at random: the control matched prompt by prompt.

    Raises:
        TypeError: If `rule` is not a rule.
    """

    rule: Acceptance

    def __post_init__(self) -> None:
        check_acceptance(self.rule, "the rule of RandomLike()")

    @property
    def requires(self) -> frozenset[str]:
        """What the rule that is matched needs."""
        return self.rule.requires

    def for_round(self, round_number: int) -> "RandomLike":
        """Returns the control of the rule as it stands in that round."""
        return RandomLike(self.rule.for_round(round_number))

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool, with the row sums of the rule."""
        counts = self.rule(batch, generator).sum(dim=1, keepdim=True)
        return choose_first(batch.is_candidate, counts, generator)


@dataclass(frozen=True, repr=False)
class PerPromptCap(Acceptance):
    """Accepts at most k candidates of each prompt, so that easy prompts do not fill the round.

    ReST-EM keeps at most 10 solutions per problem (Singh et al. 2023, arXiv:2312.06585): the last rule of a `Sequence`.

    Attributes:
        k: Most candidates accepted per prompt.
        keep: "random", or "best" by reward with ties at random.

    Raises:
        TypeError: If `k` is no integer.
        ValueError: If `k` is below 1 or `keep` is neither.
    """

    k: int
    keep: Keep = "random"

    def __post_init__(self) -> None:
        check_integer("k", self.k, minimum=1)
        if self.keep not in get_args(Keep):
            raise ValueError(f"`keep`={self.keep!r} must be 'random' or 'best'.")

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool: min(k, candidates) in each row."""
        keys = (-batch.rewards,) if self.keep == "best" else ()
        return choose_first(batch.is_candidate, self.k, generator, *keys)


@dataclass(frozen=True, repr=False)
class DifficultyRange(Acceptance):
    """Accepts all candidates of the prompts that are neither too hard nor too easy.

    The share of a prompt's candidates with a reward above `solved_above` must lie in [low, high]. Put it first in a
    `Sequence`: after a threshold, every prompt that is left looks solved. Candidates filtered out or not judged are in
    neither part of the share.

    Attributes:
        low: Least share solved, in [0, 1].
        high: Largest share solved, in [low, 1].
        solved_above: The reward above which a candidate solves its prompt.

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
        shares = num_solved / is_candidate.sum(dim=1, keepdim=True)  # NaN without candidates: in no range
        # 1e-9 wide of the limits, so that a third of three candidates lies in a range that ends at 1/3 or .333333333.
        return is_candidate & (shares >= self.low - 1e-9) & (shares <= self.high + 1e-9)


@dataclass(frozen=True, init=False, repr=False)
class Sequence(Acceptance):
    """Applies several rules in turn, each to what the one before has accepted.

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
        """The log-probabilities that any of the rules reads."""
        return frozenset[str]().union(*(rule.requires for rule in self.rules))

    def for_round(self, round_number: int) -> "Sequence":
        """Returns the sequence of its rules as they stand in that round."""
        return Sequence(*(rule.for_round(round_number) for rule in self.rules))

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the candidates that every rule has accepted, shape (P, n), bool."""
        accepted = batch.is_candidate
        for rule in self.rules:
            accepted = accepted & rule(batch.restricted_to(accepted), generator)
        return accepted

    def __repr__(self) -> str:
        """The rules in their order."""
        return f"Sequence({', '.join(map(repr, self.rules))})"
