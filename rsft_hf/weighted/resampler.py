"""Draws the rows of each epoch in proportion to weights derived from their losses.

    losses (N,) in data-set order -> weighting -> weights (N,) -> rejection_sample on the main process -> broadcast

This file holds the order of the stages and the state between epochs; every stage stands in a file of its own.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.distributed import broadcast_from_main, forked_rng
from rsft_hf.rejection import rejection_sample
from rsft_hf.resampling import Resampler, load_state, run_seed, save_state
from rsft_hf.weighted.history import EpochHistory
from rsft_hf.weighted.ledger import LossLedger
from rsft_hf.weighted.losses import PerExampleLoss, Reading, given_losses, record_loss, row_losses
from rsft_hf.weighted.measure import measure_losses
from rsft_hf.weighted.options import check_options, check_reading
from rsft_hf.weighted.predictions import PREDICTION_STATISTICS
from rsft_hf.weighted.probe import find_reading
from rsft_hf.weighted.targets import class_labels, correction_factors, draw_metrics, target_weights, try_weighting
from rsft_hf.weighted.undisturbed import in_evaluation_mode, untouched
from rsft_hf.weighted.weights import Proportional, Weighting

logger = logging.get_logger(__name__)


class LossResampler(Resampler):
    """Resamples a labelled training set each epoch by rejection sampling with loss-derived weights.

    Args:
        weighting: Rule from losses to weights; w = L by default. With noisy labels take a softer one: see the card
            `rsft_hf/weighted/README.md`.
        losses: "forward" measures every row in a pass of its own before the epoch; "training" uses the losses that
            the training steps compute anyway, so that a row's loss is as old as its last draw.
        proposal: Proposal q over the rows, shape (N,), > 0; uniform where None. It changes the acceptance rate, not
            the law of the draws.
        num_draws: Rows per epoch, in [1, 2**31]; the size of the data set where None. Fewer saves compute.
        every_n_epochs: Epochs from one measuring pass to the next. None is 1 for "forward" and never for "training",
            where a number re-measures all rows so often.
        warmup_epochs: Epochs at the start that read the data set uniformly, at least 0.
        uniform_final_epochs: Epochs at the end that do, at least 0 (InfoBatch, arXiv:2303.04947, ends so).
        importance_correction: Exponent b in [0, 1] of the factor (1 / (N p_i)) ** b on each row's loss; at 1 the
            gradient is unbiased.
        per_example_loss: Called as `per_example_loss(outputs, labels)`, returns shape (B,); for models whose losses
            cannot be read otherwise.
        ema_decay: Weight of a row's old loss when a new one comes, in [0, 1); 0 keeps the last.
        batch_size: Rows per scoring pass and process; `per_device_eval_batch_size` where None.

    Raises:
        TypeError: If `weighting` is a class or has no `requires`.
        ValueError: If an argument is out of its range, or the rule needs what the source cannot give.
    """

    def __init__(
        self,
        weighting: Weighting | None = None,
        *,
        losses: Literal["forward", "training"] = "forward",
        proposal: torch.Tensor | None = None,
        num_draws: int | None = None,
        every_n_epochs: int | None = None,
        warmup_epochs: int = 0,
        uniform_final_epochs: int = 0,
        importance_correction: float = 0.0,
        per_example_loss: PerExampleLoss | None = None,
        ema_decay: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self.weighting = Proportional() if weighting is None else weighting
        self.losses, self.proposal, self.num_draws = losses, proposal, num_draws
        self.every_n_epochs = 1 if every_n_epochs is None and losses == "forward" else every_n_epochs
        self.warmup_epochs, self.uniform_final_epochs = warmup_epochs, uniform_final_epochs
        self.importance_correction, self.per_example_loss = importance_correction, per_example_loss
        self.ema_decay, self.batch_size = ema_decay, batch_size
        check_options(self)
        self.trainer: Trainer | None = None
        self.history = EpochHistory()

    def bind(self, trainer: Trainer) -> Any:
        """Returns the trainer's own training set, after a first look at it."""
        dataset = trainer.train_dataset
        num_rows = len(dataset)
        if self.proposal is not None and len(self.proposal) != num_rows:
            raise ValueError(f"`proposal` has {len(self.proposal)} entries for a data set of {num_rows} rows.")
        self.trainer, self.num_rows, self.seed = trainer, num_rows, run_seed(trainer)
        self._labels: torch.Tensor | None = None
        if "labels" in self.weighting.requires:
            with forked_rng(self.seed):
                self._labels = class_labels(trainer, dataset)
        try_weighting(self.weighting, num_rows, self._labels)
        self.ledger = LossLedger(num_rows, self.ema_decay)
        self.history = EpochHistory()
        self._reading: Reading | None = None
        self._predictions: dict[str, torch.Tensor] = {}
        self._is_measured = False
        self._row_factors: torch.Tensor | None = None
        self._metrics: dict[str, float] = {}
        self._seconds, self._began = 0.0, time.perf_counter()
        return dataset

    def draws_per_epoch(self) -> int:
        """Returns `num_draws`, or the size of the data set."""
        return self.num_rows if self.num_draws is None else self.num_draws

    def resample(self, epoch: int) -> torch.Tensor:
        """Returns the rows of the epoch: measured, weighted, drawn and broadcast. Collective."""
        began = time.perf_counter()
        trainer = self._bound()
        if self.losses == "training":
            self.ledger.merge(trainer.accelerator)
        self._find_reading()
        is_uniform = self._is_uniform(epoch)
        if not is_uniform and self._is_due(epoch):
            self._measure(epoch)
        losses = self._known_losses()
        is_uniform |= bool(losses.isnan().all())
        weights = (
            torch.ones(self.num_rows, dtype=torch.float64)
            if is_uniform
            else target_weights(self.weighting, losses, self._predictions, self._labels)
        )
        indices = self._draw(weights, None if is_uniform else self.proposal, epoch)
        self._row_factors = None
        if self.importance_correction > 0 and not is_uniform:
            self._row_factors = correction_factors(weights, self.importance_correction)
        self.history.append(epoch, self.ledger.losses, self.ledger.logit_margins, weights, indices)
        self._metrics = draw_metrics(weights, None if is_uniform else self.proposal, indices)
        if not bool(losses.isnan().all()):
            self._metrics["mean_loss"] = float(losses.nanmean())
        self._metrics["excluded_rows"] = int((weights == 0).sum() if is_uniform else losses.isnan().sum())
        self._metrics["seconds"] = time.perf_counter() - began
        self._seconds += self._metrics["seconds"]
        return indices

    def metrics(self) -> dict[str, float]:
        """Returns the figures of the current epoch, and the share of the time since the start spent resampling."""
        overhead = self._seconds / max(time.perf_counter() - self._began, 1e-9)
        return {f"resampling/{name}": value for name, value in {**self._metrics, "overhead_fraction": overhead}.items()}

    def table(self) -> datasets.Dataset:
        """Returns one line per epoch and row: `epoch`, `row`, `loss`, `margin`, `weight` (sums to 1), `count`."""
        return self.history.table()

    def suspects(self, num_suspects: int = 100) -> datasets.Dataset:
        """Returns the rows whose loss stays high while the rest falls, worst first: see `EpochHistory.suspects`."""
        return self.history.suspects(num_suspects)

    @property
    def observes_rows(self) -> bool:
        """Whether training steps fill the ledger or are corrected."""
        return self.losses == "training" or self.importance_correction > 0

    @contextlib.contextmanager
    def observe_loss(self, model: torch.nn.Module, rows: Sequence[int]) -> Iterator[None]:
        """Fills the ledger from a training step, and scales its loss where a correction is asked for."""
        if self.losses == "forward" and self._row_factors is None:
            yield
            return
        factors = None if self._row_factors is None else self._row_factors[list(rows)]
        with record_loss(self._bound(), model, len(rows), factors) as recording:
            yield
        if factors is not None and not recording.capture.calls:
            raise RuntimeError(
                "`importance_correction` found no loss of torch.nn.functional to scale in this training step (label "
                "smoothing, a fused head or a compiled model computes it another way). Set importance_correction=0."
            )
        if self.losses == "forward" or self._reading is None:
            return
        if self.per_example_loss is not None:
            losses = given_losses(self.per_example_loss, recording, len(rows))
        else:
            losses = row_losses(recording, self._reading, len(rows))
        if losses is None:
            raise RuntimeError(
                f'losses="training" captured nothing in a step of {len(rows)} rows, so the ledger would stand still '
                '(a compiled model or a fused loss makes no call that can be read). Use losses="forward" or pass '
                "`per_example_loss`."
            )
        self.ledger.record(list(rows), losses, recording.row_margins())

    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes losses, ledger, history and counters. Collective."""
        tensors = {**self.ledger.state(self._bound().accelerator), **self.history.state()}
        tensors |= {f"prediction_{name}": values for name, values in self._predictions.items()}
        if self._row_factors is not None:
            tensors["row_factors"] = self._row_factors
        numbers = {
            "seed": self.seed,
            "weighting": repr(self.weighting),
            "losses": self.losses,
            "is_measured": self._is_measured,
            "reading": None if self._reading is None else asdict(self._reading),
            "history_epochs": self.history.epochs,
            "metrics": self._metrics,
        }
        if is_writer:
            save_state(directory, "weighted", numbers, tensors)

    def load(self, directory: Path) -> None:
        """Takes up what `save` wrote; the draws go on with the seed of the saved run.

        Raises:
            ValueError: If the state is absent, or was saved with another source of losses.
        """
        numbers, tensors = load_state(directory, "weighted")
        if numbers["losses"] != self.losses:
            raise ValueError(
                f'The checkpoint was saved with losses="{numbers["losses"]}" and this run has losses="{self.losses}". '
                "Resume with the same source, or start a new run from the checkpoint's weights."
            )
        if numbers["weighting"] != repr(self.weighting):
            logger.warning(
                f"The checkpoint was saved with {numbers['weighting']}; from here on {self.weighting!r} weighs the rows."
            )
        self.seed, self._is_measured, self._metrics = numbers["seed"], numbers["is_measured"], numbers["metrics"]
        self._reading = None if numbers["reading"] is None else Reading(**numbers["reading"])
        self._row_factors = tensors.get("row_factors")
        self._predictions = {
            name: tensors[f"prediction_{name}"] for name in PREDICTION_STATISTICS if f"prediction_{name}" in tensors
        }
        self.ledger.load(tensors, self._bound().accelerator.is_main_process)
        self.history.load(numbers["history_epochs"], tensors)

    def _bound(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("The resampler is not bound to a trainer yet. Pass it as `resampler=` and call train().")
        return self.trainer

    def _is_uniform(self, epoch: int) -> bool:
        num_epochs = self._bound().state.num_train_epochs
        return epoch < self.warmup_epochs or epoch >= num_epochs - self.uniform_final_epochs

    def _is_due(self, epoch: int) -> bool:
        if self.every_n_epochs is None:
            return False
        return not self._is_measured or (epoch - self.warmup_epochs) % self.every_n_epochs == 0

    def _known_losses(self) -> torch.Tensor:
        """The loss of every row, NaN without a label; a row that no step has read yet counts as an average one."""
        losses = self.ledger.losses
        return torch.where(losses.isnan() & ~self.ledger.is_unlabelled, losses.nanmean(), losses)

    def _measuring_arguments(self, epoch: int) -> dict[str, Any]:
        trainer = self._bound()
        loader = trainer.callback_handler.train_dataloader or trainer.get_train_dataloader()
        return {
            # DeepSpeed alone computes through its wrapper; DDP's would only add communication.
            "model": trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model,
            "dataset": loader.dataset,
            "collate": loader.collate_fn,
            "seed": self.seed + epoch,
        }

    def _find_reading(self) -> None:
        """Looks at a few rows before the first step, whatever the source, so that what cannot work fails there."""
        if self._reading is not None:
            return
        if self.per_example_loss is not None:
            self._reading = Reading("given")
        else:
            arguments = self._measuring_arguments(0)
            with (
                forked_rng(arguments["seed"]),
                untouched(self._bound()),
                in_evaluation_mode(arguments["model"]),
            ):
                self._reading = find_reading(self._bound(), **arguments)
        check_reading(self._reading, self.losses, self.importance_correction)

    def _measure(self, epoch: int) -> None:
        measurement = measure_losses(
            self._bound(),
            reading=self._reading,
            per_example_loss=self.per_example_loss,
            batch_size=self.batch_size,
            statistics=self.weighting.requires,
            **self._measuring_arguments(epoch),
        )
        self.ledger.replace(measurement.losses, measurement.logit_margins)
        self._predictions = measurement.predictions
        self._is_measured = True

    def _draw(self, weights: torch.Tensor, proposal: torch.Tensor | None, epoch: int) -> torch.Tensor:
        accelerator = self._bound().accelerator
        indices = torch.empty(self.draws_per_epoch(), dtype=torch.int64)
        if accelerator.is_main_process:
            # A plain Trainer permutes epoch e with this seed too: equal weights read what it reads.
            generator = torch.Generator().manual_seed(self.seed + epoch)
            indices = rejection_sample(weights, self.draws_per_epoch(), generator, proposal)
        # Broadcast: the processes must read one order, and sums may differ in the last bit between machines.
        return broadcast_from_main(accelerator, indices)
