"""Weightings that the study tried and the package does not have: none of them won anywhere by more than the spread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rsft_hf.checks import check_interval
from rsft_hf.weighted import ExampleStatistics


@dataclass(frozen=True)
class PredictionVariance:
    """w = standard error-corrected deviation of the label's probability over the epochs, plus a floor.

    Active Bias, Chang et al. 2017, arXiv:1704.07433, equation 5: sqrt(var + var^2 / (epochs - 1)) + floor, with the
    probability exp(-L). Rows whose prediction changes are drawn most; sure ones, right or wrong, least. Before two
    epochs are measured the draws are uniform.

    Attributes:
        floor: Added to every weight, > 0.

    Raises:
        ValueError: If `floor` is not positive.
    """

    floor: float = 0.05
    requires: ClassVar[frozenset[str]] = frozenset({"loss_history"})

    def __post_init__(self) -> None:
        check_interval("floor", self.floor, "(0, inf)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the weights, > 0; the scores are not used.

        Example:
            >>> history = torch.tensor([[0.0, 0.6931], [0.0, 0.0]])  # probabilities 1, 1 and .5, 1
            >>> PredictionVariance()(history[-1], ExampleStatistics(loss_history=history)).round(decimals=3).tolist()
            [0.05, 0.425]
        """
        history = statistics.loss_history.double()
        if len(history) < 2:
            return torch.ones(history.shape[1], dtype=torch.float64)
        is_read = ~history.isnan()
        count = is_read.sum(0)
        probabilities = torch.where(is_read, (-history).exp(), 0.0)
        mean = probabilities.sum(0) / count.clamp(min=1)
        squares = torch.where(is_read, (probabilities - mean) ** 2, 0.0).sum(0)
        variance = squares / (count - 1).clamp(min=1)
        deviation = (variance + variance**2 / (count - 1).clamp(min=1)).sqrt()
        return torch.where(count > 1, deviation, deviation[count > 1].mean().nan_to_num(0.0)) + self.floor


@dataclass(frozen=True)
class LearningProgress:
    """w = fall of the loss since it was last measured, at least 0, plus a floor: what is being learnt is drawn most.

    Graves et al. 2017, arXiv:1704.03003 (prediction gain). Before two epochs are measured the draws are uniform.

    Attributes:
        floor: Added to every weight as a share of the mean fall, > 0.

    Raises:
        ValueError: If `floor` is not positive.
    """

    floor: float = 0.5
    requires: ClassVar[frozenset[str]] = frozenset({"loss_history"})

    def __post_init__(self) -> None:
        check_interval("floor", self.floor, "(0, inf)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the weights, >= 0; the scores are not used.

        Example:
            >>> history = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 3.0]])
            >>> LearningProgress(0.5)(history[-1], ExampleStatistics(loss_history=history)).tolist()
            [1.1666666666666667, 0.16666666666666666, 0.16666666666666666]
        """
        history = statistics.loss_history.double()
        if len(history) < 2:
            return torch.ones(history.shape[1], dtype=torch.float64)
        fall = (history[-2] - history[-1]).clamp(min=0).nan_to_num(0.0)
        return fall + self.floor * fall.mean()


def hump(quantile: float = 0.8, floor: float = 0.5) -> Callable[[torch.Tensor], torch.Tensor]:
    """w = L up to a quantile and the mean of those above it, mixed with the uniform distribution."""

    def weights(losses: torch.Tensor) -> torch.Tensor:
        limit = losses.kthvalue(max(1, int(quantile * len(losses)))).values
        below = losses <= limit
        shares = torch.where(below, losses, losses[below].mean())
        return (1 - floor) * shares / shares.sum().clamp(min=1e-300) + floor / len(losses)

    return weights


@dataclass(frozen=True)
class WithinClass:
    """A rule applied to the losses of each class apart; a class keeps its share of the rows."""

    rule: Any
    requires: frozenset[str] = frozenset({"labels"})

    def __call__(self, scores: torch.Tensor, statistics: Any = None) -> torch.Tensor:
        weights = torch.empty_like(scores)
        for one in statistics.labels.unique():
            rows = statistics.labels == one
            found = self.rule(scores[rows])
            weights[rows] = found * (rows.sum() / found.sum()) if float(found.sum()) > 0 else 1.0
        return weights


def infobatch(losses: torch.Tensor) -> torch.Tensor:
    """Half of the draws of a row below the mean loss; rescaled by the importance correction (arXiv:2303.04947)."""
    return torch.where(losses < losses.mean(), 0.5, 1.0)
