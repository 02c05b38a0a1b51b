"""Compatibility test of a model with continuous batching: rows admitted while others run against the same rows alone.

Models differ in positions, masks and caches, and a mistake there raises no error. A few short candidates are generated
with the slot KV cache, and their log probabilities compared with a plain forward pass over each of them.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rsft_hf.engines.base import GeneratedSequence, GenerationRequest
from rsft_hf.engines.generate import _CRITERIA, reason_against_batching, reason_against_dropping
from rsft_hf.engines.generation_config import context_length
from rsft_hf.engines.inflight.scheduler import Scheduler
from rsft_hf.engines.model_access import is_peft_model, without_wrappers
from rsft_hf.engines.sampling import Prepared
from rsft_hf.memory import is_out_of_memory

_PROMPT_LENGTHS, _LIMITS = (3, 12, 1, 7, 5), (6, 2, 7, 3, 5)  # rows of many ages; the last ones enter among others

_MOST_TOKENS, _SLOTS = max(_LIMITS), 3

# Nats: float32 in another batch shape is off by 1e-5. Where it is multiplied as TF32, and in half precision, by up to a
# tenth, on average by a hundredth: there the bound is three times what rows alone in slots are off by.
_EXACT, _MOST, _LEAST_MEAN, _TIMES = 1e-3, 0.5, 5e-3, 3.0


def probe_request(request: GenerationRequest, model: Any) -> GenerationRequest:
    """Returns a small request like the given one: short prompts, answers of different lengths.

    Args:
        request: Supplies prompts and how to sample.
        model: Says how much it can read.
    """
    room = (context_length(model) or 10**9) - _MOST_TOKENS
    prompts = [
        list(request.prompts[number % len(request.prompts)])[: max(1, min(length, room))]
        for number, length in enumerate(_PROMPT_LENGTHS)
    ]
    config = copy.deepcopy(request.generation_config)
    config.max_new_tokens, config.do_sample, config.min_new_tokens = _MOST_TOKENS, True, None
    # Some models leave padding out when they count positions, and so differ by themselves where they say it.
    own_pad = model.config.get_text_config().to_dict().get("pad_token_id")
    config.suppress_tokens = [pad for pad in (config.pad_token_id, own_pad) if isinstance(pad, int)]
    return dataclasses.replace(
        request,
        prompts=prompts,
        seeds=[[number] for number in range(len(prompts))],
        limits=[[limit] for limit in _LIMITS],
        generation_config=config,
        with_log_probs=True,
        expected_lengths=[float(len(prompts) - number) for number in range(len(prompts))],  # enter in this order
    )


@torch.no_grad()
def probe_result(
    model: Any, request: GenerationRequest, make_scheduler: Callable[[int], Scheduler], decoder_start: list[int]
) -> str | None:
    """Returns why the model cannot run in continuous batches, None if it can.

    Args:
        model: With whatever wraps it, which a plain pass goes through.
        request: From `probe_request`.
        make_scheduler: Returns a scheduler of the request with so many slots.
        decoder_start: First tokens of a decoder; empty for decoder-only models.
    """
    is_quantised = model.config.to_dict().get("quantization_config") is not None
    is_exact = model.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" and not is_quantised
    try:
        try:
            # Where weights are float32 under autocast it shows more plainly without it whether a row is in its place.
            with _without_autocast(model):
                differences = _differences(model, request, make_scheduler(_SLOTS), decoder_start)
        except RuntimeError as error:
            if is_out_of_memory(error) or not torch.is_autocast_enabled(model.device.type):
                raise
            is_exact = False  # weights of several types, which only autocast brings together
            differences = _differences(model, request, make_scheduler(_SLOTS), decoder_start)
        most = mean = _EXACT
        if not is_exact:
            alone = _differences(model, request, make_scheduler(1), decoder_start)
            most, mean = _MOST, max(_LEAST_MEAN, _TIMES * float(alone.mean()))
            if _reads_what_is_masked(make_scheduler):
                return "it reads keys and values that the mask hides"
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return f"a trial run ended with {type(error).__name__}: {error}"
    if bool(differences.max() <= most) and bool(differences.mean() <= mean):  # NaN is neither
        return None
    return f"rows admitted while others run get other log probabilities than alone, by {differences.max():.3g} nats"


@contextlib.contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Turns autocast off, and takes away the one that accelerate puts around `forward`, of a wrapper alone perhaps."""
    around = {one: one.forward for one in (model, without_wrappers(model)) if "_original_forward" in vars(one)}
    try:
        for one in around:
            one.forward = one._original_forward
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for one, forward in around.items():
            one.forward = forward


def _differences(
    model: Any, request: GenerationRequest, scheduler: Scheduler, decoder_start: list[int]
) -> torch.Tensor:
    """Distances, in nats, of the log probabilities of all tokens from those of plain passes."""
    return torch.cat([_difference(model, request, one, decoder_start) for one in scheduler.run()]).abs()


def _reads_what_is_masked(make_scheduler: Callable[[int], Scheduler]) -> bool:
    """Whether anything depends on what a row has not written: in any precision, a mask that holds is exact."""
    found = []
    for value in (0.0, 1.0):
        scheduler = make_scheduler(_SLOTS)
        scheduler.runner.fill(value)
        found.append([(one.prompt, one.token_ids, torch.as_tensor(one.log_p).tolist()) for one in scheduler.run()])
    return found[0] != found[1]


def _difference(
    model: Any, request: GenerationRequest, one: GeneratedSequence, decoder_start: list[int]
) -> torch.Tensor:
    """Log probabilities of a sequence's tokens from a plain pass, less those they were drawn with."""
    prompt, answer = list(request.prompts[one.prompt]), torch.tensor(one.token_ids, device=model.device)
    if decoder_start:
        source = torch.tensor([prompt], device=model.device)
        start = torch.tensor([decoder_start + one.token_ids[:-1]], device=model.device)
        logits = model(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=start).logits[0]
        logits = logits[len(decoder_start) - 1 :]
    else:
        whole = torch.tensor([prompt + one.token_ids], device=model.device)
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, len(prompt) - 1 : -1]
    values = logits.float().log_softmax(-1).gather(1, answer[:, None]).squeeze(1)
    return values.cpu() - torch.as_tensor(one.log_p)


def reason_against_inflight(model: Any, request: GenerationRequest, prepared: Prepared | None = None) -> str | None:
    """Returns why the request cannot be generated in slots, None if it can.

    Args:
        model: May carry adapters.
        request: What is asked for.
        prepared: What `generate` made of it; without it only what the configuration says is looked at.
    """
    config = request.generation_config
    if (config.num_beams or 1) > 1:
        return f"num_beams={config.num_beams} searches beams"
    if config.token_healing:
        return "token_healing changes the prompts"
    if _learns_prompts(model):
        return "its adapter puts learned tokens before the prompt"
    if reason := reason_against_batching(model, request):
        return reason
    if prepared is None:
        return None
    for criterion in prepared.criteria:
        if type(criterion) not in _CRITERIA:
            return f"{type(criterion).__name__} looks at more than one candidate"
    return reason_against_dropping(prepared.processors, prepared.model_kwargs)


def _learns_prompts(model: Any) -> bool:
    return is_peft_model(model) and bool(model.active_peft_config.is_prompt_learning)
