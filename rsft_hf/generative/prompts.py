"""Prompts of a data set: text or messages, with the other columns of their rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

Prompt = str | list[dict[str, Any]]

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, and its other columns, by row.

    Attributes:
        dataset: Rows that are mappings, with a length and random access.
        column: Name of the column with the prompts.
    """

    dataset: Any
    column: str

    def __post_init__(self) -> None:
        if isinstance(self.dataset, datasets.Dataset) and not _is_transformed(self.dataset):
            vars(self).update(dataset=self.dataset.with_format(None))  # texts and lists, whatever tensors it gives

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, prompt_id: int) -> tuple[Prompt, dict[str, Any]]:
        """Returns a prompt and the other columns of its row.

        Arrow gives every message and tool the fields of all rows, null where it has none: these are dropped.
        """
        row = dict(self.dataset[prompt_id])
        prompt = _as_python(row.pop(self.column))
        if isinstance(prompt, list):
            prompt = [_without_nulls(message, kept=("content",)) for message in prompt]
            row |= {name: _without_nulls(_as_python(row[name])) for name in TEMPLATE_COLUMNS if name in row}
        return prompt, row


def template_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a row's columns hand to the chat template: `tools`, and the entries of `chat_template_kwargs`.

    Example:
        >>> template_arguments({"chat_template_kwargs": {"enable_thinking": False}, "tools": None, "topic": "sums"})
        {'enable_thinking': False}
    """
    tools = columns.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return dict(columns.get("chat_template_kwargs") or {}) | ({"tools": tools} if tools else {})


def message_text(content: str | list[dict[str, Any]] | None) -> str:
    """Returns the content of a message as text: its text parts in one, and nothing of null.

    Example:
        >>> message_text([{"type": "text", "text": "2 + "}, {"type": "text", "text": "2"}])
        '2 + 2'
    """
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def column_names(dataset: Any) -> list[str]:
    """Returns the names of a data set's columns: its own, or those of its first row where rows are made on access."""
    if isinstance(dataset, datasets.Dataset) and not _is_transformed(dataset):
        return list(dataset.column_names)
    if isinstance(dataset, datasets.IterableDataset):
        return list(dataset.column_names or ())
    first = dataset[0]
    return list(first) if isinstance(first, Mapping) else []


def _is_transformed(dataset: datasets.Dataset) -> bool:
    return dataset.format["type"] == "custom"


def _as_python(value: Any) -> Any:
    """NumPy's strings and arrays, and tuples, as texts and lists."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, np.str_) else value


def _without_nulls(value: Any, kept: tuple[str, ...] = ()) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None or name in kept}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value
