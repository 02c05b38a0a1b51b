"""Request fields and reply parsing for each server dialect.

Dialects: "vllm" (vLLM, SGLang) takes prompts as token ids and sampling parameters beyond OpenAI's API; "openai" takes
text and OpenAI's own fields; "transformers" (`transformers serve`) takes text and the whole generation configuration.
A setting that a dialect cannot express is refused, never dropped. `ReplyReader` turns one choice of a reply into token
ids, finish reason and log probabilities, and validates them.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rsft_hf.engines.generation_config import active_settings, end_tokens

Dialect = Literal["vllm", "openai", "transformers"]

DIALECTS: tuple[str, ...] = get_args(Dialect)

_SENT = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens",
    "eos_token_id", "stop_strings",
}  # fmt: skip

# What has no bearing on a sampled token, or none where one beam is searched.
_WITHOUT_EFFECT = {
    "early_stopping", "length_penalty", "num_return_sequences", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits",
    "remove_invalid_values", "compile_config", "disable_compile", "continuous_batching_config", "low_memory",
    "prefill_chunk_size", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "speculation_type", "use_mtp",
}  # fmt: skip

# Values that say no more than leaving a setting out.
_NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0,
}  # fmt: skip


def check_settings(config: GenerationConfig, dialect: str) -> None:
    """Raises if a setting shapes what is sampled and cannot be said to the server.

    Raises:
        ValueError: If there is such a setting (it is named).
    """
    if dialect == "transformers":
        return
    for name, value in active_settings(config).items():
        if name in _SENT or name in _WITHOUT_EFFECT or value == _NEUTRAL.get(name) or not value:
            continue
        remedy = "Use min_new_tokens, which counts the answer alone." if name == "min_length" else (
            "Unset it, or use GenerateEngine, which knows every setting of transformers."
        )  # fmt: skip
        raise ValueError(
            f"`generation_config` has {name}={value!r}, which a completions server cannot be asked for. {remedy}"
        )
    if dialect == "openai":
        if config.stop_strings:
            raise ValueError(
                f"`generation_config` has stop_strings={config.stop_strings!r}, and a server of OpenAI's API takes "
                "them off the answers: what was sampled would be unknown. Unset them and let an end token end the "
                'answers, or use dialect="vllm" where the server is vLLM or SGLang, which leave them in.'
            )
        for name in sorted(needed_settings(config) - {"temperature", "top_p"}):
            raise ValueError(
                f"`generation_config` has {name}={active_settings(config)[name]!r}, which OpenAI's API does not have. "
                'Unset it, or use dialect="vllm" where the server is vLLM or SGLang.'
            )


def needed_settings(config: GenerationConfig) -> set[str]:
    """Returns the active settings that change the sampled distribution from the model's own; empty if none does."""
    neutral: dict[str, float] = {"repetition_penalty": 1.0, "min_new_tokens": 0}
    if config.do_sample:
        neutral |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    settings = active_settings(config)
    return {name for name, value in neutral.items() if settings.get(name, value) != value}


def sampling_fields(config: GenerationConfig, dialect: str) -> dict[str, Any]:
    """Returns the sampling fields of a dialect, equal in every request.

    Every setting is said, also where it does nothing: servers fill in a `generation_config.json` of their own.
    """
    stops = list(config.stop_strings or []) if not isinstance(config.stop_strings, str) else [config.stop_strings]
    fields: dict[str, Any] = {"stop": stops} if stops else {}
    if dialect == "transformers":
        return fields | {"generation_config": json.dumps(active_settings(config))}
    is_sampled = config.do_sample
    fields |= {"temperature": config.temperature if is_sampled else 0.0, "top_p": config.top_p if is_sampled else 1.0}
    if dialect == "openai":
        return fields
    return fields | {
        "top_k": (config.top_k if is_sampled else 0) or -1,  # 0 is refused by SGLang and older vLLM, -1 by none
        "min_p": (config.min_p if is_sampled else 0.0) or 0.0,
        "repetition_penalty": config.repetition_penalty or 1.0,
        "min_tokens": config.min_new_tokens or 0,
        "stop_token_ids": end_tokens(config),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


def prompt_field(
    prompt: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None, dialect: str
) -> list[int] | str:
    """Returns a prompt as a dialect has it: token ids, or a text that the server's tokenizer turns into these ids.

    Args:
        prompt: Names the prompt in errors.
        ids: Its tokens.
        tokenizer: The model's own; needed for text.
        dialect: One of `DIALECTS`.

    Raises:
        ValueError: If there is no tokenizer, or no text has these tokens.
    """
    if dialect == "vllm":
        return list(ids)
    if tokenizer is None:
        raise ValueError(f"dialect={dialect!r} sends prompts as text, and the request has no `tokenizer` to write it.")
    # Servers add the special tokens that a text begins with, so they must not be written where they are added.
    for skipped in (0, 1):
        text: str = tokenizer.decode(list(ids)[skipped:], skip_special_tokens=False)
        if text and _ids_at_server(tokenizer, text) == list(ids):
            return text
    raise ValueError(
        f"Prompt {prompt} has tokens that no text has (it reads {tokenizer.decode(list(ids))!r}), and "
        f"dialect={dialect!r} sends text. "
        'Use a server that takes token ids, with dialect="vllm".'
    )


def _ids_at_server(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


_LEAST = -9999.0  # what vLLM writes in place of -inf: no sampled token has it

_ROUNDING = 1e-4  # nats by which a certain token may pass probability 1


class UnusableChoice(Exception):
    """Error for a choice that is no candidate, aborted or empty, and may be requested again."""


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
            ids = self._encoded(choice)
            return self._cut(ids[:limit], "length" if len(ids) > limit else reason, log_probs)
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

    def _encoded(self, choice: dict[str, Any]) -> list[int]:
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
        return ids

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
