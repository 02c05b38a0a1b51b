"""The clock: tells the trainer when an epoch begins, before its loader is read."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from rsft_hf.trainer import RejectionSamplingMixin


class ResampleCallback(TrainerCallback):
    """Resamples at the beginning of every epoch; the trainer adds it to itself.

    Args:
        trainer: The trainer whose epochs are to be resampled.
    """

    def __init__(self, trainer: "RejectionSamplingMixin") -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws the epoch's rows, or takes up those of the epoch that a checkpoint interrupted."""
        self._trainer.begin_epoch(kwargs["train_dataloader"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the epoch's figures if no line with a loss has carried them, and none is about to."""
        if not control.should_log:
            self._trainer.log_waiting_metrics()
