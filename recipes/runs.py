"""Runs on disk, so that a killed recipe goes on: one folder per arm and seed, with its configuration and its result.

    <output_dir>/<arm>/seed_<seed>/configuration.json    written before the first step
                                   checkpoint-*          Trainer's own, where `save_strategy` is not "no"
                                   result.json           written after the last

In: what decides a run's outcome, as a dict. Out: the result of an earlier run with the same configuration, or the
checkpoint to go on from. It knows no model and no data.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from recipes.common import RecipeError

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
            RecipeError: If the folder holds a result or checkpoint of other options, or files of something else.
        """
        written = self.path / "configuration.json"
        if self.path.is_dir() and any(self.path.iterdir()) and not written.is_file():
            raise RecipeError(f"{self.path} is not empty and holds no run of a recipe. Choose another `--output_dir`.")
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
            raise RecipeError(
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
