"""Labelled texts for classification: loading, splits, class ids, and the training rows of a seed.

Input: the name or path of a data set and its columns. Output: `datasets.Dataset` splits with an integer column
`labels`. Training rows can be made fewer, imbalanced or mislabelled; the same seed gives the same rows to every arm.
"""

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from experiments.builtin.reviews import make_reviews
from experiments.harness.arguments import ExperimentError

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}

HOLDOUT = "holdout"

HOLDOUT_FRACTION = 0.2


@dataclass(frozen=True)
class TextTask:
    """Texts (`text`) with class ids (`labels`), and what the ids mean.

    Attributes:
        train: All rows that may be trained on.
        evaluation: The rows to evaluate on.
        class_names: Name of every class, by its id.
        groups: Group of every evaluation row, None where none was asked for.
    """

    train: Dataset
    evaluation: Dataset
    class_names: list[str]
    groups: list[str] | None


def load_task(options: Any) -> TextTask:
    """Returns the texts to train and evaluate on.

    Args:
        options: Has `dataset`, `train_split`, `eval_split`, `text_column`, `label_column`, `group_column` and
            `max_eval_samples`.

    Raises:
        ExperimentError: If the data set, a split, a column or a label is not what the options say.
    """
    splits = load_splits(options.dataset)
    train, evaluation = choose_splits(splits, options.train_split, options.eval_split, options.label_column)
    for dataset in (train, evaluation):
        check_columns(dataset, options.text_column, options.label_column)
    names = class_names(train, options.label_column)
    chosen = stratified_rows(evaluation[options.label_column][:], options.max_eval_samples, random.Random(0))
    evaluation = evaluation.select(chosen)
    groups = None
    if options.group_column is not None:
        if options.group_column not in evaluation.column_names:
            raise ExperimentError(_missing_column("group_column", options.group_column, evaluation))
        groups = [str(value) for value in evaluation[options.group_column]]
    columns = (options.text_column, options.label_column)
    return TextTask(*(_encode(dataset, *columns, names) for dataset in (train, evaluation)), names, groups)


def _encode(dataset: Dataset, text_column: str, label_column: str, names: Sequence[str]) -> Dataset:
    dataset = with_class_ids(dataset.select_columns([text_column, label_column]), label_column, names)
    return dataset if text_column == "text" else dataset.rename_column(text_column, "text")


def load_splits(source: str) -> DatasetDict:
    """Returns the splits of a data set by name.

    Args:
        source: "builtin", a file (Parquet, CSV, JSON, JSONL: the split "train"), a folder of such files named by split,
            a folder written by `save_to_disk`, or the name of a data set on the hub. `~` and `$NAMES` are expanded.

    Raises:
        ExperimentError: If nothing is found there.
    """
    if source == "builtin":
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in make_reviews().items()})
    path = Path(os.path.expandvars(source)).expanduser()
    if path.is_file():
        return DatasetDict({"train": _load_file(path)})
    if path.is_dir():
        return _load_folder(path)
    if "$" in str(path):
        raise ExperimentError(
            f"`--dataset` {source!r} names an environment variable that is not set. Set it, or write the path."
        )
    if path.suffix in BUILDERS or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise ExperimentError(
            f"`--dataset` {source!r}: there is no {path.absolute()}. Give an existing file or folder."
        )
    try:
        return load_dataset(source)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExperimentError(
            f"`--dataset` {source!r} is no local path and could not be read from the hub ({reason}). Give a file or "
            "folder, or `--dataset builtin`, which needs no network."
        ) from error


def _load_file(path: Path) -> Dataset:
    if path.suffix not in BUILDERS:
        raise ExperimentError(f"`--dataset` {path} ends in {path.suffix!r}. Files may end in {', '.join(BUILDERS)}.")
    return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")


def _load_folder(path: Path) -> DatasetDict:
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    if (path / "state.json").is_file():
        return DatasetDict({"train": load_from_disk(str(path))})
    files = sorted(file for file in path.iterdir() if file.suffix in BUILDERS)
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ExperimentError(
            f"`--dataset` {path} holds {found}. It must hold files named by split, such as train.parquet and "
            f"test.parquet (or {', '.join(list(BUILDERS)[1:])}), or be a folder written by `save_to_disk`."
        )
    if len({file.stem for file in files}) < len(files):
        raise ExperimentError(
            f"`--dataset` {path} has two files for one split: {', '.join(file.name for file in files)}."
        )
    return DatasetDict({file.stem: _load_file(file) for file in files})


def choose_splits(splits: DatasetDict, train_split: str, eval_split: str, label_column: str) -> tuple[Dataset, Dataset]:
    """Returns the rows to train and to evaluate on; "holdout" takes a fifth of the training rows, always the same ones.

    Raises:
        ExperimentError: If a split is missing or empty.
    """
    for option, name in (("train_split", train_split), ("eval_split", eval_split)):
        if name != HOLDOUT and name not in splits:
            remedy = "" if option == "train_split" else ", or 'holdout' to hold out a fifth of the training rows"
            raise ExperimentError(
                f"`--{option}` {name!r} is not in the data set. Use one of {', '.join(splits)}{remedy}."
            )
        if name != HOLDOUT and len(splits[name]) == 0:
            raise ExperimentError(f"`--{option}` {name!r} has no rows.")
    train = splits[train_split]
    if eval_split != HOLDOUT:
        return train, splits[eval_split]
    if label_column not in train.column_names:
        raise ExperimentError(_missing_column("label_column", label_column, train))
    held_out = stratified_rows(train[label_column], round(HOLDOUT_FRACTION * len(train)), random.Random(0))
    kept = sorted(set(range(len(train))) - set(held_out))
    return train.select(kept), train.select(held_out)


def check_columns(dataset: Dataset, text_column: str, label_column: str) -> None:
    """Raises ExperimentError if a column is missing, or a row has no text."""
    for option, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            raise ExperimentError(_missing_column(option, column, dataset))
    for row, text in enumerate(dataset[text_column]):
        if not isinstance(text, str):
            raise ExperimentError(
                f"Row {row} has {text!r} in `{text_column}`; every row needs a text. Remove such rows."
            )


def _missing_column(option: str, column: str, dataset: Dataset) -> str:
    return f"`--{option}` {column!r} is not a column. Use one of {', '.join(dataset.column_names)}."


def class_names(train: Dataset, label_column: str) -> list[str]:
    """Returns the name of every class, in the order of the class ids.

    Integers must count from 0; other values are sorted and numbered.

    Raises:
        ExperimentError: If there are fewer than two classes, or integers with gaps.
    """
    feature, values = train.features[label_column], set(train[label_column])
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if len(values) < 2:
        raise ExperimentError(
            f"`{label_column}` holds only {sorted(map(str, values))}: training a classifier needs two classes."
        )
    if all(isinstance(value, int) for value in values):
        if values != set(range(len(values))):
            raise ExperimentError(
                f"`{label_column}` holds the classes {sorted(values)[:10]}; integers must count from 0 to "
                f"{len(values) - 1}. Renumber them, or write the labels as words."
            )
        return [str(value) for value in sorted(values)]
    return sorted(str(value) for value in values)


def with_class_ids(dataset: Dataset, label_column: str, names: Sequence[str]) -> Dataset:
    """Returns the data set with an integer column `labels` in place of its label column.

    Raises:
        ExperimentError: If a row has a label that no training row has (-1 is how hidden test labels are written).
    """
    ids = {name: number for number, name in enumerate(names)}
    ids |= {number: number for number in range(len(names))} if not isinstance(dataset[0][label_column], str) else {}
    labels = []
    for row, value in enumerate(dataset[label_column]):
        if value not in ids:
            raise ExperimentError(
                f"Row {row} has the label {value!r}, which is none of the classes {', '.join(names)}. Choose another "
                "`--eval_split` or `--label_column`, or remove such rows."
            )
        labels.append(ids[value])
    return dataset.remove_columns(label_column).add_column("labels", labels, feature=Value("int64"))


def stratified_rows(labels: Sequence[int | str], num_rows: int | None, rng: random.Random) -> list[int]:
    """Returns `num_rows` rows, ascending, with the classes in the proportions of `labels` (largest remainders).

    Example:
        >>> rows = stratified_rows([0, 0, 0, 1, 1, 1], 4, random.Random(0))
        >>> [row < 3 for row in rows]
        [True, True, False, False]
    """
    if num_rows is None or num_rows >= len(labels):
        return list(range(len(labels)))
    by_class: dict[int | str, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    exact = {label: num_rows * len(rows) / len(labels) for label, rows in by_class.items()}
    counts = {label: int(share) for label, share in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (counts[label] - exact[label], str(label)))
    for label in by_remainder[: num_rows - sum(counts.values())]:
        counts[label] += 1
    return sorted(row for label in sorted(by_class, key=str) for row in rng.sample(by_class[label], counts[label]))


def imbalanced_rows(
    labels: Sequence[int], positive_fraction: float, num_rows: int | None, rng: random.Random
) -> list[int]:
    """Returns rows, ascending, of which the share `positive_fraction` has label 1.

    Args:
        labels: Class ids 0 and 1.
        positive_fraction: In (0, 1).
        num_rows: How many rows; as many as the data allow where None.
        rng: Draws the rows.

    Raises:
        ExperimentError: If there are not exactly two classes, or one has too few rows.

    Example:
        >>> len(imbalanced_rows([0] * 9 + [1] * 9, 0.1, None, random.Random(0)))  # 9 of class 0, 1 of class 1
        10
    """
    by_class = {label: [row for row, value in enumerate(labels) if value == label] for label in sorted(set(labels))}
    if set(by_class) != {0, 1}:
        raise ExperimentError(
            f"`--positive_fraction` needs the two classes 0 and 1; the training rows have {sorted(by_class)}."
        )
    if num_rows is None:
        num_rows = int(min(len(by_class[1]) / positive_fraction, len(by_class[0]) / (1 - positive_fraction)) + 1e-9)
    counts = {1: round(num_rows * positive_fraction)}
    counts[0] = num_rows - counts[1]
    for label, count in counts.items():
        if not 1 <= count <= len(by_class[label]):
            raise ExperimentError(
                f"`--positive_fraction` {positive_fraction} of {num_rows} rows asks for {count} rows of class {label}, "
                f"and there are {len(by_class[label])}. Change it, or lower `--max_train_samples`."
            )
    return sorted(row for label, count in counts.items() for row in rng.sample(by_class[label], count))


def flip_labels(
    labels: Sequence[int], fraction: float, num_classes: int, rng: random.Random
) -> tuple[list[int], list[bool]]:
    """Returns the labels with round(fraction N) of them changed to another class, and which rows those are.

    Example:
        >>> flip_labels([0, 0, 1, 1], 1.0, 2, random.Random(0))
        ([1, 1, 0, 0], [True, True, True, True])
    """
    flipped = set(rng.sample(range(len(labels)), round(fraction * len(labels))))
    noisy = [
        rng.choice([other for other in range(num_classes) if other != label]) if row in flipped else label
        for row, label in enumerate(labels)
    ]
    return noisy, [row in flipped for row in range(len(labels))]


def minority_class(labels: Sequence[int]) -> int:
    """Returns the class with the fewest rows; of several the highest, which is "positive" in balanced binary data."""
    counts = Counter(labels)
    return min(sorted(counts, reverse=True), key=lambda label: counts[label])


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one seed, which of their labels were changed, and the class with the fewest rows before that."""

    dataset: Dataset
    is_flipped: list[bool]
    minority_label: int


def choose_training_rows(dataset: Dataset, num_classes: int, options: Any, seed: int) -> TrainingRows:
    """Returns the rows a seed trains on: fewer, imbalanced, mislabelled, as the options say.

    Args:
        dataset: Rows with class ids in the column `labels`.
        num_classes: How many classes there are.
        options: Has `max_train_samples`, `positive_fraction` and `label_noise`.
        seed: Fixes the choice.

    Raises:
        ExperimentError: If there are too few rows of a class.
    """
    rng = random.Random(seed)
    labels = dataset["labels"][:]
    if options.positive_fraction is None:
        rows = stratified_rows(labels, options.max_train_samples, rng)
    else:
        rows = imbalanced_rows(labels, options.positive_fraction, options.max_train_samples, rng)
    true_labels = [labels[row] for row in rows]
    labels, is_flipped = flip_labels(true_labels, options.label_noise, num_classes, rng)
    chosen = dataset.select(rows).remove_columns("labels").add_column("labels", labels, feature=Value("int64"))
    return TrainingRows(chosen, is_flipped, minority_class(true_labels))
