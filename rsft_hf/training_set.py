"""Training set: validation, lengths of the examples, reading order of an epoch, and fingerprint."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from rsft_hf.distributed import run_seed
from rsft_hf.isolation import forked_rng

_NUM_FINGERPRINT_ROWS = 16
LABEL_COLUMNS = ("labels", "label", "label_ids")


def validate_dataset(dataset: Any) -> None:
    """Validate a training set for resampling; None is left to Trainer.

    Raises:
        ValueError: If it has no random access, no length or no rows, or is a dictionary of splits.
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
            'such as dataset["train"], or several joined by `datasets.concatenate_datasets`.'
        )
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"`train_dataset` ({type(dataset).__name__}) has no length. Give it a `__len__`, so that its rows can be "
            "drawn by index."
        )
    if len(dataset) == 0:
        raise ValueError("`train_dataset` has no rows. Check the split name and the filters applied to it.")


def example_lengths(dataset: Any, length_column: str) -> list[int] | None:
    """Returns the length of every row in tokens, or None if that needs a pass over the rows.

    Args:
        dataset: A `datasets.Dataset` with the column `length_column` or `input_ids`, or a list of mappings.
        length_column: As `TrainingArguments.length_column_name`.
    """
    if isinstance(dataset, datasets.Dataset):
        if length_column in dataset.column_names:
            lengths = list(dataset[length_column])
            if all(isinstance(length, (int, float)) for length in lengths):
                return lengths
        if "input_ids" in dataset.column_names:
            column = dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
            return pyarrow.compute.list_value_length(column).to_pylist()
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        return [len(row["input_ids"]) for row in dataset]
    return None


def order_rows(trainer: Trainer, dataset: Any, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Returns the accepted rows in the reading order of `train_sampling_strategy`. Collective.

    "random" is the order of acceptance, "sequential" that of the data set, "group_by_length" batches of similar length.

    Args:
        trainer: Trainer with the strategy and the batch size.
        dataset: Data set that the indices refer to.
        indices: Accepted rows, shape (num_draws,), int64.
        epoch: Number of the epoch, for the seed.

    Raises:
        ValueError: If the strategy is "group_by_length" and the rows have no known length.
    """
    strategy = trainer.args.train_sampling_strategy
    if strategy == "sequential":
        return indices.sort().values
    if strategy != "group_by_length":
        return indices
    lengths = _required_lengths(trainer, dataset)
    # Trainer's own sampler draws from the global generator, so it would not resume exactly.
    generator = torch.Generator().manual_seed(run_seed(trainer) + epoch)
    positions = get_length_grouped_indices(
        [lengths[row] for row in indices.tolist()],
        trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        generator=generator,
    )
    return indices[positions]


def _required_lengths(trainer: Trainer, dataset: Any) -> list[int]:
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


def dataset_fingerprint(dataset: Any, num_rows: int = _NUM_FINGERPRINT_ROWS) -> str:
    """Returns a hash of the columns and of rows, equal from run to run.

    Of a `datasets.Dataset` it reads all labels, where a row has a single one.

    Args:
        dataset: A data set with a length and random access.
        num_rows: Number of rows, spread over it, whose other columns are read, but for those drawn anew at each access.
    """
    digest = hashlib.blake2b(digest_size=8)
    is_stored = isinstance(dataset, datasets.Dataset)
    if is_stored:
        dataset = dataset.with_format(None)  # the stored values: a random transform gives others at every access
        for part in _numbers(dataset):
            digest.update(part)
    rows = [number * len(dataset) // min(num_rows, len(dataset)) for number in range(min(num_rows, len(dataset)))]
    with forked_rng(0):
        columns = _column_digests(dataset, rows)
        again = columns if is_stored else _column_digests(dataset, rows)  # a data set may have an RNG of its own
    for name, found in sorted(columns.items()):
        digest.update(name.encode())
        if found == again.get(name):
            digest.update(found)
    return digest.hexdigest()


def _numbers(dataset: datasets.Dataset) -> Iterable[bytes]:
    for name, feature in dataset.features.items():
        is_value = isinstance(feature, (datasets.Value, datasets.ClassLabel))
        if name in LABEL_COLUMNS and is_value and feature.dtype.startswith(("int", "uint", "float", "bool")):
            column = dataset.select_columns([name]).with_format("arrow")[:][name]
            values = pyarrow.compute.cast(column, pyarrow.float64(), safe=False)
            yield pyarrow.compute.fill_null(values, math.nan).to_numpy().tobytes()


def _column_digests(dataset: Any, rows: Iterable[int]) -> dict[str, bytes]:
    digests: dict[str, Any] = {}
    for row in rows:
        values = dataset[row]
        if not isinstance(values, Mapping):
            values = dict(enumerate(values if isinstance(values, (list, tuple)) else [values]))
        for name, value in values.items():
            digest = digests.setdefault(str(name), hashlib.blake2b(digest_size=8))
            for part in _hashed_parts(value):
                digest.update(part)
    return {name: digest.digest() for name, digest in digests.items()}


def _hashed_parts(value: Any) -> Iterable[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _hashed_parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _hashed_parts(item)
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
        yield type(value).__name__.encode()  # such as an image, whose repr may hold a memory address
