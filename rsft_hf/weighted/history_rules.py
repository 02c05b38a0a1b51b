"""Weightings from the losses and margins of earlier epochs: suspected label errors, and the rows first got wrong.

The statistics `loss_history` and, from the end of warm-up on, `margin_history` hold one line per measured epoch, shape
(epochs, N), the current one last; NaN where a row was not read in an epoch. Their lines come from the record that
`LossResampler.table()` returns.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rsft_hf.checks import check_interval
from rsft_hf.weighted.weightings import ExampleStatistics, floor_count, read_statistic, validated_scores

_MIN_EPOCHS = 2  # a trend needs two


def mean_excess_losses(history: torch.Tensor) -> torch.Tensor:
    """Returns each row's mean excess of the loss over the epoch's median.

    Args:
        history: Losses, shape (epochs, N), NaN where a row was not read.

    Returns:
        Shape (N,); -inf for a row that was never read.

    Example:
        >>> mean_excess_losses(torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.25, 5.0]])).tolist()
        [-0.5, -0.125, 4.25]
    """
    excess = (history - history.nanmedian(dim=1, keepdim=True).values).nanmean(dim=0)
    return torch.where(excess.isnan(), float("-inf"), excess)


@dataclass(frozen=True)
class LeaveOutSuspects:
    """w = L, but 0 for the fraction of the rows read whose loss stayed highest over all epochs while the others fell.

    Unlike `DropTop`, which reads the last loss, it reads the whole history: a hard row is learnt eventually, a
    mislabelled one is not. Before two epochs are measured nothing is left out.

    Attributes:
        fraction: Fraction of the rows with weight 0, in [0, 1).

    Raises:
        ValueError: If `fraction` is outside [0, 1).
    """

    fraction: float = 0.1
    requires: ClassVar[frozenset[str]] = frozenset({"loss_history"})

    def __post_init__(self) -> None:
        check_interval("fraction", self.fraction, "[0, 1)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the scores, >= 0, with the floor(fraction n) largest mean excess losses of n rows read at 0.

        Example:
            >>> history = torch.tensor([[1.0, 2.0, 6.0], [0.5, 7.0, 5.0]])
            >>> LeaveOutSuspects(0.34)(history[-1], ExampleStatistics(loss_history=history)).tolist()
            [0.5, 7.0, 0.0]
        """
        scores = validated_scores(scores, "LeaveOutSuspects", statistics)
        history = read_statistic(statistics, "loss_history", "LeaveOutSuspects")
        if len(history) < _MIN_EPOCHS:
            return scores
        excess = mean_excess_losses(history)
        suspects = excess.topk(floor_count(self.fraction * int(excess.isfinite().sum()))).indices
        return scores.index_fill(0, suspects, 0.0)


@dataclass(frozen=True)
class ErrorSet:
    """w = `upweight` for the rows that the model got wrong at one epoch, 1 for the others.

    JTT, Liu et al. 2021, arXiv:2107.09044, within one run: the set is found at the first epoch that is measured after
    warm-up, with losses of training steps in the last epoch of warm-up, and kept. A row is wrong if its margin (logit
    of the label minus the largest other) is negative.

    Attributes:
        upweight: Weight of a wrong row, at least 1.

    Raises:
        ValueError: If `upweight` is below 1.
    """

    upweight: float = 5.0
    requires: ClassVar[frozenset[str]] = frozenset({"margin_history"})

    def __post_init__(self) -> None:
        check_interval("upweight", self.upweight, "[1, inf)")

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        """Returns the weights; the scores are not used.

        Raises:
            ValueError: If no row has a margin: the loss does not compare one class per row with others.

        Example:
            >>> margins = torch.tensor([[1.0, -2.0], [1.0, 3.0]])
            >>> ErrorSet(5.0)(torch.zeros(2), ExampleStatistics(margin_history=margins)).tolist()
            [1.0, 5.0]
        """
        first = read_statistic(statistics, "margin_history", "ErrorSet")[0]
        if not bool(first.isfinite().any()):
            raise ValueError(
                "ErrorSet reads the margin of each row's label, and this loss gives none: it needs one class per row, "
                "of 2 to 1,024. Take a rule on the losses, such as Tempered(0.5)."
            )
        return torch.where(first < 0, self.upweight, 1.0).double()
