"""Measures every example of a data set by forward passes, leaving no trace in the model, the trainer or the RNGs.

A trainer, a model and a data set enter; losses, margins and prediction statistics in data-set order leave. The pass
runs longest rows first, in batches of similar length, without gradient, shared out over the processes. What the
measurements are for is not known here.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.distributed import sum_over_processes
from rsft_hf.isolation import forked_rng, in_evaluation_mode, untouched
from rsft_hf.training_set import example_lengths
from rsft_hf.weighted.losses import (
    Batch,
    Collate,
    PerExampleLoss,
    Reading,
    Recording,
    RowLosses,
    compute_loss,
    given_losses,
    has_label,
    row_losses,
)
from rsft_hf.weighted.predictions import PREDICTION_STATISTICS, prediction_statistics
from rsft_hf.weighted.probe import find_reading

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Measurement:
    """What a pass over the data set found, in data-set order.

    Attributes:
        losses: Loss of each example, shape (N,), float64, nats for a likelihood, NaN for a row without a label.
        logit_margins: Logit of the label less the largest other logit, shape (N,), float64, NaN where there is none.
        predictions: The prediction statistics asked for, each of shape (N,), float64.
    """

    losses: torch.Tensor
    logit_margins: torch.Tensor
    predictions: dict[str, torch.Tensor]


def measure_losses(
    trainer: Trainer,
    *,
    model: torch.nn.Module | None = None,
    loader: torch.utils.data.DataLoader[Any] | None = None,
    reading: Reading | None = None,
    per_example_loss: PerExampleLoss | None = None,
    batch_size: int | None = None,
    statistics: frozenset[str] = frozenset(),
    seed: int = 0,
) -> Measurement:
    """Returns the loss of every example of the trainer's training set. Collective.

    Args:
        trainer: Any `transformers.Trainer`; its loss, its collator and its processes are used.
        model: The model to measure, such as a reference model; the trainer's own where None.
        loader: Its data set is measured and its collator makes the batches; the training loader where None.
        reading: How losses are read; found by a probe where None.
        per_example_loss: Called as `per_example_loss(outputs, labels)`, returns one loss per example, shape (B,).
        batch_size: Rows per forward pass and process; `per_device_eval_batch_size` where None. Halved when the device
            runs out of memory.
        statistics: Names of prediction statistics to take as well, of "entropies", "margins", "confidences".
        seed: Seed of a random collator or data set during the pass.

    Raises:
        NotPerExampleError: If the loss has no meaning for a single example.
        ValueError: If no row has a label, a labelled row has a NaN or infinite loss (it is named), or a statistic is
            not defined for the model's outputs.
    """
    loader = trainer.get_train_dataloader() if loader is None else loader
    dataset: Any = loader.dataset
    collate: Any = loader.collate_fn
    model = trainer.model if model is None else model
    with forked_rng(seed), untouched(trainer), in_evaluation_mode(model):
        if per_example_loss is None and reading is None:
            reading = find_reading(trainer, model, dataset, collate, seed)
        scorer = _Scorer(trainer, model, reading, per_example_loss, statistics, len(dataset))
        if scorer.reading.kind == "single" or scorer.reading.depends_on_padding:
            batch_size = 1
        _score_all(scorer, dataset, collate, batch_size or trainer.args.per_device_eval_batch_size, seed)
    return scorer.gathered()


class _Scorer:
    """Scores collated batches and keeps the results of this process, 0 for the rows of others."""

    def __init__(
        self,
        trainer: Trainer,
        model: torch.nn.Module,
        reading: Reading | None,
        per_example_loss: PerExampleLoss | None,
        statistics: frozenset[str],
        num_rows: int,
    ) -> None:
        self.trainer, self.model, self.per_example_loss = trainer, model, per_example_loss
        self.reading = reading if per_example_loss is None and reading is not None else Reading("given")
        names = ["losses", "logit_margins", *sorted(statistics & set(PREDICTION_STATISTICS))]
        self.values = {name: torch.zeros(num_rows, dtype=torch.float64) for name in names}

    def score(self, batch: Batch, rows: list[int]) -> None:
        scalar, recording = compute_loss(self.trainer, self.model, batch, len(rows))
        losses, is_labelled = (value.cpu() for value in self._losses(scalar, recording, rows))
        refuse_unusable(losses, is_labelled, rows)
        nothing = torch.full((len(rows),), float("nan"), dtype=torch.float64)
        margins = recording.row_margins()
        self.values["losses"][rows] = torch.where(is_labelled, losses.double(), nothing)
        self.values["logit_margins"][rows] = nothing if margins is None else margins.cpu().double()
        if len(self.values) > 2:
            predictions = prediction_statistics(recording.outputs, batch)
            for name in list(self.values)[2:]:
                self.values[name][rows] = predictions[name]

    def _losses(self, scalar: float, recording: Recording, rows: list[int]) -> RowLosses:
        if self.per_example_loss is not None:
            return given_losses(self.per_example_loss, recording, len(rows))
        if self.reading.kind == "single":
            is_labelled = has_label(recording.labels, 1)
            return RowLosses(torch.where(is_labelled, scalar, 0.0), is_labelled)
        losses = row_losses(recording, self.reading, len(rows))
        if losses is None:
            raise RuntimeError(
                f"The losses of rows {rows[:3]}... could not be read although those of the first rows could. Pass "
                "`per_example_loss` to LossResampler."
            )
        return losses

    def gathered(self) -> Measurement:
        values = {name: sum_over_processes(self.trainer.accelerator, value) for name, value in self.values.items()}
        return Measurement(values.pop("losses"), values.pop("logit_margins"), values)


def _score_all(scorer: _Scorer, dataset: Any, collate: Collate, batch_size: int, seed: int) -> None:
    args, accelerator = scorer.trainer.args, scorer.trainer.accelerator
    order = _longest_first(dataset, args.length_column_name)
    progress = tqdm(
        total=len(order),
        desc="Scoring examples",
        unit=" rows",
        leave=False,
        disable=args.disable_tqdm or not scorer.trainer.is_local_process_zero(),
    )
    first = 0
    with progress:
        while first < len(order):
            batches = [order[start : start + batch_size] for start in range(first, len(order), batch_size)]
            mine, num_mine = _share(batches, accelerator.process_index, accelerator.num_processes)
            generator = torch.Generator().manual_seed(seed)  # iter(DataLoader) would draw from the global one
            loader = torch.utils.data.DataLoader(
                dataset,
                batch_sampler=mine,
                collate_fn=collate,
                num_workers=args.dataloader_num_workers,
                generator=generator,
            )
            try:
                for number, (rows, batch) in enumerate(zip(mine, loader, strict=True)):
                    # A repeated batch keeps the processes in step; its rows are another process's to report.
                    if number < num_mine:
                        scorer.score(batch, rows)
                    else:
                        compute_loss(scorer.trainer, scorer.model, batch, len(rows))
                    step = len(rows) * accelerator.num_processes
                    first += step
                    progress.update(min(step, progress.total - progress.n))
                first = len(order)
            except RuntimeError as error:
                batch_size = _halved(batch_size, accelerator.num_processes, error)


def _share(batches: list[list[int]], process: int, num_processes: int) -> tuple[list[list[int]], int]:
    """This process's batches, padded so that every process has as many, and the number of its own among them."""
    num_each = -(-len(batches) // num_processes)
    mine = batches[process::num_processes]
    return mine + [batches[0]] * (num_each - len(mine)), len(mine)


def _halved(batch_size: int, num_processes: int, error: RuntimeError) -> int:
    if not should_reduce_batch_size(error) or batch_size == 1:
        raise error
    if num_processes > 1:  # the others would wait for a batch that never comes
        raise RuntimeError(
            f"Out of memory while scoring {batch_size} rows at a time. Pass a smaller `batch_size` to LossResampler."
        ) from error
    clear_device_cache(garbage_collection=True)
    logger.warning(f"Out of memory while scoring {batch_size} rows at a time; going on with {batch_size // 2}.")
    return batch_size // 2


def refuse_unusable(losses: torch.Tensor, is_labelled: torch.Tensor, rows: Sequence[int]) -> None:
    """Raises ValueError, naming the row, if a labelled row's loss is NaN or infinite. All of shape (len(rows),)."""
    wrong = is_labelled & ~losses.isfinite()
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"Row {rows[position]} of the training set has loss {float(losses[position])}, which cannot be a weight. "
            "Repair or remove the row, or train in a wider number format if the loss overflows."
        )


def _longest_first(dataset: Sized, length_column: str) -> list[int]:
    lengths = example_lengths(dataset, length_column)
    if lengths is None:
        return list(range(len(dataset)))
    # The longest rows first, so that an out-of-memory error comes at once.
    return torch.tensor(lengths).argsort(descending=True, stable=True).tolist()
