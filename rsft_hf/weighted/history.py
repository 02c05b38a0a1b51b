"""EpochHistory: losses, margins, weights and counts of every row in every epoch, and the suspected label errors."""

import datasets
import numpy as np
import torch

from rsft_hf.checks import check_integer
from rsft_hf.weighted.history_rules import mean_excess_losses

HISTORIES = ("loss_history", "margin_history")
_TABLE_COLUMNS = ("loss", "margin", "weight", "count")


class EpochHistory:
    """History of losses, margins, weights and counts of every epoch, in single precision.

    Attributes:
        epochs: Numbers of the recorded epochs.

    Example:
        >>> history = EpochHistory()
        >>> losses = torch.tensor([0.1, 3.0, 0.2])
        >>> history.append(0, losses, -losses, losses, indices=torch.tensor([1, 1, 2]))
        >>> history.table()["count"][:], history.suspects(1)["row"][:]
        ([0, 2, 1], [1])
    """

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self._columns: dict[str, list[torch.Tensor]] = {name: [] for name in (*_TABLE_COLUMNS, "is_fresh")}

    @property
    def num_rows(self) -> int | None:
        """Number of rows; None before the first epoch."""
        return len(self._columns["loss"][0]) if self.epochs else None

    def epochs_of(self, column: str) -> torch.Tensor:
        """Returns `loss`, `margin`, `weight` or `count` of all epochs, shape (epochs, N)."""
        return torch.stack(self._columns[column])

    def append(
        self,
        epoch: int,
        losses: torch.Tensor,
        margins: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        is_fresh: torch.Tensor | None = None,
    ) -> None:
        """Records an epoch.

        Args:
            epoch: Number of the epoch.
            losses: Losses at its start, shape (N,), NaN if unknown.
            margins: Shape (N,), NaN if not defined.
            weights: Shape (N,).
            indices: Drawn rows, shape (num_draws,).
            is_fresh: Whether a row's loss was measured since the epoch before, shape (N,), bool; all by default.
                `suspects` uses only those, because a stale loss exceeds the falling losses of the others.
        """
        counts = torch.bincount(indices, minlength=len(weights))
        for values, column in zip(
            (losses, margins, weights / weights.sum()), ("loss", "margin", "weight"), strict=True
        ):
            self._columns[column].append(values.float())
        self._columns["count"].append(counts.int())
        self.epochs.append(epoch)
        self._columns["is_fresh"].append(torch.ones_like(counts, dtype=torch.bool) if is_fresh is None else is_fresh)

    def measured(self, *current: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the losses and margins of the epochs that measured any, by the names of the statistics.

        Args:
            current: Losses, margins and whether they are fresh, shape (N,) each, of an epoch not recorded yet.

        Returns:
            Two tensors of shape (measured epochs, N), NaN where a row was not read in the epoch; empty if none was.
        """
        columns = [self._columns[name] for name in ("loss", "margin", "is_fresh")]
        lines = [*zip(*columns, strict=True), *([current] if current else [])]
        lines = [line for line in lines if bool((line[2] & line[0].isfinite()).any())]
        if not lines:
            return {}
        read = [[torch.where(fresh, values, float("nan")).float() for values in pair] for *pair, fresh in lines]
        return {name: torch.stack(values) for name, values in zip(HISTORIES, zip(*read, strict=True), strict=True)}

    def table(self) -> datasets.Dataset:
        """Returns one line per epoch and row: `epoch`, `row`, `loss`, `margin`, `weight` (sums to 1), `count`."""
        if not self.epochs:
            raise RuntimeError("Nothing has been resampled yet. Call `table()` after `train()` has begun an epoch.")
        num_rows = len(self._columns["loss"][0])
        columns = {
            "epoch": np.repeat(np.array(self.epochs, dtype=np.int64), num_rows),
            "row": np.tile(np.arange(num_rows, dtype=np.int64), len(self.epochs)),
        }
        columns |= {name: torch.cat(self._columns[name]).numpy() for name in _TABLE_COLUMNS}
        return datasets.Dataset.from_dict(columns)

    def suspects(self, num_suspects: int, *current: torch.Tensor) -> datasets.Dataset:
        """Returns the rows with the largest mean excess of the loss over the epoch's median, largest first.

        A hard row is learnt eventually; a row whose loss stays high while the others fall is often mislabelled. The
        area under the margins is a similar measure (Pleiss et al. 2020, arXiv:2001.10528).

        Args:
            num_suspects: Number of rows to return, at least 1.
            current: An epoch not recorded yet, as in `measured`.

        Returns:
            Columns `row`, `excess_loss` (mean over the measured epochs, in the unit of the loss), `losses` and
            `margins` (lists, one entry per measured epoch).

        Raises:
            RuntimeError: If no epoch has been measured.
            TypeError: If `num_suspects` is not an integer.
            ValueError: If `num_suspects` is below 1.
        """
        check_integer("num_suspects", num_suspects, minimum=1)
        measured = self.measured(*current)
        if not measured:
            raise RuntimeError("No epoch has been measured yet. Call `suspects()` after `train()`.")
        losses, margins = measured["loss_history"], measured["margin_history"]
        excess = mean_excess_losses(losses)
        num_known = int(excess.isfinite().sum())
        rows = excess.topk(min(num_suspects, num_known)).indices
        return datasets.Dataset.from_dict(
            {
                "row": rows.tolist(),
                "excess_loss": excess[rows].tolist(),
                "losses": losses[:, rows].T.tolist(),
                "margins": margins[:, rows].T.tolist(),
            }
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the columns as tensors of shape (epochs, N)."""
        if not self.epochs:
            return {}
        return {f"history_{name}": torch.stack(values) for name, values in self._columns.items()}

    def load(self, epochs: list[int], state: dict[str, torch.Tensor]) -> None:
        """Restores the epochs and the columns that `state` returned."""
        self.epochs = list(epochs)
        for name in self._columns:
            self._columns[name] = list(state[f"history_{name}"].unbind(0)) if epochs else []
