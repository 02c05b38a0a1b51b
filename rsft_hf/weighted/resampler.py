"""LossResampler: rejection sampling of the rows of each epoch with loss-derived weights.

losses (N,) in data-set order -> weighting -> weights (N,) -> rejection_sample on the main process -> broadcast
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.checkpointing import load_state, save_state
from rsft_hf.checks import check_integer, check_interval
from rsft_hf.distributed import broadcast_from_main, run_seed
from rsft_hf.isolation import forked_rng
from rsft_hf.rejection import MAX_DRAWS, rejection_sample
from rsft_hf.resampler import Resampler
from rsft_hf.weighted.history import HISTORIES, EpochHistory
from rsft_hf.weighted.label_errors import row_error_probabilities
from rsft_hf.weighted.label_report import LabelReport
from rsft_hf.weighted.labels import class_labels, column_values, describe_labels, stored_classes
from rsft_hf.weighted.loss_source import LossSource
from rsft_hf.weighted.losses import PerExampleLoss
from rsft_hf.weighted.measurement import PREDICTION_STATISTICS
from rsft_hf.weighted.targets import (
    collapse,
    correction_factors,
    draw_metrics,
    target_weights,
    try_weighting,
    with_factored_labels,
)
from rsft_hf.weighted.tasks import Tasks
from rsft_hf.weighted.weightings import Chain, Clipped, Floored, Tempered, Weighting, as_weighting

logger = logging.get_logger(__name__)

# Chosen by docs/weighted_study.md. The cap bounds M, and so the share of the rows that an epoch does not read; a row
# keeps 9/10 of its uniform share, so that no corrected loss counts more than 10/9.
SAFE_WEIGHTING = Chain(Tempered(0.5), Clipped(0.9), Floored(0.9))


class LossResampler(Resampler):
    """Resampler that draws the rows of a labelled training set each epoch with loss-derived weights.

    Args:
        weighting: Rule from losses to weights, or a plain function: losses, shape (N,), float64, of the labelled rows
            in data-set order, to weights, shape (N,), >= 0. By default the safe rule, `SAFE_WEIGHTING`: nine
            tenths uniform, one tenth by the capped square root of the loss, from training losses and corrected in the
            loss; where the model's loss allows no correction, uncorrected. `Proportional()` is w = L, which can harm:
            see the card `rsft_hf/weighted/README.md`.
        losses: "forward" measures every row in a scoring pass before the epoch; "training" uses the losses of the
            training steps, so that a row's loss is as old as its last draw and the first epoch is uniform. By default
            "forward" with a weighting or `per_example_loss`, "training" without.
        num_draws: Rows per epoch, in [1, 2**31], or a fraction of the data set, in (0, 1); its size by default. Fewer
            draws save compute.
        every_n_epochs: Epochs from one scoring pass to the next. By default 1 for "forward" and never for "training".
        warmup_epochs: Number of epochs at the start that read the data set uniformly, at least 0.
        uniform_final_epochs: Number of such epochs at the end, at least 0 (as InfoBatch, arXiv:2303.04947).
        importance_correction: Exponent b in [0, 1] of the factor (1 / (N p_i)) ** b on each row's loss. At 1 the
            gradient is unbiased if every row has one label, and unbiased up to O(1/batch) if a batch averages over
            tokens or class weights. 1 without a weighting, 0 with one.
        per_example_loss: Function `(outputs, labels) -> losses` of shape (B,), for models whose losses cannot be read
            otherwise.
        ema_decay: Weight of a row's old loss in an update, in [0, 1); 0 keeps the last loss.
        batch_size: Rows per forward pass and process; `per_device_eval_batch_size` by default.
        task_column: Column with the task of each row, if several are trained in one run: each keeps its share of every
            epoch, with weights and envelope of its own, so that the one with larger losses does not take the epoch.

    Raises:
        TypeError: If `weighting` is a class, an object without `requires`, or a function of more than the losses.
        ValueError: If an argument is out of range, or the rule needs statistics that are not measured.

    Example:
        >>> LossResampler().weighting
        Chain(Tempered(alpha=0.5), Clipped(quantile=0.9), Floored(fraction=0.9))
        >>> from rsft_hf import Tempered
        >>> LossResampler(Tempered(0.5), losses="training", warmup_epochs=1).weighting
        Tempered(alpha=0.5)
        >>> LossResampler(lambda losses: losses.clamp(max=2.0)).weighting(torch.tensor([1.0, 5.0])).tolist()
        [1.0, 2.0]
    """

    def __init__(
        self,
        weighting: Weighting | Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        losses: Literal["forward", "training"] | None = None,
        num_draws: int | float | None = None,
        every_n_epochs: int | None = None,
        warmup_epochs: int = 0,
        uniform_final_epochs: int = 0,
        importance_correction: float | None = None,
        per_example_loss: PerExampleLoss | None = None,
        ema_decay: float = 0.0,
        batch_size: int | None = None,
        task_column: str | None = None,
    ) -> None:
        is_safe = weighting is None
        self.weighting = SAFE_WEIGHTING if weighting is None else as_weighting(weighting, "`weighting`")
        given = {"losses": losses, "importance_correction": importance_correction}
        self._adaptable = frozenset(name for name, value in given.items() if is_safe and value is None)
        self.losses = losses or ("training" if is_safe and per_example_loss is None else "forward")
        self.num_draws = num_draws
        self.every_n_epochs = 1 if every_n_epochs is None and self.losses == "forward" else every_n_epochs
        self.warmup_epochs, self.uniform_final_epochs = warmup_epochs, uniform_final_epochs
        self.importance_correction = float(is_safe) if importance_correction is None else importance_correction
        self.per_example_loss, self.ema_decay, self.batch_size = per_example_loss, ema_decay, batch_size
        self.task_column = task_column
        check_options(self)
        self.source: LossSource | None = None
        self._last_epoch: tuple[torch.Tensor, ...] = ()
        self.history = EpochHistory()

    def bind(self, trainer: Trainer) -> Any:
        """Returns the trainer's own training set, after validation. Collective."""
        dataset, args = trainer.train_dataset, trainer.args
        if getattr(args, "packing", False):
            raise ValueError("A packed row is no example, and its loss no example's. Set packing=False.")
        if lmbda := getattr(args, "lmbda", 0):  # of TRL's GKDTrainer
            raise ValueError(
                f"`lmbda`={lmbda} trains on answers that the steps generate, which have no loss before. Set lmbda=0."
            )
        self.num_rows, self.seed = len(dataset), run_seed(trainer)
        self._labels: torch.Tensor | None = None
        if "labels" in self.weighting.requires:
            with forked_rng(self.seed):
                self._labels = class_labels(trainer, dataset)
        else:
            self._labels = stored_classes(trainer, dataset)
        try_weighting(self.weighting, self.num_rows, self._labels)
        self._tasks = None if self.task_column is None else Tasks(column_values(dataset, self.task_column))
        self.source = LossSource(
            trainer,
            losses=self.losses,
            statistics=self.weighting.requires,
            every_n_epochs=self.every_n_epochs,
            warmup_epochs=self.warmup_epochs,
            importance_correction=self.importance_correction,
            per_example_loss=self.per_example_loss,
            ema_decay=self.ema_decay,
            batch_size=self.batch_size,
            adaptable=self._adaptable,
        )
        self.history = EpochHistory()
        self._is_count_weighted = self._has_collapsed = False
        self._row_factors: torch.Tensor | None = None
        self._metrics: dict[str, float] = {}
        self._seconds, self._start = 0.0, time.perf_counter()
        return dataset

    def draws_per_epoch(self) -> int:
        """Returns `num_draws`, as a number of rows."""
        self._bound()
        if self.num_draws is None:
            return self.num_rows
        return max(1, round(self.num_draws * self.num_rows)) if is_share(self.num_draws) else int(self.num_draws)

    def resample(self, epoch: int) -> torch.Tensor:
        """Returns the rows of the epoch: measured, weighted, drawn and broadcast. Collective."""
        start, source, self._last_epoch = time.perf_counter(), self._bound(), ()
        num_epochs = source.trainer.state.num_train_epochs
        num_first = max(self.warmup_epochs, int(source.is_from_training))
        is_observer = source.is_from_training and self.warmup_epochs >= num_epochs
        if not self.history.epochs and num_first + self.uniform_final_epochs >= num_epochs and not is_observer:
            logger.warning(
                f"No epoch of this run is resampled: of {num_epochs} epochs the first {num_first} (`warmup_epochs`, or "
                f'losses="training" before it knows a loss) and the last {self.uniform_final_epochs} '
                "(`uniform_final_epochs`) read the data set uniformly. Train for more epochs, or lower them."
            )
        is_uniform = epoch < self.warmup_epochs or epoch >= num_epochs - self.uniform_final_epochs
        losses = source.losses_at(epoch, self.seed + epoch, may_measure=not is_uniform)
        is_uniform |= bool(losses.isnan().all())
        weights = (
            torch.ones(self.num_rows, dtype=torch.float64)
            if is_uniform
            else target_weights(
                self.weighting, losses, source.predictions | self._histories(), self._labels, self._tasks
            )
        )
        indices = self._draw(weights, epoch)
        self._row_factors, self._is_count_weighted = None, False
        if source.importance_correction > 0 and not is_uniform:
            self._row_factors = correction_factors(weights, source.importance_correction)
        self.history.append(
            epoch, source.ledger.losses, source.ledger.logit_margins, weights, indices, source.ledger.is_fresh
        )
        self._metrics = draw_metrics(weights, indices)
        self._warn_of_collapse(epoch, weights, indices)
        if not bool(losses.isnan().all()):
            self._metrics["mean_loss"] = float(losses.nanmean())
        self._metrics["excluded_rows"] = 0 if is_uniform else int(losses.isnan().sum())
        self._metrics["seconds"] = time.perf_counter() - start
        self._seconds += self._metrics["seconds"]
        return indices

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the current epoch, and the fraction of the run's time spent on resampling."""
        self._bound()
        overhead = self._seconds / max(time.perf_counter() - self._start, 1e-9)
        return {f"resampling/{name}": value for name, value in {**self._metrics, "overhead_fraction": overhead}.items()}

    def table(self) -> datasets.Dataset:
        """Returns one line per epoch and row: `epoch`, `row`, `loss`, `margin`, `weight` (sums to 1), `count`."""
        return self.history.table()

    def measured(self) -> dict[str, torch.Tensor]:
        """Returns `loss_history` and `margin_history` of the measured epochs: see `EpochHistory.measured`.

        With losses of training steps the last epoch counts as soon as it has ended.
        """
        return self.history.measured(*self._last_epoch)

    def suspects(self, num_suspects: int = 100) -> datasets.Dataset:
        """Returns the rows whose loss stays high while the others fall, largest first: see `EpochHistory.suspects`.

        With losses of training steps the last epoch counts as soon as it has ended. To observe a plain run, pass
        `LossResampler(losses="training", warmup_epochs=num_train_epochs)`.
        """
        return self.history.suspects(num_suspects, *self._last_epoch)

    def end_epoch(self) -> dict[str, float]:
        """Keeps the losses of the epoch that has ended, for `suspects`; logs nothing. Collective."""
        if (source := self._bound()).is_from_training:
            self._last_epoch = source.ledger.pending(source.trainer.accelerator)
            source.label_margins.end_epoch(source.trainer.accelerator)
        return {}

    @property
    def has_label_report(self) -> bool:
        """Whether training steps have been observed whose loss compares classes."""
        margins = self._bound().label_margins
        return margins.problem is None and bool(margins.epochs)

    def label_report(self) -> LabelReport:
        """Returns the probability that each label is wrong and the label the model prefers: see `LabelReport`.

        Reads the training steps of all epochs that have ended; observe a plain run for it, as for `suspects`.

        Raises:
            RuntimeError: If no training step has been observed (`losses="training"`), or its loss compares no classes.
        """
        source = self._bound()
        return LabelReport(source.label_margins, **describe_labels(source.trainer, source.trainer.train_dataset))

    @property
    def observes_rows(self) -> bool:
        """Whether training steps update the ledger or are corrected."""
        source = self._bound()
        return source.is_from_training or source.importance_correction > 0

    def counted_batches(self, batches: Sequence[Any], rows: Sequence[Sequence[int]]) -> Sequence[Any]:
        """Returns the labels of the window, each row's tokens counted by its correction factor."""
        counted = None
        if (factors := self._row_factors) is not None and len(batches) == len(rows):
            counted = with_factored_labels(batches, [factors[list(one)] for one in rows])
        self._is_count_weighted = counted is not None
        return batches if counted is None else counted

    @contextlib.contextmanager
    def observe_loss(self, model: torch.nn.Module, rows: Sequence[int], is_known: bool = False) -> Iterator[None]:
        """Updates the ledger from a training step, and scales its loss by the importance correction."""
        factors = None if self._row_factors is None else self._row_factors[list(rows)]
        if factors is None and not self._bound().is_from_training:
            yield
            return
        is_count_weighted = self._is_count_weighted and self._bound().heeds_count
        with self._bound().observe(model, list(rows), factors, is_count_weighted, is_known):
            yield

    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes losses, ledger, history and counters. Collective."""
        numbers, tensors = self._bound().state()
        tensors |= self.history.state()
        if self._row_factors is not None:
            tensors["row_factors"] = self._row_factors
        numbers |= {
            "seed": self.seed,
            "weighting": repr(self.weighting),
            "losses": self.losses,
            "history_epochs": self.history.epochs,
            "metrics": self._metrics,
            "labels": describe_labels(self._bound().trainer, self._bound().trainer.train_dataset),
        }
        if is_writer:
            save_state(directory, "weighted", numbers, tensors)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote; the draws continue with the seed of the saved run.

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
                f"The checkpoint was saved with {numbers['weighting']}; the run continues with {self.weighting!r}."
            )
        self.seed, self._metrics = numbers["seed"], numbers["metrics"]
        self._row_factors = tensors.get("row_factors")
        source = self._bound()
        source.load(numbers, tensors)
        self.history.load(numbers["history_epochs"], tensors)
        # Of a finished run no epoch follows that would record the last one.
        if source.is_from_training and source.ledger.num_reads(source.trainer.accelerator) >= self.draws_per_epoch():
            self._last_epoch = source.ledger.pending(source.trainer.accelerator)

    def _bound(self) -> LossSource:
        if self.source is None:
            raise RuntimeError("The resampler is not bound to a trainer yet. Pass it as `resampler=` and call train().")
        return self.source

    def __repr__(self) -> str:
        return (
            f"LossResampler({self.weighting!r}, losses={self.losses!r}, "
            f"importance_correction={self.importance_correction:g})"
        )

    def _warn_of_collapse(self, epoch: int, weights: torch.Tensor, indices: torch.Tensor) -> None:
        if self._has_collapsed or bool((weights == weights[0]).all()):
            return
        measured = self.history.measured()
        errors = row_error_probabilities(measured["margin_history"], self._labels) if measured else None
        if (how := collapse(weights, indices, self._labels, errors)) is None:
            return
        self._has_collapsed = True
        logger.warning(
            f"The draws of epoch {epoch} have collapsed: {how}. Training on them can ruin the model. Take a softer "
            "rule (`LossResampler()`, Tempered, Floored) or warm-up epochs; wrong labels show up in `label_report()`."
        )

    def _histories(self) -> dict[str, torch.Tensor]:
        """Losses of the measured epochs, this one included, and margins since warm-up ended, if the rule reads them."""
        if not self.weighting.requires & set(HISTORIES):
            return {}
        ledger, num_before = self._bound().ledger, max(0, self.warmup_epochs - 1) * self._bound().is_from_training
        measured = self.history.measured(ledger.losses, ledger.logit_margins, ledger.is_fresh)
        return {name: lines[num_before:] if name == "margin_history" else lines for name, lines in measured.items()}

    def _draw(self, weights: torch.Tensor, epoch: int) -> torch.Tensor:
        accelerator = self._bound().trainer.accelerator
        indices = torch.empty(self.draws_per_epoch(), dtype=torch.int64)
        if accelerator.is_main_process:
            # A plain Trainer permutes epoch e with this seed, too: equal weights read the same rows.
            generator = torch.Generator().manual_seed(self.seed + epoch)
            draw = rejection_sample if self._tasks is None else self._tasks.draw
            indices = draw(weights, self.draws_per_epoch(), generator)
        # Broadcast: all processes must read one order, and sums may differ in the last bit between machines.
        return broadcast_from_main(accelerator, indices)


def is_share(num_draws: int | float) -> bool:
    """Returns whether `num_draws` is a fraction of the data set."""
    return isinstance(num_draws, float) and 0 < num_draws < 1


def check_options(resampler: "LossResampler") -> None:
    """Validate the options of a LossResampler.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a value is out of range, or the rule needs statistics that are not measured.
    """
    if resampler.losses not in ("forward", "training"):
        raise ValueError(f'`losses`={resampler.losses!r} must be "forward" or "training".')
    if resampler.num_draws is not None and not is_share(resampler.num_draws):
        check_integer("num_draws", resampler.num_draws, minimum=1, maximum=MAX_DRAWS)
    check_integer("warmup_epochs", resampler.warmup_epochs, minimum=0)
    check_integer("uniform_final_epochs", resampler.uniform_final_epochs, minimum=0)
    if resampler.every_n_epochs is not None:
        check_integer("every_n_epochs", resampler.every_n_epochs, minimum=1)
    if resampler.batch_size is not None:
        check_integer("batch_size", resampler.batch_size, minimum=1)
    check_interval("importance_correction", resampler.importance_correction, "[0, 1]", "0 is none, 1 is unbiased.")
    check_interval("ema_decay", resampler.ema_decay, "[0, 1)", "At 1 no new loss would count.")
    needs = sorted(resampler.weighting.requires & set(PREDICTION_STATISTICS))
    if needs and (resampler.losses == "training" or resampler.per_example_loss is not None):
        raise ValueError(
            f'{resampler.weighting!r} reads {needs}, which only a scoring pass measures. Use losses="forward" '
            "without `per_example_loss`."
        )
