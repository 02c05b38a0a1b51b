"""What a request says in the words of a server: prompts and a generation configuration become fields of its body.

Three dialects are spoken. "vllm" (vLLM, SGLang): prompts as token ids, and sampling parameters that OpenAI's API does
not have. "openai": prompts as text and nothing but OpenAI's own fields. "transformers" (`transformers serve`): prompts
as text, and the whole generation configuration. What a dialect cannot say is refused, never left out.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rsft_hf.generative.settings import in_force

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
    for name, value in in_force(config).items():
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
                f"`generation_config` has {name}={in_force(config)[name]!r}, which OpenAI's API does not have. Unset "
                'it, or use dialect="vllm" where the server is vLLM or SGLang.'
            )


def needed_settings(config: GenerationConfig) -> set[str]:
    """Returns the settings by which the distribution in force differs from the model's own; empty if it does not."""
    neutral: dict[str, float] = {"repetition_penalty": 1.0, "min_new_tokens": 0}
    if config.do_sample:
        neutral |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    settings = in_force(config)
    return {name for name, value in neutral.items() if settings.get(name, value) != value}


def sampling_fields(config: GenerationConfig, dialect: str) -> dict[str, Any]:
    """Returns how to sample, in a dialect; what is the same for every request.

    Every setting is said, also where it does nothing: servers fill in a `generation_config.json` of their own.
    """
    stops = list(config.stop_strings or []) if not isinstance(config.stop_strings, str) else [config.stop_strings]
    fields: dict[str, Any] = {"stop": stops} if stops else {}
    if dialect == "transformers":
        return fields | {"generation_config": json.dumps(in_force(config))}
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


def end_tokens(config: GenerationConfig) -> list[int]:
    """Returns the tokens that end an answer."""
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


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
