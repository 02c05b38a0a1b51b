"""What a run must be to go on from a checkpoint, and where in its epoch it stands.

A trainer enters; `clock.json` and `clock.safetensors` beside the model are written and read. The resampler's own state
is the resampler's affair.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from rsft_hf.fingerprint import dataset_fingerprint
from rsft_hf.resampling import load_state, save_state

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
