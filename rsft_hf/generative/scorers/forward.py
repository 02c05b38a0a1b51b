"""Forward passes that score texts: sorted by length, halved when memory runs out, without dropout or gradients.

Encoded texts and a function of one batch enter, one number or vector per text leaves, in the order of the texts.
What the numbers mean is not known here.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from rsft_hf.isolation import in_evaluation_mode

logger = logging.getLogger(__name__)

Encoded = Mapping[str, Sequence[int]]


@contextlib.contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Turns dropout and gradients off inside the block; every module gets its own mode back."""
    with in_evaluation_mode(model), torch.no_grad():
        yield


def in_batches(
    lengths: Sequence[int], batch_size: int, compute: Callable[[list[int]], torch.Tensor]
) -> list[torch.Tensor]:
    """Returns what `compute` says of every row, longest rows first, in smaller batches once memory has run out.

    Args:
        lengths: Tokens of each row; rows of like length share a batch.
        batch_size: Most rows of a batch.
        compute: From the positions of the rows of a batch to a tensor with one entry for each.

    Returns:
        One tensor per row, on the CPU, in the order of `lengths`.

    Raises:
        RuntimeError: If a batch of one row does not fit into memory; any other error of `compute` as it is.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    results: dict[int, torch.Tensor] = {}
    while len(results) < len(order):
        batch = order[len(results) : len(results) + batch_size]
        if (values := _or_none_without_memory(compute, batch)) is not None:
            results.update(zip(batch, values.cpu(), strict=True))
            continue
        batch_size = max(1, len(batch) // 2)
        logger.info("Out of memory with %d rows of up to %d tokens: going on with batches of %d.",
                    len(batch), lengths[batch[0]], batch_size)  # fmt: skip
        clear_device_cache()
    return [results[row] for row in range(len(lengths))]


def pad_right(rows: Sequence[Encoded], pad_token_id: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Returns a batch of encoded texts, each tensor of shape (rows, longest row), int64.

    Args:
        rows: What a tokenizer returned for each text: `input_ids`, `attention_mask` and perhaps `token_type_ids`.
        pad_token_id: Fills `input_ids`; everything else is filled with 0.
        device: Where the batch goes.

    Example:
        >>> pad_right([{"input_ids": [5, 6]}, {"input_ids": [7]}], 1, "cpu")["input_ids"].tolist()
        [[5, 6], [7, 1]]
    """
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id}
    return {
        key: torch.tensor([[*row[key], *[fill.get(key, 0)] * (width - len(row[key]))] for row in rows], device=device)
        for key in rows[0]
    }


def _or_none_without_memory(compute: Callable[[list[int]], torch.Tensor], batch: list[int]) -> torch.Tensor | None:
    # In a frame of its own: while the error is handled, its traceback still holds the tensors of the failed batch.
    try:
        return compute(batch)
    except RuntimeError as error:
        if len(batch) == 1 or not should_reduce_batch_size(error):
            raise
        return None
