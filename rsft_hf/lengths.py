"""Lengths of examples in tokens, where they can be had without reading the data set.

A data set enters, a list of integers leaves, or None.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow.compute


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
