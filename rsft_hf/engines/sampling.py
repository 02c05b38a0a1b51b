"""Sampling of tokens, and the logits processors and stopping criteria that `generate` would use.

`prepare` builds logits processors, stopping criteria, first decoder tokens and KV cache as `model.generate` does.
`ProcessorChains` runs logits processors over rows of different ages: those that read only scores over all rows at once,
the others over rows of the same age. `StreamSampler` and `EndRecorder` draw each token from its candidate's stream and
record log probabilities and ends inside `generate`.
"""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, generation
from transformers.generation import (
    ForcedEOSTokenLogitsProcessor,
    GenerationMixin,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from rsft_hf.engines.base import GenerationRequest


@dataclass(frozen=True)
class Prepared:
    """Inputs, processors and criteria that `generate` prepared for one or several prompts.

    Attributes:
        processors: From the scores of the next token to those it is drawn from.
        criteria: When a row ends.
        input_ids: Tokens that generation goes on from, shape (prompts, width): prompts, or a decoder's first tokens.
        model_kwargs: What would be handed to the model, its cache among it.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]


def prepare(model: Any, request: GenerationRequest, prompt: Sequence[int]) -> Prepared:
    """Returns the preparation of `model.generate` for one prompt, without generating.

    Args:
        model: Has `generate`.
        request: Says how to sample.
        prompt: Token ids.
    """
    config, criteria = separated_stops(request)
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=model.device)
    return prepare_inputs(model, config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, criteria)


def prepare_inputs(
    model: Any, config: GenerationConfig, inputs: dict[str, torch.Tensor], criteria: StoppingCriteriaList
) -> Prepared:
    """Returns the preparation of `model.generate` for these inputs, without generating; an encoder runs.

    Args:
        model: Has `generate`.
        config: Without stop strings; `generate` may fill it in.
        inputs: `input_ids` and `attention_mask`, shape (prompts, width).
        criteria: Further ones, such as stop strings.
    """
    forced_end, found = config.forced_eos_token_id, list[Prepared]()

    def keep(_: Any, input_ids: torch.Tensor, **kwargs: Any) -> None:
        processors = without_forced_end(kwargs.pop("logits_processor"), forced_end)
        found.append(Prepared(processors, kwargs.pop("stopping_criteria"), input_ids, kwargs))

    with without_own_stops(model):
        model.generate(**inputs, generation_config=config, stopping_criteria=criteria, custom_generate=keep)
    return found[0]


@contextlib.contextmanager
def without_own_stops(model: Any) -> Iterator[None]:
    """Keeps `generate` from putting a model's own stop strings back, for which it would want a tokenizer."""
    configs = [one.generation_config for one in model.modules() if isinstance(one, GenerationMixin)]
    stops = [config.stop_strings for config in configs]
    for config in configs:
        config.stop_strings = None
    try:
        yield
    finally:
        for config, own in zip(configs, stops, strict=True):
            config.stop_strings = own


def separated_stops(request: GenerationRequest) -> tuple[GenerationConfig, StoppingCriteriaList]:
    """Returns a copy of the configuration, which `generate` may fill in, and its stop strings as a criterion."""
    config, criteria = copy.deepcopy(request.generation_config), StoppingCriteriaList()
    if config.stop_strings is not None:
        criteria.append(StopStringCriteria(tokenizer=request.tokenizer, stop_strings=config.stop_strings))
        config.stop_strings = None  # `generate` hands no tokenizer on to a decoding function of one's own
    return config, criteria


def without_forced_end(processors: LogitsProcessorList, forced_end: Any) -> LogitsProcessorList:
    """Returns the processors without the one that ends every answer at the limit, unless it was asked for.

    `generate` takes it from the model's own configuration (BART's, Marian's) where a request leaves it out.
    """
    if forced_end is not None:
        return processors
    return LogitsProcessorList(one for one in processors if type(one) is not ForcedEOSTokenLogitsProcessor)


_BLOCK = 64  # tokens


class StreamSampler(LogitsProcessor):
    """Draws each row's token from the row's own stream, and keeps it with its log probabilities.

    As the last of `generate`'s logits processors it leaves the token drawn as the only choice.

    Args:
        processors: Those that `generate` built from its configuration.
        uniforms: Shape (rows, steps), float64; None picks the most probable token.
        with_log_probs: Whether to keep log q and log p of the chosen tokens.
        size: Rows, and most tokens of a row.
        device: Where the tokens are drawn.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        uniforms: torch.Tensor | None,
        with_log_probs: bool,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.processors, self.with_log_probs = processors, with_log_probs
        self.uniforms = None if uniforms is None else uniforms.to(device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        # Four bytes a token each, where the scores of the whole vocabulary would be kept otherwise.
        self.log_q = torch.zeros(size if with_log_probs else (0, 0), device=device)
        self.log_p = torch.zeros_like(self.log_q)
        self._step = 0

    def draw(self, input_ids: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Returns the next token of these rows, shape (len(rows),), int64."""
        raw = scores.float()
        processed = self.processors(input_ids, raw.clone())
        chosen, _ = choose(processed, None if self.uniforms is None else self.uniforms[rows, self._step])
        self.tokens[rows, self._step] = chosen
        if self.with_log_probs:
            self.log_p[rows, self._step] = log_probability(raw, chosen)
            self.log_q[rows, self._step] = log_probability(processed, chosen)
        self._step += 1
        return chosen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores that leave one choice, for a loop that picks the best of all rows."""
        chosen = self.draw(input_ids, scores, torch.arange(len(input_ids), device=input_ids.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class EndRecorder(StoppingCriteriaList):
    """The criteria of `generate`, which also note where each row ended, and whether by its own end or by the limit.

    Args:
        criteria: Those that `generate` built.
        limits: Most tokens of each row, shape (rows,), int64.
        prompt_width: Columns before the first token that is generated.
    """

    def __init__(self, criteria: StoppingCriteriaList, limits: torch.Tensor, prompt_width: int) -> None:
        super().__init__(criteria)
        self.limits, self.prompt_width = limits, prompt_width
        self.lengths = torch.zeros_like(limits)  # 0 while a row goes on
        self.is_stopped = torch.zeros_like(limits, dtype=torch.bool)

    def ended(self, input_ids: torch.Tensor, rows: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """Returns which of these rows have ended, now or before, shape (len(rows),), bool."""
        going_on = self.lengths[rows] == 0
        is_done, is_stopped = torch.zeros_like(going_on), torch.zeros_like(going_on)
        for criterion in self:
            is_met = criterion(input_ids, scores, **kwargs)
            is_done |= is_met
            if not isinstance(criterion, (MaxLengthCriteria, MaxTimeCriteria)):
                is_stopped |= is_met
        is_done |= input_ids.shape[1] - self.prompt_width >= self.limits[rows]
        newly = going_on & is_done
        self.is_stopped[rows] |= is_stopped & newly
        self.lengths[rows[newly]] = input_ids.shape[1] - self.prompt_width
        return ~going_on | is_done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns which rows of the whole batch have ended."""
        return self.ended(input_ids, torch.arange(len(input_ids), device=input_ids.device), scores, **kwargs)


def inverse_cdf(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Returns the token of each row at which the cumulative distribution passes the row's uniform, shape (rows,).

    Args:
        probabilities: Shape (rows, vocabulary), >= 0; 0 for tokens that cannot be drawn.
        uniforms: Shape (rows,), float64, in [0, 1).

    Example:
        >>> probabilities = torch.tensor([[0.2, 0.0, 0.8]])
        >>> [int(inverse_cdf(probabilities, torch.tensor([u], dtype=torch.float64))) for u in (0.1, 0.2, 0.9)]
        [0, 2, 2]
    """
    num_blocks = -(-probabilities.shape[1] // _BLOCK)
    padded = torch.nn.functional.pad(probabilities, (0, num_blocks * _BLOCK - probabilities.shape[1]))
    blocks = padded.view(len(probabilities), num_blocks, _BLOCK)
    # In float64: a float32 sum over a vocabulary of 150,000 is off by more than a rare token's probability. First the
    # block, then the token in it, which costs a pass over the probabilities and no sums of the same size.
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _passed(sums, uniforms * sums.sum(-1))
    chosen_blocks = blocks[torch.arange(len(blocks), device=blocks.device), block].double()
    token, _ = _passed(chosen_blocks, rest)
    return (block * _BLOCK + token).clamp(max=probabilities.shape[1] - 1)  # past the end where they are NaN


def _passed(parts: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part in which the sum over the parts of each row passes its target, and how far into it, shapes (rows,)."""
    cumulative = parts.cumsum(-1)
    totals = cumulative[:, -1]
    targets = torch.minimum(targets, torch.nextafter(totals, torch.zeros_like(totals)))
    part = torch.searchsorted(cumulative, targets[:, None], right=True).clamp(max=parts.shape[1] - 1)
    before = torch.where(part > 0, cumulative.gather(1, (part - 1).clamp(min=0)), 0.0)
    return part.squeeze(1), (targets[:, None] - before).squeeze(1)


def choose(processed: torch.Tensor, uniforms: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the token of each row, shape (rows,), int64, and the probabilities it was drawn from, if it was drawn.

    Args:
        processed: Scores, shape (rows, vocabulary), float32.
        uniforms: Shape (rows,), float64; None picks the most probable token.

    Raises:
        ValueError: If the scores of a row are NaN, or leave no token to choose.
    """
    if uniforms is None:
        chosen, probabilities = processed.argmax(-1), None
    else:
        probabilities = processed.softmax(-1)
        chosen = inverse_cdf(probabilities, uniforms)
    _refuse_broken(processed if probabilities is None else probabilities, chosen)
    return chosen, probabilities


def _refuse_broken(values: torch.Tensor, chosen: torch.Tensor) -> None:
    """Raises ValueError if a token was chosen that has no probability: its row is NaN, or leaves nothing to choose.

    Args:
        values: Probabilities, or the scores that the greatest was taken of, shape (rows, vocabulary).
        chosen: Token of each row, shape (rows,), int64.
    """
    is_broken = ~torch.isfinite(values.gather(1, chosen[:, None]))
    if bool(is_broken.any()):
        raise ValueError(
            f"The scores of {int(is_broken.sum())} of {len(chosen)} candidates are NaN, or leave no token to choose. "
            "Training may have diverged, a number may have overflowed in half precision, or `generation_config` may "
            "forbid every token."
        )


def log_probability(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns the log probability of each row's token, shape (rows,), nats."""
    return logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)


# Logits processors by what they read of a batch; one that is in no group may read anything.
# They leave out tokens whose scores are too low.
TRUNCATING = (
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.MinPLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)
# They read the scores of a row alone.
SCORES_ONLY = (
    *TRUNCATING,
    generation.InfNanRemoveLogitsProcessor,
    generation.LogitNormalization,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
)
# They read the scores and the tokens of a row, and no other row.
ROW_WISE = (
    *SCORES_ONLY,
    generation.ExponentialDecayLengthPenalty,
    generation.ForcedBOSTokenLogitsProcessor,
    generation.ForcedEOSTokenLogitsProcessor,
    generation.MinLengthLogitsProcessor,
    generation.MinNewTokensLengthLogitsProcessor,
    generation.NoBadWordsLogitsProcessor,
    generation.NoRepeatNGramLogitsProcessor,
    generation.RepetitionPenaltyLogitsProcessor,
    generation.SuppressTokensAtBeginLogitsProcessor,
)


class ProcessorChains:
    """The processors of each row, built by `generate` for a prompt of its length.

    Args:
        model: Has `generate`.
        request: Says how to sample.
        prepared: What `generate` made of one of the prompts.
    """

    def __init__(self, model: Any, request: GenerationRequest, prepared: Prepared) -> None:
        self._model, self._request = model, request
        self._by_width = {prepared.input_ids.shape[1]: self._without_padding(prepared.processors)}
        self._common = None if counts_tokens(prepared.processors) else prepared.processors

    @property
    def is_empty(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self._common is not None and not len(self._common)

    def __call__(self, sequences: torch.Tensor, ages: list[tuple[int, int]], scores: torch.Tensor) -> torch.Tensor:
        """Returns processed scores, shape (rows, vocabulary).

        Args:
            sequences: Tokens of each row from its first on, shape (rows, most tokens), int64.
            ages: Tokens of each row's prompt, and of the whole row so far.
            scores: Raw, shape (rows, vocabulary), float32.
        """
        if self._common is not None:
            processed: torch.Tensor = self._common(sequences[:, :1], scores)
            return processed
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, age in enumerate(ages):
            groups[age].append(row)
        processed = torch.empty_like(scores)
        for (prompt_width, width), rows in groups.items():
            chosen = torch.tensor(rows, device=scores.device)
            processed[chosen] = self._of_width(prompt_width)(sequences[chosen, :width], scores[chosen])
        return processed

    def _of_width(self, width: int) -> LogitsProcessorList:
        if width not in self._by_width:
            prompt = next(ids for ids in self._request.prompts if len(ids) == width)
            prepared = prepare(self._model, self._request, prompt)
            self._by_width[width] = self._without_padding(prepared.processors)
        return self._by_width[width]

    @staticmethod
    def _without_padding(processors: LogitsProcessorList) -> LogitsProcessorList:
        for one in processors:
            if type(one) is generation.RepetitionPenaltyLogitsProcessor:
                one.prompt_ignore_length = None  # it was told the padding of one prompt; here rows have none
        return processors


def counts_tokens(processors: LogitsProcessorList) -> bool:
    """Returns whether one of the processors looks at the tokens of a row, or at how many there are."""
    return not all(_looks_at_scores_alone(one) for one in processors)


def _looks_at_scores_alone(processor: Any) -> bool:
    if type(processor) is generation.NoBadWordsLogitsProcessor:
        return all(len(word) == 1 for word in processor.bad_word_ids)
    return type(processor) in SCORES_ONLY


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: Any, is_left: bool
) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask`, shape (prompts, longest), int64.

    Decoder-only models continue from the right end, so they are padded on the left; encoders on the right.
    """
    side = "left" if is_left else "right"
    rows = [torch.tensor(list(prompt), dtype=torch.long) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
