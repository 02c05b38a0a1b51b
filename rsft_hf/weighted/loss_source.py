"""Knows the loss of every row, from scoring passes or from the training steps.

The options of a resampler and a trainer enter; losses in data-set order leave. Weights and draws are not known here.

The losses that the training steps have seen, one entry per row of the data set.

Rows and their losses enter micro-batch by micro-batch and wait; at the end of an epoch the mean of each row's losses
enters its moving average, summed over the processes so that their number and order do not matter.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.distributed import sum_over_processes
from rsft_hf.isolation import forked_rng, in_evaluation_mode, preserved_trainer_state
from rsft_hf.weighted.losses import (
    PerExampleLoss,
    Reading,
    RowLosses,
    given_losses,
    record_loss,
    refuse_unusable,
    row_losses,
)
from rsft_hf.weighted.measurement import PREDICTION_STATISTICS, find_reading, measure_losses

logger = logging.get_logger(__name__)


class LossSource:
    """Keeps the losses of one run.

    Args:
        trainer: Trainer whose training set is measured.
        losses: "forward" for scoring passes, "training" for the losses of the training steps.
        statistics: Names of the prediction statistics that a scoring pass measures as well.
        every_n_epochs: Epochs between two scoring passes; None for no scoring pass.
        warmup_epochs: Uniform epochs at the start, from which `every_n_epochs` counts.
        importance_correction: Exponent of the factors on the losses of training steps, in [0, 1].
        per_example_loss: Function `(outputs, labels) -> losses` of shape (B,), for losses that cannot be captured.
        ema_decay: Weight of a row's old loss when a new one comes, in [0, 1).
        batch_size: Rows per forward pass and process; `per_device_eval_batch_size` by default.

    Attributes:
        ledger: The losses and margins, in data-set order.
        predictions: Prediction statistics of the last scoring pass, by name, each of shape (N,).
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        losses: Literal["forward", "training"],
        statistics: frozenset[str] = frozenset(),
        every_n_epochs: int | None = 1,
        warmup_epochs: int = 0,
        importance_correction: float = 0.0,
        per_example_loss: PerExampleLoss | None = None,
        ema_decay: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self.trainer = trainer
        self._is_from_training = losses == "training"
        self._statistics = statistics & set(PREDICTION_STATISTICS)
        self._every_n_epochs, self._warmup_epochs = every_n_epochs, warmup_epochs
        self._importance_correction, self._per_example_loss = importance_correction, per_example_loss
        self._batch_size = batch_size
        self.ledger = LossLedger(len(trainer.train_dataset), ema_decay)
        self.predictions: dict[str, torch.Tensor] = {}
        self._reading: Reading | None = None
        self._is_measured = False

    def losses_at(self, epoch: int, seed: int, may_measure: bool) -> torch.Tensor:
        """Returns the loss of every row as it is known when the epoch begins. Collective.

        Args:
            epoch: Number of epochs begun before.
            seed: Seed of a random collator in a scoring pass.
            may_measure: Whether a scoring pass is made if it is due.

        Returns:
            Shape (N,), float64, NaN for a row without a label; a row that no step has read yet counts as an average
            one. All NaN if nothing is known.
        """
        if self._is_from_training:
            self.ledger.merge(self.trainer.accelerator)
        self._find_reading(seed)
        if may_measure and self._is_due(epoch):
            measurement = measure_losses(
                self.trainer,
                reading=self._reading,
                per_example_loss=self._per_example_loss,
                batch_size=self._batch_size,
                statistics=self._statistics,
                model=self._trained_model(),
                loader=self._training_loader(),
                seed=seed,
            )
            self.ledger.replace(measurement.losses, measurement.logit_margins)
            self.predictions, self._is_measured = measurement.predictions, True
        losses, is_unlabelled = self.ledger.losses, self.ledger.is_unlabelled
        if self._reading is not None and self._reading.is_collator_random:
            is_unlabelled = torch.zeros_like(is_unlabelled)  # hidden by chance, so not for good
        return torch.where(losses.isnan() & ~is_unlabelled, losses.nanmean(), losses)

    @contextlib.contextmanager
    def observe(self, model: torch.nn.Module, rows: list[int], factors: torch.Tensor | None) -> Iterator[None]:
        """Notes the losses of the training step inside the block, and scales them by `factors`, shape (len(rows),).

        Raises:
            RuntimeError: If the step shows no loss that can be read or scaled.
        """
        with record_loss(self.trainer, model, len(rows), factors) as recording:
            yield
        if factors is not None and not recording.capture.calls:
            raise RuntimeError(
                "`importance_correction` found no loss of torch.nn.functional to scale in this training step (a fused "
                "head or a compiled model computes it another way). Set importance_correction=0."
            )
        if not self._is_from_training or self._reading is None:
            return
        losses: RowLosses | None
        if self._per_example_loss is not None:
            losses = given_losses(self._per_example_loss, recording, len(rows))
        else:
            losses = row_losses(recording, self._reading, len(rows))
        if losses is None:
            raise RuntimeError(
                f'losses="training" captured nothing in a step of {len(rows)} rows, so the ledger would stand still '
                '(a compiled model or a fused loss makes no call that can be read). Use losses="forward" or pass '
                "`per_example_loss`."
            )
        self.ledger.record(rows, losses, recording.row_margins())

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns the numbers and tensors that `load` needs. Collective."""
        numbers = {
            "is_measured": self._is_measured,
            "reading": None if self._reading is None else asdict(self._reading),
        }
        tensors = self.ledger.state(self.trainer.accelerator)
        tensors |= {f"prediction_{name}": values for name, values in self.predictions.items()}
        return numbers, tensors

    def load(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` returned."""
        self._is_measured = numbers["is_measured"]
        self._reading = None if numbers["reading"] is None else Reading(**numbers["reading"])
        self.predictions = {
            name: tensors[f"prediction_{name}"] for name in PREDICTION_STATISTICS if f"prediction_{name}" in tensors
        }
        self.ledger.load(tensors, self.trainer.accelerator.is_main_process)

    def _is_due(self, epoch: int) -> bool:
        if self._every_n_epochs is None:
            return False
        missing = self._statistics - set(self.predictions)
        return not self._is_measured or bool(missing) or (epoch - self._warmup_epochs) % self._every_n_epochs == 0

    def _trained_model(self) -> torch.nn.Module:
        # DeepSpeed alone computes through its wrapper; DDP's would only add communication.
        return self.trainer.model_wrapped if self.trainer.is_deepspeed_enabled else self.trainer.model

    def _training_loader(self) -> Any:
        return self.trainer.callback_handler.train_dataloader or self.trainer.get_train_dataloader()

    def _find_reading(self, seed: int) -> None:
        """Looks at a few rows before every epoch, so that what cannot work fails before a step is made.

        Once is not enough: a term that is zero at the start (a penalty on the distance from the start, say) shows
        only later.
        """
        if self._per_example_loss is not None:
            reading = Reading("given")
        else:
            model, loader = self._trained_model(), self._training_loader()
            with forked_rng(seed), preserved_trainer_state(self.trainer), in_evaluation_mode(model):
                reading = find_reading(self.trainer, model, loader.dataset, loader.collate_fn, seed)
        # The main process's word: at the edge of a tolerance the processes might choose differently, and then wait.
        (reading,) = broadcast_object_list([reading])
        check_reading(reading, self._is_from_training, self._importance_correction)
        if self._reading is not None and self._reading.kind != reading.kind:
            logger.warning(
                f"The losses can no longer be read by {self._reading.kind!r} and are read by {reading.kind!r} from "
                "here on: a term of the loss appeared that was zero before."
            )
        self._reading = reading


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
        for rows, measured, margins in self._queue:
            losses, is_labelled = measured.losses.cpu(), measured.is_labelled.cpu()
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


def check_reading(reading: Reading, is_from_training: bool, importance_correction: float) -> None:
    """Raises ValueError if the way the losses can be read does not allow what was asked for."""
    if is_from_training and reading.kind == "single":
        raise ValueError(
            'losses="training" needs losses that can be read from the training step, and those of this model cannot '
            '(see the warning above). Use losses="forward", or pass `per_example_loss`.'
        )
    if importance_correction > 0 and reading.kind != "criterion":
        raise ValueError(
            "`importance_correction` scales the losses of torch.nn.functional inside the model or the loss function, "
            "and this loss is computed another way (label smoothing, an added term, a fused head). Set "
            "importance_correction=0."
        )
