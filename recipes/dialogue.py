"""Dialogues for a recipe: from rows of turns to contexts, good and bad responses, and the messages of a chat.

In: a data set in one of three forms. Its rows have `context` (a list of turns) and `positive_responses`, perhaps
`adversarial_negative_responses` and `random_negative_responses`; or `dialog` (a list of turns) or `messages` (a chat),
whose last turn is then the response. Out: a data set with the columns of the first form. It knows no model.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from recipes.common import RecipeError
from recipes.data import load_splits

CONTEXT, POSITIVE = "context", "positive_responses"
ADVERSARIAL, RANDOM = "adversarial_negative_responses", "random_negative_responses"
COLUMNS = (CONTEXT, POSITIVE, ADVERSARIAL, RANDOM)
FEATURES = Features({name: List(Value("string")) for name in COLUMNS})
HALVES = ("a", "b")

Message = dict[str, str]


def load_dialogues(source: str, split: str, split_option: str = "train_split") -> Dataset:
    """Returns the dialogues of a split, with the columns `context`, `positive_responses` and the two of negatives.

    Args:
        source: What `recipes.data.load_splits` takes.
        split: Name of the split, or several joined by "+".
        split_option: Name of the option that named the split, for the error.

    Returns:
        Rows of four lists of strings; where the data set has no negatives, their lists are empty.

    Raises:
        RecipeError: If a split is missing or has no usable row, or its columns are in none of the three forms.
    """
    splits = load_splits(source)
    parts = []
    for name in split.split("+"):
        if name not in splits:
            raise RecipeError(f"`--{split_option}` {name!r} is not in the data set. Use one of {', '.join(splits)}.")
        parts.append(_one_form(splits[name]).filter(is_usable))
        if len(parts[-1]) == 0:
            raise RecipeError(f"`--{split_option}` {name!r} has no row with a context and a response to it.")
    return concatenate_datasets(parts)


def is_usable(row: dict[str, Any]) -> bool:
    """Returns whether a row has a context and a response, none of whose turns is empty."""
    return all(len(row[name]) > 0 and all(turn.strip() for turn in row[name]) for name in (CONTEXT, POSITIVE))


def _one_form(dataset: Dataset) -> Dataset:
    columns = dataset.column_names
    if CONTEXT in columns and POSITIVE in columns:
        lists = {name: dataset[name][:] if name in columns else [[]] * len(dataset) for name in COLUMNS}
        return Dataset.from_dict(lists, features=FEATURES)
    readers: dict[str, Callable[[Any], list[str]]] = {
        "dialog": list,
        "messages": lambda messages: [message["content"] for message in messages if message["role"] != "system"],
    }
    for column, turns_of in readers.items():
        if column in columns:
            turns = [turns_of(value) for value in dataset[column]]
            none: list[list[str]] = [[] for _ in turns]
            lists = {CONTEXT: [one[:-1] for one in turns], POSITIVE: [one[-1:] for one in turns]}
            return Dataset.from_dict({**lists, ADVERSARIAL: none, RANDOM: none}, features=FEATURES)
    raise RecipeError(
        f"The data set has the columns {', '.join(columns)}. Dialogues need `{CONTEXT}` and `{POSITIVE}`, or `dialog`, "
        "or `messages`. Rename yours."
    )


def half_of(dialogues: Dataset, half: str) -> Dataset:
    """Returns one half of the dialogues, the same rows whatever their order; "all" is both halves.

    Rows with one first turn share a half: they are parts of one conversation, and halves must not overlap.
    """
    if half == "all":
        return dialogues
    wanted = HALVES.index(half)
    return dialogues.filter(lambda row: zlib.crc32(row[CONTEXT][0].strip().lower().encode()) % 2 == wanted)


def sample_rows(dialogues: Dataset, num_rows: int | None, seed: int) -> Dataset:
    """Returns so many rows chosen by the seed, in the order of the data set; all where there are fewer, or None."""
    if num_rows is None or num_rows >= len(dialogues):
        return dialogues
    return dialogues.select(sorted(random.Random(seed).sample(range(len(dialogues)), num_rows)))


def as_messages(turns: Sequence[str], max_turns: int | None = None) -> list[Message]:
    """Returns the last turns as a chat that the assistant is to go on with: roles alternate, the last is the user's.

    A chat template may refuse a chat that the assistant begins. With `max_turns` odd, the user begins every chat that
    is cut; without a cut, a context with an even number of turns is begun by the assistant.

    Example:
        >>> [message["role"] for message in as_messages(["Hi!", "Hello.", "How are you?"])]
        ['user', 'assistant', 'user']
    """
    kept = list(turns) if max_turns is None else list(turns)[-max_turns:]
    return [
        {"role": "user" if (len(kept) - number) % 2 else "assistant", "content": turn.strip()}
        for number, turn in enumerate(kept)
    ]


def judged_responses(dialogues: Dataset, seed: int, most_per_kind: int | None = None) -> list[dict[str, Any]]:
    """Returns one row per context and response: `messages` (the response last), `kind`, `label` and `context_id`.

    A context without random negatives is given as many as it has positive responses: those of other contexts, so that
    nothing but the context tells them from good ones.

    Args:
        dialogues: What `load_dialogues` returned.
        seed: Of the negatives, and of the choice among responses.
        most_per_kind: Keep so many responses of each kind and context, chosen by the seed; None keeps all.

    Returns:
        Rows with `kind` "positive", "adversarial" or "random", `label` 1.0 for positive and 0.0 for the others.
    """
    kinds = {"positive": POSITIVE, "adversarial": ADVERSARIAL, "random": RANDOM}
    everyone = [response for responses in dialogues[POSITIVE] for response in responses]
    generator = random.Random(seed)
    rows = []
    for number, dialogue in enumerate(dialogues):
        responses = {kind: dialogue[name] for kind, name in kinds.items()}
        own = responses["positive"]
        if not responses["random"]:
            drawn = generator.sample(everyone, min(len(everyone), 2 * len(own)))
            responses["random"] = [text for text in drawn if text not in own][: len(own)]
        context = as_messages(dialogue[CONTEXT])
        for kind, texts in responses.items():
            kept = texts if most_per_kind is None else generator.sample(texts, min(len(texts), most_per_kind))
            label = float(kind == "positive")
            rows += [
                {"messages": [*context, {"role": "assistant", "content": text}], "kind": kind, "label": label,
                 "context_id": number}
                for text in kept
            ]  # fmt: skip
    return rows
