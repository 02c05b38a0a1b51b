"""Validation of the training set, at construction of the trainer."""

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch

import runs
from rsft_hf import RejectionSamplingTrainer


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(runs.rows())


class WithoutLength(torch.utils.data.Dataset):
    def __getitem__(self, row: int) -> dict[str, Any]:
        return runs.rows()[row]


DATASETS = {
    "iterable": (Stream, r"`train_dataset` is a Stream, whose rows cannot be chosen by index"),
    "streamed": (
        lambda: datasets.Dataset.from_list(runs.rows()).to_iterable_dataset(),
        r"`train_dataset` is a IterableDataset, whose rows cannot be chosen by index. .* without `streaming=True`",
    ),
    "without_length": (WithoutLength, r"`train_dataset` \(WithoutLength\) has no length. Give it a `__len__`"),
    "empty_list": (list, r"`train_dataset` has no rows. Check the split name"),
    "empty": (lambda: datasets.Dataset.from_list(runs.rows()).select([]), r"`train_dataset` has no rows"),
    "splits": (
        lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(runs.rows())),
        r"`train_dataset` is a DatasetDict",
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_without_rows_to_choose_from_is_refused_at_construction(name, tmp_path):
    make, message = DATASETS[name]
    with pytest.raises(ValueError, match=message):
        RejectionSamplingTrainer(
            model=runs.bert(), args=runs.arguments(tmp_path), train_dataset=make(), data_collator=runs.collate
        )
