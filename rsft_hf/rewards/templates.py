"""Texts out of prompts and completions, plain or conversational, and references out of columns."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

Prompt = str | list[dict[str, Any]]

Completion = str | list[dict[str, Any]]


def whole_text(turns: Prompt | Completion) -> str:
    """Returns a plain text as it is, and the contents of a conversation's messages on a line each.

    Example:
        >>> whole_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]).split()
        ['Hi', 'Ho']
    """
    return turns if isinstance(turns, str) else "\n".join(_content(message) for message in turns)


def last_turn(turns: Prompt | Completion) -> str:
    """Returns a plain text as it is, and the content of a conversation's last message.

    Example:
        >>> last_turn([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}])
        'Ho'
    """
    return turns if isinstance(turns, str) else _content(turns[-1])


def references_of(columns: Mapping[str, Any], column: str) -> list[list[str] | None]:
    """Returns the references of each completion, None where there is none to compare with.

    Args:
        columns: The keywords a reward function was called with.
        column: The one that holds a string, a list of strings or None per completion.

    Raises:
        ValueError: If the column is absent.
        TypeError: If an entry is something else, say a number.
    """
    if column not in columns:
        raise ValueError(f"The column `{column}` is absent; there are {sorted(columns)}.")
    return [_references(value, column, index) for index, value in enumerate(columns[column])]


def _references(value: Any, column: str, index: int) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return list(value) or None
    raise TypeError(f"`{column}[{index}]` is {value!r}. A reference is a string, a list of strings, or None.")


def _content(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    # A message with images is a list of blocks; a call of a tool may have no content.
    return "".join(block["text"] for block in content or () if block.get("type") == "text")


def fields_of(*templates: str) -> frozenset[str]:
    """Returns the columns that templates name, besides what every reward function is given.

    Raises:
        ValueError: If a field has no name, as `{}`.

    Example:
        >>> sorted(fields_of("{prompt} {completion}", "{document}"))
        ['document']
    """
    fields = {name for template in templates for _, name, _, _ in Formatter().parse(template) if name is not None}
    if unnamed := sorted(field for field in fields if not field.isidentifier()):
        raise ValueError(f"The template {templates} has the fields {unnamed}. Name each: {{prompt}}, {{completion}}.")
    return frozenset(fields) - {"prompt", "last_turn", "completion"}


def render(
    template: str, prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> list[str | None]:
    """Returns the template filled in for each completion, None where a column that it names is None.

    `{prompt}` is the whole prompt, `{last_turn}` the last message of it, `{completion}` the completion, and any other
    field a column of the prompts.

    Example:
        >>> render("{document}: {completion}", ["p"], ["c"], {"document": ["d"]})
        ['d: c']
    """
    names = fields_of(template)
    texts: list[str | None] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        values = {name: columns[name][index] for name in names}
        if any(value is None for value in values.values()):
            texts.append(None)
            continue
        turns = {"prompt": whole_text(prompt), "last_turn": last_turn(prompt), "completion": whole_text(completion)}
        texts.append(template.format(**turns, **values))
    return texts
