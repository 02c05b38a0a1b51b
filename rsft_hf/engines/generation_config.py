"""Generation configuration: the user's over the model's own, completed and validated before anything is generated.

`sampling_config` leaves nothing to a default, so that log q is that of a known distribution.
`check_settings_supported` raises for settings that shape the sampled distribution and that an engine does not support.
"""

import copy
from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_generation_config(config: GenerationConfig | None, num_candidates: int) -> None:
    """Raises if a user's configuration can give no candidates.

    Raises:
        TypeError: If it is no GenerationConfig.
        ValueError: If it is greedy with several candidates, searches beams, sets its own number of candidates or has no
            usable temperature.
    """
    if config is None:
        return
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"`generation_config` must be a transformers GenerationConfig, got {type(config).__name__}. Write "
            "GenerationConfig(do_sample=True, max_new_tokens=64)."
        )
    if (config.do_sample is False and num_candidates > 1) or config.temperature == 0:
        raise ValueError(
            f"`generation_config` is greedy (do_sample={config.do_sample}, temperature={config.temperature}) and "
            f"`num_candidates`={num_candidates}: all candidates of a prompt would be equal. Set do_sample=True and a "
            "temperature above 0, or num_candidates=1."
        )
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"`generation_config` has num_beams={config.num_beams}: beams are not draws from a distribution. Set "
            "num_beams=1; for held-out evaluation beams may go into `eval_generation_config`."
        )
    if (config.num_return_sequences or 1) > 1:
        raise ValueError(
            f"`generation_config` has num_return_sequences={config.num_return_sequences}. Say it by "
            "`num_candidates`, and leave num_return_sequences unset."
        )


def sampling_config(
    config: GenerationConfig | None, model: Any, tokenizer: PreTrainedTokenizerBase, is_greedy: bool = False
) -> GenerationConfig:
    """Returns the complete sampling configuration: the model's own, overridden by the user's.

    The model's `generation_config.json` may bring a temperature or a truncation unasked; it stays in force, since it is
    how the model is meant to be sampled. What neither says is plain sampling: temperature 1, no top-k (where
    transformers would take 50), no top-p.

    Args:
        config: The user's, None for the model's alone.
        model: Has a `generation_config`.
        tokenizer: Supplies special tokens that the model does not name.
        is_greedy: Whether to take the most probable tokens instead, as with the user's do_sample=False; a beam search
            of the user's stays.

    Raises:
        ValueError: If no `max_new_tokens` is set anywhere, or nothing can end a candidate.
    """
    merged = copy.deepcopy(model.generation_config)
    user = {} if config is None else {name: value for name, value in config.to_dict().items() if value is not None}
    for name, value in user.items():
        if name != "transformers_version" and not name.startswith("_"):
            setattr(merged, name, value)
    if merged.max_new_tokens is None:
        # Of a decoder-only model `max_length` counts the prompt too, and so says nothing of an answer.
        if merged.max_length is None or not model.config.is_encoder_decoder:
            raise ValueError(
                "`max_new_tokens` is unset, in `generation_config` and in the model's own: a candidate would be cut "
                "off after transformers' default of 20 tokens. Pass "
                "generation_config=GenerationConfig(max_new_tokens=...)."
            )
        merged.max_new_tokens = merged.max_length
    merged.max_length = None
    if "forced_eos_token_id" not in user:
        merged.forced_eos_token_id = None  # BART's and Marian's own: at the limit, a cut-off answer would seem complete
    _fill_special_tokens(merged, tokenizer)
    if is_greedy or user.get("do_sample") is False:
        merged.do_sample = False
        for name in _SAMPLING:
            setattr(merged, name, None)
        merged.num_beams = user.get("num_beams", 1)
    else:
        merged.do_sample, merged.num_beams = True, 1
        merged.temperature = 1.0 if merged.temperature is None else merged.temperature
        merged.top_k = 0 if merged.top_k is None else merged.top_k
        merged.top_p = 1.0 if merged.top_p is None else merged.top_p
    merged.num_return_sequences, merged.use_cache, merged.return_dict_in_generate = 1, True, False
    return merged


def held_out_config(options: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Returns the complete configuration for evaluation: greedy, beam search or sampling, as the user sets it.

    Args:
        options: Has `eval_generation_config`, and `generation_config`, which says how long an answer may be where the
            former does not.
        model: As in `sampling_config`.
        tokenizer: As in `sampling_config`.

    Raises:
        TypeError: If `eval_generation_config` is no GenerationConfig.
        ValueError: As in `sampling_config`.
    """
    config, sampled = options.eval_generation_config, options.generation_config
    if config is None:
        return sampling_config(sampled, model, tokenizer, is_greedy=True)
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"`eval_generation_config` must be a transformers GenerationConfig, got {type(config).__name__}. Write "
            "GenerationConfig(num_beams=4), or None for greedy."
        )
    config = copy.deepcopy(config)
    if config.max_new_tokens is None and sampled is not None:
        config.max_new_tokens = sampled.max_new_tokens
    return sampling_config(config, model, tokenizer, is_greedy=not config.do_sample)


def active_settings(config: GenerationConfig) -> dict[str, Any]:
    """Returns every setting of a configuration that is not unset."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def end_tokens(config: GenerationConfig) -> list[int]:
    """Returns the tokens that end a candidate, as a list.

    Example:
        >>> end_tokens(GenerationConfig(eos_token_id=2)), end_tokens(GenerationConfig(eos_token_id=[2, 5]))
        ([2], [2, 5])
    """
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def context_length(model: Any) -> int | None:
    """Returns the most positions a model can read, None where its config sets no limit."""
    config = model.config.get_text_config()
    values = {config.attribute_map.get(name, name) for name in ("max_position_embeddings",)}
    limits = [config.to_dict()[name] for name in values if isinstance(config.to_dict().get(name), int)]
    return min(limits) if limits else None


def _fill_special_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.eos_token_id is None and not config.stop_strings:
        raise ValueError(
            "Nothing can end a candidate: neither `generation_config` nor the tokenizer has an `eos_token_id`, and "
            "there are no `stop_strings`. Every candidate would be cut off at `max_new_tokens`. Set one of them."
        )
    if config.pad_token_id is None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    if config.pad_token_id is None:
        config.pad_token_id = 0  # stop strings alone: what follows the end of a row is never read


# The values that change nothing; None and what is empty never do.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "renormalize_logits": (False, True),
    "remove_invalid_values": (False,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": (),
    "max_time": (),
}


def shaping_settings(config: GenerationConfig) -> dict[str, Any]:
    """Returns the settings that change what is sampled or where it ends, lengths and end tokens apart.

    Example:
        >>> shaping_settings(GenerationConfig(temperature=0.7, top_p=1.0, min_p=0.1))
        {'temperature': 0.7, 'min_p': 0.1}
    """
    values = config.to_dict()
    return {
        name: values[name]
        for name, neutral in _WITHOUT_EFFECT.items()
        if values.get(name) not in (None, [], {}, *neutral)
    }


def check_settings_supported(config: GenerationConfig, allowed: Collection[str], engine_name: str, remedy: str) -> None:
    """Raises if a configuration holds settings that an engine does not obey.

    Args:
        config: Complete: see `generation_config.sampling_config`.
        allowed: Settings that the engine obeys, such as "temperature".
        engine_name: For the message.
        remedy: What to do instead, one sentence.

    Raises:
        ValueError: If any other setting is in force.
    """
    refused = {name: value for name, value in shaping_settings(config).items() if name not in allowed}
    if refused:
        listed = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise ValueError(
            f"{engine_name} cannot sample with {listed}: of what shapes the distribution it obeys "
            f"{', '.join(sorted(allowed))} only. {remedy}"
        )
