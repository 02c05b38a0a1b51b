"""Which rows a run trains on: fewer, imbalanced, mislabelled.

In: class ids and a `random.Random`. Out: rows in ascending order, and labels. The same seed gives the same choice, so
all arms of a seed read the same rows. It knows no data set's name, no model and no trainer.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value

from recipes.common import RecipeError


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
        RecipeError: If there are not exactly two classes, or one has too few rows.

    Example:
        >>> len(imbalanced_rows([0] * 9 + [1] * 9, 0.1, None, random.Random(0)))  # 9 of class 0, 1 of class 1
        10
    """
    by_class = {label: [row for row, value in enumerate(labels) if value == label] for label in sorted(set(labels))}
    if set(by_class) != {0, 1}:
        raise RecipeError(
            f"`--positive_fraction` needs the two classes 0 and 1; the training rows have {sorted(by_class)}."
        )
    if num_rows is None:
        num_rows = int(min(len(by_class[1]) / positive_fraction, len(by_class[0]) / (1 - positive_fraction)) + 1e-9)
    counts = {1: round(num_rows * positive_fraction)}
    counts[0] = num_rows - counts[1]
    for label, count in counts.items():
        if not 1 <= count <= len(by_class[label]):
            raise RecipeError(
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
        RecipeError: If there are too few rows of a class.
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
