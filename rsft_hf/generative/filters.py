"""Filters of single candidates, and keys for deduplication, applied before scoring.

A filtered candidate enters no maximum, quantile or envelope. `solution_equations` is the deduplication key of worked
solutions: their list of equations.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from rsft_hf.generative.candidates import Candidate

Key = Literal["exact", "normalised"]


class Filter(Protocol):
    """A rule on one candidate; its `repr` is what the store and the messages call it."""

    def __call__(self, candidate: Candidate) -> bool:
        """Returns True to keep the candidate."""
        ...


@dataclass(frozen=True)
class RejectTruncated:
    """Keeps what ended by itself: a completion cut off at the token limit teaches never to stop."""

    def __call__(self, candidate: Candidate) -> bool:
        """Returns whether the candidate ended with an end token or a stop string, or is a reference answer."""
        return candidate.finish_reason != "length"


@dataclass(frozen=True)
class RejectEmpty:
    """Keeps candidates with any text besides white space."""

    def __call__(self, candidate: Candidate) -> bool:
        """Returns whether there is text."""
        return bool(candidate.text.strip())


@dataclass(frozen=True)
class LengthRange:
    """Keeps completions of `min_tokens` to `max_tokens` tokens, both included, the end token counted.

    Attributes:
        min_tokens: At least 0.
        max_tokens: At least `min_tokens`; None is no limit.

    Raises:
        ValueError: If not 0 <= `min_tokens` <= `max_tokens`.
    """

    min_tokens: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < self.min_tokens):
            raise ValueError(
                f"`min_tokens`={self.min_tokens} and `max_tokens`={self.max_tokens} must satisfy 0 <= min <= max."
            )

    def __call__(self, candidate: Candidate) -> bool:
        """Returns whether the number of tokens is in the range."""
        length = len(_token_ids(candidate))
        return self.min_tokens <= length and (self.max_tokens is None or length <= self.max_tokens)


@dataclass(frozen=True)
class RejectRepetition:
    """Keeps completions whose tokens do not go round in circles.

    The share of repeated n-grams is 1 - (different n-grams) / (n-grams) of the token ids: 0 where none comes twice. A
    completion with fewer than `ngram` tokens has none. The limits are choices of convenience, without a source.

    Attributes:
        ngram: Tokens per n-gram, >= 1.
        max_share: Largest share of repeated n-grams that is kept, in [0, 1]; None does not look at n-grams.
        max_run: Longest run of one token that is kept, >= 1; None does not look at runs.

    Raises:
        ValueError: If a number is out of range, or both limits are None.
    """

    ngram: int = 4
    max_share: float | None = 0.5
    max_run: int | None = None

    def __post_init__(self) -> None:
        if self.max_share is None and self.max_run is None:
            raise ValueError("`max_share` and `max_run` are both None, which rejects nothing. Give one of them.")
        if self.ngram < 1:
            raise ValueError(f"`ngram`={self.ngram} must be at least 1.")
        if self.max_share is not None and not 0 <= self.max_share <= 1:
            raise ValueError(f"`max_share`={self.max_share} must lie in [0, 1].")
        if self.max_run is not None and self.max_run < 1:
            raise ValueError(f"`max_run`={self.max_run} must be at least 1.")

    def __call__(self, candidate: Candidate) -> bool:
        """Returns whether neither limit is passed."""
        ids = _token_ids(candidate)
        if self.max_run is not None and _longest_run(ids) > self.max_run:
            return False
        num_grams = len(ids) - self.ngram + 1
        if self.max_share is None or num_grams < 1:
            return True
        num_different = len({tuple(ids[i : i + self.ngram]) for i in range(num_grams)})
        return 1 - num_different / num_grams <= self.max_share + 1e-9


@dataclass(frozen=True)
class MatchesPattern:
    """Keeps texts in which the regular expression is found, or is not.

    Attributes:
        pattern: Regular expression of Python's `re`; flags go inside, as in "(?is)...".
        must_match: False keeps the texts without a match.
        full: Whether the expression must match the whole text instead of a part.

    Raises:
        TypeError: If `pattern` is no string.
        ValueError: If `pattern` is no regular expression.
    """

    pattern: str
    must_match: bool = True
    full: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"`pattern` must be a string, got {self.pattern!r}. Write flags inside: '(?i)...'.")
        try:
            _compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`pattern`={self.pattern!r} is no regular expression: {error}.") from error

    def __call__(self, candidate: Candidate) -> bool:
        """Returns whether the text matches as asked."""
        pattern = _compile(self.pattern)
        found = pattern.fullmatch(candidate.text) if self.full else pattern.search(candidate.text)
        return (found is not None) == self.must_match


@dataclass(frozen=True, repr=False)
class Satisfies:
    """Keeps texts of which a function of yours says so, such as that they parse.

    Attributes:
        predicate: Called with the text; True keeps it.
        name: What the store calls it.

    Raises:
        TypeError: If `predicate` cannot be called.
        ValueError: If `name` is empty.
    """

    predicate: Callable[[str], bool]
    name: str

    def __post_init__(self) -> None:
        if not callable(self.predicate):
            raise TypeError(f"`predicate` must be a function of the text, got {self.predicate!r}.")
        if not self.name:
            raise ValueError("`name` is empty. Name the filter, so that the store can say who rejected a candidate.")

    def __call__(self, candidate: Candidate) -> bool:
        """Returns the value of the predicate for the text."""
        return bool(self.predicate(candidate.text))

    def __repr__(self) -> str:
        """The name, as a function has no readable one."""
        return f"Satisfies({self.name})"


@dataclass(frozen=True)
class Deduplicate:
    """Says which candidates of a prompt count as the same, of which one is kept.

    Attributes:
        key: "exact" compares texts; "normalised" compares them without case, punctuation, white space and the forms
            that Unicode holds equal (NFKC) - it also takes "2 - 1" for "2 1", so compare calculations otherwise; a
            function maps the text to anything hashable, or to None for a candidate that is never a duplicate, such as
            `solution_equations`.
        across_rounds: Whether candidates of earlier rounds count too.

    Raises:
        TypeError: If `key` is neither a function nor a name.
        ValueError: If `key` is another name.
    """

    key: Key | Callable[[str], Hashable] = "exact"
    across_rounds: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.key, str) and self.key not in get_args(Key):
            raise ValueError(f"`key`={self.key!r} must be 'exact', 'normalised' or a function of the text.")
        if not isinstance(self.key, str) and not callable(self.key):
            raise TypeError(f"`key` must be 'exact', 'normalised' or a function of the text, got {self.key!r}.")

    def key_of(self, candidate: Candidate) -> Hashable | None:
        """Returns the key of the candidate: candidates of a prompt with equal keys are the same; None equals nothing.

        Raises:
            TypeError: If the function returns what cannot be hashed.
        """
        if self.key == "exact":
            return candidate.text
        if self.key == "normalised":
            return _normalise(candidate.text)
        found: Any = self.key(candidate.text)
        try:
            hash(found)
        except TypeError as error:
            raise TypeError(
                f"The `key` of Deduplicate returned {found!r}, which cannot be hashed. Return a string or a tuple."
            ) from error
        return found


def _token_ids(candidate: Candidate) -> list[int]:
    if not candidate.token_ids and candidate.text:
        raise ValueError(
            f"The completion {candidate.text[:60]!r} has a text but no tokens, which this filter reads. Import with "
            "them: import_candidates(..., tokenizer=...)."
        )
    return candidate.token_ids


def _longest_run(items: list[int]) -> int:
    longest = run = 0
    for position, item in enumerate(items):
        run = run + 1 if position and item == items[position - 1] else 1
        longest = max(longest, run)
    return longest


@functools.lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = "".join(" " if unicodedata.category(mark).startswith("P") else mark for mark in folded).split()
    return " ".join(words or folded.split())  # "?!" and "..." stay different


_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)%?"

# At most a few signs and brackets, so that a line of dashes is not tried from each of its dashes to its end.
_TERM = rf"(?:[-(]\s*){{0,6}}{_NUMBER}(?:\s*\))*"

_EXPRESSION = rf"{_TERM}(?:\s*[-+*/^]\s*{_TERM})*"

_EQUATION = re.compile(rf"(?<![\w.]){_EXPRESSION}(?:\s*=\s*{_EXPRESSION})+")

_ANNOTATION = re.compile(r"<<(.*?)>>")

# The signs for times, middle dot, divided by, minus and en dash; currencies say nothing of the reasoning.
_SPELLINGS = str.maketrans("\u00d7\u00b7\u00f7\u2212\u2013", "**/--", "$\u20ac\u00a3")


def solution_equations(text: str) -> tuple[str, ...] | None:
    r"""Returns the equations of a solution in their order, without spaces, or None if it has none.

    Two solutions with the same equations reason alike, whatever their words: RFT keeps one of them, Yuan et al. 2023,
    arXiv:2308.01825. Where calculations are annotated as in GSM8K, `<<48/2=24>>`, only the annotations are read.
    Currency signs and thousands separators are dropped. An equation with words between its numbers, "3 apples + 2
    apples = 5", is not seen.

    Args:
        text: A worked solution.

    Returns:
        The key for `Deduplicate(key=solution_equations)`; None, which is never a duplicate, without equations.

    Example:
        >>> solution_equations("She sold 48 / 2 = 24 clips in May, and 48 + 24 = $72 in all.")
        ('48/2=24', '48+24=72')
        >>> solution_equations("She sold 48/2 = <<48/2=24>>24 clips.")
        ('48/2=24',)
    """
    annotations = _ANNOTATION.findall(text)
    source = "\n".join(annotations) if annotations else text
    source = re.sub(r"(?<=\d),(?=\d{3}\b)", "", source.translate(_SPELLINGS))
    source = re.sub(r"(?<=\d)\s+[xX]\s+(?=[\d(.])", "*", source)
    equations = tuple(_unwrap(re.sub(r"\s+", "", found)) for found in _EQUATION.findall(source))
    return equations or None


def _unwrap(equation: str) -> str:
    """The equation without brackets of the sentence around it: "(2+3=5)"."""
    left = equation.split("=", 1)[0]
    while left.count("(") > left.count(")"):
        left, equation = left[1:], equation[1:].removesuffix(")")
    return equation
