"""The contenders of `generation.py` but TRL's: who generates a workload, and how each is held to its lengths.

In: a model and a workload. Out: how many tokens of each candidate came back. Each way is forced by what it has:

- `generate` by a logits processor that forbids the end token until a row's last step and leaves nothing else there,
  one column of the scores per step, so that the loop sees rows end as it does with a real model;
- `generate_batch` by the `max_new_tokens` of each request, an engine by `limits`, both with no end token.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from workloads import END, PAD, Workload

from rsft_hf.engines.base import Engine, GenerationRequest
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine

Lengths = list[list[int]]
CERTAIN = 1e9  # beside it every other score has probability 0, and unlike infinity it passes through a softmax
PAGE = 64  # tokens of a page of `generate_batch`; its default of 256 is no faster here, and wants room for all pages
BATCH_TOKENS = 1024


class ForcedEnds(LogitsProcessor):
    """Lets every row end at the length meant for it, and at no other.

    Args:
        lengths: Tokens of each row with the end token, shape (rows,), int64.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        scores[:, END] = torch.where(self.lengths <= self.step, CERTAIN, -torch.inf)  # `generate` hands over a copy
        return scores


class ChildLimits(int):
    """The limit of a request that is forked, whose deep copies are the limits of its children, one after another.

    A forked request is a deep copy of its parent: its limit has no other way to differ from the parent's. The parent
    takes the largest, so that it is still there when its children leave it.
    """

    def __new__(cls, limits: Iterable[int]) -> "ChildLimits":
        descending = sorted(limits, reverse=True)
        made = super().__new__(cls, descending[0])
        made.waiting = iter(descending[1:])
        return made

    def __deepcopy__(self, memo: dict) -> int:
        return next(self.waiting)


@dataclass(frozen=True)
class Rollout:
    """A contender, ready to run.

    Attributes:
        model: What it calls; TRL's trainers have a copy of their own.
        generate: Generates a workload, and returns the tokens of each candidate.
    """

    model: Any
    generate: Callable[[Workload], Lengths]


def count_to_end(tokens: torch.Tensor) -> list[int]:
    """Returns the tokens of each row up to its first end token, that one included."""
    is_end = tokens == END
    return (tokens.shape[1] - (is_end.cumsum(1) - is_end.long()).bool().sum(1)).tolist()


def sampling(workload: Workload, **settings: Any) -> GenerationConfig:
    """Returns plain sampling: temperature 1 and no truncation, so that which tokens come does not matter."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_beams": 1, "pad_token_id": PAD}
    return GenerationConfig(**plain, max_new_tokens=workload.size.longest, **settings)


def forced_generate(model: Any, inputs: dict, config: GenerationConfig, lengths: list[int], **keywords: Any) -> Any:
    """Returns what `model.generate` returns, rows ending at `lengths`."""
    processors = LogitsProcessorList([ForcedEnds(torch.tensor(lengths, device=model.device))])
    return model.generate(**inputs, generation_config=config, logits_processor=processors, **keywords)


def pad(prompts: list[list[int]], model: Any) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask`: on the left where the prompt is continued, on the right if encoded."""
    is_left, width = not model.config.is_encoder_decoder, max(map(len, prompts))
    rows = [[PAD] * (width - len(ids)) * is_left + ids + [PAD] * (width - len(ids)) * (1 - is_left) for ids in prompts]
    input_ids = torch.tensor(rows, device=model.device)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}  # no word of a workload is PAD


def in_batches(model: Any, workload: Workload, order: list[int], prompts_per_batch: int) -> Lengths:
    """Generates with `model.generate`, so many prompts with all of their candidates at a time."""
    num_candidates = workload.size.num_candidates
    counted: dict[int, list[int]] = {}
    for start in range(0, len(order), prompts_per_batch):
        batch = order[start : start + prompts_per_batch]
        inputs = pad([workload.prompts[prompt] for prompt in batch], model)
        config = sampling(workload, num_return_sequences=num_candidates, eos_token_id=END)
        lengths = [length for prompt in batch for length in workload.lengths[prompt]]
        output = forced_generate(model, inputs, config, lengths)
        first = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        counts = count_to_end(output[:, first:])
        counted |= {prompt: counts[at * num_candidates :][:num_candidates] for at, prompt in enumerate(batch)}
    return [counted[prompt] for prompt in range(len(workload.prompts))]


def in_order(workload: Workload) -> list[int]:
    return list(range(len(workload.prompts)))


def mean_lengths(workload: Workload) -> list[float]:
    """Returns the mean length of each prompt's candidates: as a prediction, one that is never wrong."""
    return [sum(row) / len(row) for row in workload.lengths]


def by_length(workload: Workload) -> list[int]:
    return sorted(in_order(workload), key=mean_lengths(workload).__getitem__)


def continuous_settings(num_requests: int, num_children: int = 1) -> dict[str, int]:
    """Returns the settings of `generate_batch`; left alone, it takes more than half of the memory.

    There is room for all children of the requests, since one that does not fit is read again, with its parent's limit.
    """
    return {"num_blocks": 4 * num_requests * num_children, "page_size": PAGE, "max_batch_tokens": BATCH_TOKENS,
            "max_requests_per_batch": num_requests}  # fmt: skip


def run_requests(model: Any, prompts: list, limits: list, config: GenerationConfig, settings: Any) -> dict[str, Any]:
    """Does what `generate_batch` does, with a limit for every request; returns the outputs by the request's name.

    Raises:
        RuntimeError: If a request failed.
    """
    results: dict[str, Any] = {}
    num_requests = len(prompts) * (config.num_return_sequences or 1)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=settings, timeout=5
    ) as manager:
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            manager.add_request(ids, request_id=str(number), max_new_tokens=limit, eos_token_id=-1)
        while len(results) < num_requests:
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise RuntimeError(f"`generate_batch` stopped after {len(results)} of {num_requests} requests.")
            if output is not None and output.error is not None:
                raise RuntimeError(f"`generate_batch` failed at request {output.request_id}: {output.error}")
            if output is not None and output.is_finished():
                results[output.request_id] = output
    return results


def in_requests(model: Any, workload: Workload, num_requests: int, is_forked: bool) -> Lengths:
    """Generates with continuous batching: a request for each prompt, forked, or one for each candidate."""
    num_candidates = workload.size.num_candidates
    settings = ContinuousBatchingConfig(**continuous_settings(num_requests, num_candidates if is_forked else 1))
    if is_forked:
        limits = [ChildLimits(row) for row in workload.lengths]
        config = sampling(workload, num_return_sequences=num_candidates, eos_token_id=-1)
        outputs = run_requests(model, workload.prompts, limits, config, settings)
    else:
        pairs = [(ids, limit) for ids, row in zip(workload.prompts, workload.lengths, strict=True) for limit in row]
        prompts, limits = zip(*pairs, strict=True)
        outputs = run_requests(model, list(prompts), list(limits), sampling(workload, eos_token_id=-1), settings)
    counted: Lengths = [[] for _ in workload.prompts]
    for name, output in outputs.items():
        number = int(name.partition("__child#")[0])
        counted[number if is_forked else number // num_candidates].append(len(output.generated_tokens))
    return counted


@torch.no_grad()
def with_engine(engine: Engine, model: Any, workload: Workload, **wishes: Any) -> Lengths:
    """Generates with one of the package's engines."""
    config = copy.deepcopy(model.generation_config)
    config.update(**sampling(workload, num_return_sequences=1).to_diff_dict())
    config.update(top_k=0, top_p=1.0, num_beams=1)
    width = workload.size.num_candidates
    seeds = [[prompt * width + index for index in range(width)] for prompt in range(len(workload.prompts))]
    request = GenerationRequest(workload.prompts, seeds, config, limits=workload.lengths, **wishes)
    counted = [[0] * width for _ in workload.prompts]
    for sequence in engine(model, request):
        counted[sequence.prompt][sequence.index] = len(sequence.token_ids)
    return counted


def build_rollout(name: str, model: Any, workload: Workload) -> Rollout:
    """Returns the contender of this name; what is built here is not timed.

    Args:
        name: A kind and its setting, such as "generate_batch 32 forked" or "in_flight log_probs".
        model: What is to generate.
        workload: Says how many candidates there are, and how many of them at a time.

    Raises:
        ValueError: If there is no such contender.
    """
    size = workload.size
    kind, _, setting = name.partition(" ")
    if kind.startswith("trl"):
        import trl_rollouts

        return trl_rollouts.build_rollout(kind, model, workload)
    if kind == "generate_batch":
        num_requests, _, form = setting.partition(" ")
        return Rollout(model, lambda work: in_requests(model, work, int(num_requests), is_forked=form == "forked"))
    if kind in ("naive", "fixed", "sorted"):
        width = 1 if kind == "naive" else max(1, size.slots // size.num_candidates)
        order = by_length if kind == "sorted" else in_order
        return Rollout(model, lambda work: in_batches(model, work, order(work), width))
    if kind not in ("in_flight", "generate_engine"):
        raise ValueError(f"There is no contender {name!r}.")
    # One engine for all rounds, as in training: what it tries out about a model it tries out once.
    engine = InFlightEngine(max_sequences=size.slots) if kind == "in_flight" else GenerateEngine(size.slots)
    if setting == "longest_first":
        return Rollout(model, lambda work: with_engine(engine, model, work, expected_lengths=mean_lengths(work)))
    return Rollout(model, lambda work: with_engine(engine, model, work, with_log_probs=setting == "log_probs"))


def check_lengths(name: str, counted: Lengths, workload: Workload) -> None:
    """Raises if a contender generated anything but the tokens meant for it.

    A forked request does not say which of its children is which, so the candidates of a prompt are compared sorted.

    Raises:
        RuntimeError: At the first prompt that differs.
    """
    for prompt, (found, meant) in enumerate(zip(counted, workload.lengths, strict=True)):
        if sorted(found) != sorted(meant):
            raise RuntimeError(f"{name} gave prompt {prompt} answers of {found} tokens instead of {meant}.")
