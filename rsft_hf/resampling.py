"""The strategy object that decides which rows the next epoch reads, and the sampler that yields them.

A `Resampler` is bound to a trainer, asked for indices once per epoch, and saved with every checkpoint. What the
indices are derived from is its own affair; when it is asked, and how the rows reach the model, is the trainer's.
"""

import contextlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from rsft_hf.distributed import broadcast_from_main


class Resampler(ABC):
    """Decides which rows of the training set the next epoch reads."""

    @abstractmethod
    def bind(self, trainer: Trainer) -> Any:
        """Returns the data set to train on, forgetting any earlier run. Called at the start of every `train()`.

        Args:
            trainer: Supplies the training set, the model, the loss and the processes.

        Raises:
            ValueError: If the data set cannot be resampled.
        """

    @abstractmethod
    def draws_per_epoch(self) -> int:
        """Returns the number of indices that `resample` returns, constant for the run: schedule and resume need it."""

    @abstractmethod
    def resample(self, epoch: int) -> torch.Tensor:
        """Returns the rows that epoch `epoch` reads, shape (draws_per_epoch(),), int64, equal everywhere. Collective.

        Args:
            epoch: Number of epochs begun before this one in the run, resumes not counted anew.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Returns what there is to log of the current epoch, keys as the trackers shall show them."""

    @abstractmethod
    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes into `directory` all that `load` needs to go on exactly. Collective; only the writer writes."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Takes up the state that `save` wrote. Called after `bind`, on every process."""

    def end_epoch(self) -> dict[str, float]:
        """Returns what there is to log when the epoch has been trained on."""
        return {}

    def collator(self, collator: Any) -> Any:
        """Returns the collator to train with: the trainer's own, unless the bound data set needs another."""
        return collator

    def evaluates(self, dataset: Any) -> bool:
        """Returns whether `evaluate` measures on this data set, instead of the trainer's own evaluation."""
        return False

    def evaluate(self, dataset: Any, prefix: str) -> dict[str, float]:
        """Returns held-out figures of the model as it stands, keys with `prefix`. Collective."""
        raise NotImplementedError(f"{type(self).__name__} leaves evaluation to the trainer.")

    @property
    def observes_rows(self) -> bool:
        """Whether `observe_loss` is to be called, which costs a list of the rows of every micro-batch."""
        return False

    @contextlib.contextmanager
    def observe_loss(self, model: torch.nn.Module, rows: Sequence[int]) -> Iterator[None]:
        """Surrounds the computation of the training loss of one micro-batch, which holds these rows, in order."""
        yield


def run_seed(trainer: Trainer) -> int:
    """Returns the seed of a run's draws, equal on every process: the one a plain Trainer shuffles with. Collective."""
    seed = trainer.args.data_seed
    seed = (torch.initial_seed() if seed is None else seed) % 2**62
    return int(broadcast_from_main(trainer.accelerator, torch.tensor(seed)))


class EpochSampler(torch.utils.data.Sampler[int]):
    """Yields a list of rows that is replaced between epochs; its length never changes.

    Trainer reads the length of the training loader once, for the schedule and for resume, so an epoch of another
    length would end early without an error.

    Attributes:
        indices: The rows of the coming epoch, shape (num_draws,), int64.
    """

    def __init__(self, num_draws: int, num_rows: int) -> None:
        self.num_draws = num_draws
        # Until the first resampling, for those who look at a batch before they train.
        self.indices = torch.arange(num_draws) % num_rows

    def replace(self, indices: torch.Tensor) -> None:
        """Takes the rows of the coming epoch, shape (num_draws,), int64.

        Raises:
            ValueError: If their number is not `num_draws`.
        """
        if indices.shape != (self.num_draws,):
            raise ValueError(
                f"The resampler returned {tuple(indices.shape)} indices for an epoch of {self.num_draws} draws. "
                "`resample` must return exactly `draws_per_epoch()` indices."
            )
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())

    def __len__(self) -> int:
        return self.num_draws


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
