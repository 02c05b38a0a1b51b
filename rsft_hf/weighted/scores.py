"""Scores other than the loss, and what every rule checks of the scores it is given.

Measured statistics enter, weights leave. The rules for losses stand in `weights.py`; a measurement stands in
`losses.py`, of which this file knows nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

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
    """

    entropies: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Entropy:
    """w = entropy of the prediction, nats: uncertainty instead of loss, so a wrong label cannot raise it."""

    requires: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the measured entropies; the scores are not used."""
        return non_negative(read_statistic(statistics, "entropies", "Entropy"), "Entropy")


@dataclass(frozen=True)
class Margin:
    """w = 1 - (p_first - p_second): rows near the decision boundary are drawn most. Needs no label."""

    requires: ClassVar[frozenset[str]] = frozenset({"margins"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns one minus the measured margins, in [0, 1]; the scores are not used."""
        return (1 - non_negative(read_statistic(statistics, "margins", "Margin"), "Margin")).clamp(min=0)


@dataclass(frozen=True)
class LeastConfidence:
    """w = 1 - p_first: rows whose best guess is least probable are drawn most. Needs no label."""

    requires: ClassVar[frozenset[str]] = frozenset({"confidences"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns one minus the measured confidences, in [0, 1]; the scores are not used."""
        return (
            1 - non_negative(read_statistic(statistics, "confidences", "LeastConfidence"), "LeastConfidence")
        ).clamp(min=0)


@dataclass(frozen=True)
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
        rows = read_statistic(statistics, "rows", "Learnability")
        if int(rows.max()) >= len(self.reference_losses):
            raise ValueError(
                f"`reference_losses` has {len(self.reference_losses)} entries but the data set has a row "
                f"{int(rows.max())}. Measure the reference model on the same data set."
            )
        difference = finite(scores, "Learnability") - self.reference_losses[rows]
        return finite(difference, "Learnability (loss - reference loss)").clamp(min=0)


def finite(scores: torch.Tensor, rule: str) -> torch.Tensor:
    """Returns the scores, float64 on the CPU; raises ValueError naming `rule` and the row of one not finite."""
    return _checked(scores, rule, torch.isfinite, "finite")


def non_negative(scores: torch.Tensor, rule: str) -> torch.Tensor:
    """Returns what `finite` does, and raises for a negative score too."""
    return _checked(scores, rule, lambda values: torch.isfinite(values) & (values >= 0), "finite and >= 0")


def _checked(
    scores: torch.Tensor, rule: str, is_right: Callable[[torch.Tensor], torch.Tensor], what: str
) -> torch.Tensor:
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{rule} takes scores of shape (N,) with N >= 1, got {tuple(scores.shape)}.")
    wrong = ~is_right(scores)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{rule} needs scores that are {what}, got {float(scores[row])} at index {row} ({int(wrong.sum())} such "
            "rows). Repair or remove the row; scores that may be negative go through Softmax first."
        )
    return scores


def read_statistic(statistics: ExampleStatistics | None, name: str, rule: str) -> torch.Tensor:
    """Returns the statistic of that name; raises ValueError naming `rule` if it was not measured."""
    values = getattr(statistics, name) if statistics is not None else None
    if values is None:
        raise ValueError(
            f"{rule} needs the statistic `{name}`, which was not measured. Pass ExampleStatistics({name}=...)."
        )
    return values
