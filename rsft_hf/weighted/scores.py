"""Scores other than the loss, and what every rule checks of the scores it is given.

Measured statistics enter, weights leave. The rules for losses stand in `weights.py`; a measurement stands in
`losses.py`, of which this file knows nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class ExampleStatistics:
    """What a measurement of the data set can know of each example beside its loss; None where it was not asked for.

    Attributes:
        entropies: Entropy of the predicted distribution, shape (N,), nats.
        margins: Probability of the first class less that of the second, shape (N,), in [0, 1].
        confidences: Probability of the predicted class, shape (N,), in [0, 1].
        labels: Class of each example, shape (N,), int64.
        rows: Index of each example in the data set, shape (N,), int64.
        num_rows: Number of rows of the whole data set, those without a loss included.
    """

    entropies: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    num_rows: int | None = None


@dataclass(frozen=True)
class Entropy:
    """w = entropy of the prediction, nats: the label plays no part, so a wrong one cannot raise the weight."""

    requires: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the measured entropies; the scores are not used."""
        return non_negative(read_statistic(statistics, "entropies", "Entropy"), "Entropy", statistics)


@dataclass(frozen=True)
class Margin:
    """w = 1 - (p_first - p_second): rows near the decision boundary are drawn most, whatever their label."""

    requires: ClassVar[frozenset[str]] = frozenset({"margins"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns one minus the measured margins, in [0, 1]; the scores are not used."""
        return (1 - non_negative(read_statistic(statistics, "margins", "Margin"), "Margin", statistics)).clamp(min=0)


@dataclass(frozen=True)
class LeastConfidence:
    """w = 1 - p_first: the least certain rows are drawn most, whatever their label."""

    requires: ClassVar[frozenset[str]] = frozenset({"confidences"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns one minus the measured confidences, in [0, 1]; the scores are not used."""
        confidences = read_statistic(statistics, "confidences", "LeastConfidence")
        return (1 - non_negative(confidences, "LeastConfidence", statistics)).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Learnability:
    """w = max(0, L - L_reference): hard now, yet easy for a model that has learnt the task.

    A noisy or unlearnable row is hard for both and falls to 0. The reference losses come from
    `rsft_hf.measure_losses` with the reference model. RHO-loss, Mindermann et al. 2022, arXiv:2206.07137, which takes
    the top of the batch where we weight.

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
        """Returns the scores less the reference losses of the same rows, at least 0.

        Example:
            >>> rule = Learnability(torch.tensor([1.0, 1.0]))
            >>> rule(torch.tensor([3.0, 0.5]), ExampleStatistics(rows=torch.tensor([0, 1]))).tolist()
            [2.0, 0.0]
        """
        scores = finite(scores, "Learnability", statistics)
        rows = read_statistic(statistics, "rows", "Learnability")
        num_rows = None if statistics is None else statistics.num_rows
        if int(rows.max()) >= len(self.reference_losses) or num_rows not in (None, len(self.reference_losses)):
            raise ValueError(
                f"`reference_losses` has {len(self.reference_losses)} entries but the data set has "
                f"{num_rows or f'a row {int(rows.max())}'}. Measure the reference model on the same data set."
            )
        difference = scores - self.reference_losses[rows]
        return finite(difference, "Learnability (loss - reference loss)", statistics).clamp(min=0)


def finite(scores: torch.Tensor, rule: str, statistics: ExampleStatistics | None = None) -> torch.Tensor:
    """Returns the scores, float64 on the CPU; raises ValueError naming `rule` and the row of one not finite."""
    return _checked(scores, rule, torch.isfinite, "finite", statistics)


def non_negative(scores: torch.Tensor, rule: str, statistics: ExampleStatistics | None = None) -> torch.Tensor:
    """Returns what `finite` does, and raises for a negative score too."""
    return _checked(scores, rule, lambda values: torch.isfinite(values) & (values >= 0), "finite and >= 0", statistics)


def read_statistic(statistics: ExampleStatistics | None, name: str, rule: str) -> torch.Tensor:
    """Returns the statistic of that name; raises ValueError naming `rule` if it was not measured."""
    values = None if statistics is None else vars(statistics)[name]
    if values is None:
        raise ValueError(
            f"{rule} needs the statistic `{name}`, which was not measured. Pass ExampleStatistics({name}=...)."
        )
    return values


def check_rule(rule: Any, name: str) -> None:
    """Raises TypeError if `rule`, called `name` in the message, is not an object that maps scores to weights."""
    if isinstance(rule, type) or not callable(rule):
        raise TypeError(f"{name} must be a rule such as Proportional() or Tempered(0.5), got {rule!r}.")
    try:
        requires = rule.requires
    except AttributeError:
        requires = None
    if not isinstance(requires, frozenset):
        raise TypeError(
            f"{name}, {rule!r}, does not say which statistics it reads. Give its class an attribute "
            "`requires: ClassVar[frozenset[str]] = frozenset()`."
        )


def _checked(
    scores: torch.Tensor,
    rule: str,
    is_right: Callable[[torch.Tensor], torch.Tensor],
    what: str,
    statistics: ExampleStatistics | None,
) -> torch.Tensor:
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{rule} takes scores of shape (N,) with N >= 1, got {tuple(scores.shape)}.")
    wrong = ~is_right(scores)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        rows = None if statistics is None else statistics.rows
        place = f"index {index}" if rows is None else f"row {int(rows[index])}"
        raise ValueError(
            f"{rule} needs scores that are {what}, got {float(scores[index])} at {place} ({int(wrong.sum())} such "
            "rows). Repair or remove the row; scores that may be negative go through Softmax first."
        )
    return scores
