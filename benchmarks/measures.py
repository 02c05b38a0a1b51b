"""What `generation.py` reads off a contender: seconds, forward passes, memory, and the least that its tokens cost.

In: a model, a workload and something to call. Out: plain numbers. No contender is known here.

*Framework limit*: unique prompt tokens over the peak of reading prompts, plus the other tokens over the peak of
decoding, both peaks measured by bare `model(...)` calls on a warm cache. No schedule that uses those calls is faster;
one that runs the model by other means may be. On a GPU also the *memory-bound limit*: steps that no schedule can avoid,
each of which reads all weights once at the speed of a copy.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from workloads import FIRST_WORD, PAD, Workload

PROMPTS_AT_ONCE = (1, 4, 16, 32)
ROWS_AT_ONCE = (16, 32, 64, 128)
NUM_TRIALS = 5
COPIED_BYTES = 2**30


def seconds_of(action: Callable[[], Any], device: str) -> tuple[dict[str, float], Any]:
    """Returns processor ("cpu") and wall ("wall") seconds of a call, and what it returned."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    wait()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}, result


def peak_mib(device: str) -> float:
    """Returns the peak of memory so far: of the process, or of what torch holds on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


class ForwardCount:
    """Forward passes of a model, and the rows of those that computed one token for each."""

    def __init__(self) -> None:
        self.passes, self.decode_rows = 0, 0

    def __call__(self, model: Any, arguments: tuple, keywords: dict) -> None:
        name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        tokens = keywords[name] if keywords.get(name) is not None else arguments[0]
        self.passes += 1
        self.decode_rows += len(tokens) if tokens.shape[1] == 1 else 0


@contextmanager
def counted(model: Any) -> Iterator[ForwardCount]:
    """Counts the forward passes of a model while it lasts."""
    count = ForwardCount()
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


def decode_tokens(workload: Workload, is_encoder_decoder: bool) -> int:
    """Returns the tokens that cost a decoding row each; a decoder-only model gets the first one from the prompt."""
    return workload.num_tokens - (0 if is_encoder_decoder else workload.num_candidates)


def fewest_steps(workload: Workload) -> int:
    """Returns the decoding steps that no schedule can do without, with all slots filled at every step."""
    longest = max(map(max, workload.lengths))
    return max(longest, math.ceil(workload.num_tokens / workload.size.slots))


@torch.no_grad()
def limits(model: Any, workload: Workload, device: str) -> dict[str, Any]:
    """Returns peaks and limits; "limit_s" and the peaks hold "cpu" and "wall" each, as `seconds_of` does."""
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    width = round(workload.num_prompt_tokens / len(workload.prompts))
    prompts_at_once = sorted({*PROMPTS_AT_ONCE, min(workload.size.slots, len(workload.prompts))})
    rows_at_once = sorted({*ROWS_AT_ONCE, workload.size.slots})
    reading = {size: best_seconds(reader(model, size, width), device) for size in prompts_at_once}
    decoding = {size: best_seconds(decoder(model, size, workload), device) for size in rows_at_once}
    num_decoded = decode_tokens(workload, is_encoder_decoder)
    found: dict[str, Any] = {"fewest_steps": fewest_steps(workload), "limit_s": {}, "chosen_batch_limit_s": {}}
    for clock in ("cpu", "wall"):
        tokens_per_s = max(size * width / spent[clock] for size, spent in reading.items())
        rows_per_s = {size: size / spent[clock] for size, spent in decoding.items()}
        chosen = rows_per_s[workload.size.slots]
        found["limit_s"][clock] = workload.num_prompt_tokens / tokens_per_s + num_decoded / max(rows_per_s.values())
        found["chosen_batch_limit_s"][clock] = workload.num_prompt_tokens / tokens_per_s + num_decoded / chosen
        found[f"prompt_tokens_per_{clock}_s"] = tokens_per_s
        found[f"decode_rows_per_{clock}_s"] = rows_per_s
    if device == "cuda":
        num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        found["memory_bound_s"] = found["fewest_steps"] * num_bytes / copy_bandwidth()
    return found


def best_seconds(action: Callable[[], Any], device: str) -> dict[str, float]:
    """Returns the least seconds of a few calls, after one that warms up."""
    action()
    trials = [seconds_of(action, device)[0] for _ in range(NUM_TRIALS)]
    return {clock: min(trial[clock] for trial in trials) for clock in ("cpu", "wall")}


def random_words(model: Any, rows: int, width: int) -> torch.Tensor:
    return torch.randint(FIRST_WORD, model.config.vocab_size, (rows, width), device=model.device)


def reader(model: Any, rows: int, width: int) -> Callable[[], Any]:
    """Returns a call that reads so many prompts: the encoder, or the model as far as its first token."""
    prompts = random_words(model, rows, width)
    if model.config.is_encoder_decoder:
        return lambda: model.get_encoder()(prompts)
    return lambda: model(prompts, use_cache=True, logits_to_keep=1)


def decoder(model: Any, rows: int, workload: Workload) -> Callable[[], Any]:
    """Returns a call that computes one token of so many rows; a cache of the workload's mean length grows by it."""
    before_prompt, before_token = (max(1, round(tokens)) for tokens in workload.mean_context)
    tokens = random_words(model, rows, 1)
    if not model.config.is_encoder_decoder:
        warm = model(random_words(model, rows, before_prompt + before_token), use_cache=True, logits_to_keep=1)
        return lambda: model(tokens, past_key_values=warm.past_key_values, use_cache=True)
    prompts, said = random_words(model, rows, before_prompt), random_words(model, rows, before_token)
    said[:, 0] = PAD
    encoded = model.get_encoder()(prompts)
    cache = model(encoder_outputs=encoded, decoder_input_ids=said, use_cache=True).past_key_values
    return lambda: model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True)


def copy_bandwidth() -> float:
    """Returns bytes per second that a copy on the GPU reads and writes."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / best_seconds(lambda: target.copy_(source), "cuda")["wall"]
