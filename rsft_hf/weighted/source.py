"""Knows the loss of every row, from scoring passes or from the training steps.

The options of a resampler and a trainer enter; losses in data-set order leave. Weights and draws are not known here.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.isolation import forked_rng, in_evaluation_mode, untouched
from rsft_hf.weighted.ledger import LossLedger
from rsft_hf.weighted.losses import Reading, RowLosses, given_losses, record_loss, row_losses
from rsft_hf.weighted.measure import measure_losses
from rsft_hf.weighted.options import check_reading
from rsft_hf.weighted.predictions import PREDICTION_STATISTICS
from rsft_hf.weighted.probe import find_reading

if TYPE_CHECKING:
    from rsft_hf.weighted.resampler import LossResampler

logger = logging.get_logger(__name__)


class LossSource:
    """Keeps the losses of one run.

    Args:
        options: The resampler whose options hold.
        trainer: The trainer whose training set is measured.

    Attributes:
        ledger: The losses and margins, in data-set order.
        predictions: Prediction statistics of the last scoring pass, by name, each of shape (N,).
    """

    def __init__(self, options: "LossResampler", trainer: Trainer) -> None:
        self.options, self.trainer = options, trainer
        self.ledger = LossLedger(len(trainer.train_dataset), options.ema_decay)
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
        if self.options.losses == "training":
            self.ledger.merge(self.trainer.accelerator)
        self._find_reading(seed)
        if may_measure and self._is_due(epoch):
            measurement = measure_losses(
                self.trainer,
                reading=self._reading,
                per_example_loss=self.options.per_example_loss,
                batch_size=self.options.batch_size,
                statistics=self.options.weighting.requires,
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
        if self.options.losses == "forward" or self._reading is None:
            return
        losses: RowLosses | None
        if self.options.per_example_loss is not None:
            losses = given_losses(self.options.per_example_loss, recording, len(rows))
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
        every_n_epochs = self.options.every_n_epochs
        if every_n_epochs is None:
            return False
        missing = (self.options.weighting.requires & set(PREDICTION_STATISTICS)) - set(self.predictions)
        return not self._is_measured or bool(missing) or (epoch - self.options.warmup_epochs) % every_n_epochs == 0

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
        if self.options.per_example_loss is not None:
            reading = Reading("given")
        else:
            model, loader = self._trained_model(), self._training_loader()
            with forked_rng(seed), untouched(self.trainer), in_evaluation_mode(model):
                reading = find_reading(self.trainer, model, loader.dataset, loader.collate_fn, seed)
        # The main process's word: at the edge of a tolerance the processes might choose differently, and then wait.
        (reading,) = broadcast_object_list([reading])
        check_reading(reading, self.options.losses, self.options.importance_correction)
        if self._reading is not None and self._reading.kind != reading.kind:
            logger.warning(
                f"The losses can no longer be read by {self._reading.kind!r} and are read by {reading.kind!r} from "
                "here on: a term of the loss appeared that was zero before."
            )
        self._reading = reading
