"""Rules around rules: random controls of equal size, a cap, the difficulty of prompts, one rule after another.

They take and give what the rules in `acceptance.py` do, and know none of those by name.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rsft_hf.generative.batch import Acceptance, CandidateBatch, check_acceptance, check_count, choose_first

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
        check_count("k", self.k)

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
        check_count("k", self.k)
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
