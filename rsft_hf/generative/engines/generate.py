"""The engine that fits every model: `model.generate`, in batches of prompts of like length.

`generate` itself runs the loop, the cache and the logits processors. Two things are put into it: the draw of each token
comes from the candidate's own stream instead of the global generator, and the chosen token's log probabilities are kept
as the loop goes, 4 bytes a token each, instead of the scores of the whole vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMixin, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria
from transformers.utils import logging

from rsft_hf.generative.engines.engine import GeneratedSequence, GenerationRequest
from rsft_hf.generative.streams import token_uniforms

logger = logging.get_logger(__name__)


@dataclass
class GenerateEngine:
    """Generates with `model.generate`, sorted by length, several prompts at a time.

    Args:
        max_sequences: Most candidates in one batch; halved, and kept so, when memory runs out.

    Raises:
        ValueError: If `max_sequences` is below 1.
    """

    max_sequences: int = 64

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise ValueError(f"`max_sequences`={self.max_sequences} must be at least 1: it is the size of a batch.")

    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields the candidates batch by batch, longest prompts first, so that a want of memory shows at once."""
        order = sorted(range(len(request.prompts)), key=lambda prompt: (-len(request.prompts[prompt]), prompt))
        pairs = [(prompt, index) for prompt in order for index in range(request.num_candidates)]
        waiting = [pairs[start : start + self._width(request)] for start in range(0, len(pairs), self._width(request))]
        while waiting:
            batch = waiting.pop(0)
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

    def _width(self, request: GenerationRequest) -> int:
        """Whole prompts where they fit: encoder-decoder models then encode each prompt once."""
        if request.num_candidates > self.max_sequences:
            return self.max_sequences
        return self.max_sequences // request.num_candidates * request.num_candidates


class _SampleFromStreams(LogitsProcessor):
    """Ends the list of processors: draws each row's token from the row's stream, and leaves it as the only choice.

    Args:
        processors: Those that `generate` built from its configuration.
        uniforms: Shape (rows, steps), float64; None picks the most probable token.
        with_log_probs: Whether to keep log q and log p of the chosen tokens.
    """

    def __init__(self, processors: LogitsProcessorList, uniforms: torch.Tensor | None, with_log_probs: bool) -> None:
        self.processors, self.uniforms, self.with_log_probs = processors, uniforms, with_log_probs
        self.log_q: list[torch.Tensor] = []
        self.log_p: list[torch.Tensor] = []
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raw = scores.float()
        processed = self.processors(input_ids, raw.clone())
        if self.uniforms is None:
            chosen = processed.argmax(-1)
        else:
            chosen = inverse_cdf(processed, self.uniforms[:, self._step].to(processed.device))
        if self.with_log_probs:
            self.log_p.append(_log_probability(raw, chosen))
            self.log_q.append(_log_probability(processed, chosen))
        self._step += 1
        return torch.full_like(processed, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def inverse_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Returns the token of each row at which the cumulative distribution passes the row's uniform, shape (rows,).

    Args:
        logits: Shape (rows, vocabulary); -inf for tokens that cannot be drawn.
        uniforms: Shape (rows,), float64, in [0, 1).

    Example:
        >>> logits = torch.log(torch.tensor([[0.2, 0.0, 0.8]]))
        >>> [int(inverse_cdf(logits, torch.tensor([u], dtype=torch.float64))) for u in (0.1, 0.2, 0.9)]
        [0, 2, 2]
    """
    # In float64: a float32 sum over a vocabulary of 150,000 is off by more than a rare token's probability.
    cumulative = logits.softmax(-1, dtype=torch.float32).double().cumsum(-1)
    totals = cumulative[:, -1]
    targets = torch.minimum(uniforms * totals, torch.nextafter(totals, torch.zeros_like(totals)))
    return torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(1)


def _log_probability(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)


class _RecordedCriteria(StoppingCriteriaList):
    """The criteria of `generate`, which also note where each row ended, and whether by its own end or by the limit."""

    def __init__(self, criteria: StoppingCriteriaList, prompt_width: int) -> None:
        super().__init__(criteria)
        self.prompt_width = prompt_width
        self.lengths: torch.Tensor | None = None  # (rows,), 0 while a row goes on
        self.is_stopped: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.lengths is None or self.is_stopped is None:
            self.lengths = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
            self.is_stopped = torch.zeros_like(self.lengths, dtype=torch.bool)
        is_done = torch.zeros_like(self.is_stopped)
        going_on = self.lengths == 0
        for criterion in self:
            is_met = criterion(input_ids, scores, **kwargs)
            is_done |= is_met
            if not isinstance(criterion, (MaxLengthCriteria, MaxTimeCriteria)):
                self.is_stopped |= is_met & going_on
        self.lengths = torch.where(going_on & is_done, input_ids.shape[1] - self.prompt_width, self.lengths)
        return is_done


def _generate_batch(model: Any, request: GenerationRequest, pairs: list[tuple[int, int]]) -> list[GeneratedSequence]:
    config = copy.deepcopy(request.generation_config)  # `generate` fills in what it finds missing
    num_per_prompt = request.num_candidates if _holds_whole_prompts(pairs, request.num_candidates) else 1
    prompts = [request.prompts[prompt] for prompt, _ in pairs[::num_per_prompt]]
    inputs = pad_prompts(prompts, config.pad_token_id, model)
    criteria = StoppingCriteriaList()
    if config.stop_strings is not None:
        criteria.append(StopStringCriteria(tokenizer=request.tokenizer, stop_strings=config.stop_strings))
        config.stop_strings = None  # `generate` hands no tokenizer on to a decoding function of one's own
    if config.num_beams is not None and config.num_beams > 1:
        output = model.generate(**inputs, generation_config=config, tokenizer=request.tokenizer)
        return _split_beams(model, output, config, inputs["input_ids"].shape[1], pairs)
    config.num_return_sequences = num_per_prompt
    uniforms = None
    if config.do_sample:
        uniforms = token_uniforms([request.seeds[prompt][index] for prompt, index in pairs], config.max_new_tokens)
    recorders: list[Any] = []

    def decode(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sampler = _SampleFromStreams(kwargs.pop("logits_processor"), uniforms, request.with_log_probs)
        recorded = _RecordedCriteria(kwargs.pop("stopping_criteria"), input_ids.shape[1])
        recorders.extend((sampler, recorded))
        kwargs["generation_config"].do_sample = False  # the sampler has left one choice
        return GenerationMixin._sample(
            self, input_ids, logits_processor=LogitsProcessorList([sampler]), stopping_criteria=recorded, **kwargs
        )

    output = model.generate(**inputs, generation_config=config, stopping_criteria=criteria, custom_generate=decode)
    sampler, recorded = recorders
    return _split(output, sampler, recorded, pairs)


def _holds_whole_prompts(pairs: list[tuple[int, int]], num_candidates: int) -> bool:
    """Whether each prompt can be given once, for `generate` to repeat after an encoder has run."""
    starts = range(0, len(pairs), num_candidates)
    return len(pairs) % num_candidates == 0 and all(
        prompt == pairs[start][0] for start in starts for prompt, _ in pairs[start : start + num_candidates]
    )


def _split(
    output: torch.Tensor, sampler: _SampleFromStreams, recorded: _RecordedCriteria, pairs: list[tuple[int, int]]
) -> list[GeneratedSequence]:
    tokens = output[:, recorded.prompt_width :].cpu()
    if recorded.lengths is None or recorded.is_stopped is None:
        raise RuntimeError("`generate` never asked its stopping criteria: this version of transformers is not known.")
    lengths, is_stopped = recorded.lengths.cpu(), recorded.is_stopped.cpu()
    log_q = torch.stack(sampler.log_q, 1).cpu() if sampler.log_q else None
    log_p = torch.stack(sampler.log_p, 1).cpu() if sampler.log_p else None
    sequences = []
    for row, (prompt, index) in enumerate(pairs):
        length = int(lengths[row])
        sequences.append(
            GeneratedSequence(
                prompt,
                index,
                tokens[row, :length].tolist(),
                "stop" if bool(is_stopped[row]) else "length",
                None if log_q is None else log_q[row, :length],
                None if log_p is None else log_p[row, :length],
            )
        )
    return sequences


def _split_beams(
    model: Any, output: torch.Tensor, config: GenerationConfig, prompt_width: int, pairs: list[tuple[int, int]]
) -> list[GeneratedSequence]:
    """Cuts the result of a beam search, which has one best row per prompt, at its first end token."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    start = 1 if model.config.is_encoder_decoder else prompt_width
    sequences = []
    for (prompt, index), row in zip(pairs, output[:, start:].tolist(), strict=True):
        end = next((position for position, token in enumerate(row) if token in ends), None)
        ids = row if end is None else row[: end + 1]
        sequences.append(GeneratedSequence(prompt, index, ids, "length" if end is None else "stop"))
    return sequences


def pad_prompts(prompts: list[Any], pad_token_id: int, model: Any) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask`, shape (prompts, longest), on the model's device.

    Decoder-only models continue from the right end, so they are padded on the left; encoders on the right.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if model.config.is_encoder_decoder else slice(width - len(prompt), width)
        ids[row, place] = torch.tensor(prompt, dtype=torch.long)
        mask[row, place] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
