"""What can be said of an `EndpointEngine`'s arguments before a server is asked for anything.

Arguments enter; an error with the remedy leaves, or nothing.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from transformers import GenerationConfig

from rsft_hf.generative.engines.dialects import DIALECTS, needed_settings

# What a request says by itself, or what would change the shape of a reply.
_NEVER = {
    "model", "prompt", "n", "seed", "max_tokens", "temperature", "stop", "logprobs", "generation_config",
    "max_completion_tokens", "best_of", "echo", "stream", "suffix", "use_beam_search",
}  # fmt: skip
# The same, but a server that does not know the field can be spared it: by the setting that must then not be in force.
_SPARED: dict[str, str | None] = {
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens", "include_stop_str_in_output": "stop_strings", "stop_token_ids": None,
    "skip_special_tokens": None, "return_token_ids": None, "return_tokens_as_token_ids": None, "cache_salt": None,
}  # fmt: skip


def check_url(name: str, url: Any) -> None:
    """Raises if an address cannot be asked for anything.

    Raises:
        TypeError: If it is no text.
        ValueError: If it lacks http:// or https://, or a host.
    """
    if not isinstance(url, str):
        raise TypeError(f"`{name}`={url!r} must be text such as 'http://localhost:8000/v1'.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`{name}`={url!r} is no address of a server. Write it as 'http://localhost:8000/v1'.")


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises if a count or a time of an engine, by the names of its arguments, is none or out of its range.

    Raises:
        TypeError: If a count is no integer, or a time no number.
        ValueError: If one is too small.
    """
    for name, least in (("concurrency", 1), ("candidates_per_request", 1), ("max_retries", 0)):
        value = values[name]
        if value is None and name == "candidates_per_request":
            continue
        if type(value) is not int:
            raise TypeError(f"`{name}`={value!r} must be an integer of at least {least}.")
        if value < least:
            raise ValueError(f"`{name}`={value} must be at least {least}.")
    for name in ("timeout_seconds", "backoff_seconds"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}`={value!r} must be a number of seconds.")
        if not value >= 0 or (value == 0 and name == "timeout_seconds"):
            raise ValueError(f"`{name}`={value} must be {'more than' if name == 'timeout_seconds' else 'at least'} 0.")


def check_choices(dialect: str, logprobs_mode: str) -> None:
    """Raises ValueError if a name is not one of those known."""
    if dialect not in DIALECTS or logprobs_mode not in ("raw", "processed"):
        raise ValueError(
            f"`dialect`={dialect!r} must be one of {', '.join(map(repr, DIALECTS))}, and "
            f"`logprobs_mode`={logprobs_mode!r} 'raw' or 'processed'."
        )


def check_weights(weights: Any) -> None:
    """Raises TypeError if what is to hand weights over cannot be called with a model."""
    is_unmade = inspect.ismethod(weights) and isinstance(weights.__self__, type)
    if weights is not None and (isinstance(weights, type) or is_unmade or not callable(weights)):
        raise TypeError(
            f"`weights`={weights!r} must be None, or what takes a model and brings it to the server. Write "
            "SaveAndReload.sglang(base_url, directory), with its arguments, or a function of yours."
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError if more of a request is asked for than is free to say."""
    for name, value in options.items():
        if name in _NEVER or (name in _SPARED and value is not None):
            raise ValueError(
                f"`options` has {name}={value!r}, which every request says by itself: the candidates would be others "
                "than those that are asked for and written down. Say it by `generation_config`, or by the arguments "
                "of EndpointEngine."
                + (" None takes it out, for a server that does not know it." if name in _SPARED else "")
            )


def check_spared(options: Mapping[str, Any], config: GenerationConfig) -> None:
    """Raises ValueError if a setting is in force whose field was taken out of the requests."""
    in_force = needed_settings(config) | ({"stop_strings"} if config.stop_strings else set())
    for name in options:
        setting = _SPARED.get(name)
        if setting in in_force:
            raise ValueError(
                f"`options` takes {name} out of the requests, and `generation_config` has "
                f"{setting}={config.to_dict()[setting]!r}, which it says. Unset the one or the other."
            )


def check_log_probs(config: GenerationConfig, dialect: str, logprobs_mode: str, wanted: Collection[str]) -> None:
    """Raises ValueError if log probabilities are wanted of a server with weights of its own that it does not give.

    Its weights are not those of the model, so that the model here cannot say what the server does not.

    Args:
        config: Complete: see `settings.sampling_config`.
        dialect: One of `DIALECTS`.
        logprobs_mode: "raw" or "processed".
        wanted: Of "log_q" and "log_p".
    """
    settings = sorted(needed_settings(config))
    if not wanted or (not settings and dialect != "transformers"):
        return
    if dialect == "transformers" or logprobs_mode == "raw":
        raise ValueError(missing_log_q(f"{', '.join(settings)} in force" if settings else "its dialect has none"))
    if "log_p" in wanted:
        raise ValueError(
            f"log p, of the undistorted distribution of what generates, is wanted. The server says log q, with "
            f"{', '.join(settings)} in force, and its weights are not those of the model here. Name the model that log "
            "p is wanted of as `reference_model`, or sample plainly (temperature 1, no truncation), or pass `weights`."
        )


def missing_log_q(reason: str) -> str:
    """Returns why log probabilities are lacking, and what to do."""
    return (
        f"Log probabilities of the candidates are wanted, and the server's do not serve ({reason}). Its weights are "
        "not those of the model, so that the model cannot say them either. Sample plainly (temperature 1, no "
        "truncation), or have the server say them (vLLM: --logprobs-mode processed_logprobs, and here "
        'logprobs_mode="processed"), or pass `weights`; if the server holds the very weights of the model, '
        "weights=lambda model: None says so."
    )
