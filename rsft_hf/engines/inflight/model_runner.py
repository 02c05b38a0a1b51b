"""Model runner for continuous batching: prefill and decode steps, decoder-only and encoder-decoder.

Prefill returns next-token logits, and keys and values for the slot KV cache. `row_positions` sets per-row positions in
decoders without a positions argument: BART, Marian, M2M100 and related models take them from the cache length, in a
module `embed_positions`.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rsft_hf.engines.inflight.kv_cache import BatchCache, CrossAttentionCache
from rsft_hf.engines.sampling import pad_prompts
from rsft_hf.upstream import CACHE_LENGTH_NAMES, cache_argument

States = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class PrefillOutput:
    """Prompts that have been read once, for all of their candidates.

    Attributes:
        scores: Of the first token of the answer, shape (prompts, vocabulary).
        states: Keys and values of each layer, shape (prompts, heads, width, head dimension), ending together.
        cross_states: The same of what the decoder reads of the encoder, beginning together; empty without one.
        source_lengths: Tokens that the encoder read of each prompt; empty without one.
    """

    scores: torch.Tensor
    states: States
    cross_states: States
    source_lengths: list[int]

    def only(self, row: int) -> "PrefillOutput":
        """Returns one of the prompts, in memory of its own."""
        one = slice(row, row + 1)
        states, cross_states = (
            [(keys[one].clone(), values[one].clone()) for keys, values in layers]
            for layers in (self.states, self.cross_states)
        )
        return PrefillOutput(self.scores[one].clone(), states, cross_states, self.source_lengths[one])


class CausalModelRunner:
    """A decoder-only model.

    Args:
        model: A transformers model, unwrapped; adapters may be inside.
        pad_token_id: Fills prompts up on the left.
        max_rows: Slots.
    """

    def __init__(self, model: Any, pad_token_id: int, max_rows: int) -> None:
        self.model, self.pad_token_id, self.cache = model, pad_token_id, BatchCache(max_rows)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # The scores of a whole prompt over the vocabulary would be the largest thing in memory.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def fill(self, value: float) -> None:
        """Says what stands in the cache where nothing has been written."""
        self.cache.columns.fill = value

    def read(self, prompts: Sequence[Sequence[int]]) -> PrefillOutput:
        """Reads prompts in one pass, padded on the left."""
        inputs = pad_prompts(prompts, self.pad_token_id, self.model.device, is_left=True)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()
        scores = self._scores(inputs["input_ids"], inputs["attention_mask"], positions, cache, **self._last_only)
        return PrefillOutput(scores, _states(cache), [], [])

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Returns the scores of each row's next token, shape (rows, vocabulary).

        Args:
            tokens: Last token of each row, shape (rows,), int64.
            lengths: Tokens of each row, that one included, shape (rows,), int64.
            width: The greatest of the lengths.
        """
        mask = _mask(lengths, width)
        self.cache.columns.start = self.cache.columns.write + 1 - width
        scores = self._scores(tokens[:, None], mask, lengths[:, None] - 1, self.cache)
        self.cache.columns.write += 1
        return scores

    def admit(self, read: PrefillOutput, sources: list[int]) -> None:
        """Lets a row enter for each of `sources`, which says what prompt it goes on from."""
        self.cache.make_room(read.states[0][0].shape[2])
        self.cache.admit(read.states, sources)

    def keep_only(self, rows: int, sources: list[int], targets: list[int]) -> None:
        """Leaves the first `rows` rows, after the rows `sources` have been copied over `targets`."""
        self.cache.keep_only(rows, sources, targets)

    def make_room(self, is_last: bool) -> None:
        """Sees to a free column for the next step; `is_last` says that no row will enter any more."""
        if is_last:
            self.cache.expect_no_more_rows()
        self.cache.make_room(0)

    def _scores(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, **more: Any) -> Any:
        if self._takes_positions:
            more["position_ids"] = positions
        # A mask of two dimensions: masks of four go wrong under eager attention and sliding windows.
        more |= cache_argument(self.model, cache)
        outputs = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        return outputs.logits[:, -1]


class EncoderDecoderModelRunner:
    """A model that reads the prompt with an encoder.

    Args:
        model: A transformers model, unwrapped; adapters may be inside.
        pad_token_id: Fills prompts up on the right.
        max_rows: Slots.
        decoder_start: First tokens of the decoder, shape (1, width).
        longest: Tokens of the longest prompt.
    """

    def __init__(self, model: Any, pad_token_id: int, max_rows: int, decoder_start: torch.Tensor, longest: int) -> None:
        self.model, self.pad_token_id, self.decoder_start = model, pad_token_id, decoder_start
        self.cache, self.cross_cache = BatchCache(max_rows), CrossAttentionCache(max_rows, longest)
        self._source_lengths: list[int] = []
        self._placeholder = torch.zeros(0)

    def fill(self, value: float) -> None:
        """Says what stands in the caches where nothing has been written."""
        self.cache.columns.fill = self.cross_cache.columns.fill = value

    def read(self, prompts: Sequence[Sequence[int]]) -> PrefillOutput:
        """Encodes prompts in one pass, padded on the right, and takes the decoder's first step."""
        inputs = pad_prompts(prompts, self.pad_token_id, self.model.device, is_left=False)
        encoded = self.model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        self._placeholder = encoded.new_zeros((1, 1, encoded.shape[-1]))
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = self.decoder_start.expand(len(prompts), -1)
        scores = self._scores(start, None, encoded, inputs["attention_mask"], caches)
        lengths = [len(prompt) for prompt in prompts]
        cross = [(keys, values) for keys, values in _states(caches.cross_attention_cache)]
        return PrefillOutput(scores, _states(caches.self_attention_cache), cross, lengths)

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Returns the scores of each row's next token, shape (rows, vocabulary).

        Args:
            tokens: Last token of each row, shape (rows,), int64.
            lengths: Tokens of each row in the decoder, that one included, shape (rows,), int64.
            width: The greatest of the lengths.
        """
        sources = torch.tensor(self._source_lengths, device=lengths.device)
        source_width = max(self._source_lengths)
        self.cross_cache.narrow(source_width)
        source_mask = (torch.arange(source_width, device=lengths.device) < sources[:, None]).long()
        self.cache.columns.start = self.cache.columns.write + 1 - width
        caches = EncoderDecoderCache(self.cache, self.cross_cache)  # which it takes to be filled already
        # What the encoder said is in the cache of the cross attention; only its shape is looked at.
        encoded = self._placeholder.expand(len(tokens), source_width, -1)
        with row_positions(self.model, lengths - 1):
            scores = self._scores(tokens[:, None], _mask(lengths, width), encoded, source_mask, caches)
        self.cache.columns.write += 1
        return scores

    def admit(self, read: PrefillOutput, sources: list[int]) -> None:
        """Lets a row enter for each of `sources`, which says what prompt it goes on from."""
        self.cache.make_room(read.states[0][0].shape[2])
        self.cache.admit(read.states, sources)
        self.cross_cache.admit(read.cross_states, sources)
        self._source_lengths += [read.source_lengths[source] for source in sources]

    def keep_only(self, rows: int, sources: list[int], targets: list[int]) -> None:
        """Leaves the first `rows` rows, after the rows `sources` have been copied over `targets`."""
        self.cache.keep_only(rows, sources, targets)
        self.cross_cache.keep_only(rows, sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self._source_lengths[target] = self._source_lengths[source]
        del self._source_lengths[rows:]

    def make_room(self, is_last: bool) -> None:
        """Sees to a free column for the next step; `is_last` says that no row will enter any more."""
        if is_last:
            self.cache.expect_no_more_rows()
        self.cache.make_room(0)

    def _scores(
        self, ids: torch.Tensor, mask: Any, encoded: torch.Tensor, source_mask: torch.Tensor, caches: Any
    ) -> Any:
        outputs = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=source_mask,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            use_cache=True,
            **cache_argument(self.model, caches),
        )
        return outputs.logits[:, -1]


def _mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """1 for the columns of each row, which end together, shape (rows, width), int64."""
    return (torch.arange(width, device=lengths.device) >= width - lengths[:, None]).long()


def _states(cache: Any) -> States:
    return [(layer.keys, layer.values) for layer in cache.layers]


@contextlib.contextmanager
def row_positions(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Gives each row its own position while the block runs; decoders with relative positions are left as they are.

    Args:
        model: Encoder-decoder.
        positions: Of each row's token, shape (rows,), int64.
    """
    embedding = dict(model.get_decoder().named_children()).get("embed_positions")
    names = [] if embedding is None else list(inspect.signature(embedding.forward).parameters)
    with contextlib.ExitStack() as hooks:
        if embedding is not None and "position_ids" in names:
            hooks.enter_context(_as_one_sequence(embedding, positions))
        elif embedding is not None and (length := next((one for one in CACHE_LENGTH_NAMES if one in names), None)):
            hooks.enter_context(_one_by_one(embedding, positions, length))
        yield


@contextlib.contextmanager
def _as_one_sequence(embedding: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Embeds the positions of the rows as those of one sequence would be, then gives each row its own."""
    signature = inspect.signature(embedding.forward)

    def replace(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["position_ids"] = positions
        return bound.args, bound.kwargs

    def separate(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.reshape(len(positions), 1, -1)

    with embedding.register_forward_pre_hook(replace, with_kwargs=True), embedding.register_forward_hook(separate):
        yield


@contextlib.contextmanager
def _one_by_one(embedding: torch.nn.Module, positions: torch.Tensor, length_name: str) -> Iterator[None]:
    """Embeds as often as there are different positions, each time as if the cache were that long."""
    signature = inspect.signature(embedding.forward)

    def embed(_: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        bound, rows = signature.bind(*args, **kwargs), output.expand(len(positions), 1, -1).clone()
        for position in positions.unique().tolist():
            bound.arguments[length_name] = position
            here = positions == position
            rows[here] = embedding.forward(*bound.args, **bound.kwargs).expand_as(rows)[here]
        return rows

    with embedding.register_forward_hook(embed, with_kwargs=True):
        yield
