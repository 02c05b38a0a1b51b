"""The losses that the training steps have seen, one entry per row of the data set.

Rows and their losses enter micro-batch by micro-batch and wait; at the end of an epoch the mean of each row's losses
enters its moving average, summed over the processes so that their number and order do not matter.
"""

import torch
from accelerate import Accelerator

from rsft_hf.distributed import sum_over_processes
from rsft_hf.weighted.losses import RowLosses
from rsft_hf.weighted.measure import refuse_unusable

_QUEUE_LENGTH = 64  # micro-batches kept on the device before their losses are fetched: one wait instead of many


class LossLedger:
    """Keeps an exponential moving average of the loss of each row.

    Args:
        num_rows: Number of rows N of the data set.
        ema_decay: Weight of the old average when a new loss comes, in [0, 1).

    Attributes:
        losses: Shape (N,), float64; NaN where the row has not been seen or has no label.
        logit_margins: As last seen, shape (N,), float64, NaN where there is none.
        is_unlabelled: Whether a row was seen without a label, shape (N,), bool.
        is_fresh: Whether a loss came in since the epoch before, shape (N,), bool.
    """

    def __init__(self, num_rows: int, ema_decay: float) -> None:
        self.ema_decay = ema_decay
        self.losses = torch.full((num_rows,), float("nan"), dtype=torch.float64)
        self.logit_margins = self.losses.clone()
        self.is_unlabelled = torch.zeros(num_rows, dtype=torch.bool)
        self.is_fresh = torch.zeros(num_rows, dtype=torch.bool)
        self._queue: list[tuple[list[int], RowLosses, torch.Tensor | None]] = []
        self._loss_sums = torch.zeros(num_rows, dtype=torch.float64)
        self._margin_sums = torch.zeros(num_rows, dtype=torch.float64)
        self._counts = torch.zeros(num_rows, dtype=torch.int64)
        self._unlabelled_counts = torch.zeros(num_rows, dtype=torch.int64)
        self._broken_sums = torch.zeros(num_rows, dtype=torch.float64)

    def record(self, rows: list[int], losses: RowLosses, margins: torch.Tensor | None) -> None:
        """Notes the losses of one micro-batch; all of shape (len(rows),)."""
        self._queue.append((rows, losses, None if margins is None else margins.detach()))
        if len(self._queue) >= _QUEUE_LENGTH:
            self._fetch()

    def replace(self, losses: torch.Tensor, logit_margins: torch.Tensor) -> None:
        """Averages in a measurement of the whole data set, shapes (N,), NaN where a row has no label.

        A row whose label was hidden this time, as by random masking, keeps what is known of it.
        """
        self.is_fresh = ~losses.isnan()
        self.losses = torch.where(self.is_fresh, self._averaged(losses), self.losses)
        self.is_unlabelled = self.losses.isnan()
        self.logit_margins = logit_margins

    def merge(self, accelerator: Accelerator) -> None:
        """Moves what has waited into the averages. Collective.

        Raises:
            ValueError: If every loss of a labelled row was NaN or infinite; one such loss among others is passed over,
                as Trainer's gradient scaler does.
        """
        sums, margin_sums, counts, unlabelled, broken = self._gathered(accelerator)
        is_seen = counts > 0
        refuse_unusable(broken, ~broken.isfinite() & ~is_seen, range(len(counts)))
        self.is_fresh = is_seen
        means = sums / counts.clamp(min=1)
        self.losses = torch.where(is_seen, self._averaged(means), self.losses)
        self.logit_margins = torch.where(is_seen, margin_sums / counts.clamp(min=1), self.logit_margins)
        self.is_unlabelled |= unlabelled > 0
        self._forget_waiting()

    def state(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Returns all that `load` needs. Collective: what waits on other processes is counted in."""
        sums, margin_sums, counts, unlabelled, broken = self._gathered(accelerator)
        return {
            "ledger_losses": self.losses,
            "ledger_margins": self.logit_margins,
            "ledger_is_unlabelled": self.is_unlabelled,
            "ledger_loss_sums": sums,
            "ledger_margin_sums": margin_sums,
            "ledger_counts": counts,
            "ledger_unlabelled_counts": unlabelled,
            "ledger_broken_sums": broken,
        }

    def load(self, state: dict[str, torch.Tensor], is_main_process: bool) -> None:
        """Takes up a state; what waited goes to the main process, as it already is the sum over all."""
        self.losses, self.logit_margins = state["ledger_losses"], state["ledger_margins"]
        self.is_unlabelled = state["ledger_is_unlabelled"]
        self._forget_waiting()
        if is_main_process:
            self._loss_sums, self._margin_sums = state["ledger_loss_sums"], state["ledger_margin_sums"]
            self._counts, self._unlabelled_counts = state["ledger_counts"], state["ledger_unlabelled_counts"]
            self._broken_sums = state["ledger_broken_sums"]

    def _averaged(self, losses: torch.Tensor) -> torch.Tensor:
        average = self.ema_decay * self.losses + (1 - self.ema_decay) * losses
        return torch.where(self.losses.isnan(), losses, average)

    def _gathered(self, accelerator: Accelerator) -> tuple[torch.Tensor, ...]:
        self._fetch()
        counts = (self._counts, self._unlabelled_counts, self._broken_sums)
        waiting = (self._loss_sums, self._margin_sums, *counts)
        return tuple(sum_over_processes(accelerator, values) for values in waiting)

    def _fetch(self) -> None:
        for rows, row_losses, margins in self._queue:
            losses, is_labelled = row_losses.losses.cpu(), row_losses.is_labelled.cpu()
            indices, is_broken = torch.tensor(rows), is_labelled & ~losses.isfinite()
            self._broken_sums.index_add_(0, indices, torch.where(is_broken, losses, 0.0).double())
            self._unlabelled_counts.index_add_(0, indices, (~is_labelled).long())
            is_labelled &= ~is_broken
            self._loss_sums.index_add_(0, indices, torch.where(is_labelled, losses, 0.0).double())
            self._counts.index_add_(0, indices, is_labelled.long())
            values = torch.full((len(rows),), float("nan")) if margins is None else margins.cpu()
            self._margin_sums.index_add_(0, indices, torch.where(is_labelled, values, 0.0).double())
        self._queue.clear()

    def _forget_waiting(self) -> None:
        self._queue.clear()
        self._loss_sums = torch.zeros_like(self._loss_sums)
        self._margin_sums = torch.zeros_like(self._margin_sums)
        self._counts = torch.zeros_like(self._counts)
        self._unlabelled_counts = torch.zeros_like(self._unlabelled_counts)
        self._broken_sums = torch.zeros_like(self._broken_sums)
