"""Weightings: rules from the losses of the examples to their sampling weights.

A rule is a frozen dataclass called with `(scores, statistics)`, or a plain function of the scores. The scores are the
losses for the first rule, and the previous rule's weights for the next one in a `Chain`; `statistics` holds the other
measurements. Rules get only the rows that have a loss.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch

from rsft_hf.checks import check_fraction, check_interval


@dataclass(frozen=True)
class ExampleStatistics:
    """Measured statistics of the examples besides the loss; None if not measured.

    Attributes:
        entropies: Entropy of the predicted distribution, shape (N,), nats.
        margins: Probability of the most likely class minus that of the second, shape (N,), in [0, 1].
        confidences: Probability of the most likely class, shape (N,), in [0, 1].
        labels: Class of each example, shape (N,), int64.
        rows: Index of each example in the data set, shape (N,), int64.
        num_rows: Number of rows of the whole data set, those without a loss included.
        loss_history: Losses of the measured epochs, the current one last, shape (epochs, N), NaN if a row was not read.
        margin_history: Margins of these epochs from the last one of warm-up on, shape (epochs, N).

    Example:
        >>> ExampleStatistics(entropies=torch.tensor([0.5, 0.1])).labels is None
        True
    """

    entropies: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    num_rows: int | None = None
    loss_history: torch.Tensor | None = None
    margin_history: torch.Tensor | None = None


class Weighting(Protocol):
    """Rule from scores to weights; implement your own as a frozen dataclass with `requires` and `__call__`.

    Example:
        >>> @dataclass(frozen=True)
        ... class Squared:
        ...     requires: ClassVar[frozenset[str]] = frozenset()
        ...     def __call__(self, scores, statistics=None):
        ...         return scores**2
        >>> Squared()(torch.tensor([1.0, 3.0])).tolist()
        [1.0, 9.0]
    """

    @property
    def requires(self) -> frozenset[str]:
        """Names of the `ExampleStatistics` that the rule reads; empty if it reads only the scores."""
        ...

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns weights, shape (N,), float64, >= 0, not normalised, for scores of shape (N,)."""
        ...


@dataclass(frozen=True)
class Proportional:
    """w = L: rows are drawn in proportion to their loss. Sensitive to label noise."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the scores themselves, which must be >= 0.

        Example:
            >>> Proportional()(torch.tensor([1.0, 3.0])).tolist()
            [1.0, 3.0]
        """
        return validated_scores(scores, "Proportional", statistics)


@dataclass(frozen=True)
class Tempered:
    """w = L ** alpha: alpha in (0, 1) softens the preference for high losses, 0 is uniform, above 1 sharpens it.

    Attributes:
        alpha: Exponent, >= 0.

    Raises:
        ValueError: If `alpha` is negative or not finite.
    """

    alpha: float = 0.5
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_interval("alpha", self.alpha, "[0, inf)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the scores, >= 0, to the power `alpha`, relative to the largest.

        Example:
            >>> Tempered(0.5)(torch.tensor([1.0, 4.0])).tolist()  # (1/4)^.5, (4/4)^.5
            [0.5, 1.0]
        """
        scores = validated_scores(scores, "Tempered", statistics)
        # Relative to the largest, so that no power overflows; a common factor changes no draw.
        return (scores / scores.max().clamp(min=torch.finfo(torch.float64).tiny)) ** self.alpha


@dataclass(frozen=True)
class Softmax:
    """w = exp(L / temperature): accepts any finite score, negative ones too.

    Attributes:
        temperature: In the unit of the scores, > 0.

    Raises:
        ValueError: If `temperature` is not positive and finite.
    """

    temperature: float = 1.0
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_interval("temperature", self.temperature, "(0, inf)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns softmax(scores / temperature).

        Example:
            >>> Softmax(1.0)(torch.tensor([5.0, 5.0])).tolist()
            [0.5, 0.5]
        """
        scores = validated_scores(scores, "Softmax", statistics, is_signed=True)
        return torch.softmax((scores - scores.max()) / self.temperature, dim=0)


@dataclass(frozen=True)
class Clipped:
    """w = min(L, quantile of L): no row is drawn more often than the one at the quantile.

    Attributes:
        quantile: In [0, 1].

    Raises:
        ValueError: If `quantile` is outside [0, 1].
    """

    quantile: float = 0.95
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fraction("quantile", self.quantile)

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the scores, >= 0, capped at their quantile (the next lower order statistic).

        Example:
            >>> Clipped(0.5)(torch.tensor([1.0, 2.0, 9.0])).tolist()
            [1.0, 2.0, 2.0]
        """
        scores = validated_scores(scores, "Clipped", statistics)
        return scores.clamp(max=_order_statistic(scores, floor_count(self.quantile * (len(scores) - 1))))


@dataclass(frozen=True)
class DropTop:
    """w = L, but 0 for the highest-scoring fraction, where mislabelled rows accumulate.

    Attributes:
        fraction: Fraction of the rows with weight 0, in [0, 1).

    Raises:
        ValueError: If `fraction` is outside [0, 1).
    """

    fraction: float = 0.05
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_interval("fraction", self.fraction, "[0, 1)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the scores, >= 0, with the top floor(fraction N) at 0; rows that tie with a kept one are kept.

        Example:
            >>> DropTop(0.34)(torch.tensor([1.0, 9.0, 2.0])).tolist()  # floor(.34 * 3) = 1 row
            [1.0, 0.0, 2.0]
        """
        scores = validated_scores(scores, "DropTop", statistics)
        num_dropped = floor_count(self.fraction * len(scores))
        highest_kept = _order_statistic(scores, len(scores) - num_dropped - 1)
        return torch.where(scores > highest_kept, 0.0, scores)


@dataclass(frozen=True)
class Floored:
    """w = (1 - fraction) L / sum L + fraction / N: mixture with the uniform distribution.

    Attributes:
        fraction: Share of the uniform distribution, in [0, 1].

    Raises:
        ValueError: If `fraction` is outside [0, 1].
    """

    fraction: float = 0.2
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the mixture of the normalised scores, >= 0, and the uniform distribution; it sums to 1.

        Example:
            >>> Floored(0.5)(torch.tensor([0.0, 2.0])).tolist()  # .5 * (0, 1) + .5 * (1/2, 1/2)
            [0.25, 0.75]
        """
        scores = validated_scores(scores, "Floored", statistics)
        uniform = torch.full_like(scores, 1 / len(scores))
        scores = scores / scores.max().clamp(min=torch.finfo(torch.float64).tiny)  # so that no sum overflows
        total = scores.sum()
        return (1 - self.fraction) * (scores / total if total > 0 else uniform) + self.fraction * uniform


@dataclass(frozen=True)
class ClassBalanced:
    """w = L / total of its class: every class is drawn equally often, the rows of a class in proportion to L."""

    requires: ClassVar[frozenset[str]] = frozenset({"labels"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns scores, >= 0, over the total of their class; a class whose scores are all 0 is uniform.

        Example:
            >>> labels = torch.tensor([0, 0, 1])
            >>> ClassBalanced()(torch.tensor([1.0, 3.0, 7.0]), ExampleStatistics(labels=labels)).tolist()
            [0.25, 0.75, 1.0]
        """
        scores = validated_scores(scores, "ClassBalanced", statistics)
        labels = read_statistic(statistics, "labels", "ClassBalanced")
        _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
        totals = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, classes, scores)
        return torch.where(totals[classes] > 0, scores / totals[classes], 1 / sizes[classes].double())


@dataclass(frozen=True, eq=False)
class Learnability:
    """w = max(0, L - L_reference): rows that are hard now and easy for a model that has learnt the task.

    A noisy or unlearnable row is hard for both models, so its weight goes to 0. The reference losses come from
    `rsft_hf.measure_losses` with the reference model. RHO-loss, Mindermann et al. 2022, arXiv:2206.07137, which selects
    the top of each batch instead of weighting.

    Attributes:
        reference_losses: Loss of every row of the data set under the reference model, shape (N,), nats, finite where
            the row can be scored.

    Raises:
        ValueError: If `reference_losses` is not one-dimensional.
    """

    reference_losses: torch.Tensor = field(repr=False)
    requires: ClassVar[frozenset[str]] = frozenset({"rows"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference_losses", torch.as_tensor(self.reference_losses, dtype=torch.float64))
        if self.reference_losses.ndim != 1:
            raise ValueError(f"`reference_losses` must have shape (N,), got {tuple(self.reference_losses.shape)}.")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the scores minus the reference losses of the same rows, at least 0.

        Example:
            >>> rule = Learnability(torch.tensor([1.0, 1.0]))
            >>> rule(torch.tensor([3.0, 0.5]), ExampleStatistics(rows=torch.tensor([0, 1]))).tolist()
            [2.0, 0.0]
        """
        scores = validated_scores(scores, "Learnability", statistics, is_signed=True)
        rows = read_statistic(statistics, "rows", "Learnability")
        num_rows = None if statistics is None else statistics.num_rows
        if int(rows.max()) >= len(self.reference_losses) or num_rows not in (None, len(self.reference_losses)):
            raise ValueError(
                f"`reference_losses` has {len(self.reference_losses)} entries but the data set has "
                f"{num_rows or f'a row {int(rows.max())}'}. Measure the reference model on the same data set."
            )
        difference = scores - self.reference_losses[rows]
        return validated_scores(difference, "Learnability (loss - reference loss)", statistics, is_signed=True).clamp(
            min=0
        )


@dataclass(frozen=True, init=False, repr=False)
class Chain:
    """Sequence of rules, each applied to the weights of the one before.

    Attributes:
        rules: The rules; plain functions are wrapped as `FunctionWeighting`.

    Raises:
        TypeError: If one of them is not a rule.
        ValueError: If no rule is given.
    """

    rules: tuple[Weighting, ...]

    def __init__(self, *rules: Weighting | Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not rules:
            raise ValueError("Chain() needs at least one rule, such as Chain(DropTop(0.05), Floored(0.2)).")
        object.__setattr__(self, "rules", tuple(as_weighting(rule, "a rule of Chain()") for rule in rules))

    @property
    def requires(self) -> frozenset[str]:
        """Statistics that any of the rules needs."""
        return frozenset[str]().union(*(rule.requires for rule in self.rules))

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.rules))})"

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the last rule's weights.

        Example:
            >>> Chain(DropTop(0.34), Floored(0.5))(torch.tensor([1.0, 9.0, 3.0])).tolist()  # (1/4, 0, 3/4), floored
            [0.29166666666666663, 0.16666666666666666, 0.5416666666666666]
        """
        for rule in self.rules:
            scores = rule(scores, statistics)
        return scores


@dataclass(frozen=True, repr=False)
class FunctionWeighting:
    """w = f(L) for a plain function f, as `LossResampler(weighting=f)` and `Chain` wrap it.

    Attributes:
        function: Function from losses, shape (N,), float64, to weights, shape (N,), >= 0.

    Raises:
        TypeError: If the function needs more arguments than the losses.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.function).bind(torch.empty(0))
        except ValueError:
            return  # a builtin without a signature, such as torch.sqrt
        except TypeError as error:
            raise TypeError(
                f"The weighting {self!r} must take the losses as its only required argument ({error}). Statistics "
                "besides the loss need a rule with `requires`: see rsft_hf.weighted.Weighting."
            ) from error

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns what the function returns for the scores; the statistics are not used.

        Example:
            >>> FunctionWeighting(torch.sqrt)(torch.tensor([1.0, 9.0])).tolist()
            [1.0, 3.0]
        """
        return self.function(scores)

    def __repr__(self) -> str:
        """Name of the function; a lambda's file and line. Equal in every process, as it is saved in checkpoints."""
        return _function_name(self.function)


def as_weighting(rule: Any, name: str) -> "Weighting":
    """Returns a rule as it is, and a plain function of the losses as a `FunctionWeighting`.

    Args:
        rule: Object with `requires` and `__call__`, or a function `losses -> weights`.
        name: Name of the argument in the error message.

    Raises:
        TypeError: If it is a class, not callable, an object without `requires`, or a function that needs more arguments
            than the losses.
    """
    if isinstance(rule, type) or not callable(rule):
        raise TypeError(
            f"{name} must be a rule such as Proportional() or Tempered(0.5), or a function from losses to weights, "
            f"got {rule!r}."
        )
    if _is_function(rule):
        return FunctionWeighting(rule)
    try:
        requires = rule.requires
    except AttributeError:
        requires = None
    if not isinstance(requires, frozenset):
        raise TypeError(
            f"{name}, {rule!r}, does not say which statistics it reads. Give its class an attribute "
            "`requires: ClassVar[frozenset[str]] = frozenset()`, or pass a plain function of the losses."
        )
    return rule


def _is_function(rule: Any) -> bool:
    return inspect.isroutine(rule) or (isinstance(rule, functools.partial) and _is_function(rule.func))


def _function_name(function: Any) -> str:
    if isinstance(function, functools.partial):
        keywords = [f"{name}={value!r}" for name, value in function.keywords.items()]
        return f"partial({', '.join([_function_name(function.func), *map(repr, function.args), *keywords])})"
    if isinstance(function, FunctionType) and function.__name__ == "<lambda>":
        return f"<lambda> ({Path(function.__code__.co_filename).name}, line {function.__code__.co_firstlineno})"
    return function.__qualname__


def read_statistic(statistics: ExampleStatistics | None, name: str, rule: str) -> torch.Tensor:
    """Returns the statistic of that name; raises ValueError naming `rule` if it was not measured."""
    values = None if statistics is None else vars(statistics)[name]
    if values is None:
        raise ValueError(
            f"{rule} needs the statistic `{name}`, which was not measured. Pass ExampleStatistics({name}=...)."
        )
    return values


def validated_scores(
    scores: torch.Tensor, rule: str, statistics: ExampleStatistics | None, is_signed: bool = False
) -> torch.Tensor:
    """Returns scores as float64 on the CPU; raises ValueError with the row of one that is not finite (or negative)."""
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{rule} takes scores of shape (N,) with N >= 1, got {tuple(scores.shape)}.")
    is_invalid = ~(torch.isfinite(scores) & (is_signed | (scores >= 0)))
    if bool(is_invalid.any()):
        index = int(is_invalid.nonzero()[0])
        rows = None if statistics is None else statistics.rows
        place = f"index {index}" if rows is None else f"row {int(rows[index])}"
        raise ValueError(
            f"{rule} needs scores that are finite{'' if is_signed else ' and >= 0'}, got {float(scores[index])} at "
            f"{place} ({int(is_invalid.sum())} such rows). Repair or remove the row; scores that may be negative go "
            "through Softmax first."
        )
    return scores


def floor_count(product: float) -> int:
    """Returns the largest integer of at most `product`, a fraction of a number of rows, up to its rounding error."""
    return math.floor(product + 1e-9)  # 0.29 * 100 is 28.999...


def _order_statistic(scores: torch.Tensor, position: int) -> torch.Tensor:
    return scores.kthvalue(position + 1).values  # torch.quantile stops at 2^24 elements
