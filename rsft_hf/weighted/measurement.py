"""Scoring pass: losses, margins and prediction statistics of every example of a data set, by forward passes.

The pass runs in evaluation mode without gradient, longest rows first in batches of similar length, on all processes,
and changes neither the model nor the trainer nor the RNGs.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.distributed import sum_over_processes
from rsft_hf.isolation import forked_rng, in_evaluation_mode, preserved_trainer_state
from rsft_hf.memory import halve_batch_size, is_out_of_memory
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
    logits_of,
    row_losses,
    validate_losses,
)
from rsft_hf.weighted.reading import NUM_VERIFIED, find_reading

logger = logging.get_logger(__name__)

PREDICTION_STATISTICS = ("entropies", "margins", "confidences")


@dataclass(frozen=True)
class Measurement:
    """Result of a scoring pass, in data-set order.

    Attributes:
        losses: Loss of each example, shape (N,), float64, nats for a likelihood, NaN for a row without a label.
        logit_margins: Logit of the label minus the largest other logit, shape (N,), float64, NaN if not defined.
        predictions: The requested prediction statistics by name, each of shape (N,), float64.

    Example:
        >>> losses = torch.tensor([0.5, 2.0], dtype=torch.float64)
        >>> int(Measurement(losses, -losses, {}).losses.argmax())
        1
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
        trainer: Any `transformers.Trainer`; its loss, collator and processes are used.
        model: Model to measure, such as a reference model; the trainer's own by default.
        loader: Data loader with the data set and the collator; the training loader by default.
        reading: Method of reading per-example losses; found by `find_reading` by default.
        per_example_loss: Function `(outputs, labels) -> losses`, one loss per example, shape (B,).
        batch_size: Rows per forward pass and process; `per_device_eval_batch_size` by default. Halved when the device
            runs out of memory.
        statistics: Names of prediction statistics to measure as well, of "entropies", "margins", "confidences".
        seed: Seed of a random collator or data set during the pass.

    Raises:
        NotPerExampleError: If the loss is not defined for a single example.
        ValueError: If no row has a label, a labelled row has a NaN or infinite loss (it is named), or a statistic is
            not defined for the model's outputs.
    """
    loader = trainer.get_train_dataloader() if loader is None else loader
    dataset: Any = loader.dataset
    collate: Any = loader.collate_fn
    model = trainer.model if model is None else model
    batch_size = batch_size or trainer.args.per_device_eval_batch_size
    with forked_rng(seed), preserved_trainer_state(trainer), in_evaluation_mode(model):
        if per_example_loss is None and reading is None:
            reading = find_reading(trainer, model, dataset, collate, batch_size, seed, NUM_VERIFIED)
        scorer = _Scorer(trainer, model, reading, per_example_loss, statistics, len(dataset))
        if scorer.reading.kind == "single" or scorer.reading.is_scored_singly:
            batch_size = 1
        order = _longest_first(dataset, trainer.args.length_column_name)
        scoring_pass(trainer, dataset, collate, order, batch_size, seed, scorer.visit)
    return scorer.summed()


def trained_model(trainer: Trainer) -> torch.nn.Module:
    """Returns the model to run forward passes with during training."""
    # DeepSpeed needs its wrapper for the forward pass; DDP's would only add communication.
    return trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model


def training_loader(trainer: Trainer) -> Any:
    """Returns the loader of the run; makes one only outside of training, as accelerate keeps each that it prepares."""
    return trainer.callback_handler.train_dataloader or trainer.get_train_dataloader()


class _Scorer:
    """Scorer of collated batches with the results of this process, 0 for the rows of the others."""

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

    def visit(self, batch: Batch, rows: list[int], is_own: bool) -> None:
        scalar, recording = compute_loss(self.trainer, self.model, batch, len(rows))
        if not is_own:
            return
        losses, is_labelled = (value.cpu() for value in self._losses(scalar, recording, rows))
        validate_losses(losses, is_labelled, rows)
        undefined = torch.full((len(rows),), float("nan"), dtype=torch.float64)
        margins = recording.row_margins()
        self.values["losses"][rows] = torch.where(is_labelled, losses.double(), undefined)
        self.values["logit_margins"][rows] = undefined if margins is None else margins.cpu().double()
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

    def summed(self) -> Measurement:
        values = {name: sum_over_processes(self.trainer.accelerator, value) for name, value in self.values.items()}
        return Measurement(values.pop("losses"), values.pop("logit_margins"), values)


def scoring_pass(
    trainer: Trainer,
    dataset: Any,
    collate: Collate,
    order: Sequence[int],
    batch_size: int,
    seed: int,
    visit: Callable[[Batch, list[int], bool], None],
) -> None:
    """Visits rows in batches that the processes share, smaller ones when the device runs out of memory. Collective.

    Args:
        trainer: Trainer whose processes and workers are used.
        dataset: Rows by number.
        collate: Collator.
        order: Numbers of the rows, in the order of the pass.
        batch_size: Rows per batch and process.
        seed: Seed of the workers.
        visit: Called with a batch, the numbers of its rows, and whether they are this process's; a batch that is not
            keeps the processes in step, and is computed without being counted.
    """
    args, accelerator = trainer.args, trainer.accelerator
    progress = tqdm(
        total=len(order),
        desc="Scoring examples",
        unit=" rows",
        leave=False,
        disable=args.disable_tqdm or not trainer.is_local_process_zero(),
    )
    first = 0
    with progress:
        while first < len(order):
            batches = [list(order[start : start + batch_size]) for start in range(first, len(order), batch_size)]
            own_batches, num_own = _batches_of_process(batches, accelerator.process_index, accelerator.num_processes)
            loader = _own_loader(trainer, dataset, collate, own_batches, seed)
            try:
                for number, (rows, batch) in enumerate(zip(own_batches, loader, strict=True)):
                    visit(batch, rows, number < num_own)
                    step = len(rows) * accelerator.num_processes
                    first += step
                    progress.update(min(step, progress.total - progress.n))
                first = len(order)
            except (RuntimeError, MemoryError) as error:
                if accelerator.num_processes > 1 and batch_size > 1 and is_out_of_memory(error):
                    # The other processes would wait for a batch that never comes.
                    raise RuntimeError(
                        f"Out of memory while scoring {batch_size} rows in one batch. Pass a smaller `batch_size` to "
                        "the resampler."
                    ) from error
                batch_size = halve_batch_size(batch_size, error)


def _own_loader(
    trainer: Trainer, dataset: Any, collate: Collate, batches: list[list[int]], seed: int
) -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)  # iter(DataLoader) would draw from the global one
    num_workers = trainer.args.dataloader_num_workers
    options = {"collate_fn": collate, "num_workers": num_workers, "generator": generator}
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, **options)


def _batches_of_process(batches: list[list[int]], process: int, num_processes: int) -> tuple[list[list[int]], int]:
    """Batches of this process, padded to an equal number on every process, and the number without padding."""
    num_each = -(-len(batches) // num_processes)
    own_batches = batches[process::num_processes]
    return own_batches + [batches[0]] * (num_each - len(own_batches)), len(own_batches)


def _longest_first(dataset: Sized, length_column: str) -> list[int]:
    lengths = example_lengths(dataset, length_column)
    if lengths is None:
        return list(range(len(dataset)))
    # The longest rows first, so that an out-of-memory error comes at once.
    return torch.tensor(lengths).argsort(descending=True, stable=True).tolist()


def prediction_statistics(outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Returns entropy (nats), margin and confidence of each example's prediction; for tokens, means over positions.

    Args:
        outputs: Model outputs with `logits`, shape (B, C) or (B, T, C), C >= 2 exclusive classes.
        batch: Model inputs, which give the positions to average: those with a label, else those attended to.

    Returns:
        The statistics named in `PREDICTION_STATISTICS`, each of shape (B,), float64, on the CPU.

    Raises:
        ValueError: If the outputs have no such logits.
    """
    logits = logits_of(outputs)
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        shape = None if logits is None else tuple(logits.shape)
        raise ValueError(
            f"Entropy, Margin and LeastConfidence need logits over at least two classes, got shape {shape}. Use a "
            "rule on the loss, such as Proportional."
        )
    with torch.no_grad():
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        probabilities = log_probs.exp()
        top = probabilities.topk(2, dim=-1).values
        values = {
            "entropies": -(probabilities * log_probs).sum(-1),
            "margins": top[..., 0] - top[..., 1],
            "confidences": top[..., 0],
        }
        if logits.ndim == 3:
            mask = _position_mask(batch, logits)
            values = {name: (value * mask).sum(1) / mask.sum(1).clamp(min=1) for name, value in values.items()}
    return {name: value.cpu().double() for name, value in values.items()}


def _position_mask(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    labels, mask = (batch.get("labels"), batch.get("attention_mask")) if isinstance(batch, Mapping) else (None, None)
    if isinstance(labels, torch.Tensor) and labels.shape == logits.shape[:2]:
        return labels.ne(-100).to(logits)
    return mask.to(logits) if mask is not None else torch.ones_like(logits[..., 0])
