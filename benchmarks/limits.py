"""Forward-pass counts and lower bounds on the seconds of a generation workload, for `generation.py`.

*Framework limit*: prompt tokens over the peak rate of prefill, plus the other tokens over the peak rate of decoding,
both measured by bare `model(...)` calls on a warm KV cache. No schedule that uses those calls is faster; one that runs
the model by other means may be. On a GPU also the *memory-bound limit*: the fewest decoding steps, each of which reads
all weights once at the speed of a copy.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measures import seconds_of
from workloads import FIRST_WORD, PAD, Workload

from rsft_hf.upstream import cache_argument, cache_name

PREFILL_BATCHES = (1, 4, 16, 32)
DECODE_BATCHES = (16, 32, 64, 128)
NUM_TRIALS = 5
COPIED_BYTES = 2**30


class ForwardCount:
    """Number of forward passes of a model, and of rows in those that computed one token per row."""

    def __init__(self) -> None:
        self.passes, self.decode_rows = 0, 0

    def __call__(self, model: Any, arguments: tuple, keywords: dict) -> None:
        name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        tokens = keywords[name] if keywords.get(name) is not None else arguments[0]
        self.passes += 1
        self.decode_rows += len(tokens) if tokens.shape[1] == 1 else 0


@contextmanager
def count_forwards(model: Any) -> Iterator[ForwardCount]:
    """Counts the forward passes of a model inside the `with` block."""
    count = ForwardCount()
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


def decode_tokens(workload: Workload, is_encoder_decoder: bool) -> int:
    """Returns the tokens that need a decoding row each; a decoder-only model gets the first token from the prefill."""
    return workload.num_tokens - (0 if is_encoder_decoder else workload.num_candidates)


def fewest_steps(workload: Workload) -> int:
    """Returns the least number of decoding steps of any schedule, with all slots filled at every step."""
    longest = max(map(max, workload.lengths))
    return max(longest, math.ceil(workload.num_tokens / workload.size.slots))


@torch.no_grad()
def measure_limits(model: Any, workload: Workload, device: str) -> dict[str, Any]:
    """Returns peak rates and limits; "limit_s" and the rates hold "cpu" and "wall" each, as `seconds_of` does."""
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    width = round(workload.num_prompt_tokens / len(workload.prompts))
    prefill_batches = sorted({*PREFILL_BATCHES, min(workload.size.slots, len(workload.prompts))})
    decode_batches = sorted({*DECODE_BATCHES, workload.size.slots})
    prefill = {size: best_seconds(prefill_call(model, size, width), device) for size in prefill_batches}
    decoding = {size: best_seconds(decode_call(model, size, workload), device) for size in decode_batches}
    num_decoded = decode_tokens(workload, is_encoder_decoder)
    limits: dict[str, Any] = {"fewest_steps": fewest_steps(workload), "limit_s": {}, "chosen_batch_limit_s": {}}
    for clock in ("cpu", "wall"):
        tokens_per_s = max(size * width / spent[clock] for size, spent in prefill.items())
        rows_per_s = {size: size / spent[clock] for size, spent in decoding.items()}
        chosen = rows_per_s[workload.size.slots]
        limits["limit_s"][clock] = workload.num_prompt_tokens / tokens_per_s + num_decoded / max(rows_per_s.values())
        limits["chosen_batch_limit_s"][clock] = workload.num_prompt_tokens / tokens_per_s + num_decoded / chosen
        limits[f"prompt_tokens_per_{clock}_s"] = tokens_per_s
        limits[f"decode_rows_per_{clock}_s"] = rows_per_s
    if device == "cuda":
        num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        limits["memory_bound_s"] = limits["fewest_steps"] * num_bytes / copy_bandwidth()
    return limits


def best_seconds(action: Callable[[], Any], device: str) -> dict[str, float]:
    """Returns the least seconds of `NUM_TRIALS` calls, after one to warm up."""
    action()
    trials = [seconds_of(action, device)[0] for _ in range(NUM_TRIALS)]
    return {clock: min(trial[clock] for trial in trials) for clock in ("cpu", "wall")}


def random_words(model: Any, rows: int, width: int) -> torch.Tensor:
    return torch.randint(FIRST_WORD, model.config.vocab_size, (rows, width), device=model.device)


def prefill_call(model: Any, rows: int, width: int) -> Callable[[], Any]:
    """Returns a call that reads `rows` prompts: the encoder's pass, or the decoder's up to its first token."""
    prompts = random_words(model, rows, width)
    if model.config.is_encoder_decoder:
        return lambda: model.get_encoder()(prompts)
    return lambda: model(prompts, use_cache=True, logits_to_keep=1)


def decode_call(model: Any, rows: int, workload: Workload) -> Callable[[], Any]:
    """Returns a call that decodes one token of `rows` rows on a KV cache of the workload's mean length."""
    before_prompt, before_token = (max(1, round(tokens)) for tokens in workload.mean_context)
    tokens = random_words(model, rows, 1)
    if not model.config.is_encoder_decoder:
        warm = model(random_words(model, rows, before_prompt + before_token), use_cache=True, logits_to_keep=1)
        return lambda: model(tokens, use_cache=True, **cache_argument(model, warm[cache_name(warm)]))
    prompts, prefix = random_words(model, rows, before_prompt), random_words(model, rows, before_token)
    prefix[:, 0] = PAD
    encoded = model.get_encoder()(prompts)
    outputs = model(encoder_outputs=encoded, decoder_input_ids=prefix, use_cache=True)
    cache = cache_argument(model, outputs[cache_name(outputs)])
    return lambda: model(encoder_outputs=encoded, decoder_input_ids=tokens, use_cache=True, **cache)


def copy_bandwidth() -> float:
    """Returns bytes per second that a copy on the GPU reads and writes."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / best_seconds(lambda: target.copy_(source), "cuda")["wall"]
