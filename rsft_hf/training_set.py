"""Lengths of examples in tokens, where they can be had without reading the data set.

A data set enters, a list of integers leaves, or None.

A digest by which a data set is known again.

A data set enters, a few characters leave. Which data sets must be equal, and what follows if they are not, is not known
here.

The order in which the rows of an epoch are read, as `train_sampling_strategy` says.

A trainer, its rows and the accepted indices enter; the same indices leave, arranged.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from rsft_hf.distributed import run_seed
from rsft_hf.isolation import forked_rng


def example_lengths(dataset: Any, length_column: str) -> list[int] | None:
    """Returns the length of every row in tokens where that costs no pass over the rows, else None.

    Args:
        dataset: A `datasets.Dataset` with the column `length_column` or `input_ids`, or a list of mappings.
        length_column: As `TrainingArguments.length_column_name`.
    """
    if isinstance(dataset, datasets.Dataset):
        if length_column in dataset.column_names:
            return list(dataset[length_column])
        if "input_ids" in dataset.column_names:
            column = dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
            return pyarrow.compute.list_value_length(column).to_pylist()
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        return [len(row["input_ids"]) for row in dataset]
    return None


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


def arranged(trainer: Trainer, dataset: Any, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Returns the accepted rows in the order to read them; "random" is the order of acceptance. Collective.

    Args:
        trainer: Says how, and in what batches.
        dataset: What the indices point into.
        indices: Rows, shape (num_draws,), int64.
        epoch: Number of the epoch, for the seed.

    Raises:
        ValueError: If rows are to be grouped by a length that they do not have.
    """
    strategy = trainer.args.train_sampling_strategy
    if strategy == "sequential":
        return indices.sort().values
    if strategy != "group_by_length":
        return indices
    lengths = _lengths(trainer, dataset)
    # Trainer's own sampler draws from the global generator and so does not resume exactly.
    generator = torch.Generator().manual_seed(run_seed(trainer) + epoch)
    positions = get_length_grouped_indices(
        [lengths[row] for row in indices.tolist()],
        trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        generator=generator,
    )
    return indices[positions]


def _lengths(trainer: Trainer, dataset: Any) -> list[int]:
    lengths = example_lengths(dataset, trainer.args.length_column_name)
    if lengths is not None:
        return lengths
    name = "input_ids" if trainer.processing_class is None else trainer.processing_class.model_input_names[0]
    if name not in dataset[0]:
        raise ValueError(
            f'`train_sampling_strategy="group_by_length"` finds no {name!r} in the rows of the training set. Add a '
            f"column {trainer.args.length_column_name!r} (`length_column_name`) with the length of each row."
        )
    return [len(dataset[row][name]) for row in range(len(dataset))]


def refuse_dataset(dataset: Any) -> None:
    """Raises if a training set cannot be resampled; None is left to Trainer.

    Raises:
        ValueError: If it is iterable only, has no length or no rows.
    """
    if dataset is None:
        return
    if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__}, whose rows cannot be chosen by index. Pass a data set "
            "with a length and random access: for a streamed one, `datasets.Dataset.from_generator(...)`, or "
            "`load_dataset` without `streaming=True`."
        )
    if isinstance(dataset, dict):
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__} with the keys {list(dataset)}, not rows. Pass one split, "
            'such as dataset["train"].'
        )
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"`train_dataset` ({type(dataset).__name__}) has no length. Give it a `__len__`, so that its rows can be "
            "drawn by index."
        )
    if len(dataset) == 0:
        raise ValueError("`train_dataset` has no rows. Check the split name and the filters applied to it.")
