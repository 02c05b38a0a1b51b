"""Checkpoint state of a run: progress within the epoch, validation against the resuming run, and state files.

A trainer's progress is written to `progress.json` and `progress.safetensors` in the folder of the resampler's state,
which the resampler writes itself.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from rsft_hf.isolation import forked_rng
from rsft_hf.training_set import dataset_fingerprint

logger = logging.get_logger(__name__)

STATE_DIRECTORY = "resampler"


@dataclass
class EpochProgress:
    """Position of a run: its epoch, the rows of that epoch, and the micro-batches done.

    Attributes:
        epoch: Number of the epoch begun last; -1 before the first. Not Trainer's, which counts differently after an
            epoch was stopped early.
        num_batches: Micro-batches of that epoch and process.
        num_batches_done: Those that have been trained on.
        num_batches_observed: Those whose losses a checkpoint holds: more than the done ones if it was saved before
            their optimizer step, as `enable_jit_checkpoint` does.
        window: Micro-batches done, and optimizer steps, where the present accumulation window began.
        indices: Rows of that epoch in reading order, shape (num_draws,).
        has_unlogged_metrics: Whether the epoch's metrics have not been logged yet.
        has_unlogged_end: Whether the line of the epoch's end has not been logged yet.
        is_resumed: Whether this state comes from a checkpoint and no epoch has begun since.
        has_other_batches: Whether that checkpoint, of an epoch's end, was of a run with other batches or processes.
        step_offset: Optimizer steps done beyond those that the epochs would have taken in the present batches.
        batch_rows: Rows of each of this process's micro-batches, if the resampler observes them.
    """

    epoch: int = -1
    num_batches: int = 0
    num_batches_done: int = 0
    num_batches_observed: int = 0
    window: tuple[int, int] = (0, -1)
    indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    has_unlogged_metrics: bool = False
    has_unlogged_end: bool = False
    is_resumed: bool = False
    has_other_batches: bool = False
    step_offset: int = 0
    batch_rows: list[list[int]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all rows of the epoch have been trained on."""
        return self.num_batches_done >= self.num_batches > 0

    @property
    def is_untouched(self) -> bool:
        """Whether rows are drawn and none of them has been trained on."""
        return self.num_batches_done == 0 < self.num_batches


_JIT_MARK = "checkpoint-is-incomplete.txt"  # of `enable_jit_checkpoint`, which may write over an older checkpoint

_BATCH_SETTINGS = {
    "processes",
    "rows per micro-batch and process",
    "gradient accumulation steps",
    "train_sampling_strategy",
}


def run_settings(trainer: Trainer, num_draws: int, batch_size: int | None = None) -> dict[str, Any]:
    """Returns the settings that must be equal for an exact resume: data, draws, batch, accumulation and processes.

    Args:
        trainer: Trainer of the run.
        num_draws: Number of rows per epoch.
        batch_size: Rows per micro-batch and process, if `auto_find_batch_size` is about to replace the trainer's.
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


def save_progress(directory: Path, progress: EpochProgress, settings: Mapping[str, Any], global_step: int) -> None:
    """Writes the progress, after so many optimizer steps, and the settings of the run into `directory`."""
    first, step = progress.window
    numbers = {
        "settings": settings,
        "epoch": progress.epoch,
        "num_batches": progress.num_batches,
        "num_batches_done": first if step == global_step else progress.num_batches_done,
        "num_batches_observed": progress.num_batches_done,
        "has_unlogged_metrics": progress.has_unlogged_metrics,
        "has_unlogged_end": progress.has_unlogged_end,
        "step_offset": progress.step_offset,
    }
    save_state(directory, "progress", numbers, {"indices": progress.indices})


def load_progress(directory: Path, settings: Mapping[str, Any], max_steps: int = -1) -> EpochProgress:
    """Returns the progress saved in a checkpoint.

    At an epoch's end nothing is left of the drawn rows, so the next epoch may come in other batches, unless `max_steps`
    counts them.

    Raises:
        ValueError: If there is none, or the run that saved it differs in one of `settings`; all differences are named.
    """
    numbers, tensors = load_state(directory, "progress")
    progress = EpochProgress(
        epoch=numbers["epoch"],
        num_batches=numbers["num_batches"],
        num_batches_done=numbers["num_batches_done"],
        num_batches_observed=numbers.get("num_batches_observed", 0),
        indices=tensors["indices"],
        has_unlogged_metrics=numbers["has_unlogged_metrics"],
        has_unlogged_end=numbers["has_unlogged_end"],
        is_resumed=True,
        step_offset=numbers["step_offset"],
    )
    saved = numbers["settings"]
    differing = [name for name, value in settings.items() if saved.get(name) != value]
    if progress.is_complete and max_steps <= 0 and set(differing) <= _BATCH_SETTINGS:
        progress.has_other_batches = bool(differing)
        return progress
    if differing:
        differences = "; ".join(
            f"{name}: {saved.get(name)} in the checkpoint, {settings[name]} now" for name in differing
        )
        raise ValueError(
            f"Cannot resume from {directory.parent}: its epoch was drawn for another run ({differences}). Resume with "
            "the same data and settings (at an epoch's end, without `max_steps`, batches and processes may differ), "
            "or load the checkpoint's weights into the model and call train() without `resume_from_checkpoint`."
        )
    return progress


def state_directory(directory: Path | str) -> Path:
    """Returns the folder of the resampler's state in a checkpoint, or in the last complete one of an output folder.

    Raises:
        ValueError: If there is no complete checkpoint.
    """
    state = Path(directory) / STATE_DIRECTORY
    return state if state.is_dir() else Path(last_complete_checkpoint(str(directory))) / STATE_DIRECTORY


def last_complete_checkpoint(output_dir: str) -> str:
    """Returns the newest checkpoint in `output_dir` that was saved completely.

    A run can be killed while it saves. The trainer's state is the last file of a checkpoint, so one without it, or
    without the resampler's, is skipped with a warning; so is one that Trainer marks as incomplete.

    Raises:
        ValueError: If there is no complete checkpoint.
    """
    folders = [
        folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdigit()
    ]
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        is_whole = _is_json(folder / TRAINER_STATE_NAME) and _is_json(folder / STATE_DIRECTORY / "progress.json")
        if is_whole and not (folder / _JIT_MARK).exists():
            return str(folder)
        logger.warning(f"Skipping {folder}, which was not saved completely (perhaps the run was killed while saving).")
    raise ValueError(
        f"No valid checkpoint found in output directory ({output_dir}): of {len(folders)} checkpoint folders none was "
        "saved completely. Call train() without `resume_from_checkpoint` to start from the beginning, with "
        "`save_only_model` off so that later runs can resume."
    )


def logged_lines(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines that the trainer had logged when it saved its state in a folder; none without a state."""
    path = directory / TRAINER_STATE_NAME
    return json.loads(path.read_text())["log_history"] if path.is_file() else []


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
            f"{numbers} or {tensors.name} is damaged ({error}); perhaps the run was killed while saving. Resume from "
            "an earlier checkpoint."
        ) from error


def validate_unchanged(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raises ValueError if a run that goes on from a checkpoint differs from the one that saved it."""
    for name, value in present.items():
        if saved[name] != value:
            raise ValueError(
                f"Cannot resume: {name} was {saved[name]} when the checkpoint was saved, and is {value}. Resume with "
                "what it was, or start a new run from the checkpoint's weights."
            )


@contextlib.contextmanager
def replaced_directory(directory: Path, is_writer: bool) -> Iterator[Path]:
    """Yields a temporary directory that replaces `directory` if the block succeeds."""
    temporary = directory.with_name(directory.name + ".incomplete")
    if is_writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    yield temporary
    if is_writer:
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)


def save_trainable(model: torch.nn.Module, path: Path) -> None:
    """Writes the trainable parameters of a model: of a PEFT model its adapter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".incomplete")
    save_file({name: values.detach().cpu().contiguous().clone() for name, values in _trainable(model).items()}, draft)
    draft.replace(path)


def load_trainable(model: torch.nn.Module, path: Path) -> None:
    """Restores the parameters that `save_trainable` wrote.

    Raises:
        RuntimeError: If the file is absent, or belongs to other parameters.
    """
    if not path.is_file():
        raise RuntimeError(f"{path}, the weights at the start of the run, is missing. Start the run again.")
    saved, parameters = load_file(path), _trainable(model)
    if saved.keys() != parameters.keys():
        raise RuntimeError(f"{path} holds other parameters than the model. Start the run again in another folder.")
    with torch.no_grad():
        for name, values in parameters.items():
            values.copy_(saved[name])


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: values for name, values in model.named_parameters() if values.requires_grad}


def load_renamed_weights(model: torch.nn.Module, folder: Path) -> list[str]:
    """Loads weights of a checkpoint that have other names there than in the model, which Trainer passes over.

    transformers saves ViT, Segformer, Mixtral and others by the names of the hub's files, and resumes them without
    renaming (seen in 5.24): such a run would go on from its initial weights.

    Returns:
        Names of weights that the checkpoint may hold under other names, and that could not be loaded.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files:
        return []
    state, found = model.state_dict(), set[str]()
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    tied = {state[name].data_ptr() for name in found & state.keys()}
    ignored = model._keys_to_ignore_on_save or ()
    missing = [name for name in state.keys() - found if state[name].data_ptr() not in tied and name not in ignored]
    if not missing or not found - state.keys():
        return []  # all is there, or the others were never saved
    try:
        with forked_rng(0):
            loaded, info = type(model).from_pretrained(
                folder, config=model.config, dtype=torch.float32, output_loading_info=True
            )
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        logger.warning(f"{folder} cannot be loaded by from_pretrained: {error}")
        return sorted(missing)
    values = {name: one for name, one in loaded.state_dict().items() if name not in info["missing_keys"]}
    model.load_state_dict({name: values[name] for name in missing if name in values}, strict=False)
    logger.info(f"{len(missing)} weights of {folder} have other names there than in {type(model).__name__}.")
    return sorted(set(missing) - set(values))
