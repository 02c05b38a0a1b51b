"""What a run must be to go on from a checkpoint, and where in its epoch it stands.

A trainer enters; `clock.json` and `clock.safetensors` beside the model are written and read. The resampler's own state
is the resampler's affair.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from rsft_hf.training_set import dataset_fingerprint

logger = logging.get_logger(__name__)


@dataclass
class EpochClock:
    """Where the run stands.

    Attributes:
        epoch: Number of the epoch begun last; -1 before the first. Not Trainer's, which counts differently when an
            epoch was stopped early.
        num_steps_done: Micro-batches of that epoch that this process has trained on.
        indices: The rows of that epoch, as arranged, shape (num_draws,).
        has_waiting_metrics: Whether the epoch's figures have not been logged yet.
        is_resumed: Whether this state comes from a checkpoint and no epoch has begun since.
        batches: The rows of each of this process's micro-batches, where the resampler wants to know them.
    """

    epoch: int = -1
    num_steps_done: int = 0
    indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    has_waiting_metrics: bool = False
    is_resumed: bool = False
    batches: list[list[int]] = field(default_factory=list)


def run_facts(trainer: Trainer, num_draws: int, batch_size: int | None = None) -> dict[str, Any]:
    """Returns what must be equal for a run to go on exactly: data, draws, batch, accumulation and processes.

    Args:
        trainer: Whose run it is.
        num_draws: Rows per epoch.
        batch_size: Rows per micro-batch and process, if one found by trial is about to replace the trainer's.
    """
    return {
        "rows of the training set": len(trainer.train_dataset),
        "draws per epoch": num_draws,
        "processes": trainer.args.world_size,
        "rows per micro-batch and process": batch_size or trainer._train_batch_size,
        "gradient accumulation steps": trainer.args.gradient_accumulation_steps,
        "train_sampling_strategy": str(trainer.args.train_sampling_strategy),
        "fingerprint of the training set": dataset_fingerprint(trainer.train_dataset),
    }


def save_clock(directory: Path, clock: EpochClock, facts: Mapping[str, Any]) -> None:
    """Writes the clock and the facts of the run into `directory`."""
    numbers = {
        "facts": facts,
        "epoch": clock.epoch,
        "num_steps_done": clock.num_steps_done,
        "has_waiting_metrics": clock.has_waiting_metrics,
    }
    save_state(directory, "clock", numbers, {"indices": clock.indices})


def load_clock(directory: Path, facts: Mapping[str, Any]) -> EpochClock:
    """Returns the clock of a checkpoint.

    Raises:
        ValueError: If there is none, or the run that saved it differs in one of `facts`; all differences are named.
    """
    numbers, tensors = load_state(directory, "clock")
    differences = [
        f"{name}: {numbers['facts'].get(name)} in the checkpoint, {value} now"
        for name, value in facts.items()
        if numbers["facts"].get(name) != value
    ]
    if differences:
        raise ValueError(
            f"Cannot resume from {directory.parent}: its epoch was drawn for another run ({'; '.join(differences)}). "
            "Resume with the same data set and set-up, or load the checkpoint's weights into the model and call "
            "train() without `resume_from_checkpoint`."
        )
    return EpochClock(
        epoch=numbers["epoch"],
        num_steps_done=numbers["num_steps_done"],
        indices=tensors["indices"],
        has_waiting_metrics=numbers["has_waiting_metrics"],
        is_resumed=True,
    )


def last_complete_checkpoint(output_dir: str, state_directory: str) -> str:
    """Returns the newest checkpoint in `output_dir` that was saved to the end.

    A run can be killed while it saves. The trainer's state is the last file of a checkpoint, so one without it, or
    without the resampler's, is passed over with a warning.

    Raises:
        ValueError: If there is no complete checkpoint.
    """
    folders = [
        folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdigit()
    ]
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        if _is_json(folder / TRAINER_STATE_NAME) and _is_json(folder / state_directory / "clock.json"):
            return str(folder)
        logger.warning(f"{folder} was not saved to the end (the run was killed there, perhaps); passing it over.")
    raise ValueError(
        f"No complete checkpoint in {output_dir} ({len(folders)} folders looked at). Call train() without "
        "`resume_from_checkpoint` to start anew, with `save_only_model` off so that later runs can resume."
    )


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def save_state(directory: Path, name: str, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes `name.json` and `name.safetensors` into `directory`."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / f"{name}.safetensors")
    (directory / f"{name}.json").write_text(json.dumps(numbers, indent=2) + "\n")


def load_state(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the numbers and tensors that `save_state` wrote.

    Raises:
        ValueError: If the files are absent or damaged: saved without a resampler, or cut off while saving.
    """
    numbers, tensors = directory / f"{name}.json", directory / f"{name}.safetensors"
    if not numbers.is_file() or not tensors.is_file():
        raise ValueError(
            f"{directory} holds no {name}.json and {name}.safetensors: the checkpoint was saved by a trainer without a "
            "resampler, with save_only_model=True, or by a run that was killed while saving. Resume from an earlier "
            "checkpoint, or load its weights into the model and call train() without `resume_from_checkpoint`."
        )
    try:
        return json.loads(numbers.read_text()), load_file(tensors)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"{numbers} or {tensors.name} is damaged ({error}): the run was killed while saving, perhaps. Resume from "
            "an earlier checkpoint."
        ) from error


@contextlib.contextmanager
def replaced_directory(directory: Path, is_writer: bool) -> Iterator[Path]:
    """Yields a directory to write into, which takes the place of `directory` only when the block has succeeded."""
    draft = directory.with_name(directory.name + ".incomplete")
    if is_writer:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    yield draft
    if is_writer:
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(draft, directory)
