"""What a finished run tells about itself: its curve, its draws, its weights, the mislabelled rows it read.

In: a trainer after `train()`. Out: plain numbers, ready for JSON. It works for a plain Trainer too, which read every
row once an epoch, and knows no task.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback

from rsft_hf import RejectionSamplingTrainer

PREFIX = "resampling/"


def rows_per_epoch(trainer: Trainer) -> int:
    """Returns how many rows an epoch trains on, repeats counted."""
    if isinstance(trainer, RejectionSamplingTrainer):
        return trainer.resampler.draws_per_epoch()
    return len(trainer.train_dataset)


def rows_trained_on(trainer: Trainer) -> int:
    """Returns how many rows the whole run trained on, repeats counted."""
    return round(trainer.state.epoch * rows_per_epoch(trainer))


def training_curve(trainer: Trainer, metric: str) -> list[list[float]]:
    """Returns [training rows seen, metric] for every evaluation during training."""
    return [
        [round(entry["epoch"] * rows_per_epoch(trainer)), entry[f"eval_{metric}"]]
        for entry in trainer.state.log_history
        if f"eval_{metric}" in entry
    ]


def evaluation_seconds(trainer: Trainer) -> float:
    """Returns the seconds of `train()` that went into evaluations."""
    return sum(entry["eval_runtime"] for entry in trainer.state.log_history if "eval_runtime" in entry)


def resampling_figures(trainer: Trainer) -> list[dict[str, float]]:
    """Returns what the resampler logged of each epoch, without its prefix; empty for a plain Trainer."""
    return [
        {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}
        for entry in trainer.state.log_history
        if f"{PREFIX}acceptance_rate" in entry
    ]


def weight_percentiles(trainer: Trainer) -> list[list[float]]:
    """Returns for each epoch the 0th to 100th percentile of the weights, 1 = uniform; empty for a plain Trainer."""
    weights = _column(trainer, "weight")
    if weights is None:
        return []
    return np.percentile(weights * weights.shape[1], np.arange(101), axis=1).T.round(5).tolist()


def flipped_share(trainer: Trainer, is_flipped: Sequence[bool]) -> dict[str, Any]:
    """Returns the share of rows with a flipped label among all rows, among all draws and among those of each epoch."""
    flipped = np.asarray(is_flipped, dtype=bool)
    counts = _column(trainer, "count")
    if counts is None:  # a plain Trainer draws every row once an epoch
        counts = np.ones((1, len(flipped)))
    return {
        "of_rows": float(flipped.mean()),
        "of_draws": float(counts[:, flipped].sum() / counts.sum()),
        "by_epoch": (counts[:, flipped].sum(axis=1) / counts.sum(axis=1)).tolist(),
    }


def accuracy_by_group(
    predictions: Sequence[int], references: Sequence[int], groups: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Returns group -> rows and accuracy, the largest group first.

    Example:
        >>> accuracy_by_group([1, 0, 1], [1, 1, 1], ["a", "a", "b"])
        {'a': {'rows': 2, 'accuracy': 0.5}, 'b': {'rows': 1, 'accuracy': 1.0}}
    """
    hits: dict[str, list[bool]] = {}
    for prediction, reference, group in zip(predictions, references, groups, strict=True):
        hits.setdefault(str(group), []).append(prediction == reference)
    return {
        group: {"rows": len(found), "accuracy": sum(found) / len(found)}
        for group, found in sorted(hits.items(), key=lambda item: -len(item[1]))
    }


def _column(trainer: Trainer, name: str) -> np.ndarray | None:
    """A column of the resampler's table, shape (epochs, N), in data-set order."""
    if not isinstance(trainer, RejectionSamplingTrainer):
        return None
    values = trainer.resampler.table().with_format("numpy")[:][name]
    return values.reshape(-1, len(trainer.train_dataset))


class ProgressLine(TrainerCallback):
    """Prints one short line for each evaluation, in place of everything that is logged."""

    def __init__(self, name: str, metric: str) -> None:
        self.name, self.metric = name, metric

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Prints the epoch and the metric."""
        if state.is_world_process_zero:
            value = metrics[f"eval_{self.metric}"]
            print(f"{self.name}: epoch {state.epoch:.2f}, {self.metric} {value:.3f}", flush=True)
