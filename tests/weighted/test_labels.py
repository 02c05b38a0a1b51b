"""Labels as columns store them, and the classes that rules and warnings read from them."""

from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from rsft_hf.weighted.labels import class_labels, describe_labels, labels_per_row, stored_classes, stored_labels

TAGS = datasets.ClassLabel(names=["O", "B", "I"])


def column(values: list[Any], feature: Any = None) -> datasets.Dataset:
    features = None if feature is None else datasets.Features({"labels": feature})
    return datasets.Dataset.from_dict({"labels": values}, features=features)


@pytest.mark.parametrize(
    ("dataset", "kind", "values", "num_per_row"),
    [
        (column([3, 1, None, -100, 3]), "class", [3, 1, 3], [1, 1, 0, 0, 1]),
        (column([0, 2], TAGS), "class", [0, 2], [1, 1]),
        (column([True, False]), "class", [1, 0], [1, 1]),
        (column([[1, -100, 2], [], None, [-100], [0]]), "token", [1, 2, 0], [2, 0, 0, 0, 1]),
        (column([[0, 1], [2]], datasets.List(TAGS)), "token", [0, 1, 2], [2, 1]),
        (column([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), "multi_label", [0, 1, 1, 1, 0, 0], [3, 3]),
        (column([[0.0, 1.0], None], datasets.List(datasets.Value("float32"), 2)), "multi_label", [0, 1], [2, 0]),
        (column([5, 6, 7]).select([2, 0]), "class", [7, 5], [1, 1]),
        (column([4, 5]).with_transform(lambda batch: {"x": batch["labels"]}), "class", [4, 5], [1, 1]),
    ],
)
def test_stored_labels_by_hand(dataset, kind, values, num_per_row):
    labels = stored_labels(dataset, "labels")
    assert (labels.kind, labels.values.tolist(), labels.num_per_row.tolist()) == (kind, values, num_per_row)
    trainer = SimpleNamespace(label_names=["labels"])
    assert labels_per_row(trainer, dataset).tolist() == num_per_row
    assert (stored_classes(trainer, dataset) is None) == (kind != "class")


@pytest.mark.parametrize("values", [[0.5, 1.5], ["a", "b"], [[[1]], [[2]]], [["a"], ["b"]]])
def test_other_columns_hold_no_classes(values):
    assert stored_labels(column(values), "labels") is None
    assert labels_per_row(SimpleNamespace(label_names=None), column(values)).tolist() == [1, 1]


def test_class_names_come_from_the_feature():
    trainer = SimpleNamespace(label_names=None)
    assert tuple(describe_labels(trainer, column([0, 2], TAGS)).values()) == ("class", "labels", ["O", "B", "I"])
    assert tuple(describe_labels(trainer, column([[0], [2]], datasets.List(TAGS))).values()) == (
        "token",
        "labels",
        ["O", "B", "I"],
    )
    assert tuple(describe_labels(trainer, column([[0], [2]])).values()) == ("token", "labels", None)
    assert tuple(describe_labels(trainer, [{"labels": 1}]).values()) == ("class", "labels", None)


CLASSES = [3, 1, None, -100, 3]
FORMS = {
    "dataset": datasets.Dataset.from_dict({"labels": CLASSES}),
    "dataset_label": datasets.Dataset.from_dict({"x": range(5), "label": CLASSES}),
    "list": [{"x": 0, "labels": value} for value in CLASSES],
    "tensors": [{"labels": torch.tensor(-100 if value is None else value)} for value in CLASSES],
    "named": datasets.Dataset.from_dict({"labels": [0] * 5, "topic": CLASSES}),
}


@pytest.mark.parametrize("form", FORMS)
def test_class_labels(form):
    trainer = SimpleNamespace(label_names=["topic"] if form == "named" else ["labels"])
    labels = class_labels(trainer, FORMS[form])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [3, 1, -100, -100, 3]


@pytest.mark.parametrize("column", ["label", "fine_class"])
def test_class_labels_under_a_transform(column):
    """The stored column where there is one of a known name, else the rows as the transform returns them."""
    stored = datasets.Dataset.from_dict({"image": [[0.0]] * 4, column: [2, 0, 1, 2]})
    dataset = stored.with_transform(lambda batch: {"pixel_values": batch["image"], "labels": batch[column]})
    assert class_labels(SimpleNamespace(label_names=["labels"]), dataset).tolist() == [2, 0, 1, 2]


class Squares(torch.utils.data.Dataset):
    """A map-style data set that computes its rows: torch asks for `__getitem__` and `__len__`, not for an end."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> dict[str, int]:
        if row >= len(self):
            raise AssertionError(f"row {row} was asked for")  # without this line, a loop over the rows never ends
        return {"labels": row * row}


def test_class_labels_of_a_data_set_that_never_says_stop():
    assert class_labels(SimpleNamespace(label_names=None), Squares()).tolist() == [0, 1, 4, 9]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [3, 4]], r"ClassBalanced needs one integer class per row, but column 'labels'"),
        ([[1, 2], [3]], r"ClassBalanced needs one integer class per row, but column 'labels'"),
        ([0.5, 1.5], r"ClassBalanced needs one integer class per row, but column 'labels' holds 0.5 in row 0"),
        (["cat", "dog"], r"ClassBalanced needs one integer class per row, but column 'labels'"),
    ],
    ids=["sequences", "ragged_sequences", "floats", "strings"],
)
@pytest.mark.parametrize("make", [lambda rows: datasets.Dataset.from_list(rows), list], ids=["dataset", "list"])
def test_labels_that_are_no_classes_are_refused(values, message, make):
    with pytest.raises(ValueError, match=message):
        class_labels(SimpleNamespace(label_names=["labels"]), make([{"labels": value} for value in values]))


def test_a_missing_label_column_is_named():
    message = r"none of \['start', 'labels', 'label', 'label_ids'\] is in \['text'\]"
    for dataset in (datasets.Dataset.from_dict({"text": ["a"]}), [{"text": "a"}]):
        with pytest.raises(ValueError, match=message):
            class_labels(SimpleNamespace(label_names=["start"]), dataset)
