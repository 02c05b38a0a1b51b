"""Weightings from the model's prediction, whatever the label says: entropy, margin, least confidence.

They read statistics that only a scoring pass measures: `LossResampler(losses="forward")`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rsft_hf.weighted.weightings import ExampleStatistics, read_statistic, validated_scores


@dataclass(frozen=True)
class Entropy:
    """w = entropy of the prediction, nats; independent of the label, so a wrong label cannot raise the weight."""

    requires: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the measured entropies; the scores are not used.

        Example:
            >>> Entropy()(torch.zeros(2), ExampleStatistics(entropies=torch.tensor([0.5, 0.25]))).tolist()
            [0.5, 0.25]
        """
        return validated_scores(read_statistic(statistics, "entropies", "Entropy"), "Entropy", statistics)


@dataclass(frozen=True)
class Margin:
    """w = 1 - (p_first - p_second): rows near the decision boundary are drawn most, independent of the label."""

    requires: ClassVar[frozenset[str]] = frozenset({"margins"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns one minus the measured margins, in [0, 1]; the scores are not used.

        Example:
            >>> Margin()(torch.zeros(2), ExampleStatistics(margins=torch.tensor([1.0, 0.25]))).tolist()
            [0.0, 0.75]
        """
        margins = read_statistic(statistics, "margins", "Margin")
        return (1 - validated_scores(margins, "Margin", statistics)).clamp(min=0)


@dataclass(frozen=True)
class LeastConfidence:
    """w = 1 - p_first: the least confident rows are drawn most, independent of the label."""

    requires: ClassVar[frozenset[str]] = frozenset({"confidences"})

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns one minus the measured confidences, in [0, 1]; the scores are not used.

        Example:
            >>> LeastConfidence()(torch.zeros(2), ExampleStatistics(confidences=torch.tensor([1.0, 0.5]))).tolist()
            [0.0, 0.5]
        """
        confidences = read_statistic(statistics, "confidences", "LeastConfidence")
        return (1 - validated_scores(confidences, "LeastConfidence", statistics)).clamp(min=0)
