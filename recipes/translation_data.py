"""Sentences and their translations for a recipe: what is trained on, validated on and tested on.

In: a data set's name and the names of its columns and splits. Out: `datasets.Dataset` with the columns `prompt` and
`reference`. It knows no model and no reward.
"""

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

from recipes.builtin_numbers import make_numbers
from recipes.common import RecipeError
from recipes.data import load_splits

BUILTIN_TEST = "numbers"


@dataclass(frozen=True)
class TranslationTask:
    """The rows of one seed.

    Attributes:
        prompts: What candidates are generated for: `prompt`, and what the rewards need of it.
        labelled: What the supervised arm trains on: `prompt`, `reference`.
        val: Held out, for the curves and every choice.
        tests: Held out, for the last measurement: name -> rows.
    """

    prompts: Dataset
    labelled: Dataset
    val: Dataset
    tests: dict[str, Dataset]


class TranslationSource:
    """A data set from which every seed takes its own prompts; what is held out is the same for all.

    Args:
        options: Has `dataset`, `source_column`, `target_column`, `train_split`, `val_split`, `test_splits`,
            `max_train_samples`, `max_val_samples`, `max_test_samples` and `num_labelled`.

    Raises:
        RecipeError: If the data set, a split or a column is not what the options say.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        self._splits = None if options.dataset == "builtin" else load_splits(options.dataset)
        if self._splits is not None:
            wanted = {"train_split": [options.train_split], "val_split": [options.val_split],
                      "test_splits": options.test_splits}  # fmt: skip
            for option, names in wanted.items():
                _check_splits(self._splits, option, names)
            self._pairs = {name: self._read(name) for names in wanted.values() for name in names}

    def task(self, seed: int) -> TranslationTask:
        """Returns the rows of a seed.

        Raises:
            RecipeError: If there are fewer rows than the options ask for.
        """
        options = self.options
        if self._splits is None:
            return self._numbers(seed)
        train = self._pairs[options.train_split]
        chosen = sorted(random.Random(seed).sample(range(len(train)), _at_most(options.max_train_samples, len(train))))
        prompts = train.select(chosen)
        return TranslationTask(
            prompts=prompts,
            labelled=prompts,
            val=_first(self._pairs[options.val_split], options.max_val_samples),
            tests={name: _first(self._pairs[name], options.max_test_samples) for name in options.test_splits},
        )

    def _numbers(self, seed: int) -> TranslationTask:
        options = self.options
        sizes = {"num_prompts": options.max_train_samples, "num_val": options.max_val_samples,
                 "num_test": options.max_test_samples}  # fmt: skip
        try:
            rows = make_numbers(seed, options.num_labelled, **{key: size for key, size in sizes.items() if size})
        except ValueError as error:
            raise RecipeError(str(error)) from error
        splits = {
            name: Dataset.from_list(
                [{"prompt": row["en"], "reference": row["de"], "number": row["number"]} for row in found]
            )
            for name, found in rows.items()
        }
        # The numbers to train on come without their translation: the verifier is all that judges them.
        prompts = splits["train"].remove_columns("reference")
        return TranslationTask(prompts, splits["labelled"], splits["val"], {BUILTIN_TEST: splits["test"]})

    def _read(self, split: str) -> Dataset:
        dataset, options = self._splits[split], self.options
        for option in ("source_column", "target_column"):
            if vars(options)[option] not in dataset.column_names:
                raise RecipeError(
                    f"`--{option}` {vars(options)[option]!r} is not a column of {split}. Use one of "
                    f"{', '.join(dataset.column_names)}."
                )
        columns = {options.source_column: "prompt", options.target_column: "reference"}
        dataset = dataset.select_columns(list(columns)).rename_columns(columns)
        dataset = dataset.filter(lambda row: all(isinstance(text, str) and text.strip() for text in row.values()))
        if len(dataset) == 0:
            raise RecipeError(f"The split {split!r} has no row with a text and its translation.")
        return dataset


def _check_splits(splits: DatasetDict, option: str, wanted: list[str]) -> None:
    for name in wanted:
        if name not in splits:
            raise RecipeError(f"`--{option}` {name!r} is not in the data set. Use one of {', '.join(splits)}.")


def _at_most(wanted: int | None, available: int) -> int:
    return available if wanted is None else min(wanted, available)


def _first(dataset: Dataset, wanted: int | None) -> Dataset:
    return dataset.select(range(_at_most(wanted, len(dataset))))
