"""The strategy object that decides which rows the next epoch reads, and the sampler that yields them.

A `Resampler` is bound to a trainer, asked for indices once per epoch, and saved with every checkpoint. What the
indices are derived from is its own affair; when it is asked, and how the rows reach the model, is the trainer's.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


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
