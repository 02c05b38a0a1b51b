"""LossSource: the current loss of every row, from scoring passes or from the training steps.

`LossLedger` holds the losses, one entry per row of the data set. Losses of training steps are queued per micro-batch;
at the end of an epoch the mean of each row's losses, summed over the processes, updates its moving average.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.distributed import sum_over_processes
from rsft_hf.isolation import forked_rng, in_evaluation_mode, preserved_trainer_state
from rsft_hf.weighted.correction import heeds_count, is_corrected
from rsft_hf.weighted.label_margins import LabelMargins
from rsft_hf.weighted.labels import labels_per_row
from rsft_hf.weighted.losses import (
    PerExampleLoss,
    Reading,
    RowLosses,
    given_losses,
    record_loss,
    row_losses,
    validate_losses,
)
from rsft_hf.weighted.measurement import (
    PREDICTION_STATISTICS,
    measure_losses,
    trained_model,
    training_loader,
)
from rsft_hf.weighted.reading import NUM_COMPARED, NUM_PROBED, NUM_VERIFIED, find_reading, some_batches

logger = logging.get_logger(__name__)

_QUEUE_LENGTH = 64  # micro-batches kept on the device before their losses are copied, in one synchronisation


class LossSource:
    """Source of the losses of one run.

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
        adaptable: Names of the options among "losses" and "importance_correction" that are given up with a warning
            where the model's loss allows no more; an error by default.

    Attributes:
        is_from_training: Whether the losses are those of the training steps.
        importance_correction: Exponent in use.
        ledger: The losses and margins, in data-set order.
        label_margins: The margins of the labels in the training steps, if the losses are taken from them.
        predictions: Prediction statistics of the last scoring pass, by name, each of shape (N,).
        heeds_count: Whether the loss is divided by the `num_items_in_batch` that it is given.
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
        adaptable: Collection[str] = (),
    ) -> None:
        self.trainer, self._adaptable = trainer, frozenset(adaptable)
        self.is_from_training = losses == "training"
        self._statistics = statistics & set(PREDICTION_STATISTICS)
        self._every_n_epochs, self._warmup_epochs = every_n_epochs, warmup_epochs
        self.importance_correction, self._per_example_loss = importance_correction, per_example_loss
        self._batch_size = batch_size
        self.ledger = LossLedger(len(trainer.train_dataset), ema_decay)
        self.label_margins = LabelMargins(lambda: labels_per_row(trainer, trainer.train_dataset))
        self.predictions: dict[str, torch.Tensor] = {}
        self._reading: Reading | None = None
        self._is_measured = self._has_further_calls = False
        self._num_further = 0  # criterion calls of a step beyond those of the probe
        self.heeds_count = True

    def losses_at(self, epoch: int, seed: int, may_measure: bool) -> torch.Tensor:
        """Returns the known loss of every row at the start of an epoch. Collective.

        Args:
            epoch: Number of epochs begun before this one.
            seed: Seed of a random collator in a scoring pass.
            may_measure: Whether a scoring pass may run if it is due.

        Returns:
            Shape (N,), float64, NaN for a row without a label; the mean of the others for a row not read yet. All NaN
            before any loss is known.
        """
        if self.is_from_training:
            self.ledger.merge(self.trainer.accelerator)
        self._heed_further_calls()
        self._find_reading(seed)
        if may_measure and self._is_due(epoch):
            measurement = measure_losses(
                self.trainer,
                reading=self._reading,
                per_example_loss=self._per_example_loss,
                batch_size=self._batch_size,
                statistics=self._statistics,
                model=trained_model(self.trainer),
                loader=training_loader(self.trainer),
                seed=seed,
            )
            self.ledger.replace(measurement.losses, measurement.logit_margins)
            self.predictions, self._is_measured = measurement.predictions, True
        elif not self.is_from_training:
            self.ledger.is_fresh = torch.zeros_like(self.ledger.is_fresh)
        losses, is_unlabelled = self.ledger.losses, self.ledger.is_unlabelled
        if self._reading is not None and self._reading.is_collator_random:
            is_unlabelled = torch.zeros_like(is_unlabelled)  # masked at random, so only temporarily
        return torch.where(losses.isnan() & ~is_unlabelled, losses.nanmean(), losses)

    @contextlib.contextmanager
    def observe(
        self,
        model: torch.nn.Module,
        rows: list[int],
        factors: torch.Tensor | None,
        is_count_weighted: bool = False,
        is_known: bool = False,
    ) -> Iterator[None]:
        """Records the losses of the training step inside the block, and scales them by `factors`, shape (len(rows),).

        Losses that are known, of a step that is repeated, are scaled alone.

        Raises:
            RuntimeError: If the step has no loss that can be read or scaled.
        """
        with record_loss(self.trainer, model, len(rows), factors, is_count_weighted) as recording:
            yield
        if self._reading is not None and self._reading.num_calls:
            self._num_further = max(self._num_further, len(recording.calls) - self._reading.num_calls)
        if factors is not None and not recording.capture.calls and not recording.is_smoothed:
            raise RuntimeError(
                "`importance_correction` found no loss of torch.nn.functional to scale in this training step (a fused "
                "head or a compiled model computes it another way). Set importance_correction=0."
            )
        if not self.is_from_training or self._reading is None or is_known:
            return
        losses: RowLosses | None
        if self._per_example_loss is not None:
            losses = given_losses(self._per_example_loss, recording, len(rows))
        else:
            losses = row_losses(recording, self._reading, len(rows))
        if losses is None and "losses" in self._adaptable:
            self._fall_back("no loss of torch.nn.functional was found in a training step", is_from_training=False)
            return
        if losses is None:
            raise RuntimeError(
                f'losses="training" captured nothing in a step of {len(rows)} rows, so the ledger would not be updated '
                '(a compiled model or a fused loss makes no call that can be read). Use losses="forward" or pass '
                "`per_example_loss`."
            )
        self.ledger.record(rows, losses, recording.row_margins())
        if (labelled := recording.label_choices) is not None:
            self.label_margins.record(rows, *labelled)

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns the numbers and tensors that `load` needs. Collective."""
        tensors = self.ledger.state(self.trainer.accelerator) | self.label_margins.state(self.trainer.accelerator)
        tensors |= {f"prediction_{name}": values for name, values in self.predictions.items()}
        numbers = {
            "is_measured": self._is_measured,
            "is_from_training": self.is_from_training,
            "importance_correction": self.importance_correction,
            "reading": None if self._reading is None else asdict(self._reading),
            "further_calls": [self._num_further, self._has_further_calls],
            "heeds_count": self.heeds_count,
            "label_problem": self.label_margins.problem,  # known on all processes once the margins are gathered
        }
        return numbers, tensors

    def load(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Restores what `state` returned."""
        self._is_measured = numbers["is_measured"]
        self._num_further, self._has_further_calls = numbers.get("further_calls", (0, False))
        self.heeds_count = numbers.get("heeds_count", True)
        if "losses" in self._adaptable and self.is_from_training and not numbers["is_from_training"]:
            self.is_from_training, self._every_n_epochs = False, 1
        if "importance_correction" in self._adaptable:
            self.importance_correction = numbers["importance_correction"]
        self._reading = None if numbers["reading"] is None else Reading(**numbers["reading"])
        self.predictions = {
            name: tensors[f"prediction_{name}"] for name in PREDICTION_STATISTICS if f"prediction_{name}" in tensors
        }
        self.ledger.load(tensors, self.trainer.accelerator.is_main_process)
        self.label_margins.load(tensors, self.trainer.accelerator.is_main_process)
        self.label_margins.problem = numbers.get("label_problem")

    def _is_due(self, epoch: int) -> bool:
        if self._every_n_epochs is None:
            return False
        missing = self._statistics - set(self.predictions)
        return not self._is_measured or bool(missing) or (epoch - self._warmup_epochs) % self._every_n_epochs == 0

    def _reading_batch_size(self) -> int:
        """Rows of the largest batches whose losses are read."""
        args = self.trainer.args
        is_scored, is_trained = not self.is_from_training, self.is_from_training or self.importance_correction > 0
        scored = self._batch_size or args.per_device_eval_batch_size
        return max(is_scored * scored, is_trained * args.per_device_train_batch_size)

    def _find_reading(self, seed: int) -> None:
        """Finds the reading from a few rows before every epoch, so that an unreadable loss fails before the first step.

        Once is not enough: a term that is zero at the start (a penalty on the distance from the initial weights, say)
        appears later.
        """
        if self._reading is not None and self._reading.is_final:
            return
        if self._per_example_loss is not None:
            reading = Reading("given")
        else:
            model, loader = trained_model(self.trainer), training_loader(self.trainer)
            num_verified = NUM_VERIFIED if self._reading is None else 0
            with forked_rng(seed), preserved_trainer_state(self.trainer), in_evaluation_mode(model):
                reading = find_reading(
                    self.trainer,
                    model,
                    loader.dataset,
                    loader.collate_fn,
                    self._reading_batch_size(),
                    seed,
                    num_verified,
                )
        # The main process decides: near a tolerance the processes might choose differently, and deadlock.
        (reading,) = broadcast_object_list([reading])
        is_intercepted = reading.kind == "criterion" and not reading.is_fused
        if is_intercepted and self.importance_correction > 0 and self._reading is None:
            is_intercepted = self._try_correction(reading, seed)
        is_correctable = is_intercepted or (reading.kind == "outputs" and is_smoothed(self.trainer))
        if not is_correctable and (self.importance_correction > 0 or reading.kind == "single"):
            num_rows = self._reading_batch_size()
            self._fall_back(_why_not(reading), is_from_training=reading.kind != "single")
            if self._reading_batch_size() != num_rows and not reading.is_final:  # that of scoring passes
                self._find_reading(seed)
                return
        check_reading(reading, is_correctable, self.is_from_training, self.importance_correction)
        if self._reading is not None and self._reading.kind != reading.kind:
            logger.warning(
                f"The losses can no longer be read by {self._reading.kind!r} and are read by {reading.kind!r} from "
                "now on: a term of the loss appeared that was zero before."
            )
        if self._reading is not None:  # what other batches have shown once stays true
            reading = replace(
                reading,
                num_calls=max(reading.num_calls, self._reading.num_calls),
                is_scored_singly=reading.is_scored_singly or self._reading.is_scored_singly,
            )
        self._reading = reading

    def _try_correction(self, reading: Reading, seed: int) -> bool:
        """Whether scaled rows give the corrected loss on a few batches; finds out by what it is divided."""
        model, loader = trained_model(self.trainer), training_loader(self.trainer)
        width = 1 if reading.is_scored_singly else min(NUM_PROBED, self._reading_batch_size(), len(loader.dataset))
        with forked_rng(seed), preserved_trainer_state(self.trainer), in_evaluation_mode(model):
            batches = list(some_batches(loader.dataset, loader.collate_fn, NUM_COMPARED, width, seed))
            self.heeds_count = heeds_count(self.trainer, model, batches)
            is_right = is_corrected(self.trainer, model, reading, batches, self.heeds_count)
        # The main process decides, as for the reading.
        self.heeds_count, is_right = broadcast_object_list([self.heeds_count, is_right])
        return bool(is_right)

    def _heed_further_calls(self) -> None:
        """Gives up training losses and correction if it may, where steps had terms that no probe saw. Collective."""
        if not self.is_from_training and self.importance_correction == 0:
            return
        found = torch.tensor([float(self._num_further > 0)])
        num_processes = float(sum_over_processes(self.trainer.accelerator, found))
        if not num_processes or self._has_further_calls:
            return
        self._has_further_calls = True
        if "losses" in self._adaptable and (
            self.importance_correction == 0 or "importance_correction" in self._adaptable
        ):
            self._fall_back("training mode adds terms to them", is_from_training=False)
            return
        logger.warning(
            "Training steps compute more losses of torch.nn.functional than batches in evaluation mode: the losses of "
            "training steps are not those that a scoring pass measures, and `importance_correction` does not scale "
            'what else is added. Compute one loss in both modes, or use losses="forward" without '
            "`importance_correction`."
        )

    def _fall_back(self, reason: str, is_from_training: bool) -> None:
        """Goes on without correction, and with scoring passes if training steps give no losses, if it may."""
        before = self.is_from_training, self.importance_correction
        if "importance_correction" in self._adaptable:
            self.importance_correction = 0.0
        if "losses" in self._adaptable and self.is_from_training and not is_from_training:
            self.is_from_training, self._every_n_epochs = False, 1
        if before == (self.is_from_training, self.importance_correction):
            return
        source = "the training steps" if self.is_from_training else "a scoring pass before each epoch"
        logger.warning(
            f"The losses of this model cannot be corrected for the draws ({reason}): they are taken from {source}, "
            "and the rows are drawn without `importance_correction`. Pass a weighting to choose otherwise."
        )


def _why_not(reading: Reading) -> str:
    """Why losses of a reading are not corrected."""
    if reading.kind == "criterion" and not reading.is_fused:
        return "rows that are scaled do not give the corrected loss, as where a sum has a count of its own"
    return "they come from a fused head" if reading.is_fused else f"they come from the reading {reading.kind!r}"


def is_smoothed(trainer: Trainer) -> bool:
    """Returns whether the training loss is that of Trainer's label smoother."""
    return trainer.label_smoother is not None and trainer.compute_loss_func is None


def check_reading(reading: Reading, is_correctable: bool, is_from_training: bool, importance_correction: float) -> None:
    """Raises ValueError if the reading does not support training losses or an importance correction."""
    if is_from_training and reading.kind == "single":
        raise ValueError(
            'losses="training" needs losses that can be read from the training step, and those of this model cannot '
            '(see the warning above). Use losses="forward", or pass `per_example_loss`.'
        )
    if importance_correction > 0 and not is_correctable:
        raise ValueError(
            "`importance_correction` scales the losses of torch.nn.functional inside the model or the loss function, "
            "and this loss is computed another way (an own loss, an added term, a fused head, or a sum over tokens "
            "divided by another number than Trainer's `num_items_in_batch`). Set importance_correction=0."
        )


class LossLedger:
    """Exponential moving average of the loss of each row.

    Args:
        num_rows: Number of rows N of the data set.
        ema_decay: Weight of the old average in an update, in [0, 1).

    Attributes:
        losses: Shape (N,), float64; NaN for a row not read yet or without a label.
        logit_margins: Last margins, shape (N,), float64, NaN if not defined.
        is_unlabelled: Whether a row was read without a label, shape (N,), bool.
        is_fresh: Whether a loss was recorded since the epoch before, shape (N,), bool.

    Example:
        >>> ledger = LossLedger(num_rows=2, ema_decay=0.75)
        >>> for loss in (4.0, 8.0):
        ...     ledger.replace(torch.full((2,), loss).double(), torch.zeros(2))
        >>> ledger.losses.tolist()  # .75 * 4 + .25 * 8
        [5.0, 5.0]
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
        self._invalid_sums = torch.zeros(num_rows, dtype=torch.float64)

    def record(self, rows: list[int], losses: RowLosses, margins: torch.Tensor | None) -> None:
        """Queues the losses of one micro-batch; all of shape (len(rows),)."""
        self._queue.append((rows, losses, None if margins is None else margins.detach()))
        if len(self._queue) >= _QUEUE_LENGTH:
            self._empty_queue()

    def replace(self, losses: torch.Tensor, logit_margins: torch.Tensor) -> None:
        """Updates the averages by a scoring pass, shapes (N,), NaN for a row without a label.

        A row whose label is masked at random this time keeps its average.
        """
        self.is_fresh = ~losses.isnan()
        self.losses = torch.where(self.is_fresh, self._averaged(losses), self.losses)
        self.is_unlabelled = self.losses.isnan()
        self.logit_margins = logit_margins

    def merge(self, accelerator: Accelerator) -> None:
        """Updates the averages by the queued losses of the epoch. Collective.

        Raises:
            ValueError: If every loss of a labelled row was NaN or infinite; one such loss among others is skipped, as
                Trainer's gradient scaler does.
        """
        sums, margin_sums, counts, unlabelled, invalid = self._summed_over_processes(accelerator)
        is_read = counts > 0
        unreadable = torch.where(is_read, 0.0, invalid)
        validate_losses(unreadable, is_read | ~invalid.isfinite(), range(len(counts)))
        self.losses, self.logit_margins, self.is_fresh = self._updated(sums, margin_sums, counts)
        self.is_unlabelled |= unlabelled > 0
        self._reset_sums()

    def pending(self, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the losses, margins and freshness, shape (N,) each, that `merge` would set. Collective."""
        sums, margin_sums, counts, *_ = self._summed_over_processes(accelerator)
        return self._updated(sums, margin_sums, counts)

    def num_reads(self, accelerator: Accelerator) -> int:
        """Returns how many rows the epoch has read so far, repeats included. Collective."""
        _, _, counts, unlabelled, _ = self._summed_over_processes(accelerator)
        return int(counts.sum() + unlabelled.sum())

    def state(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Returns the state for `load`, with the sums of all processes. Collective."""
        sums, margin_sums, counts, unlabelled, invalid = self._summed_over_processes(accelerator)
        return {
            "ledger_losses": self.losses,
            "ledger_margins": self.logit_margins,
            "ledger_is_unlabelled": self.is_unlabelled,
            "ledger_loss_sums": sums,
            "ledger_margin_sums": margin_sums,
            "ledger_counts": counts,
            "ledger_unlabelled_counts": unlabelled,
            "ledger_invalid_sums": invalid,
        }

    def load(self, state: dict[str, torch.Tensor], is_main_process: bool) -> None:
        """Restores a state; the sums go to the main process, as they already are over all processes."""
        self.losses, self.logit_margins = state["ledger_losses"], state["ledger_margins"]
        self.is_unlabelled = state["ledger_is_unlabelled"]
        self._reset_sums()
        if is_main_process:
            self._loss_sums, self._margin_sums = state["ledger_loss_sums"], state["ledger_margin_sums"]
            self._counts, self._unlabelled_counts = state["ledger_counts"], state["ledger_unlabelled_counts"]
            self._invalid_sums = state["ledger_invalid_sums"]

    def _averaged(self, losses: torch.Tensor) -> torch.Tensor:
        average = self.ema_decay * self.losses + (1 - self.ema_decay) * losses
        return torch.where(self.losses.isnan(), losses, average)

    def _updated(
        self, sums: torch.Tensor, margin_sums: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        is_read, divisors = counts > 0, counts.clamp(min=1)
        losses = torch.where(is_read, self._averaged(sums / divisors), self.losses)
        return losses, torch.where(is_read, margin_sums / divisors, self.logit_margins), is_read

    def _summed_over_processes(self, accelerator: Accelerator) -> tuple[torch.Tensor, ...]:
        self._empty_queue()
        counts = (self._counts, self._unlabelled_counts, self._invalid_sums)
        sums = (self._loss_sums, self._margin_sums, *counts)
        return tuple(sum_over_processes(accelerator, values) for values in sums)

    def _empty_queue(self) -> None:
        for rows, measured, margins in self._queue:
            losses, is_labelled = measured.losses.cpu(), measured.is_labelled.cpu()
            indices, is_invalid = torch.tensor(rows), is_labelled & ~losses.isfinite()
            self._invalid_sums.index_add_(0, indices, torch.where(is_invalid, losses, 0.0).double())
            self._unlabelled_counts.index_add_(0, indices, (~is_labelled).long())
            is_labelled &= ~is_invalid
            self._loss_sums.index_add_(0, indices, torch.where(is_labelled, losses, 0.0).double())
            self._counts.index_add_(0, indices, is_labelled.long())
            values = torch.full((len(rows),), float("nan")) if margins is None else margins.cpu()
            self._margin_sums.index_add_(0, indices, torch.where(is_labelled, values, 0.0).double())
        self._queue.clear()

    def _reset_sums(self) -> None:
        self._queue.clear()
        self._loss_sums = torch.zeros_like(self._loss_sums)
        self._margin_sums = torch.zeros_like(self._margin_sums)
        self._counts = torch.zeros_like(self._counts)
        self._unlabelled_counts = torch.zeros_like(self._unlabelled_counts)
        self._invalid_sums = torch.zeros_like(self._invalid_sums)
