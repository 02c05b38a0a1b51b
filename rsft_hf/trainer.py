"""Rejection sampling inside the `Trainer` loop: with `callbacks.py`, the file that knows Trainer's internals.

train() -> _inner_training_loop: bind the resampler, load its state from the checkpoint if there is one
        -> for each epoch: on_epoch_begin -> ResampleCallback -> begin_epoch
               -> resampler.resample(epoch) -> rows arranged as `train_sampling_strategy` says -> EpochSampler
               -> iter(train_dataloader), sharded by accelerate -> training_step, Trainer's own, observed
        -> every checkpoint: _save_rng_state, on every process -> <checkpoint>/resampler

What can be resampled and what cannot, told before the first step.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from rsft_hf.checkpointing import (
    EpochClock,
    last_complete_checkpoint,
    load_clock,
    replaced_directory,
    run_facts,
    save_clock,
)
from rsft_hf.resampler import EpochSampler, Resampler
from rsft_hf.training_set import arranged, refuse_dataset
from rsft_hf.weighted.resampler import LossResampler

logger = logging.get_logger(__name__)

STATE_DIRECTORY = "resampler"

_Base: Any = object  # what the mixin stands on is its subclass's choice


class RejectionSamplingMixin(_Base):
    """Adds rejection sampling to any Trainer: `class X(RejectionSamplingMixin, SFTTrainer): pass`.

    Args:
        *args: As the trainer's own.
        resampler: Decides which rows each epoch reads; `LossResampler()` where None.
        **kwargs: As the trainer's own.

    Raises:
        TypeError: If `resampler` is not a Resampler.
        ValueError: If the training set or the set-up cannot be resampled.
    """

    train_dataset: Any
    data_collator: Any
    control: Any

    def __init__(self, *args: Any, resampler: Resampler | None = None, **kwargs: Any) -> None:
        if resampler is not None and not isinstance(resampler, Resampler):
            raise TypeError(
                f"`resampler` must be a Resampler object such as LossResampler(), got {resampler!r}. A weighting goes "
                "inside: LossResampler(weighting=...)."
            )
        self.resampler = LossResampler() if resampler is None else resampler
        refuse_dataset(kwargs.get("train_dataset"))  # before Trainer complains of max_steps
        super().__init__(*args, **kwargs)
        refuse_setting(self.args, self.accelerator)
        refuse_dataset(self.train_dataset)
        self._sampler: EpochSampler | None = None
        self._bound_dataset: Any = None
        self._train_loader: DataLoader[Any] | None = None
        self._clock = EpochClock()
        self._facts: dict[str, Any] = {}
        self._step_model: torch.nn.Module | None = None
        self._num_observed = 0
        self.add_callback(ResampleCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer.train` does; `resume_from_checkpoint=True` passes over checkpoints cut off in saving."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, STATE_DIRECTORY)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin_epoch(self, loader: DataLoader[Any]) -> None:
        """Gives the sampler of the training loader the rows of the coming epoch. Collective.

        A resumed run goes on with the rows of the epoch it was interrupted in, which were drawn from weights that
        the model no longer has.
        """
        self.log_waiting_metrics()
        clock, num_skipped = self._clock, 0
        if clock.is_resumed:
            num_skipped = self._num_skipped_steps(loader)
        if clock.is_resumed and (num_skipped or (self.args.ignore_data_skip and clock.num_steps_done < len(loader))):
            if num_skipped != clock.num_steps_done and not self.args.ignore_data_skip:
                logger.warning(
                    f"Trainer resumes after {num_skipped} micro-batches of an epoch that had done "
                    f"{clock.num_steps_done}, because an epoch was stopped early. The rest of the epoch differs."
                )
        else:
            clock.epoch += 1
            clock.indices = arranged(self, self._bound_dataset, self.resampler.resample(clock.epoch), clock.epoch)
            clock.has_waiting_metrics = True
        clock.is_resumed, clock.num_steps_done = False, num_skipped
        self._epoch_sampler().replace(clock.indices)
        # The order is known, so a count of micro-batches names the rows of each: no index travels in the batches.
        clock.batches = [list(rows) for rows in loader.batch_sampler or ()] if self.resampler.observes_rows else []

    def log_waiting_metrics(self) -> None:
        """Logs the epoch's figures by themselves if no line with a loss has carried them."""
        if self._clock.has_waiting_metrics and self.args.logging_strategy != "no":
            self._clock.has_waiting_metrics = False
            Trainer.log(self, self.resampler.metrics())  # a subclass's log would flush figures of its own too early

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the trainer does, with the epoch's `resampling/...` figures on the first line that has a loss."""
        if self._clock.has_waiting_metrics and "loss" in logs:
            self._clock.has_waiting_metrics = False
            logs.update(self.resampler.metrics())
        super().log(logs, *args, **kwargs)

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes the trainer's own step, while the resampler may observe its loss."""
        self._step_model, self._num_observed = model, 0
        try:
            loss = super().training_step(model, *args, **kwargs)
        finally:
            self._step_model = None
        if self.resampler.observes_rows and self._num_observed != 1:
            raise RuntimeError(
                f"The resampler observes the loss of each training step once, but saw it {self._num_observed} times: "
                "a `training_step` of this trainer's own computes it outside of `compute_loss_context_manager()`. "
                'Compute it inside, or use LossResampler(losses="forward", importance_correction=0).'
            )
        self._clock.num_steps_done += 1
        return loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Surrounds the training loss with the resampler's observation, whoever overrides `compute_loss`."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self._step_model is not None and self.resampler.observes_rows:
            self._num_observed += 1
            rows = self._clock.batches[self._clock.num_steps_done]
            stack.enter_context(self.resampler.observe_loss(self._step_model, rows))
        return stack

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the trainer's own training loader, over the rows that are drawn."""
        self._epoch_sampler()  # binds the resampler, if no training has
        kept = self.train_dataset, self.data_collator
        try:
            self.train_dataset, self.data_collator = self._bound_dataset, self.resampler.collator(self.data_collator)
            self._train_loader = super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = kept
        return self._train_loader

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Evaluates as the trainer does; held-out prompts are answered by the model, and the answers scored."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None or isinstance(dataset, dict) or not self.resampler.evaluates(dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if kwargs:
            raise ValueError(
                f"evaluate() got {', '.join(kwargs)}, which held-out prompts do not heed. Pass "
                "CandidateResampler(eval_generation_config=GenerationConfig(...))."
            )
        if not self.is_in_train and self._bound_dataset is None:
            self._epoch_sampler()  # binds the resampler
        began = time.perf_counter()
        metrics = self.resampler.evaluate(dataset, metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        Trainer.log(self, dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def restore_best_weights(self) -> None:
        """Puts back the weights of the best checkpoint so far, without the optimizer's state, unless they are in."""
        if self.state.best_model_checkpoint is None or self.state.best_global_step == self.state.global_step:
            return
        self._load_best_model()
        self.optimizer.state.clear()  # its momenta belong to the weights that were left

    def log_end_of_epoch(self) -> None:
        """Logs what there is to say of an epoch that has been trained on."""
        if self.args.logging_strategy != "no" and (figures := self.resampler.end_epoch()):
            Trainer.log(self, figures)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Returns the rows of an epoch: for the training loader those drawn, which may be fewer than there are."""
        if dataloader is self._train_loader:
            return self.resampler.draws_per_epoch()
        return super().num_examples(dataloader)

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        # Here the path of the checkpoint is resolved, and a batch size found by trial begins anew.
        refuse_dataset(self.train_dataset)
        self._clock, self._sampler = EpochClock(), None
        self._bound_dataset = self.resampler.bind(self)
        self._facts = run_facts(self, self.resampler.draws_per_epoch(), batch_size)
        if resume_from_checkpoint is not None:
            directory = Path(resume_from_checkpoint) / STATE_DIRECTORY
            self._clock = load_clock(directory, self._facts)
            self.resampler.load(directory)
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> EpochSampler:
        return self._epoch_sampler()

    def _save_rng_state(self, output_dir: str) -> None:
        # The one hook of a checkpoint that runs on every process, before old checkpoints are deleted.
        super()._save_rng_state(output_dir)
        is_writer = self.args.should_save
        with replaced_directory(Path(output_dir) / STATE_DIRECTORY, is_writer) as directory:
            self.resampler.save(directory, is_writer)
            if is_writer:
                save_clock(directory, self._clock, self._facts)

    def _epoch_sampler(self) -> EpochSampler:
        if self._sampler is None:
            if self.train_dataset is None:
                raise ValueError("Training needs a `train_dataset`.")
            if not self.is_in_train:
                self._bound_dataset = self.resampler.bind(self)
            # A pool is empty before its first round.
            self._sampler = EpochSampler(self.resampler.draws_per_epoch(), max(1, len(self._bound_dataset)))
        return self._sampler

    def _num_skipped_steps(self, loader: DataLoader[Any]) -> int:
        """Micro-batches of the resumed epoch that Trainer passes over."""
        if self.args.ignore_data_skip:
            return 0
        accumulation = self.args.gradient_accumulation_steps
        return self.state.global_step % math.ceil(len(loader) / accumulation) * accumulation


class RejectionSamplingTrainer(RejectionSamplingMixin, Trainer):
    """A `Trainer` that resamples its training set each epoch by rejection sampling."""


class RejectionSamplingSeq2SeqTrainer(RejectionSamplingMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that resamples its training set each epoch by rejection sampling."""


def refuse_setting(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raises if the training arguments leave the order of the rows to something other than the sampler.

    Raises:
        ValueError: For `dispatch_batches`, torch.nn.DataParallel, `train_sampling_strategy="batch_rebalance"`, and
            tensor, context or sequence parallelism.
    """
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "Tensor, context and sequence parallelism spread one row over several processes, which score and count "
            "rows each for itself here. Use data parallelism (DDP, FSDP, ZeRO)."
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`dispatch_batches=True` lets the main process read every batch, so that no process knows which rows it "
            "trains on. Leave it at None in `accelerator_config`."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process drives {args.n_gpu} GPUs (torch.nn.DataParallel), whose replicas hide the losses of single "
            "rows. Start one process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )
    if str(args.train_sampling_strategy) == "batch_rebalance":
        raise ValueError(
            '`train_sampling_strategy="batch_rebalance"` fixes the batches for the whole run. Use "random", '
            '"group_by_length" or "sequential", which arrange the rows that were accepted.'
        )


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
        should_log = control.should_log
        if not should_log:
            self._trainer.log_waiting_metrics()
        self._trainer.log_end_of_epoch()
        control.should_log = should_log  # logging these lines has taken it back, and a line with the loss may be due
