"""Rewards from the completion's text alone or with its context: distinctness, repetition, copying, length, format."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from rsft_hf.rewards.templates import Completion, Prompt, whole_text

Unit = Literal["words", "characters", "tokens"]

UNITS = ("words", "characters", "tokens")

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class DistinctReward:
    """Distinct n-grams over all n-grams of the completion, in (0, 1]; None if it has no n-gram.

    It falls with the length of any text: compare like lengths, or use `RepetitionPenalty`. Li et al. 2016,
    arXiv:1510.03055.

    Raises:
        ValueError: If `n` < 1 or `unit` is unknown.
    """

    n: int = 2
    unit: Unit = "words"
    name: str = "distinct"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        _at_least_one("n", self.n)
        _known_unit(self.unit, UNITS)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns the share of each completion.

        Example:
            >>> DistinctReward(n=1)(prompts=["", ""], completions=["a b a b", ""])  # {a, b} of a, b, a, b
            [0.5, None]
        """
        grams = [ngrams(row, self.n) for row in _units(completions, columns, self.unit)]
        return [len(set(row)) / len(row) if row else None for row in grams]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of the completion that repeats the block right before it, in (-1, 0]: degenerate loops.

    A word that comes back elsewhere costs nothing, so the penalty does not grow with the length of sound text.

    Attributes:
        longest: Most units of a block that is looked for.

    Raises:
        ValueError: If `longest` < 1 or `unit` is unknown.
    """

    longest: int = 32
    unit: Unit = "words"
    name: str = "repetition"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        _at_least_one("longest", self.longest)
        _known_unit(self.unit, UNITS)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        """Returns the penalty of each completion, 0 if it is empty.

        Example:
            >>> RepetitionPenalty()(prompts=["", ""], completions=["a b a b", "so a so b"])  # the second "a b", 2 of 4
            [-0.5, 0.0]
        """
        rows = _units(completions, columns, self.unit)
        return [-_num_looped(row, self.longest) / len(row) if row else 0.0 for row in rows]


@dataclass(frozen=True)
class CopyPenalty:
    """Minus the share of the completion's n-grams that stand in its context, in [-1, 0]; case is ignored.

    Attributes:
        n: Shorter spans than this may be copied freely.
        column: The column with the context; None is the prompt.
        unit: "words", or "characters" where words have no spaces.

    Raises:
        ValueError: If `n` < 1 or `unit` is unknown.
    """

    n: int = 4
    column: str | None = None
    unit: Literal["words", "characters"] = "words"
    name: str = "copy"

    def __post_init__(self) -> None:
        _at_least_one("n", self.n)
        _known_unit(self.unit, UNITS[:2])

    @property
    def requires(self) -> frozenset[str]:
        """The column with the context, if it is not the prompt."""
        return frozenset() if self.column is None else frozenset({self.column})

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns the penalty of each completion, 0 if it has no n-gram, None if its context is None.

        Example:
            >>> CopyPenalty(n=2)(prompts=["A cat sat"], completions=["a cat ran"])  # "a cat" of "a cat", "cat ran"
            [-0.5]
        """
        contexts = prompts if self.column is None else columns[self.column]
        return [
            None if context is None else self._penalty(whole_text(context), whole_text(completion))
            for context, completion in zip(contexts, completions, strict=True)
        ]

    def _penalty(self, context: str, text: str) -> float:
        known = set(ngrams(_split(context.casefold(), self.unit), self.n))
        grams = ngrams(_split(text.casefold(), self.unit), self.n)
        return -sum(gram in known for gram in grams) / max(len(grams), 1) + 0.0  # never -0.0


@dataclass(frozen=True)
class LengthWindow:
    """1 inside [minimum, maximum], 0 from `ramp` units outside on, and a straight line between.

    Attributes:
        minimum: Shortest length that earns 1.
        maximum: Longest length that earns 1; None for no end.
        ramp: Width of the slopes; 0 makes them steps.
        unit: What is counted. A text of tokens includes the end of sequence.

    Raises:
        ValueError: If not 0 <= minimum <= maximum, `ramp` is negative or `unit` is unknown.
    """

    minimum: int = 0
    maximum: int | None = None
    ramp: int = 0
    unit: Unit = "words"
    name: str = "length"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.minimum < 0 or (self.maximum is not None and self.maximum < self.minimum):
            raise ValueError(f"`minimum`={self.minimum} and `maximum`={self.maximum} must be 0 <= minimum <= maximum.")
        if self.ramp < 0:
            raise ValueError(f"`ramp`={self.ramp} must not be negative.")
        _known_unit(self.unit, UNITS)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        """Returns the reward of each length, in [0, 1].

        Example:
            >>> LengthWindow(2, 3, ramp=2)(prompts=[""] * 3, completions=["a b", "a b c d", "a b c d e"])
            [1.0, 0.5, 0.0]
        """
        return [self._reward(len(row)) for row in _units(completions, columns, self.unit)]

    def _reward(self, length: int) -> float:
        outside = max(self.minimum - length, 0 if self.maximum is None else length - self.maximum, 0)
        return 1.0 if outside == 0 else max(0.0, 1 - outside / self.ramp) if self.ramp else 0.0


@dataclass(frozen=True)
class FormatReward:
    r"""1 if the pattern is found in the completion, else 0. Anchor it (`\A...\Z`) to hold for the whole text.

    Raises:
        ValueError: If `pattern` is no regular expression.
    """

    pattern: str | re.Pattern[str]
    name: str = "format"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`pattern`={self.pattern!r} is no regular expression: {error}.") from error

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        r"""Returns 1.0 or 0.0 for each completion.

        Example:
            >>> FormatReward(r"\A\d+\Z")(prompts=["", ""], completions=["42", "42 or so"])
            [1.0, 0.0]
        """
        return [float(re.search(self.pattern, whole_text(completion)) is not None) for completion in completions]


def ngrams(units: Sequence[Item], n: int) -> list[tuple[Item, ...]]:
    """Returns all runs of n units.

    Example:
        >>> ngrams("abc", 2)
        [('a', 'b'), ('b', 'c')]
    """
    return list(zip(*(units[start:] for start in range(n)), strict=False))


def _num_looped(units: Sequence[Hashable], longest: int) -> int:
    """Counts units of blocks that equal the block of the same length right before them."""
    looped: set[int] = set()
    for period in range(1, min(longest, len(units) // 2) + 1):
        run = 0
        for position in range(period, len(units)):
            run = run + 1 if units[position] == units[position - period] else 0
            if run >= period:  # a whole block came back
                looped.update(range(position - period + 1, position + 1) if run == period else (position,))
    return len(looped)


def _units(completions: list[Completion], columns: dict[str, Any], unit: Unit) -> list[Sequence[Hashable]]:
    if unit == "tokens":
        found = list(columns["completion_ids"])
        for completion, ids in zip(completions, found, strict=True):
            if not ids and (text := whole_text(completion)):
                raise ValueError(
                    f"The completion {text[:60]!r} has a text but no tokens, which this reward counts. Import with "
                    "`tokenizer=`, or count another unit."
                )
        return found
    return [_split(whole_text(completion), unit) for completion in completions]


def _split(text: str, unit: str) -> list[str]:
    return text.split() if unit == "words" else [letter for letter in text if not letter.isspace()]


def _known_unit(unit: str, known: Sequence[str]) -> None:
    if unit not in known:
        raise ValueError(f'`unit`="{unit}" must be one of {list(known)}.')


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}`={value} must be at least 1.")
