"""Runs on disk, and the figures of a finished run.

    <output_dir>/<arm>/seed_<seed>/configuration.json    written before the first step
                                   checkpoint-*          Trainer's own, where `save_strategy` is not "no"
                                   result.json           written after the last

A killed experiment reads the results of finished runs with the same configuration, and resumes the unfinished one from
its last checkpoint. The figures are plain numbers, ready for JSON; a plain Trainer reads every row once an epoch.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from experiments.harness.arguments import ExperimentError
from experiments.harness.arms import GenerativeArmArguments
from rsft_hf import RejectionSamplingTrainer

# Options of TrainingArguments that say how a run is watched, stored or spread, not what comes out of it.
SILENT_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "hub_",
    "push_",
    "report_",
    "dataloader_",
    "disable_",
    "ddp_",
    "trackio_",
)

SILENT_OPTIONS = {"output_dir", "run_name", "project", "seed", "data_seed", "local_rank", "resume_from_checkpoint"}


def training_configuration(training_arguments: TrainingArguments) -> dict[str, Any]:
    """Returns the training arguments that decide a run's outcome, as JSON values."""
    return {
        name: value
        for name, value in json.loads(json.dumps(training_arguments.to_dict(), default=str)).items()
        if not name.startswith(SILENT_PREFIXES) and name not in SILENT_OPTIONS
    }


@dataclass(frozen=True)
class RunFolder:
    """The folder of one arm and seed, and the configuration that its files must agree with."""

    path: Path
    configuration: dict[str, Any]

    def open(self, overwrite: bool) -> None:
        """Makes the folder ready: what a run of the same options left stays, what another one left is refused.

        Raises:
            ExperimentError: If the folder holds a result or checkpoint of other options, or files of something else.
        """
        written = self.path / "configuration.json"
        if self.path.is_dir() and any(self.path.iterdir()) and not written.is_file():
            raise ExperimentError(
                f"{self.path} is not empty and holds no run of an experiment. Choose another `--output_dir`."
            )
        if written.is_file() and (overwrite or not (self.result() or self.checkpoint())):
            shutil.rmtree(self.path)  # nothing of value but what the user gives up
        if written.is_file():
            self._compare(json.loads(written.read_text(encoding="utf-8")))
            return
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(written, self.configuration)

    def _compare(self, earlier: dict[str, Any]) -> None:
        present = json.loads(json.dumps(self.configuration))
        changed = [name for name in {**earlier, **present} if earlier.get(name) != present.get(name)]
        if changed:
            differences = "; ".join(f"{name} was {earlier.get(name)}, is {present.get(name)}" for name in changed)
            raise ExperimentError(
                f"{self.path} holds a run with other options: {differences}. Choose another `--output_dir`, or begin "
                "anew with `--overwrite_output_dir`."
            )

    def checkpoint(self) -> str | None:
        """Returns the path of the last checkpoint, None where there is none."""
        return get_last_checkpoint(str(self.path))

    def result(self) -> dict[str, Any] | None:
        """Returns the result of the finished run, None where there is none."""
        path = self.path / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def status(self) -> str:
        """Returns what is going to happen with the run, for the user."""
        if self.result() is not None:
            return f"finished earlier, read from {self.path}"
        return f"going on from {self.checkpoint()}" if self.checkpoint() else "training"

    def finish(self, result: dict[str, Any], is_writer: bool = True) -> None:
        """Writes the result, in the process that writes: from here on the run counts as done."""
        if is_writer:
            _write_json(self.path / "result.json", result)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    draft = path.with_suffix(".incomplete")  # so that a kill in mid-write leaves no half of a file
    draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


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


def arguments_of_run(training: TrainingArguments, folder: Path, seed: int) -> Any:
    """Returns the training arguments with the folder and the seed of one run."""
    arguments = copy.copy(training)
    arguments.output_dir, arguments.seed, arguments.data_seed = str(folder), seed, seed
    arguments.dataloader_pin_memory &= training.device.type != "cpu"
    return arguments


def open_folders(
    options: Any, arms: GenerativeArmArguments, training: TrainingArguments
) -> dict[tuple[str, int], RunFolder]:
    """Returns the folder of every arm and seed, made ready before the first of them is trained.

    Raises:
        ExperimentError: If one of them holds a run of other options.
    """
    folders = {}
    for seed in arms.seeds:
        for arm in arms.arms:
            trained = {} if arm == "base" else training_configuration(training)
            configuration = asdict(options) | arms.configuration(arm) | trained
            folders[arm, seed] = RunFolder(Path(training.output_dir) / arm / f"seed_{seed}", configuration)
    with training.main_process_first(desc="looking for earlier runs"):
        for folder in folders.values() if training.process_index == 0 else ():
            folder.open(arms.overwrite_output_dir)
    return folders
