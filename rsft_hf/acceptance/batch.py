"""CandidateBatch, a round's candidates as tensors, and Acceptance, the protocol of the rules that accept them.

The functions below are shared by the rules in `rules.py` and `density.py`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, eq=False)
class CandidateBatch:
    """All candidates of a round: one row per prompt, one column per candidate, shorter rows padded as not valid.

    Floating-point tensors are converted to float64 on the CPU.

    Attributes:
        rewards: Shape (P, n), finite; NaN for candidates without a reward, which no rule accepts.
        log_q: Shape (P, n), nats: log-probability of the whole completion, its end included, under the *processed*
            distribution it was sampled from (after temperature, top-k, top-p, penalties).
        log_p: Shape (P, n), nats: the same under the target before rewards, the raw model or a reference model.
        lengths: Shape (P, n), tokens, int64, >= 0.
        valid: Shape (P, n), bool. False for padding and filtered candidates: never accepted, and in no maximum or
            quantile. None is all True.
        uniforms: Shape (P, n), in [0, 1): the candidate's own u, drawn once per candidate. Only `DensityRatio` reads
            it. None is drawn from the generator.

    Raises:
        TypeError: If `valid` is not bool or `lengths` is not of integers.
        ValueError: If `rewards` is not (P, n) with both >= 1 or holds an infinity, if another shape differs from it, if
            a log-probability of a valid candidate is not finite, a length negative, or a uniform outside [0, 1).

    Example:
        >>> CandidateBatch(torch.tensor([[1.0, math.nan]])).is_candidate.tolist()
        [[True, False]]
    """

    rewards: torch.Tensor
    log_q: torch.Tensor | None = None
    log_p: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("rewards", "log_q", "log_p", "uniforms"):
            if vars(self)[name] is not None:
                object.__setattr__(self, name, torch.as_tensor(vars(self)[name]).detach().to("cpu", torch.float64))
        valid = torch.ones(self.rewards.shape, dtype=torch.bool) if self.valid is None else self.valid
        if valid.dtype != torch.bool:
            raise TypeError(f"`valid` must be a bool tensor, got {valid.dtype}. Compare it: `valid != 0`.")
        object.__setattr__(self, "valid", valid.detach().cpu())
        if self.lengths is not None:
            if self.lengths.is_floating_point() or self.lengths.dtype == torch.bool:
                raise TypeError(f"`lengths` must be whole numbers of tokens, got {self.lengths.dtype}.")
            object.__setattr__(self, "lengths", self.lengths.detach().to("cpu", torch.int64))
        self._check_values()

    @property
    def is_candidate(self) -> torch.Tensor:
        """Mask of the acceptable candidates, shape (P, n), bool: valid and with a reward."""
        return self.is_valid & ~self.rewards.isnan()

    @property
    def is_valid(self) -> torch.Tensor:
        """Mask `valid`, shape (P, n), bool, all True by default."""
        return torch.ones(self.rewards.shape, dtype=torch.bool) if self.valid is None else self.valid

    def restricted_to(self, mask: torch.Tensor) -> "CandidateBatch":
        """Returns the batch in which only the candidates of `mask`, shape (P, n), bool, are valid."""
        return dataclasses.replace(self, valid=self.is_valid & mask)

    def _check_values(self) -> None:
        if self.rewards.ndim != 2 or self.rewards.numel() == 0:
            raise ValueError(f"`rewards` must have shape (P, n), both >= 1, got {tuple(self.rewards.shape)}.")
        for name in ("log_q", "log_p", "lengths", "valid", "uniforms"):
            values = vars(self)[name]
            if values is not None and values.shape != self.rewards.shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(values.shape)} but `rewards` has {tuple(self.rewards.shape)}. "
                    "Give one entry per candidate, padding included."
                )
        _check_entries("rewards", self.rewards, self.rewards.isinf(), "finite, or NaN without a reward")
        for name in ("log_q", "log_p"):
            values = vars(self)[name]
            if values is not None:
                _check_entries(name, values, self.is_valid & ~values.isfinite(), "finite for every valid candidate")
        if self.lengths is not None:
            _check_entries("lengths", self.lengths, self.lengths < 0, ">= 0")
        if self.uniforms is not None:
            is_inside = (self.uniforms >= 0) & (self.uniforms < 1)
            _check_entries("uniforms", self.uniforms, ~is_inside, "in [0, 1)")


class Acceptance(Protocol):
    """Rule that accepts candidates; subclass it with a frozen dataclass, `@dataclass(frozen=True, repr=False)`.

    Example:
        >>> @dataclass(frozen=True, repr=False)
        ... class AboveMean(Acceptance):
        ...     def __call__(self, batch, generator):
        ...         return batch.is_candidate & (batch.rewards > batch.rewards[batch.is_candidate].mean())
        >>> AboveMean()(CandidateBatch(torch.tensor([[1.0, 3.0]])), torch.Generator()).tolist()
        [[False, True]]
    """

    @property
    def requires(self) -> frozenset[str]:
        """Log-probabilities that the rule reads, of "log_q" and "log_p"; empty by default."""
        return frozenset()

    def for_round(self, round_number: int) -> "Acceptance":
        """Returns the rule of round 0, 1, ...; itself unless the rule has a schedule."""
        return self

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool; `generator` is the only RNG that is advanced."""
        ...

    def __repr__(self) -> str:
        """The rule with the parameters that differ from their defaults, as shown in stored verdicts."""
        changed = [
            f"{field.name}={vars(self)[field.name]!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # every rule is a dataclass
            if vars(self)[field.name] != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def check_acceptance(rule: Any, name: str) -> None:
    """Raises TypeError if `rule`, called `name` in the message, is not an acceptance rule."""
    if isinstance(rule, type) or not callable(rule):
        raise TypeError(f"{name} must be a rule such as TopKPerPrompt(1) or Threshold(minimum=0), got {rule!r}.")
    try:
        is_rule = isinstance(rule.requires, frozenset) and callable(rule.for_round)
    except AttributeError:
        is_rule = False
    if not is_rule:
        raise TypeError(
            f"{name}, {rule!r}, has no `requires` (log-probabilities that it reads) or no `for_round`. "
            "Derive its class from `rsft_hf.acceptance.Acceptance`, which has defaults for both."
        )


def read_column(batch: CandidateBatch, name: str, rule: str) -> torch.Tensor:
    """Returns the batch's tensor of that name, shape (P, n); raises ValueError naming `rule` if it is absent."""
    values = vars(batch)[name]
    if values is None:
        raise ValueError(f"{rule} reads `{name}`, which this batch does not hold. Pass CandidateBatch({name}=...).")
    return values


def choose_first(
    is_candidate: torch.Tensor, counts: int | torch.Tensor, generator: torch.Generator, *keys: torch.Tensor
) -> torch.Tensor:
    """Returns the first candidates of each row in the order of the keys, ties broken at random.

    Ties are broken by the generator and never by the batch's `uniforms`: a candidate accepted by `DensityRatio` has a
    small u if its ratio was small, so u would prefer the candidates least likely under the target.

    Args:
        is_candidate: Mask of the candidates, shape (R, C), bool.
        counts: Number to choose in each row, an integer or shape (R, 1); at most the row's candidates are chosen.
        generator: CPU generator; R * C numbers are drawn for any keys.
        *keys: Sort keys, shape (R, C) each, smallest first, the first key before the second; NaN only for cells that
            are no candidates.

    Returns:
        Mask, shape (R, C), bool.

    Example:
        >>> rewards = torch.tensor([[1.0, 3.0, 2.0]])
        >>> choose_first(rewards > 0, 2, torch.Generator().manual_seed(0), -rewards).tolist()
        [[False, True, True]]
    """
    order = torch.rand(is_candidate.shape, dtype=torch.float64, generator=generator).argsort(dim=1)
    for key in (*reversed(keys), (~is_candidate).to(torch.int8)):  # the last sort moves all other cells to the end
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    is_early = (torch.arange(order.shape[1]) < counts).expand(order.shape)
    return torch.zeros_like(is_candidate).scatter(1, order, is_early) & is_candidate


def row_quantiles(values: torch.Tensor, is_candidate: torch.Tensor, quantile: float) -> torch.Tensor:
    """Returns the value reached by the top fraction 1 - `quantile` of each row's candidates, rounded up to one of them.

    Args:
        values: Shape (R, C), finite for candidates.
        is_candidate: Shape (R, C), bool.
        quantile: In [0, 1]; 0 is the row's minimum, 1 its maximum.

    Returns:
        One of the row's values, shape (R, 1), float64; infinite for a row without candidates.

    Example:
        >>> values = torch.tensor([[4.0, 1.0, 2.0, 3.0]])  # the top half is 4 and 3
        >>> row_quantiles(values, values > 0, 0.5).tolist()
        [[3.0]]
    """
    num_candidates = is_candidate.sum(dim=1, keepdim=True)
    # Minus 1e-9, because (1 - 0.9) * 10 is rounded to 0.99999... or 1.00000...1.
    num_reaching = ((1 - quantile) * num_candidates.double() - 1e-9).ceil().clamp(min=1).long()
    descending = values.double().masked_fill(~is_candidate, -math.inf).sort(dim=1, descending=True).values
    return descending.gather(1, num_reaching - 1).masked_fill(num_candidates == 0, math.inf)


def _check_entries(name: str, values: torch.Tensor, is_invalid: torch.Tensor, condition: str) -> None:
    if bool(is_invalid.any()):
        prompt, candidate = is_invalid.nonzero()[0].tolist()
        raise ValueError(
            f"`{name}` is {values[prompt, candidate].item()} at prompt {prompt}, candidate {candidate} "
            f"({int(is_invalid.sum())} such entries); it must be {condition}."
        )
