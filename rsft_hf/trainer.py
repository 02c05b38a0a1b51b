"""RejectionSamplingMixin: rejection sampling inside the `Trainer` loop, over any Trainer class.

train() -> _inner_training_loop: bind the resampler, load its state from the checkpoint if there is one
        -> for each epoch: on_epoch_begin -> ResampleCallback -> begin_epoch
               -> resampler.resample(epoch) -> rows in the order of `train_sampling_strategy` -> EpochSampler
               -> iter(train_dataloader), sharded by accelerate -> Trainer's own training_step, observed
        -> for each checkpoint: _save_rng_state, on every process -> <checkpoint>/resampler
"""

import collections
import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from rsft_hf.callbacks import ResamplerCallback
from rsft_hf.cards import extend_model_card
from rsft_hf.checkpointing import (
    STATE_DIRECTORY,
    EpochProgress,
    last_complete_checkpoint,
    load_progress,
    load_renamed_weights,
    load_trainable,
    replaced_directory,
    run_settings,
    save_progress,
    save_trainable,
)
from rsft_hf.engines.model_access import unwrapped
from rsft_hf.resampler import EpochSampler, Predictions, Resampler
from rsft_hf.training_set import order_rows, validate_dataset
from rsft_hf.validation import (
    validate_arguments,
    validate_loader,
    validate_trainer_class,
    warn_of_unsaved_parameters,
)
from rsft_hf.weighted.resampler import LossResampler

logger = logging.get_logger(__name__)

BASE_WEIGHTS = "base.safetensors"


_Base: Any = object  # the Trainer class is chosen by the subclass


class RejectionSamplingMixin(_Base):
    """Mixin that adds rejection sampling to any Trainer class.

    Args:
        *args: Positional arguments of the Trainer class.
        resampler: Strategy that chooses the rows of each epoch; `LossResampler()` by default.
        **kwargs: Keyword arguments of the Trainer class.

    Raises:
        TypeError: If `resampler` is not a Resampler.
        ValueError: If the training set or the training arguments do not allow resampling.

    Example:
        >>> class RejectionSamplingMyTrainer(RejectionSamplingMixin, Trainer): ...
        >>> issubclass(RejectionSamplingMyTrainer, Trainer)
        True
    """

    train_dataset: Any
    data_collator: Any
    control: Any
    _metrics: Any

    def __init__(self, *args: Any, resampler: Resampler | None = None, **kwargs: Any) -> None:
        if resampler is not None and not isinstance(resampler, Resampler):
            raise TypeError(
                f"`resampler` must be a Resampler object such as LossResampler(), got {resampler!r}. A weighting goes "
                "inside: LossResampler(weighting=...)."
            )
        self.resampler = LossResampler() if resampler is None else resampler
        validate_trainer_class(type(self), RejectionSamplingMixin)
        validate_dataset(kwargs.get("train_dataset"))  # before Trainer's own error about max_steps
        super().__init__(*args, **kwargs)
        if self.train_dataset is not None:
            validate_arguments(self.args, self.accelerator)
            validate_dataset(self.train_dataset)
        self._sampler: EpochSampler | None = None
        self._bound_dataset: Any = None
        self._bound_source: Any = None  # `train_dataset` that it was made of
        self._is_looping = False
        self._train_loader: DataLoader[Any] | None = None
        self._progress = EpochProgress()
        self._settings: dict[str, Any] = {}
        self._step_model: torch.nn.Module | None = None
        self._num_observed = 0
        self._is_counting_window = False
        self._is_loader_validated = False
        self.add_callback(ResampleCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer.train` does; `resume_from_checkpoint=True` skips checkpoints not saved completely."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin_epoch(self, loader: DataLoader[Any]) -> None:
        """Resamples and sets the rows of the coming epoch in the sampler of the training loader. Collective.

        A resumed run continues with the rows of the interrupted epoch, because they were drawn from model weights of
        the epoch's start, which the checkpoint no longer has.
        """
        if not self._is_loader_validated:
            validate_loader(self, loader, self._epoch_sampler(), self._bound_dataset)
            self._is_loader_validated = True
        progress, num_skipped = self._progress, 0
        if progress.is_resumed:
            num_skipped = self._num_skipped_batches(loader)
        may_be_read_again = self.args.ignore_data_skip or progress.is_untouched
        is_inside_epoch = num_skipped or (may_be_read_again and not progress.is_complete)
        if progress.is_resumed and is_inside_epoch:
            if num_skipped != progress.num_batches_done:
                progress.num_batches_observed = 0
                if not self.args.ignore_data_skip:
                    logger.warning(
                        f"Trainer resumes after {num_skipped} micro-batches of an epoch that had done "
                        f"{progress.num_batches_done}, because an epoch was stopped early. The rest of the epoch "
                        "differs."
                    )
        else:
            self.log_pending_metrics()
            progress.epoch += 1
            self._set_optimizer_mode("train")  # of a schedule-free one: the weights that training goes on with
            accepted = self.resampler.resample(progress.epoch)
            progress.indices = order_rows(self, self._bound_dataset, accepted, progress.epoch)
            progress.has_unlogged_metrics = progress.has_unlogged_end = True
            progress.num_batches_observed = 0
        progress.is_resumed = progress.has_other_batches = False
        progress.num_batches, progress.num_batches_done = len(loader), num_skipped
        self._epoch_sampler().replace(progress.indices)
        # The order is known, so the count of micro-batches identifies the rows of each: batches carry no indices.
        is_observed = self.resampler.observes_rows
        progress.batch_rows = [list(rows) for rows in loader.batch_sampler or ()] if is_observed else []

    def log_pending_metrics(self) -> None:
        """Logs the epoch's metrics in a line of their own if they were not logged with a loss."""
        if self._progress.has_unlogged_metrics and self.args.logging_strategy != "no":
            self._progress.has_unlogged_metrics = False
            self._log_apart(self.resampler.metrics())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the trainer does, with the epoch's metrics of the resampler added to the first line with a loss."""
        if self._progress.has_unlogged_metrics and "loss" in logs:
            self._progress.has_unlogged_metrics = False
            logs.update(self.resampler.metrics())
        super().log(logs, *args, **kwargs)

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the trainer's own training step while the resampler observes its loss."""
        if not self.is_in_train:  # called by hand: a step of no epoch
            return super().training_step(model, *args, **kwargs)
        self._step_model, self._num_observed = model, 0
        try:
            loss = super().training_step(model, *args, **kwargs)
        finally:
            self._step_model = None
        if self.resampler.observes_rows and self._num_observed != 1:
            raise RuntimeError(
                f"The resampler observes the loss of each training step once, but saw it {self._num_observed} times: "
                "the `training_step` of this trainer class computes it outside of `compute_loss_context_manager()`. "
                'Compute it inside, or use LossResampler(losses="forward", importance_correction=0).'
            )
        self._progress.num_batches_done += 1
        return loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Adds the resampler's observation to the context of the training loss; overrides of `compute_loss` keep it."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self._step_model is not None and self.resampler.observes_rows:
            self._num_observed += 1
            rows = self._progress.batch_rows[self._progress.num_batches_done]
            is_known = self._progress.num_batches_done < self._progress.num_batches_observed
            stack.enter_context(self.resampler.observe_loss(self._step_model, rows, is_known))
        return stack

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the micro-batches of the next step, and the number of their items, corrected as their loss is."""
        self._progress.window = self._progress.num_batches_done, self.state.global_step
        self._is_counting_window = self.is_in_train and self.resampler.observes_rows
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self._is_counting_window = False

    def _get_num_items_in_batch(self, batch_samples: list[Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_counting_window:
            first = self._progress.num_batches_done
            rows = self._progress.batch_rows[first : first + len(batch_samples)]
            batch_samples = list(self.resampler.counted_batches(batch_samples, rows))
        return super()._get_num_items_in_batch(batch_samples, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the trainer's own training loader over the accepted rows."""
        if not self._is_looping and self._bound_source is not self.train_dataset:
            self._sampler = None  # another training set was given since
        self._epoch_sampler()  # binds the resampler before training, too
        original = self.train_dataset, self.data_collator
        try:
            self.train_dataset, self.data_collator = self._bound_dataset, self.resampler.collator(self.data_collator)
            self._train_loader = super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = original
        return self._train_loader

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as the trainer does, or by the resampler for data sets that it evaluates (held-out prompts).

        Arguments are those of the trainer's own method; for held-out prompts `eval_dataset` and `metric_key_prefix`.
        """
        # The trainer's own method may have others, in another order: of question answering, say.
        given = dict(zip(("eval_dataset", "ignore_keys", "metric_key_prefix"), args, strict=False)) | kwargs
        dataset = given.pop("eval_dataset", None)
        dataset = self.eval_dataset if dataset is None else dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None or isinstance(dataset, dict) or not self.resampler.evaluates(dataset):
            return super().evaluate(*args, **kwargs)
        _, _, metrics = self._answered("evaluate", dataset, "eval", given)
        self._log_apart(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predicts as the trainer does, or returns answers (texts) and references of held-out prompts.

        Arguments are those of the trainer's own method; for held-out prompts `test_dataset` and `metric_key_prefix`.
        """
        given = dict(zip(("test_dataset", "ignore_keys", "metric_key_prefix"), args, strict=False)) | kwargs
        dataset = given.pop("test_dataset", None)
        if dataset is None or not self.resampler.evaluates(dataset):
            return super().predict(*args, **kwargs)
        output = PredictionOutput(*self._answered("predict", dataset, "test", given))
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return output

    def _answered(self, method: str, dataset: Any, prefix: str, given: dict[str, Any]) -> Predictions:
        kwargs = {name: value for name, value in given.items() if name not in ("ignore_keys", "metric_key_prefix")}
        prefix = given.get("metric_key_prefix", prefix)
        if kwargs:
            raise ValueError(
                f"{method}() got {', '.join(kwargs)}, which held-out prompts do not use. Pass "
                "CandidateResampler(eval_generation_config=GenerationConfig(...))."
            )
        is_bound = self._bound_dataset is not None and vars(self.resampler).get("_bound_to") == self._binding
        if not self.is_in_train and not is_bound:
            self._sampler = None
            self._epoch_sampler()  # binds the resampler
        self._set_optimizer_mode("eval")  # as Trainer does before it evaluates
        start = time.perf_counter()
        predictions, labels, metrics = self.resampler.predict(dataset, prefix)
        return predictions, labels, metrics | {f"{prefix}_runtime": time.perf_counter() - start}

    def _set_optimizer_mode(self, name: str) -> None:
        if callable(change := getattr(self.optimizer, name, None)):
            change()

    def _log_apart(self, logs: dict[str, float]) -> None:
        # TRL's `log` adds the means that it keeps for its next line, and would log those of a few steps with ours.
        kept = vars(self).get("_metrics")
        try:
            if kept is not None:
                self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
            self.log(logs)
        finally:
            if kept is not None:
                self._metrics = kept

    def save_base_weights(self) -> None:
        """Writes the trainable weights to `<output_dir>/base.safetensors`, for `restore_base_weights`."""
        if self.args.should_save:
            save_trainable(unwrapped(self.model), Path(self.args.output_dir) / BASE_WEIGHTS)

    def restore_base_weights(self) -> None:
        """Restores the weights of `save_base_weights` and clears the optimizer state.

        Raises:
            RuntimeError: If the file is absent, or belongs to other parameters.
        """
        load_trainable(unwrapped(self.model), Path(self.args.output_dir) / BASE_WEIGHTS)
        self.optimizer.state.clear()  # its momenta belong to the replaced weights

    def restore_best_weights(self) -> None:
        """Restores the weights of the best checkpoint so far and clears the optimizer state, unless they are loaded."""
        if self.state.best_model_checkpoint is None or self.state.best_global_step == self.state.global_step:
            return
        self._load_best_model()
        self.optimizer.state.clear()  # its momenta belong to the replaced weights

    def log_end_of_epoch(self) -> None:
        """Logs the resampler's metrics of a finished epoch, once."""
        if self._progress.has_unlogged_end:
            self._progress.has_unlogged_end = False
            metrics = self.resampler.end_epoch()
            if metrics and self.args.logging_strategy != "no":
                self._log_apart(metrics)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the trainer's own model card, as `push_to_hub` does, with a section about the resampling."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            extend_model_card(Path(self.args.output_dir) / "README.md", self)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Returns the number of rows of an epoch; for the training loader that is the number of draws."""
        if dataloader is self._train_loader:
            return self.resampler.draws_per_epoch()
        return super().num_examples(dataloader)

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        # Here the checkpoint path is resolved; `auto_find_batch_size` calls it again with a smaller batch size.
        validate_arguments(self.args, self.accelerator)
        validate_dataset(self.train_dataset)
        warn_of_unsaved_parameters(unwrapped(self.model))
        self._progress, self._sampler, self._is_loader_validated = EpochProgress(), None, False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ResamplerCallback):
                callback.trainer = self
        self._bound_dataset = self._bound_rows()
        self._settings = run_settings(self, self.resampler.draws_per_epoch(), batch_size)
        if resume_from_checkpoint is not None:
            directory = Path(resume_from_checkpoint) / STATE_DIRECTORY
            self._progress = load_progress(directory, self._settings, self.args.max_steps)
            self.resampler.load(directory)
        self._is_looping = True
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)
        finally:
            self._is_looping = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if left := self._load_renamed_weights(resume_from_checkpoint):
            raise RuntimeError(
                f"{resume_from_checkpoint} lacks {len(left)} weights of the model under any name, such as {left[0]}: "
                "the run would go on from initial values. Load the weights yourself, and train from the start."
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if left := self._load_renamed_weights(self.state.best_model_checkpoint):
            logger.warning(
                f"The best checkpoint, {self.state.best_model_checkpoint}, lacks {len(left)} weights under any name, "
                f"such as {left[0]}: they stay those of the last step."
            )

    def _load_renamed_weights(self, folder: str | Path) -> list[str]:
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return load_renamed_weights(unwrapped(self.model), Path(folder)) if is_whole else []

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any) -> Any:
        done = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        progress = self._progress
        if progress.has_other_batches:
            progress.step_offset = self.state.global_step - (progress.epoch + 1) * num_update_steps_per_epoch
        if not progress.step_offset:
            return done
        # Trainer took all steps of the run for steps of the present batches.
        self.state.max_steps += progress.step_offset
        num_epochs, num_steps = divmod(self.state.global_step - progress.step_offset, num_update_steps_per_epoch)
        return num_epochs, 0 if self.args.ignore_data_skip else num_steps * self.args.gradient_accumulation_steps

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL's trainers tokenize their data set when they are made; prompts are left to the resampler.
        return dataset if self.resampler.evaluates(dataset) else super()._prepare_dataset(dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> EpochSampler:
        return self._epoch_sampler()

    def _save_rng_state(self, output_dir: str) -> None:
        # The only checkpoint hook that runs on every process, before old checkpoints are deleted.
        super()._save_rng_state(output_dir)
        is_writer = self.args.should_save
        with replaced_directory(Path(output_dir) / STATE_DIRECTORY, is_writer) as directory:
            self.resampler.save(directory, is_writer)
            if is_writer:
                save_progress(directory, self._progress, self._settings, self.state.global_step)

    def _epoch_sampler(self) -> EpochSampler:
        if self._sampler is None:
            if self.train_dataset is None:
                raise ValueError("Training needs a `train_dataset`.")
            if not self.is_in_train:
                self._bound_dataset = self._bound_rows()
            # The pool of a generative run is empty before its first round.
            self._sampler = EpochSampler(self.resampler.draws_per_epoch(), max(1, len(self._bound_dataset)))
        return self._sampler

    def _bound_rows(self) -> Any:
        """The rows of the resampler after binding it to this trainer, from which another one may have taken it."""
        rows, self._bound_source = self.resampler.bind(self), self.train_dataset
        vars(self.resampler)["_bound_to"] = self._binding
        return rows

    @property
    def _binding(self) -> tuple[int, int]:
        # Held-out prompts are answered by this model, which may be exchanged after training.
        return id(self), id(unwrapped(self.model))

    def _num_skipped_batches(self, loader: DataLoader[Any]) -> int:
        """Micro-batches of the resumed epoch that Trainer skips."""
        if self.args.ignore_data_skip:
            return 0
        accumulation = self.args.gradient_accumulation_steps
        num_steps = self.state.global_step - self._progress.step_offset
        return num_steps % math.ceil(len(loader) / accumulation) * accumulation


class RejectionSamplingTrainer(RejectionSamplingMixin, Trainer):
    """`Trainer` that resamples its training set each epoch by rejection sampling.

    Example:
        >>> import tempfile
        >>> from rsft_hf import RejectionSamplingTrainer, Tempered
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = torch.nn.Parameter(torch.ones(1))
        ...     def forward(self, x, labels):
        ...         return {"loss": torch.nn.functional.mse_loss(self.factor * x, labels)}
        >>> trainer = RejectionSamplingTrainer(
        ...     model=Scale(),
        ...     args=TrainingArguments(tempfile.mkdtemp(), num_train_epochs=2, report_to="none", use_cpu=True),
        ...     train_dataset=[{"x": float(i), "labels": 2.0 * i} for i in range(8)],
        ...     resampler=LossResampler(Tempered(0.5)),
        ... )
        >>> trainer.get_train_dataloader().batch_sampler.sampler.num_draws
        8
    """


class RejectionSamplingSeq2SeqTrainer(RejectionSamplingMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that resamples its training set each epoch by rejection sampling.

    Used as `RejectionSamplingTrainer`, with `Seq2SeqTrainingArguments`.
    """


class ResampleCallback(TrainerCallback):
    """Callback that resamples at the start of every epoch; the trainer adds it to itself.

    Args:
        trainer: Trainer whose epochs are resampled.
    """

    def __init__(self, trainer: "RejectionSamplingMixin") -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the epoch of a checkpoint that was saved at its last step; sets the learning rate for other batches."""
        scheduler, progress = kwargs["lr_scheduler"], self._trainer._progress
        if progress.is_resumed and progress.is_complete:
            self._trainer.log_pending_metrics()
            self._trainer.log_end_of_epoch()
        if progress.has_other_batches and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.last_epoch = state.global_step - progress.step_offset - 1
            scheduler.step()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws the rows of the epoch, or restores those of the epoch that a checkpoint interrupted."""
        self._trainer.begin_epoch(kwargs["train_dataloader"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs the epoch's metrics if they were not logged with a loss, and will not be."""
        should_log = control.should_log
        if not should_log:
            self._trainer.log_pending_metrics()
        self._trainer.log_end_of_epoch()
        control.should_log = should_log  # logging has reset it, but a line with the loss may be due

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells the resampler."""
        self._trainer.resampler.end_training()
