"""Rewards from references: chrF, BLEU, ROUGE, exact match, token F1, any `evaluate` metric; per sentence.

Values lie in [0, 1] for all but `MetricReward`, None where the reference is None. Of several references the best counts
(BLEU combines them). A corpus-level figure differs from the mean of these.
"""

import importlib
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rsft_hf.rewards.templates import Completion, Prompt, references_of, whole_text


@dataclass(frozen=True)
class ReferenceReward(ABC):
    """A reward that compares each completion with its reference: a string, a list of strings, or None.

    Attributes:
        reference_column: The column of the prompts that holds the references.
    """

    reference_column: str = "reference"

    @property
    def requires(self) -> frozenset[str]:
        """The column of the references."""
        return frozenset({self.reference_column})

    @abstractmethod
    def score(self, text: str, references: list[str]) -> float:
        """Returns the reward of one text against one or more references."""

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns one reward per completion, None where the reference is None.

        Raises:
            TypeError: If a reference is neither a string, a list of strings nor None.
        """
        references = references_of(columns, self.reference_column)
        return [
            None if expected is None else self.score(whole_text(completion), expected)
            for completion, expected in zip(completions, references, strict=True)
        ]


@dataclass(frozen=True)
class ChrfReward(ReferenceReward):
    """chrF of the sentence over 100, in [0, 1]: the overlap of its character n-grams. Popović 2015, W15-3049.

    Attributes:
        word_order: 2 adds words and pairs of words (chrF++).

    Raises:
        ImportError: If sacrebleu is not installed.
    """

    word_order: int = 0
    name: str = "chrf"
    _metric: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_metric", _sacrebleu().CHRF(word_order=self.word_order))

    def score(self, text: str, references: list[str]) -> float:
        """Returns the best chrF over the references."""
        return self._metric.sentence_score(text, references).score / 100


@dataclass(frozen=True)
class BleuReward(ReferenceReward):
    """BLEU of the sentence over 100, in [0, 1], of effective order and with exponential smoothing.

    Unsmoothed, a sentence without a common 4-gram would be 0. Chen & Cherry 2014, W14-3346.

    Attributes:
        tokenize: sacrebleu's tokenizer: "13a", or "zh", "ja-mecab", "ko-mecab" where words have no spaces.

    Raises:
        ImportError: If sacrebleu is not installed.
    """

    tokenize: str = "13a"
    name: str = "bleu"
    _metric: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        metric = _sacrebleu().BLEU(effective_order=True, smooth_method="exp", tokenize=self.tokenize)
        object.__setattr__(self, "_metric", metric)

    def score(self, text: str, references: list[str]) -> float:
        """Returns BLEU against all references at once."""
        return self._metric.sentence_score(text, references).score / 100


@dataclass(frozen=True)
class RougeReward(ReferenceReward):
    """ROUGE F-measure, in [0, 1]. Its tokenizer keeps a-z and 0-9 only: other alphabets count as nothing.

    Attributes:
        variant: "rougeL" (longest common subsequence), "rougeLsum" (by lines), or "rouge1", "rouge2" (n-grams).
        use_stemmer: Whether English endings are cut off before comparing.

    Raises:
        ImportError: If rouge-score is not installed.
        ValueError: If `variant` is no ROUGE type.
    """

    variant: str = "rougeL"
    use_stemmer: bool = False
    name: str = "rouge"
    _scorer: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", self.variant):
            raise ValueError(f'`variant`="{self.variant}" must be "rouge1" to "rouge9", "rougeL" or "rougeLsum".')
        try:
            scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer
        except ImportError as error:
            raise ImportError("RougeReward needs rouge-score: `pip install rsft-hf[rewards]`.") from error
        object.__setattr__(self, "_scorer", scorer([self.variant], use_stemmer=self.use_stemmer))

    def score(self, text: str, references: list[str]) -> float:
        """Returns the best F-measure over the references."""
        return float(self._scorer.score_multi(references, text)[self.variant].fmeasure)


@dataclass(frozen=True)
class ExactMatch(ReferenceReward):
    """1 if the completion is one of the references up to case, punctuation, articles and spaces, else 0."""

    name: str = "exact_match"

    def score(self, text: str, references: list[str]) -> float:
        """Returns 1.0 or 0.0.

        Example:
            >>> ExactMatch().score("The Eiffel-Tower.", ["eiffeltower", "Tour Eiffel"])
            1.0
        """
        return float(any(normalised_answer(text) == normalised_answer(reference) for reference in references))


@dataclass(frozen=True)
class TokenF1(ReferenceReward):
    """F1 of the completion's words and the reference's, in [0, 1], the best over the references, as for SQuAD."""

    name: str = "token_f1"

    def score(self, text: str, references: list[str]) -> float:
        """Returns 2 common / (words of the text + words of the reference).

        Example:
            >>> TokenF1().score("in Paris, France", ["Paris"])  # 2 * 1 / (3 + 1)
            0.5
        """
        return max(_word_f1(normalised_answer(text).split(), normalised_answer(r).split()) for r in references)


@dataclass(frozen=True)
class MetricReward:
    """One number of an `evaluate` metric, computed for each completion alone.

    Attributes:
        metric: A loaded metric, or what `evaluate.load` takes: the path of a metric's module works without the hub.
        key: Which number of the result, where there are several.
        reference_column: The column passed as `references`, entry by entry as it is.
        arguments: Passed to `compute`.

    Raises:
        ValueError: If there is no such metric; when called, if the result has several numbers and no `key`, or not that
            one.
    """

    metric: Any = field(repr=False)
    key: str | None = None
    reference_column: str = "reference"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        import evaluate

        if isinstance(self.metric, str):
            try:
                object.__setattr__(self, "metric", evaluate.load(self.metric))
            except (FileNotFoundError, ConnectionError) as error:
                raise ValueError(
                    f"`metric`={self.metric!r} is neither a folder with a metric's module nor to be had from the hub, "
                    "which may be out of reach (HF_HUB_OFFLINE). Give the path of such a folder, or a loaded metric."
                ) from error
        if not isinstance(self.metric, evaluate.EvaluationModule):
            raise TypeError(f"`metric` is a {type(self.metric).__name__}. Pass `evaluate.load(...)`, a path or a name.")
        if not self.name:
            object.__setattr__(self, "name", self.key or self.metric.name)

    @property
    def requires(self) -> frozenset[str]:
        """The column of the references."""
        return frozenset({self.reference_column})

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns the metric of each completion, None where the reference is None."""
        pairs = zip(completions, columns[self.reference_column], strict=True)
        return [None if expected is None else self._compute(whole_text(text), expected) for text, expected in pairs]

    def _compute(self, text: str, reference: Any) -> float:
        result = self.metric.compute(predictions=[text], references=[reference], **self.arguments)
        if self.key is None and len(result) != 1:
            raise ValueError(f"The metric returns {sorted(result)}. Say which one with `key`.")
        key = next(iter(result)) if self.key is None else self.key
        if key not in result:
            raise ValueError(f'`key`="{key}" is not among what the metric returns: {sorted(result)}.')
        value = result[key]
        return float(value[0] if isinstance(value, list) else value)  # some give a list with an entry per sentence


def normalised_answer(text: str) -> str:
    """Returns a text in lower case without punctuation, English articles and needless spaces.

    Source: the evaluation script of SQuAD, Rajpurkar et al. 2016, arXiv:1606.05250.

    Example:
        >>> normalised_answer("The  U.S.  Army")
        'us army'
    """
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected))  # 2 P R / (P + R), P = common / words, R = common / expected


def _sacrebleu() -> ModuleType:
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        raise ImportError("BleuReward and ChrfReward need sacrebleu: `pip install rsft-hf[rewards]`.") from error
