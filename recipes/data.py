"""Labelled texts for a recipe: found by name or path, split, labels made class ids.

In: a data set's name and the names of its columns. Out: `datasets.Dataset` splits with an integer column `labels`.
Which rows of them are trained on, `selection.py` says; it knows no model and no trainer.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from recipes.builtin_reviews import make_reviews
from recipes.common import RecipeError
from recipes.selection import stratified_rows

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
        RecipeError: If the data set, a split, a column or a label is not what the options say.
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
            raise RecipeError(_missing_column("group_column", options.group_column, evaluation))
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
        RecipeError: If nothing is found there.
    """
    if source == "builtin":
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in make_reviews().items()})
    path = Path(os.path.expandvars(source)).expanduser()
    if path.is_file():
        return DatasetDict({"train": _load_file(path)})
    if path.is_dir():
        return _load_folder(path)
    if "$" in str(path):
        raise RecipeError(
            f"`--dataset` {source!r} names an environment variable that is not set. Set it, or write the path."
        )
    if path.suffix in BUILDERS or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise RecipeError(f"`--dataset` {source!r}: there is no {path.absolute()}. Give an existing file or folder.")
    try:
        return load_dataset(source)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            f"`--dataset` {source!r} is no local path and could not be read from the hub ({reason}). Give a file or "
            "folder, or `--dataset builtin`, which needs no network."
        ) from error


def _load_file(path: Path) -> Dataset:
    if path.suffix not in BUILDERS:
        raise RecipeError(f"`--dataset` {path} ends in {path.suffix!r}. Files may end in {', '.join(BUILDERS)}.")
    return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")


def _load_folder(path: Path) -> DatasetDict:
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(str(path))
    if (path / "state.json").is_file():
        return DatasetDict({"train": load_from_disk(str(path))})
    files = sorted(file for file in path.iterdir() if file.suffix in BUILDERS)
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise RecipeError(
            f"`--dataset` {path} holds {found}. It must hold files named by split, such as train.parquet and "
            f"test.parquet (or {', '.join(list(BUILDERS)[1:])}), or be a folder written by `save_to_disk`."
        )
    if len({file.stem for file in files}) < len(files):
        raise RecipeError(f"`--dataset` {path} has two files for one split: {', '.join(file.name for file in files)}.")
    return DatasetDict({file.stem: _load_file(file) for file in files})


def choose_splits(splits: DatasetDict, train_split: str, eval_split: str, label_column: str) -> tuple[Dataset, Dataset]:
    """Returns the rows to train and to evaluate on; "holdout" takes a fifth of the training rows, always the same ones.

    Raises:
        RecipeError: If a split is missing or empty.
    """
    for option, name in (("train_split", train_split), ("eval_split", eval_split)):
        if name != HOLDOUT and name not in splits:
            remedy = "" if option == "train_split" else ", or 'holdout' to hold out a fifth of the training rows"
            raise RecipeError(f"`--{option}` {name!r} is not in the data set. Use one of {', '.join(splits)}{remedy}.")
        if name != HOLDOUT and len(splits[name]) == 0:
            raise RecipeError(f"`--{option}` {name!r} has no rows.")
    train = splits[train_split]
    if eval_split != HOLDOUT:
        return train, splits[eval_split]
    if label_column not in train.column_names:
        raise RecipeError(_missing_column("label_column", label_column, train))
    held_out = stratified_rows(train[label_column], round(HOLDOUT_FRACTION * len(train)), random.Random(0))
    kept = sorted(set(range(len(train))) - set(held_out))
    return train.select(kept), train.select(held_out)


def check_columns(dataset: Dataset, text_column: str, label_column: str) -> None:
    """Raises RecipeError if a column is missing, or a row has no text."""
    for option, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            raise RecipeError(_missing_column(option, column, dataset))
    for row, text in enumerate(dataset[text_column]):
        if not isinstance(text, str):
            raise RecipeError(f"Row {row} has {text!r} in `{text_column}`; every row needs a text. Remove such rows.")


def _missing_column(option: str, column: str, dataset: Dataset) -> str:
    return f"`--{option}` {column!r} is not a column. Use one of {', '.join(dataset.column_names)}."


def class_names(train: Dataset, label_column: str) -> list[str]:
    """Returns the name of every class, in the order of the class ids.

    Integers must count from 0; other values are sorted and numbered.

    Raises:
        RecipeError: If there are fewer than two classes, or integers with gaps.
    """
    feature, values = train.features[label_column], set(train[label_column])
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if len(values) < 2:
        raise RecipeError(
            f"`{label_column}` holds only {sorted(map(str, values))}: training a classifier needs two classes."
        )
    if all(isinstance(value, int) for value in values):
        if values != set(range(len(values))):
            raise RecipeError(
                f"`{label_column}` holds the classes {sorted(values)[:10]}; integers must count from 0 to "
                f"{len(values) - 1}. Renumber them, or write the labels as words."
            )
        return [str(value) for value in sorted(values)]
    return sorted(str(value) for value in values)


def with_class_ids(dataset: Dataset, label_column: str, names: Sequence[str]) -> Dataset:
    """Returns the data set with an integer column `labels` in place of its label column.

    Raises:
        RecipeError: If a row has a label that no training row has (-1 is how hidden test labels are written).
    """
    ids = {name: number for number, name in enumerate(names)}
    ids |= {number: number for number in range(len(names))} if not isinstance(dataset[0][label_column], str) else {}
    labels = []
    for row, value in enumerate(dataset[label_column]):
        if value not in ids:
            raise RecipeError(
                f"Row {row} has the label {value!r}, which is none of the classes {', '.join(names)}. Choose another "
                "`--eval_split` or `--label_column`, or remove such rows."
            )
        labels.append(ids[value])
    return dataset.remove_columns(label_column).add_column("labels", labels, feature=Value("int64"))
