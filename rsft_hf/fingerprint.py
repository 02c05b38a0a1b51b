"""A digest by which a data set is known again.

A data set enters, a few characters leave. Which data sets must be equal, and what follows if they are not, is not known
here.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
import torch

from rsft_hf.distributed import forked_rng

_NUM_FINGERPRINT_ROWS = 16


def dataset_fingerprint(dataset: Any, num_rows: int = _NUM_FINGERPRINT_ROWS) -> str:
    """Returns a digest of the columns and of `num_rows` rows spread over the data set, equal from run to run."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.with_format(None)  # the stored values: a random transform would differ at every look
    with forked_rng(0):
        for number in range(min(num_rows, len(dataset))):
            for part in _parts(dataset[number * len(dataset) // min(num_rows, len(dataset))]):
                digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterable[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, torch.Tensor):
        yield (
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if value.ndim
            else repr(value.item()).encode()
        )
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()  # an image or the like, whose repr may hold an address
