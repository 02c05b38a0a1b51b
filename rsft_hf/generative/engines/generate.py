"""The engine that fits every model: `model.generate`, in batches of prompts of like length.

`generate` prepares inputs, cache, logits processors and stopping criteria. Three things differ from its own sampling:
each token is drawn from the candidate's own stream instead of the global generator, its log probabilities are kept as
the loop goes, and where the model's cache allows it rows that have ended leave the batch and a prompt is read once for
all of its candidates.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin
from transformers.utils import logging

from rsft_hf.generative.engines.chains import counts_tokens
from rsft_hf.generative.engines.dropping import can_drop, sample_and_drop
from rsft_hf.generative.engines.engine import GeneratedSequence, GenerationRequest, check_request
from rsft_hf.generative.engines.preparation import (
    prepare,
    separated_stops,
    without_forced_end,
    without_own_stops,
)
from rsft_hf.generative.engines.readers import pad_prompts
from rsft_hf.generative.engines.records import EndRecorder, StreamSampler
from rsft_hf.generative.engines.refusal import reason_to_go_alone
from rsft_hf.generative.settings import context_length
from rsft_hf.generative.streams import token_uniforms

logger = logging.get_logger(__name__)


@dataclass
class GenerateEngine:
    """Generates with `model.generate`, sorted by length, several prompts at a time.

    Args:
        max_sequences: Most candidates in one batch; halved, and kept so, when memory runs out.
        max_tokens: Most tokens that a batch may come to hold: with long prompts and answers it has fewer candidates.

    Raises:
        ValueError: If a number is below 1.
    """

    max_sequences: int = 128
    max_tokens: int = 2**19

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_tokens"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}`={vars(self)[name]} must be at least 1: it is the size of a batch.")

    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields the candidates batch by batch, longest prompts first, so that a want of memory shows at once.

        Raises:
            ValueError: If a prompt is empty or fills the context.
        """
        if not request.prompts or not request.num_candidates:
            return
        check_request(request, context_length(model), bool(model.config.is_encoder_decoder))
        expected = request.expected_lengths or [0.0] * len(request.prompts)
        lengths = [(-len(prompt), -expected[row]) for row, prompt in enumerate(request.prompts)]
        order = sorted(range(len(request.prompts)), key=lambda prompt: (lengths[prompt], prompt))
        waiting = [
            pairs[start : start + width]
            for pairs, width in self._together(model, request, order)
            for start in range(0, len(pairs), width)
        ]
        while waiting:
            batch = waiting.pop(0)
            if request.is_satisfied is not None:
                unsatisfied = {prompt for prompt, _ in batch if not request.is_satisfied(prompt)}
                batch = [(prompt, index) for prompt, index in batch if prompt in unsatisfied]
                if not batch:
                    continue
            try:
                sequences = _generate_batch(model, request, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.max_sequences = max(1, len(batch) // 2)
                logger.warning(f"Out of memory at {len(batch)} sequences; going on with {self.max_sequences}.")
                rest = batch + [pair for other in waiting for pair in other]
                waiting = [rest[at : at + self.max_sequences] for at in range(0, len(rest), self.max_sequences)]
                torch.cuda.empty_cache()
                continue
            yield from sequences

    def _together(
        self, model: Any, request: GenerationRequest, order: list[int]
    ) -> Iterator[tuple[list[tuple[int, int]], int]]:
        """Candidates that may stand in one batch, and how many of them at most."""
        width = self._width(request)
        if reason := reason_to_go_alone(model, request):
            logger.warning(f"{type(model).__name__} generates one candidate at a time: {reason}.")
            width = 1
        groups: list[list[int]] = [order]
        if not model.config.is_encoder_decoder and _counts_tokens(model, request, order):
            # Padding would count as tokens: prompts of one length stand together.
            by_length = itertools.groupby(order, key=lambda prompt: len(request.prompts[prompt]))
            groups = [list(prompts) for _, prompts in by_length]
        for group in groups:
            yield [(prompt, index) for prompt in group for index in range(request.num_candidates)], width

    def _width(self, request: GenerationRequest) -> int:
        """Whole prompts where they fit: encoder-decoder models then encode each prompt once."""
        longest = max(len(prompt) for prompt in request.prompts) + request.generation_config.max_new_tokens
        most = max(1, min(self.max_sequences, self.max_tokens // longest))
        if request.num_candidates > most:
            return most
        return most // request.num_candidates * request.num_candidates


def _counts_tokens(model: Any, request: GenerationRequest, order: list[int]) -> bool:
    """Whether a processor looks at the tokens of a row or at how many there are."""
    if (request.generation_config.num_beams or 1) > 1:
        return False
    shortest = request.prompts[order[-1]]
    return counts_tokens(prepare(model, request, shortest).processors)


def _generate_batch(model: Any, request: GenerationRequest, pairs: list[tuple[int, int]]) -> list[GeneratedSequence]:
    config, criteria = separated_stops(request)
    num_per_prompt = request.num_candidates if _holds_whole_prompts(pairs, request.num_candidates) else 1
    prompts = [request.prompts[prompt] for prompt, _ in pairs[::num_per_prompt]]
    is_left = not model.config.is_encoder_decoder
    inputs = pad_prompts(prompts, config.pad_token_id, model.device, is_left)
    if config.num_beams is not None and config.num_beams > 1:
        with without_own_stops(model):
            output = model.generate(**inputs, generation_config=config, stopping_criteria=criteria)
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return _split_beams(output, start, config.eos_token_id, criteria, pairs)
    uniforms = None
    if config.do_sample:
        uniforms = token_uniforms([request.seeds[prompt][index] for prompt, index in pairs], config.max_new_tokens)
    records: list[Any] = []

    def decode(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        processors, criteria = kwargs.pop("logits_processor"), kwargs.pop("stopping_criteria")
        processors = without_forced_end(processors, request.generation_config.forced_eos_token_id)
        size, copies = (len(pairs), config.max_new_tokens), len(pairs) // len(input_ids)
        sampler = StreamSampler(processors, uniforms, request.with_log_probs, size, input_ids.device)
        limits = torch.tensor([request.limit(prompt, index) for prompt, index in pairs], device=input_ids.device)
        recorder = EndRecorder(criteria, limits, input_ids.shape[1])
        if can_drop(processors, kwargs):
            records.extend((sampler, recorder))
            return sample_and_drop(self, input_ids, sampler, recorder, copies, **kwargs)
        if copies > 1:
            return None  # `generate` has to repeat the prompts itself
        records.extend((sampler, recorder))
        kwargs["generation_config"].do_sample = False  # the sampler leaves one choice
        keywords = kwargs | {"logits_processor": LogitsProcessorList([sampler]), "stopping_criteria": recorder}
        return GenerationMixin._sample(self, input_ids, **keywords)

    # An encoder reads a prompt once though `generate` repeats it; without one, we repeat what it has read.
    for config.num_return_sequences in (num_per_prompt if model.config.is_encoder_decoder else 1, num_per_prompt):
        if not records:
            with without_own_stops(model):
                model.generate(**inputs, generation_config=config, stopping_criteria=criteria, custom_generate=decode)
    sampler, recorder = records
    return _split(sampler, recorder, pairs)


def _holds_whole_prompts(pairs: list[tuple[int, int]], num_candidates: int) -> bool:
    """Whether each prompt can be given once, for `generate` to repeat after an encoder has run."""
    starts = range(0, len(pairs), num_candidates)
    return len(pairs) % num_candidates == 0 and all(
        prompt == pairs[start][0] for start in starts for prompt, _ in pairs[start : start + num_candidates]
    )


def _split(sampler: StreamSampler, recorder: EndRecorder, pairs: list[tuple[int, int]]) -> list[GeneratedSequence]:
    tokens, lengths, is_stopped = sampler.tokens.cpu(), recorder.lengths.tolist(), recorder.is_stopped.tolist()
    log_q, log_p = sampler.log_q.cpu(), sampler.log_p.cpu()
    return [
        GeneratedSequence(
            prompt,
            index,
            tokens[row, : lengths[row]].tolist(),
            "stop" if is_stopped[row] else "length",
            log_q[row, : lengths[row]] if sampler.with_log_probs else None,
            log_p[row, : lengths[row]] if sampler.with_log_probs else None,
        )
        for row, (prompt, index) in enumerate(pairs)
    ]


def _split_beams(
    output: torch.Tensor, start: int, ends: Any, criteria: StoppingCriteriaList, pairs: list[tuple[int, int]]
) -> list[GeneratedSequence]:
    """Cuts the result of a beam search, which has one best row per prompt, at its first end token or stop string."""
    ends = ends if isinstance(ends, list) else [ends]
    sequences = []
    for (prompt, index), row in zip(pairs, output, strict=True):
        stops = (
            at
            for at in range(start, len(row))
            if int(row[at]) in ends or (criteria and bool(criteria(row[None, : at + 1], None)))
        )
        end = next(stops, None)
        ids = row[start : None if end is None else end + 1].tolist()
        sequences.append(GeneratedSequence(prompt, index, ids, "length" if end is None else "stop"))
    return sequences
