"""Out-of-memory handling: batches that are halved until they fit, longest rows first."""

import traceback
from collections.abc import Callable, Sequence

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the device, or the CPU, ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, Exception) and bool(should_reduce_batch_size(error))
    )


def halve_batch_size(batch_size: int, error: BaseException, unit: str = "rows") -> int:
    """Returns half of `batch_size` after an out-of-memory error, with the failed batch released.

    Args:
        batch_size: Size of the batch that failed.
        error: The error that was caught.
        unit: Noun for the log message: "rows", "sequences", "tokens".

    Raises:
        BaseException: `error` itself, if it is another error or the batch cannot be smaller.
    """
    if batch_size <= 1 or not is_out_of_memory(error):
        raise error
    # The traceback's frames still hold the tensors of the failed batch.
    traceback.clear_frames(error.__traceback__)
    clear_device_cache()
    logger.warning(f"Out of memory with {batch_size} {unit} in one batch; continuing with {batch_size // 2}.")
    return batch_size // 2


def map_in_batches(
    lengths: Sequence[int], batch_size: int, compute: Callable[[list[int]], Sequence[torch.Tensor] | torch.Tensor]
) -> list[torch.Tensor]:
    """Returns `compute`'s result for every row, from length-sorted batches that are halved on out-of-memory.

    Args:
        lengths: Number of tokens of each row; the longest rows come first and share a batch.
        batch_size: Maximum number of rows in a batch.
        compute: Function from the positions of the rows of a batch to one tensor per row.

    Returns:
        One tensor per row, on the CPU, in the order of `lengths`.

    Raises:
        RuntimeError: If a single row does not fit into memory; any other error of `compute` unchanged.

    Example:
        >>> [float(value) for value in map_in_batches([1, 3, 2], 2, lambda rows: torch.tensor(rows) * 10.0)]
        [0.0, 10.0, 20.0]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    results: dict[int, torch.Tensor] = {}
    while len(results) < len(order):
        batch = order[len(results) : len(results) + batch_size]
        try:
            values = compute(batch)
        except (RuntimeError, MemoryError) as error:
            batch_size = halve_batch_size(len(batch), error)
            continue
        results.update((row, value.cpu()) for row, value in zip(batch, values, strict=True))
    return [results[row] for row in range(len(lengths))]
