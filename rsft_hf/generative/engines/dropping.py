"""A decoding loop in which finished rows leave the batch, for the models and processors that allow it.

`generate` runs a batch until its longest row has ended: with the long tails of real answers most of what it computes is
padding. Here the rows that go on are picked out of the cache whenever enough have ended, and a prompt is read once for
all of its candidates. `generate` still prepares everything: inputs, cache, logits processors and stopping criteria.
"""

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessorList, generation
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# They read nothing but a row's own tokens and scores, and so do not care which rows stand beside it.
_ROW_WISE = (
    generation.ExponentialDecayLengthPenalty,
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.ForcedBOSTokenLogitsProcessor,
    generation.ForcedEOSTokenLogitsProcessor,
    generation.InfNanRemoveLogitsProcessor,
    generation.LogitNormalization,
    generation.MinLengthLogitsProcessor,
    generation.MinNewTokensLengthLogitsProcessor,
    generation.MinPLogitsWarper,
    generation.NoBadWordsLogitsProcessor,
    generation.NoRepeatNGramLogitsProcessor,
    generation.RepetitionPenaltyLogitsProcessor,
    generation.SuppressTokensAtBeginLogitsProcessor,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_ROWS_BY_NAME = ("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "token_type_ids")
_SETTINGS = ("past_key_values", "encoder_outputs", "use_cache", "logits_to_keep", "output_attentions",
             "output_hidden_states")  # fmt: skip
_SHARE_TO_DROP = 8  # rows leave when an eighth has ended: picking copies the cache


def can_drop(processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> bool:
    """Returns whether rows can leave a batch."""
    return reason_to_stay(processors, model_kwargs) is None


def reason_to_stay(processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> str | None:
    """Returns why rows cannot be taken apart, None if they can: if the cache allows it and nothing else holds them.

    Args:
        processors: What `generate` prepared for the scores.
        model_kwargs: What `generate` prepared for the model.
    """
    cache: Any = model_kwargs.get("past_key_values")
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
        if type(processor) not in _ROW_WISE:
            return f"{type(processor).__name__} may look at more than a row"
    for name, value in model_kwargs.items():
        if name not in _ROWS_BY_NAME + _SETTINGS and isinstance(value, torch.Tensor):
            return f"`generate` hands it {name}"
    return None


class Live:
    """What belongs to the rows that are still being generated: tokens, masks, cache, and which rows they are.

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
        self.model_kwargs["past_key_values"].batch_select_indices(chosen)

    def repeat(self, copies: int) -> None:
        """Puts `copies` rows in the place of each, after their common prompt has been read once."""
        chosen = torch.arange(len(self.rows), device=self.rows.device).repeat_interleave(copies)
        self._take(chosen)
        self.model_kwargs["past_key_values"].batch_repeat_interleave(copies)
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
    live = Live(input_ids, model_kwargs, sampler.processors)
    outputs = model._prefill(input_ids, generation_config, live.model_kwargs)
    while True:
        live.model_kwargs = model._update_model_kwargs_for_generation(
            outputs, live.model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        scores = outputs.logits[:, -1].clone()
        del outputs  # the logits of a long prompt are large
        if copies > 1:
            live.repeat(copies)
            scores, copies = scores.repeat_interleave(copies, 0), 1
        tokens = sampler.draw(live.input_ids, scores, live.rows)
        live.input_ids = torch.cat([live.input_ids, tokens[:, None]], dim=-1)
        goes_on = ~criteria.ended(live.input_ids, live.rows)
        num_ended = len(goes_on) - int(goes_on.sum())
        if num_ended == len(goes_on):
            return
        if num_ended * _SHARE_TO_DROP >= len(goes_on):
            live.keep(goes_on.nonzero().flatten())
        inputs = model.prepare_inputs_for_generation(live.input_ids, next_sequence_length=1, **live.model_kwargs)
        outputs = model(**inputs, return_dict=True)
