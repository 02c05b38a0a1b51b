"""From one choice of a server's reply to the tokens that were sampled, checked: what does not fit is refused or named.

The JSON of a choice enters; token ids, the reason of the end and, where the server gave them, log probabilities leave.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_LEAST = -9999.0  # what vLLM writes in place of -inf: no sampled token has it
_ROUNDING = 1e-4  # nats by which a certain token may pass probability 1


class UnusableChoice(Exception):
    """What came back is no candidate, and may be asked for again: it was aborted, or is empty."""


@dataclass(frozen=True)
class Answer:
    """A candidate as the server gave it.

    Attributes:
        token_ids: Sampled tokens, an end token included.
        finish_reason: "stop" or "length".
        log_probs: The server's number for each token, nats; None where it gave none that fit.
    """

    token_ids: list[int]
    finish_reason: str
    log_probs: list[float] | None


@dataclass(frozen=True)
class ReplyReader:
    """Reads choices.

    Attributes:
        tokenizer: The model's own; None where the server returns token ids.
        ends: Tokens that end an answer.
        stop_strings: Strings that do.
        vocabulary_size: Token ids lie below.
        with_log_probs: Whether log probabilities were asked for.
        warn: Called with what is suspicious.
    """

    tokenizer: PreTrainedTokenizerBase | None
    ends: tuple[int, ...]
    stop_strings: tuple[str, ...]
    vocabulary_size: int
    with_log_probs: bool
    warn: Callable[[str], None]

    def __call__(self, choice: Any, limit: int) -> Answer:
        """Returns the candidate that a choice holds.

        Args:
            choice: One of the reply's `choices`.
            limit: The `max_tokens` that it was asked with.

        Raises:
            UnusableChoice: If it did not end by itself or at the limit, or has no tokens.
            RuntimeError: If it is no choice, or has more tokens than were asked for.
            ValueError: If its tokens are not those of the model's tokenizer.
        """
        if not isinstance(choice, dict):
            raise RuntimeError(f"The server's choice is no object: {_short(choice)}. Is this a completions server?")
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise UnusableChoice(f"finish_reason={reason!r}")
        log_probs, ids = self._log_probs(choice), self._token_ids(choice)
        if ids is None:
            return self._cut(self._encoded(choice, limit), reason, log_probs)
        self._check(ids, limit)
        if reason == "length" and ids and len(ids) < limit and ids[-1] not in self.ends:
            self.warn(
                f"The server cut candidates at fewer tokens than were asked for (at {len(ids)}, of {limit}). Raise the "
                "context length that it was started with, or lower `max_new_tokens`."
            )
        if reason == "stop" and not self._is_ended(ids, choice):
            ids = [*ids, self._end(choice)]  # a server that strips it
        return self._cut(ids, reason, log_probs)

    def _token_ids(self, choice: dict[str, Any]) -> list[int] | None:
        """Token ids where the server returns them, under one of two names."""
        ids = choice.get("token_ids")
        if ids is not None:
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise RuntimeError(f"The server's `token_ids` are no list of integers: {_short(ids)}.")
            return ids
        names = _numbers(choice).get("tokens") or []
        numbers = [name.removeprefix("token_id:") for name in names if isinstance(name, str) and "token_id:" in name]
        return [int(number) for number in numbers] if names and len(numbers) == len(names) else None

    def _check(self, ids: list[int], limit: int) -> None:
        if len(ids) > limit:
            raise RuntimeError(f"The server returned {len(ids)} tokens where at most {limit} were asked for.")
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary_size), None)
        if wrong is not None:
            raise ValueError(
                f"The server returned token {wrong}, and the tokenizer has {self.vocabulary_size}: it has another "
                "model's tokenizer. Serve the model that is trained."
            )

    def _encoded(self, choice: dict[str, Any], limit: int) -> list[int]:
        """The tokens of a reply that holds text alone: perhaps others than those sampled, but of the same text."""
        text = choice.get("text")
        if not isinstance(text, str):
            raise RuntimeError(f"The server's choice has neither `token_ids` nor `text`: {_short(choice)}.")
        if self.tokenizer is None:
            raise ValueError("The server returns text alone, and the request has no `tokenizer` to read it with.")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        found = self.tokenizer.decode(ids)
        if found.strip() != text.strip():
            raise ValueError(
                f"The server's text {_short(text)} reads {_short(found)} once it is encoded and decoded: it has "
                "another model's tokenizer. Serve the model that is trained."
            )
        self.warn(
            "The server returns text alone. It is encoded again, and the tokens may differ from those that were "
            "sampled, and their log probabilities too. A server that returns token ids (vLLM, SGLang) is exact."
        )
        if choice["finish_reason"] == "stop" and self.ends and not self._is_ended(ids, choice):
            ids.append(self._end(choice))
        return ids[:limit]

    def _is_ended(self, ids: list[int], choice: dict[str, Any]) -> bool:
        if not self.ends or any(token in self.ends for token in ids):
            return True
        if self.tokenizer is None:
            return False
        text = self.tokenizer.decode(ids)
        # A server may know more ends than we do; they are special tokens.
        return any(stop in text for stop in self.stop_strings) or (
            bool(ids) and ids[-1] in self.tokenizer.all_special_ids
        )

    def _end(self, choice: dict[str, Any]) -> int:
        """The end token that the server says it met, else the tokenizer's own."""
        for name in ("stop_reason", "matched_stop"):
            if choice.get(name) in self.ends:
                return int(choice[name])
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return int(own) if own in self.ends else self.ends[0]

    def _log_probs(self, choice: dict[str, Any]) -> list[float] | None:
        values = _numbers(choice).get("token_logprobs")
        return values if self.with_log_probs and isinstance(values, list) else None

    def _cut(self, ids: list[int], reason: str, log_probs: list[float] | None) -> Answer:
        """Ends the answer at its first end token, whether or not the server knew it for one."""
        end = next((at for at, token in enumerate(ids) if token in self.ends), None)
        if not ids:
            raise UnusableChoice("no tokens")
        is_whole = log_probs is not None and len(log_probs) == len(ids)
        kept = len(ids) if end is None else end + 1
        fitting = (
            [float(min(value, 0.0)) for value in log_probs[:kept] if _fits(value)] if is_whole and log_probs else []
        )
        if self.with_log_probs and len(fitting) != kept:
            self.warn(
                "The server gave no log probabilities that fit its tokens; they are computed from the model itself, in "
                "a second pass."
            )
        return Answer(ids[:kept], reason if end is None else "stop", fitting if len(fitting) == kept else None)


def _fits(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and _LEAST < value <= _ROUNDING


def _numbers(choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("logprobs")
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
