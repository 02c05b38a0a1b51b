"""Validation of the training set, at construction of the trainer."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import runs
from rsft_hf import RejectionSamplingTrainer
from rsft_hf.training_set import dataset_fingerprint, example_lengths


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


class Noisy(torch.utils.data.Dataset):
    """Rows of which one word is drawn anew at each access, by an RNG of its own."""

    def __init__(self, label: int = 0) -> None:
        self.rng, self.label = np.random.default_rng(), label

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = [row] * 5
        ids[self.rng.integers(5)] = int(self.rng.integers(50))
        return {"input_ids": ids, "labels": self.label + row % 2}


def test_a_fingerprint_leaves_out_what_is_drawn_anew() -> None:
    assert dataset_fingerprint(Noisy()) == dataset_fingerprint(Noisy())
    assert dataset_fingerprint(Noisy(1)) != dataset_fingerprint(Noisy())


@pytest.mark.parametrize("label", [1, 1.0, True, None])
def test_a_fingerprint_sees_each_changed_label(label: Any) -> None:
    labels = [0 if label is None else type(label)(0)] * 500
    make = lambda labels: datasets.Dataset.from_dict({"text": ["a"] * 500, "labels": labels})  # noqa: E731
    changed = [*labels[:-2], label, labels[-1]]
    assert dataset_fingerprint(make(changed)) != dataset_fingerprint(make(labels)) == dataset_fingerprint(make(labels))


def test_a_length_column_that_holds_no_numbers_is_not_read() -> None:
    rows = {"input_ids": [[1, 2], [1]], "length": ["long", "short"]}
    assert example_lengths(datasets.Dataset.from_dict(rows), "length") == [2, 1]
    assert example_lengths(datasets.Dataset.from_dict(rows | {"length": [7, 9]}), "length") == [7, 9]
    assert example_lengths(datasets.Dataset.from_dict({"length": [None, 3]}), "length") is None
