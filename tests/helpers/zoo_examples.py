"""Seven examples of different lengths for each kind of model in the zoo, and a collator for all of them."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 7
VOCABULARY = 40
FIRST_WORD = 3  # 0 pads, 1 begins and ends, 2 masks
LENGTHS = (5, 9, 3, 7, 4, 8, 6)
NUM_LABELS = 3
IGNORED = -100

Example = dict[str, Any]


def pad_and_stack(rows: list[Example]) -> dict[str, Tensor]:
    """Returns the rows as one batch: the last dimension padded on the right, labels by -100 and all else by zero."""
    batch = {}
    for column in rows[0]:
        values = [torch.as_tensor(row[column]) for row in rows]
        if values[0].dim():
            longest = max(value.shape[-1] for value in values)
            filler = IGNORED if column == "labels" else 0
            values = [F.pad(value, (0, longest - value.shape[-1]), value=filler) for value in values]
        batch[column] = torch.stack(values)
    return batch


def word_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]


def texts(label: Callable[[list[int], random.Random], Example]) -> list[Example]:
    """Returns seven texts, with the columns that `label` adds to each."""
    rng = random.Random(SEED)
    rows = []
    for length in LENGTHS:
        ids = word_ids(rng, length)
        rows.append({"input_ids": ids, "attention_mask": [1] * length, **label(ids, rng)})
    return rows


def classes() -> list[Example]:
    return texts(lambda ids, rng: {"labels": rng.randrange(NUM_LABELS)})


def tag_sets() -> list[Example]:
    """Texts with any number of the labels, as multi-label heads read them."""
    return texts(lambda ids, rng: {"labels": [float(rng.random() < 0.5) for _ in range(NUM_LABELS)]})


def ratings() -> list[Example]:
    return texts(lambda ids, rng: {"labels": rng.uniform(-2, 2)})


def continuations() -> list[Example]:
    """Texts whose first word is the prompt: no loss is taken there."""
    return texts(lambda ids, rng: {"labels": [IGNORED, *ids[1:]]})


def translations() -> list[Example]:
    return texts(lambda ids, rng: {"labels": [*word_ids(rng, len(ids) // 2 + 1), 1]})


def spans() -> list[Example]:
    def label(ids: list[int], rng: random.Random) -> Example:
        start = rng.randrange(len(ids))
        return {"start_positions": start, "end_positions": rng.randrange(start, len(ids))}

    return texts(label)


def choices() -> list[Example]:
    rng = random.Random(SEED)
    return [
        {
            "input_ids": [word_ids(rng, length) for _ in range(NUM_LABELS)],
            "attention_mask": [[1] * length] * NUM_LABELS,
            "labels": rng.randrange(NUM_LABELS),
        }
        for length in LENGTHS
    ]


def tags() -> list[Example]:
    def label(ids: list[int], rng: random.Random) -> Example:
        return {"labels": [IGNORED, *(rng.randrange(NUM_LABELS) for _ in ids[1:])]}

    return texts(label)


def masked() -> list[Example]:
    def label(ids: list[int], rng: random.Random) -> Example:
        hidden = set(rng.sample(range(len(ids)), 1 + len(ids) // 4))
        labels = [word if place in hidden else IGNORED for place, word in enumerate(ids)]
        return {"input_ids": [2 if place in hidden else word for place, word in enumerate(ids)], "labels": labels}

    return texts(label)


def images() -> list[Example]:
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": rng.randrange(NUM_LABELS)}
        for _ in LENGTHS
    ]


def recordings() -> list[Example]:
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    return [
        {
            "input_values": torch.randn(40 * length, generator=generator),
            "attention_mask": [1] * 40 * length,
            "labels": word_ids(rng, 1 + length // 3),
        }
        for length in LENGTHS
    ]


def without_labels(rows: list[Example], unlabelled: tuple[int, ...]) -> list[Example]:
    """Returns the rows with every label of the unlabelled ones replaced by -100."""
    blank = lambda labels: IGNORED if isinstance(labels, int) else [IGNORED] * len(labels)  # noqa: E731
    return [{**row, "labels": blank(row["labels"])} if i in unlabelled else row for i, row in enumerate(rows)]
