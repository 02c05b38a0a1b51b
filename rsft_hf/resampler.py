"""Resampler, the strategy that chooses the rows of each epoch, and EpochSampler, the sampler that yields them.

The trainer binds a `Resampler`, asks it for indices once per epoch, and saves it with every checkpoint.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from rsft_hf.isolation import forked_rng

Predictions = tuple[list[Any], list[Any], dict[str, float]]


class Resampler(ABC):
    """Strategy that chooses which rows of the training set the next epoch reads.

    Example:
        >>> class EveryOther(Resampler):
        ...     def bind(self, trainer):
        ...         self.num_rows = len(trainer.train_dataset)
        ...         return trainer.train_dataset
        ...     def draws_per_epoch(self):
        ...         return self.num_rows // 2
        ...     def resample(self, epoch):
        ...         return 2 * torch.arange(self.draws_per_epoch()) + epoch % 2
        ...     def metrics(self):
        ...         return {}
        ...     def save(self, directory, is_writer): ...
        ...     def load(self, directory): ...
        >>> resampler = EveryOther()
        >>> resampler.num_rows = 6
        >>> resampler.resample(epoch=1).tolist()
        [1, 3, 5]
    """

    @abstractmethod
    def bind(self, trainer: Trainer) -> Any:
        """Returns the data set to train on and discards the state of any earlier run. Called when `train()` starts.

        Args:
            trainer: Trainer with the training set, the model, the loss and the processes.

        Raises:
            ValueError: If the data set cannot be resampled.
        """

    @abstractmethod
    def draws_per_epoch(self) -> int:
        """Returns the number of indices that `resample` returns, constant for the run: schedule and resume need it."""

    @abstractmethod
    def resample(self, epoch: int) -> torch.Tensor:
        """Returns the rows of an epoch, shape (draws_per_epoch(),), int64, equal on all processes. Collective.

        Args:
            epoch: Number of epochs begun before this one in the run; a resumed epoch is not counted twice.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the current epoch to log, by their full names."""

    @abstractmethod
    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes the state that `load` needs for an exact resume. Collective; only the writer writes."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Restores the state that `save` wrote. Called after `bind`, on every process."""

    def end_epoch(self) -> dict[str, float]:
        """Called at the end of an epoch; returns the metrics to log there. Collective."""
        return {}

    def end_training(self) -> None:  # noqa: B027
        """Called when `train()` ends. Collective."""

    def collator(self, collator: Any) -> Any:
        """Returns the collator to train with: the trainer's own, unless the bound data set needs another."""
        return collator

    def evaluates(self, dataset: Any) -> bool:
        """Returns whether `predict` answers this data set, instead of the trainer's own evaluation and prediction."""
        return False

    def predict(self, dataset: Any, prefix: str) -> Predictions:
        """Returns predictions, labels and metrics of the current model, the metrics with `prefix`. Collective."""
        raise NotImplementedError(f"{type(self).__name__} leaves evaluation to the trainer.")

    @property
    def observes_rows(self) -> bool:
        """Whether to call `observe_loss`, which costs a list of the rows of every micro-batch."""
        return False

    def counted_batches(self, batches: Sequence[Any], rows: Sequence[Sequence[int]]) -> Sequence[Any]:
        """Returns what Trainer counts the items of an accumulation window from: the batches, of these rows."""
        return batches

    @contextlib.contextmanager
    def observe_loss(self, model: torch.nn.Module, rows: Sequence[int], is_known: bool = False) -> Iterator[None]:
        """Wraps the computation of the training loss of one micro-batch.

        Args:
            model: Model that is trained.
            rows: Rows of the micro-batch, in order.
            is_known: Whether the loss was observed before: the step is repeated after a checkpoint that was saved
                between the loss and the update of the weights.
        """
        yield


class EpochSampler(torch.utils.data.Sampler[int]):
    """Sampler over a list of rows that is replaced between epochs; its length never changes.

    Trainer reads the length of the training loader once, for the schedule and for resume, so an epoch of another
    length would end early without an error.

    Attributes:
        indices: Rows of the coming epoch, shape (num_draws,), int64.
        num_iterations: Number of times that it has been iterated.

    Example:
        >>> sampler = EpochSampler(num_draws=2, num_rows=5)
        >>> sampler.replace(torch.tensor([4, 4]))
        >>> list(sampler)
        [4, 4]
    """

    def __init__(self, num_draws: int, num_rows: int) -> None:
        self.num_draws = num_draws
        self.num_iterations = 0
        # Before the first resampling, for scripts that inspect a batch before training.
        self.indices = torch.arange(num_draws) % num_rows

    def replace(self, indices: torch.Tensor) -> None:
        """Sets the rows of the coming epoch, shape (num_draws,), int64.

        Raises:
            ValueError: If their number is not `num_draws`.
        """
        if indices.shape != (self.num_draws,):
            raise ValueError(
                f"The resampler returned {tuple(indices.shape)} indices for an epoch of {self.num_draws} draws. "
                "`resample` must return exactly `draws_per_epoch()` indices."
            )
        self.indices = indices

    def is_read_by(self, loader: Any) -> bool:
        """Returns whether a data loader takes its rows from this sampler, whatever wraps it; moves no random state."""
        batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        num_before = self.num_iterations
        with forked_rng(0):
            first: Any = next(iter(batches), [])
        rows = first if isinstance(first, Iterable) else [first]
        return self.num_iterations > num_before and set(rows) <= set(self.indices.tolist())

    def __iter__(self) -> Iterator[int]:
        self.num_iterations += 1
        return iter(self.indices.tolist())

    def __len__(self) -> int:
        return self.num_draws
