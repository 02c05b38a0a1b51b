"""Harness: data sets of every kind, chosen rows, the metric, tables, runs on disk."""

import json
import random
from types import SimpleNamespace

import datasets
import pytest

from experiments.harness.arguments import ExperimentError, load_metric
from experiments.harness.data import (
    choose_splits,
    choose_training_rows,
    class_names,
    flip_labels,
    imbalanced_rows,
    load_splits,
    load_task,
    minority_class,
    stratified_rows,
    with_class_ids,
)
from experiments.harness.reporting import aggregate, arm_table, mean_and_deviation, paired_table, write_results
from experiments.harness.runs import RunFolder

ROWS = datasets.Dataset.from_list([{"text": f"text {number}", "label": number % 2} for number in range(10)])


def write_folder(folder, write):
    """Writes train (rows 0 to 5) and test (6 to 9) with `write(rows, split)`."""
    folder.mkdir()
    write(ROWS.select(range(6)), "train")
    write(ROWS.select(range(6, 10)), "test")
    return str(folder)


# Data sets


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl", "saved"])
def test_a_folder_gives_a_split_per_file(tmp_path, kind):
    folder = tmp_path / "reviews"
    if kind == "saved":
        datasets.DatasetDict(train=ROWS.select(range(6)), test=ROWS.select(range(6, 10))).save_to_disk(str(folder))
    else:
        method = f"to_{kind.removesuffix('l')}"
        write_folder(folder, lambda rows, split: getattr(rows, method)(str(folder / f"{split}.{kind}")))
    splits = load_splits(str(folder))
    assert set(splits) == {"train", "test"}
    assert splits["train"]["text"][:] == [f"text {number}" for number in range(6)]
    assert splits["test"]["label"][:] == [0, 1, 0, 1]


def test_a_file_or_one_saved_split_is_the_training_split(tmp_path, monkeypatch):
    ROWS.to_csv(str(tmp_path / "all.csv"))
    ROWS.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setenv("REVIEWS", str(tmp_path))
    for source in ("$REVIEWS/all.csv", "$REVIEWS/saved"):
        splits = load_splits(source)
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 10}


def test_the_builtin_reviews_are_a_data_set():
    splits = load_splits("builtin")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4000, "test": 1000}
    assert splits["train"].column_names == ["text", "label", "phenomenon"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/absent.csv", "there is no .*absent.csv. Give an existing file or folder"),
        ("{tmp}/notes.txt", r"ends in '.txt'. Files may end in .parquet, .csv, .json, .jsonl"),
        ("{tmp}", "holds notes.txt. It must hold files named by split"),
        ("$ABSENT_VARIABLE/imdb", "names an environment variable that is not set"),
        ("nobody/nothing", "no local path and could not be read from the hub .*`--dataset builtin`"),
    ],
)
def test_a_data_set_that_is_not_there_is_named(tmp_path, source, message):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ExperimentError, match=message):
        load_splits(source.replace("{tmp}", str(tmp_path)))


def test_two_files_for_one_split_are_refused(tmp_path):
    ROWS.to_csv(str(tmp_path / "train.csv"))
    ROWS.to_json(str(tmp_path / "train.json"))
    with pytest.raises(ExperimentError, match=r"two files for one split: train.csv, train.json"):
        load_splits(str(tmp_path))


def test_a_fifth_is_held_out_and_no_row_is_on_both_sides():
    train, held_out = choose_splits(datasets.DatasetDict(train=ROWS), "train", "holdout", "label")
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted(held_out["label"]) == [0, 1]
    assert sorted(train["text"][:] + held_out["text"][:]) == sorted(ROWS["text"][:])
    with pytest.raises(
        ExperimentError, match=r"`--eval_split` 'test' is not in the data set. Use one of train, or 'holdout'"
    ):
        choose_splits(datasets.DatasetDict(train=ROWS), "train", "test", "label")


def test_labels_become_class_ids():
    words = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": ["good", "bad", "good"]})
    assert class_names(words, "label") == ["bad", "good"]
    assert with_class_ids(words, "label", ["bad", "good"])["labels"][:] == [1, 0, 1]
    named = words.cast_column("label", datasets.ClassLabel(names=["good", "bad"]))
    assert class_names(named, "label") == ["good", "bad"]
    assert with_class_ids(named, "label", ["good", "bad"])["labels"][:] == [0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 1], r"holds only \['1'\]"), ([0, 2], r"holds the classes \[0, 2\]; integers must count from 0 to 1")],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ExperimentError, match=message):
        class_names(datasets.Dataset.from_dict({"label": labels}), "label")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "review"}, "`--text_column` 'review' is not a column. Use one of text, label"),
        ({"label_column": "stars"}, "`--label_column` 'stars' is not a column"),
        ({"group_column": "genre"}, "`--group_column` 'genre' is not a column"),
    ],
)
def test_absent_columns_are_named(tmp_path, change, message):
    source = write_folder(tmp_path / "r", lambda rows, split: rows.to_csv(str(tmp_path / "r" / f"{split}.csv")))
    with pytest.raises(ExperimentError, match=message):
        load_task(task_options(source, **change))


def test_hidden_labels_are_refused(tmp_path):
    ROWS.to_csv(str(tmp_path / "train.csv"))
    datasets.Dataset.from_list([{"text": "a", "label": -1}]).to_csv(str(tmp_path / "test.csv"))
    with pytest.raises(ExperimentError, match="Row 0 has the label -1, which is none of the classes 0, 1"):
        load_task(task_options(str(tmp_path)))


def task_options(source, **change):
    columns = {"text_column": "text", "label_column": "label", "group_column": None}
    return SimpleNamespace(
        **(
            {"dataset": source, "train_split": "train", "eval_split": "test", "max_eval_samples": None}
            | columns
            | change
        )
    )


# Rows


def test_few_rows_keep_the_proportions_of_the_classes():
    labels = [0] * 70 + [1] * 30
    rows = stratified_rows(labels, 10, random.Random(0))
    assert rows == stratified_rows(labels, 10, random.Random(0)) == sorted(set(rows))
    assert [labels[row] for row in rows] == [0] * 7 + [1] * 3
    assert stratified_rows(labels, 1000, random.Random(0)) == list(range(100))


def test_an_imbalance_is_exact():
    labels = [0, 1] * 50
    rows = imbalanced_rows(labels, 0.1, 40, random.Random(0))
    assert sum(labels[row] for row in rows) == 4  # .1 of 40
    assert len(rows) == 40
    rows = imbalanced_rows(labels, 0.2, None, random.Random(0))
    assert (len(rows), sum(labels[row] for row in rows)) == (62, 12)  # 50 / .8 = 62.5 rows; round(.2 * 62) = 12
    with pytest.raises(ExperimentError, match="asks for 60 rows of class 1, and there are 50"):
        imbalanced_rows(labels, 0.6, 100, random.Random(0))
    with pytest.raises(ExperimentError, match=r"needs the two classes 0 and 1; the training rows have \[0, 1, 2\]"):
        imbalanced_rows([0, 1, 2], 0.5, None, random.Random(0))


def test_noise_changes_exactly_the_rows_it_says():
    labels = [number % 3 for number in range(40)]
    noisy, is_flipped = flip_labels(labels, 0.25, 3, random.Random(0))
    assert sum(is_flipped) == 10
    assert [new != old for new, old in zip(noisy, labels, strict=True)] == is_flipped
    assert set(noisy) == {0, 1, 2}


def test_the_rows_of_a_seed_are_the_same_for_every_arm():
    dataset = datasets.Dataset.from_dict({"text": [str(n) for n in range(100)], "labels": [0, 1] * 50})
    options = SimpleNamespace(max_train_samples=40, positive_fraction=0.25, label_noise=0.1)
    first, again, other = (choose_training_rows(dataset, 2, options, seed) for seed in (1, 1, 2))
    assert first.dataset["text"][:] == again.dataset["text"][:] != other.dataset["text"][:]
    assert first.dataset["labels"][:] == again.dataset["labels"][:]
    assert sum(first.is_flipped) == 4
    assert first.minority_label == 1
    true_labels = [int(text) % 2 for text in first.dataset["text"]]
    assert sum(true_labels) == 10
    changed = [new != old for new, old in zip(first.dataset["labels"], true_labels, strict=True)]
    assert changed == first.is_flipped
    assert minority_class([0, 1, 1, 0]) == 1


# The metric, tables, runs


def test_the_metric_agrees_with_a_sum_by_hand():
    metric = load_metric("classification_report")
    values = metric.compute(predictions=[0, 0, 0, 1, 0], references=[0, 0, 0, 1, 1], minority_label=1)
    # Class 0: precision 3/4, recall 1, F1 6/7. Class 1: precision 1, recall 1/2, F1 2/3. Mean 16/21.
    assert values == pytest.approx({"accuracy": 4 / 5, "macro_f1": 16 / 21, "minority_recall": 1 / 2})
    values = metric.compute(predictions=[0, 0], references=[0, 1], minority_label=1)
    assert values == pytest.approx({"accuracy": 1 / 2, "macro_f1": 1 / 3, "minority_recall": 0})
    with pytest.raises(ExperimentError, match=r"No metric 'nothing' .*There are: .*classification_report"):
        load_metric("nothing")


RESULTS = [
    {"arm": arm, "seed": seed, "metrics": {"accuracy": accuracy, "seconds": seconds}}
    for arm, seed, accuracy, seconds in (
        ("plain", 1, 0.80, 12.0), ("plain", 2, 0.90, 14.0), ("rejection", 1, 0.82, 20.0), ("rejection", 2, 0.86, None)
    )
]  # fmt: skip


def test_means_and_spreads_over_seeds(tmp_path):
    table = aggregate(RESULTS)
    # plain: mean .85, squared deviations .05^2 + .05^2 over n - 1 = 1, so sqrt(.005).
    assert table["plain"]["accuracy"] == pytest.approx((0.85, 0.005**0.5))
    assert table["rejection"]["seconds"] == (None, None)  # unknown for one seed
    assert mean_and_deviation([0.5]) == (0.5, None)
    assert arm_table(RESULTS).splitlines()[2].split() == "plain 2 0.850 +- 0.071 13.00 +- 1.41".split()
    # Pairs: +.02 and -.04, mean -.01, deviation sqrt(2 * .03^2) = .0424; higher on the first of two.
    difference = paired_table(RESULTS, "rejection", ["plain"], ["accuracy"], "points").splitlines()[2]
    assert difference.split() == "accuracy -1.0 +- 4.2 (1/2)".split()
    write_results(RESULTS, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    assert (tmp_path / "results.csv").read_text().splitlines()[:2] == ["arm,seed,accuracy,seconds", "plain,1,0.8,12.0"]


def test_a_run_is_found_again_only_with_its_own_options(tmp_path):
    folder = RunFolder(tmp_path / "plain" / "seed_1", {"rate": 0.1})
    folder.open(overwrite=False)
    assert (folder.result(), folder.checkpoint()) == (None, None)
    changed = RunFolder(folder.path, {"rate": 0.2})
    changed.open(overwrite=False)  # nothing is lost: no result and no checkpoint yet
    changed.finish({"arm": "plain"})
    changed.open(overwrite=False)
    assert changed.result() == {"arm": "plain"}
    with pytest.raises(ExperimentError, match=r"run with other options: rate was 0.2, is 0.1.*--overwrite_output_dir"):
        folder.open(overwrite=False)
    folder.open(overwrite=True)
    assert folder.result() is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ExperimentError, match="not empty and holds no run"):
        RunFolder(tmp_path / "mine", {}).open(overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
