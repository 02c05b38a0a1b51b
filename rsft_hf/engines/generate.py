"""Engine over `model.generate`: works for every model, in length-sorted batches.

`generate` prepares inputs, KV cache, logits processors and stopping criteria. Three things differ from its own
sampling: each token is drawn from the random stream of its candidate, log probabilities are collected during decoding,
and, where cache and processors allow it, finished rows leave the batch and a prompt is prefilled once for all of its
candidates (`sample_and_drop`). `reason_against_batching` names the models and settings whose rows cannot share a batch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessorList, StoppingCriteriaList, generation
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import EosTokenCriteria, GenerationMixin, MaxLengthCriteria, StopStringCriteria
from transformers.utils import logging

from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest, check_request
from rsft_hf.engines.generation_config import context_length
from rsft_hf.engines.model_access import is_peft_model
from rsft_hf.engines.random_streams import token_uniforms
from rsft_hf.engines.sampling import (
    ROW_WISE,
    EndRecorder,
    StreamSampler,
    counts_tokens,
    pad_prompts,
    prepare,
    separated_stops,
    without_forced_end,
    without_own_stops,
)
from rsft_hf.memory import halve_batch_size
from rsft_hf.upstream import CACHE_NAMES, cache_name

logger = logging.get_logger(__name__)


@dataclass
class GenerateEngine(Engine):
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
        """Yields the candidates batch by batch, longest prompts first, so that an out-of-memory error comes at once.

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
            try:
                sequences = _generate_batch(model, request, batch)
            except (RuntimeError, MemoryError) as error:
                self.max_sequences = halve_batch_size(len(batch), error, "sequences")
                rest = batch + [pair for other in waiting for pair in other]
                waiting = [rest[at : at + self.max_sequences] for at in range(0, len(rest), self.max_sequences)]
                continue
            yield from sequences

    def _together(
        self, model: Any, request: GenerationRequest, order: list[int]
    ) -> Iterator[tuple[list[tuple[int, int]], int]]:
        """Candidates that may stand in one batch, and how many of them at most."""
        width = self._width(request)
        if reason := reason_against_batching(model, request):
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


_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)

_ROWS_BY_NAME = ("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "token_type_ids")

_SETTINGS = (*CACHE_NAMES, "encoder_outputs", "use_cache", "logits_to_keep", "output_attentions",
             "output_hidden_states")  # fmt: skip

_SHARE_TO_DROP = 8  # rows leave when an eighth has ended: picking copies the cache


def can_drop(processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> bool:
    """Returns whether rows can leave a batch."""
    return reason_against_dropping(processors, model_kwargs) is None


def reason_against_dropping(processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> str | None:
    """Returns why rows cannot be taken apart, None if they can: if the cache allows it and nothing else holds them.

    Args:
        processors: What `generate` prepared for the scores.
        model_kwargs: What `generate` prepared for the model.
    """
    cache: Any = model_kwargs.get(cache_name(model_kwargs))
    is_double = type(cache) is EncoderDecoderCache
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if is_double else [cache]
    if not model_kwargs.get("use_cache") or cache is None:
        return "it has no cache of keys and values"
    for one in caches:
        if type(one) is not DynamicCache:
            return f"its cache is a {type(one).__name__}"
        for layer in one.layers:
            if type(layer) not in _LAYERS:
                return f"its cache has a {type(layer).__name__}"
    for processor in processors:
        if type(processor) not in ROW_WISE:
            return f"{type(processor).__name__} may look at more than a row"
    for name, value in model_kwargs.items():
        if name not in _ROWS_BY_NAME + _SETTINGS and isinstance(value, torch.Tensor):
            return f"`generate` hands it {name}"
    return None


class ActiveRows:
    """State of the rows that are still being generated: tokens, masks, cache and row numbers.

    Args:
        input_ids: Prompt tokens, shape (rows, width).
        model_kwargs: What `generate` prepared for the model.
        processors: What `generate` prepared for the scores.
    """

    def __init__(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any], processors: LogitsProcessorList) -> None:
        self.input_ids, self.model_kwargs = input_ids, model_kwargs
        self.penalties = [one for one in processors if type(one) is generation.RepetitionPenaltyLogitsProcessor]
        self.rows = torch.arange(len(input_ids), device=input_ids.device)

    def keep(self, chosen: torch.Tensor) -> None:
        """Drops all rows but those at the positions `chosen`, shape (rows that stay,), int64."""
        self.rows = self.rows[chosen]
        self._take(chosen)
        self.model_kwargs[cache_name(self.model_kwargs)].batch_select_indices(chosen)

    def repeat(self, copies: int) -> None:
        """Puts `copies` rows in the place of each, after their common prompt has been read once."""
        chosen = torch.arange(len(self.rows), device=self.rows.device).repeat_interleave(copies)
        self._take(chosen)
        self.model_kwargs[cache_name(self.model_kwargs)].batch_repeat_interleave(copies)
        self.rows = torch.arange(len(chosen), device=chosen.device)

    def _take(self, chosen: torch.Tensor) -> None:
        self.input_ids = self.input_ids[chosen]
        for penalty in self.penalties:  # it knows the padding of each row, and does not count it as said
            if isinstance(penalty.prompt_ignore_length, torch.Tensor):
                penalty.prompt_ignore_length = penalty.prompt_ignore_length[chosen]
        for name in _ROWS_BY_NAME:
            if self.model_kwargs.get(name) is not None:
                self.model_kwargs[name] = self.model_kwargs[name][chosen]
        if (encoded := self.model_kwargs.get("encoder_outputs")) is not None:
            for name, value in encoded.items():
                if isinstance(value, torch.Tensor):
                    encoded[name] = value[chosen]


def sample_and_drop(
    model: Any,
    input_ids: torch.Tensor,
    sampler: Any,
    criteria: Any,
    copies: int,
    generation_config: Any,
    **model_kwargs: Any,
) -> None:
    """Generates until every row has ended; what was sampled is in the records of `sampler` and `criteria`.

    Args:
        model: Prepares its inputs as in `generate`.
        input_ids: Prompt tokens, shape (rows, width).
        sampler: Called with tokens, raw scores and row numbers; returns the next token of each.
        criteria: Called with tokens and row numbers; returns which rows have ended.
        copies: Candidates of each row of `input_ids`; the prompt is read once for all of them.
        generation_config: As `generate` completed it.
        **model_kwargs: As `generate` prepared them.
    """
    active = ActiveRows(input_ids, model_kwargs, sampler.processors)
    outputs = model._prefill(input_ids, generation_config, active.model_kwargs)
    while True:
        active.model_kwargs = model._update_model_kwargs_for_generation(
            outputs, active.model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        scores = outputs.logits[:, -1].clone()
        del outputs  # the logits of a long prompt are large
        if copies > 1:
            active.repeat(copies)
            scores, copies = scores.repeat_interleave(copies, 0), 1
        tokens = sampler.draw(active.input_ids, scores, active.rows)
        active.input_ids = torch.cat([active.input_ids, tokens[:, None]], dim=-1)
        goes_on = ~criteria.ended(active.input_ids, active.rows)
        num_ended = len(goes_on) - int(goes_on.sum())
        if num_ended == len(goes_on):
            return
        if num_ended * _SHARE_TO_DROP >= len(goes_on):
            active.keep(goes_on.nonzero().flatten())
        inputs = model.prepare_inputs_for_generation(active.input_ids, next_sequence_length=1, **active.model_kwargs)
        outputs = model(**inputs, return_dict=True)


_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


def reason_against_batching(model: Any, request: GenerationRequest) -> str | None:
    """Returns why a candidate would come out otherwise in a batch with others, None if it would not.

    Args:
        model: May carry adapters.
        request: What is asked for.
    """
    if is_peft_model(model) and any(config.alora_invocation_tokens for config in _loras(model)):
        return "its adapter (aLoRA) begins at a place in each prompt, which PEFT keeps for a whole batch"
    longest = max(len(prompt) for prompt in request.prompts) + request.generation_config.max_new_tokens
    for rope in _ropes(model.config.get_text_config().to_dict()):
        kind, limit = str(rope.get("rope_type", "")), rope.get("original_max_position_embeddings")
        limit = limit or model.config.get_text_config().to_dict().get("original_max_position_embeddings")
        limit = limit or context_length(model)
        if (kind == "longrope" or "dynamic" in kind) and limit is not None and longest > limit:
            return f"its {kind} rotary embedding changes for all rows when the longest passes {limit} tokens"
    return None


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of rotary embeddings in a configuration, of all layer types."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return [found, *(value for value in found.values() if isinstance(value, dict))]


def _loras(model: Any) -> list[Any]:
    from peft import LoraConfig  # an extra

    return [config for config in model.peft_config.values() if isinstance(config, LoraConfig)]
