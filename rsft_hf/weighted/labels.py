"""Labels of a training set as stored in its columns: classes, lists of classes, lists of 0 and 1 (multi-label)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import Trainer

from rsft_hf.training_set import LABEL_COLUMNS

IGNORED = -100
_MAX_CLASSES = 10_000  # larger integers are no classes


@dataclass(frozen=True)
class StoredLabels:
    """Labels of all rows, one after the other; None and -100 are no labels.

    Attributes:
        kind: "class" (one per row), "token" (a list of classes per row) or "multi_label" (a list of floats or booleans
            per row; beside 0 and 1 a negative number is no label either).
        values: Shape (L,), int64.
        num_per_row: Number of labels of each row, shape (N,), int64.
        places: Place of each label in its row, shape (L,), int64.
        no: What stands for no in a multi-label column: 0, or -1 beside 1.

    Example:
        >>> rows = datasets.Dataset.from_dict({"labels": [[3, -100, 1], [2]]})
        >>> labels = stored_labels(rows, "labels")
        >>> labels.kind, labels.values.tolist(), labels.num_per_row.tolist()
        ('token', [3, 1, 2], [2, 1])
        >>> labels.places.tolist()
        [0, 2, 0]
    """

    kind: str
    values: torch.Tensor
    num_per_row: torch.Tensor
    places: torch.Tensor
    no: int = 0

    def classes(self) -> torch.Tensor:
        """Returns the class of each row, shape (N,), -100 for none; of the kind "class" only."""
        return torch.full_like(self.num_per_row, IGNORED).masked_scatter(self.num_per_row > 0, self.values)


def stored_labels(dataset: datasets.Dataset, column: str) -> StoredLabels | None:
    """Returns the labels of a column, None if it holds no integers, booleans, or lists of these or of floats."""
    table = dataset.with_format("arrow").select_columns([column])[:]
    values: Any = table.column(column).combine_chunks()
    kind, lengths = "class", None
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        values = pc.list_flatten(values)
        kind = "token" if pa.types.is_integer(values.type) else "multi_label"
    is_class = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if not is_class and (kind == "class" or not pa.types.is_floating(values.type)):
        return None
    numbers = pc.fill_null(pc.cast(values, pa.float64(), safe=False), IGNORED).to_numpy(zero_copy_only=False)
    is_label = (numbers != IGNORED) & ~np.isnan(numbers)
    no = 0
    if kind == "multi_label" and bool((numbers == 0).any()):
        is_label &= numbers >= 0
    elif kind == "multi_label" and bool((numbers == -1).any()):
        no = -1
    lengths = np.ones(len(numbers), dtype=np.int64) if lengths is None else lengths
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = torch.from_numpy((np.arange(len(numbers)) - (np.cumsum(lengths) - lengths)[rows])[is_label])
    counts = torch.from_numpy(np.bincount(rows[is_label], minlength=len(dataset)))
    found = numbers[is_label] > 0.5 if kind == "multi_label" else numbers[is_label]  # smoothed targets, as in the loss
    return StoredLabels(kind, torch.from_numpy(found.astype(np.int64)), counts, places, no)


def stored_column(trainer: Trainer, columns: Collection[str]) -> str | None:
    """Returns the first of the trainer's label columns, `labels` and `label` that is there."""
    return next((name for name in label_names(trainer) if name in columns), None)


def label_names(trainer: Trainer) -> list[str]:
    """Returns the names under which labels are looked for."""
    return list(dict.fromkeys([*(trainer.label_names or []), *LABEL_COLUMNS]))


def labels_per_row(trainer: Trainer, dataset: Any) -> torch.Tensor:
    """Returns the number of labels of each row, shape (N,), int64: one, unless the stored column says otherwise."""
    labels = None
    if isinstance(dataset, datasets.Dataset) and (column := stored_column(trainer, dataset.column_names)):
        labels = stored_labels(dataset, column)
    return torch.ones(len(dataset), dtype=torch.int64) if labels is None else labels.num_per_row


def describe_labels(trainer: Trainer, dataset: Any) -> dict[str, Any]:
    """Returns `kind` and `column` of the labels, and `class_names` if the column stores them: of a `LabelReport`."""
    if not isinstance(dataset, datasets.Dataset) or not (column := stored_column(trainer, dataset.column_names)):
        return {"kind": "class", "column": LABEL_COLUMNS[0], "class_names": None}
    labels, names = stored_labels(dataset, column), class_names(dataset, column)
    return {"kind": "class" if labels is None else labels.kind, "column": column, "class_names": names}


def class_names(dataset: Any, column: str | None) -> list[str] | None:
    """Returns the names of the classes of a column, None if it is no `ClassLabel` or list of them."""
    if column is None or not isinstance(dataset, datasets.Dataset) or column not in dataset.features:
        return None
    feature = dataset.features[column]
    element = feature if isinstance(feature, datasets.ClassLabel) else getattr(feature, "feature", None)
    return element.names if isinstance(element, datasets.ClassLabel) else None


def stored_classes(trainer: Trainer, dataset: Any) -> torch.Tensor | None:
    """Returns the class of every row of a `datasets.Dataset` with an integer label column, shape (N,), else None."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    column = stored_column(trainer, dataset.column_names)
    if column is None or not str(getattr(dataset.features[column], "dtype", "")).startswith(("int", "uint", "bool")):
        return None
    labels = stored_labels(dataset, column)
    is_class = labels is not None and len(labels.values) and int(labels.values.max()) < _MAX_CLASSES
    return labels.classes() if labels is not None and is_class else None


def class_labels(trainer: Trainer, dataset: Any) -> torch.Tensor:
    """Returns the class of every row, shape (N,), int64; -100 for a row without one.

    Raises:
        ValueError: If the rows have no label column, or labels that are not single classes.
    """
    if isinstance(dataset, datasets.Dataset) and (column := stored_column(trainer, dataset.column_names)):
        # The stored column: a transform may rename it, and reading its rows may decode every image.
        stored = stored_labels(dataset, column)
        if stored is not None and stored.kind == "class":
            return stored.classes()
    columns = list(dataset[0])
    name = stored_column(trainer, columns)
    if name is None:
        raise ValueError(
            f"ClassBalanced needs a column with the class of each row: none of {label_names(trainer)} is in {columns}. "
            "Rename it to `labels`."
        )
    values = [dataset[row][name] for row in range(len(dataset))]
    classes = [_as_class(value) for value in values]
    if None in classes:
        row = classes.index(None)
        raise ValueError(
            f"ClassBalanced needs one integer class per row, but column {name!r} holds {values[row]!r} in row {row}. "
            "Use a rule without classes."
        )
    return torch.tensor(classes)


def _as_class(value: Any) -> int | None:
    """The class as an integer, -100 for a missing one, None for a value that is not a class."""
    if value is None:
        return IGNORED
    value = as_list(value)
    return int(value) if isinstance(value, (int, bool)) else None


def as_list(value: Any) -> Any:
    """Returns a tensor or an array as a list or number; anything else as it is."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value


def column_values(dataset: Any, column: str, rows: Sequence[int] | None = None) -> list[Any]:
    """Returns a column of a training set, one value for each of `rows`, for all where None.

    Raises:
        ValueError: If there is none of that name.
    """
    if isinstance(dataset, datasets.Dataset) and column in dataset.column_names:
        values = list(dataset.with_format(None)[column])
        return values if rows is None else [values[row] for row in rows]
    if column not in (first := dataset[0]):
        raise ValueError(f"`train_dataset` has no column {column!r}; it has {list(first)}. Name one that is there.")
    return [dataset[row][column] for row in (range(len(dataset)) if rows is None else rows)]
