"""Which settings of a generation configuration shape the distribution that is sampled from.

A configuration and the settings that an engine obeys enter; an error leaves if it would ignore any other. What a
library ignores without a word gives candidates of another distribution than the one that was asked for.
"""

from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig

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


def refuse_settings(config: GenerationConfig, allowed: Collection[str], engine_name: str, remedy: str) -> None:
    """Raises if a configuration holds settings that an engine does not obey.

    Args:
        config: Complete: see `settings.sampling_config`.
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
