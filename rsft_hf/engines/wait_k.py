"""WaitKEngine: candidates written while the source is read, for simultaneous translation.

Ma et al. 2019, arXiv:1810.08398: token t of a translation is written when k + t - 1 tokens of its source are read.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from rsft_hf.checks import check_integer
from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest, check_request
from rsft_hf.engines.generation_config import context_length, end_tokens
from rsft_hf.engines.random_streams import token_uniforms
from rsft_hf.engines.sampling import choose, prepare

Pair = tuple[int, int]


class WaitKEngine(Engine):
    """Reads k source tokens, then writes one token and reads one in turn; an encoder-decoder model of any kind.

    The encoder reads what is known of the source anew at each step, and the decoder has no cache, as its states would
    be those of shorter sources. With a k as long as the sources the candidates are those of `GenerateEngine`.

    Args:
        k: Source tokens read before the first is written, at least 1; the end token counts.
        max_sequences: Candidates in one batch, at least 1.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> WaitKEngine(3).facts()
        {'k': 3}
    """

    def __init__(self, k: int, max_sequences: int = 128) -> None:
        check_integer("k", k, 1)
        check_integer("max_sequences", max_sequences, 1)
        self.k, self.max_sequences = k, max_sequences

    def __repr__(self) -> str:
        return f"WaitKEngine({self.k})"

    def facts(self) -> dict[str, Any]:
        """Returns k, on which the candidates depend."""
        return {"k": self.k}

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Raises ValueError for a decoder-only model, beams, stop strings or wanted log probabilities."""
        if not model.config.is_encoder_decoder:
            raise ValueError(f"WaitKEngine cuts the source of an encoder, and {type(model).__name__} has none.")
        if log_probs:
            raise ValueError(
                "WaitKEngine gives no log probabilities. Take a rule on rewards, and keep_log_probs=False."
            )
        if (config.num_beams or 1) > 1 or config.stop_strings:
            raise ValueError("WaitKEngine writes token by token: leave out `num_beams` and `stop_strings`.")

    @torch.no_grad()
    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields the candidates batch by batch, those of the longest sources first.

        Raises:
            ValueError: If a prompt is empty or exceeds what the model reads.
        """
        check_request(request, context_length(model), is_encoder_decoder=True)
        pairs = [(prompt, index) for prompt in range(len(request.prompts)) for index in range(request.num_candidates)]
        pairs.sort(key=lambda pair: -len(request.prompts[pair[0]]))
        for start in range(0, len(pairs), self.max_sequences):
            yield from self._write(model, request, pairs[start : start + self.max_sequences])

    def _write(self, model: Any, request: GenerationRequest, pairs: list[Pair]) -> Iterator[GeneratedSequence]:
        config = request.generation_config
        prepared, ends = prepare(model, request, request.prompts[pairs[0][0]]), set(end_tokens(config))
        start = prepared.input_ids[:1]
        uniforms = None
        if config.do_sample:
            seeds = [request.seeds[prompt][index] for prompt, index in pairs]
            uniforms = token_uniforms(seeds, config.max_new_tokens).to(model.device)
        written = start.expand(len(pairs), -1)
        rows = list(range(len(pairs)))
        for step in range(config.max_new_tokens):
            sources = [request.prompts[pairs[row][0]][: self.k + step] for row in rows]
            logits = model(**_padded(sources, model.device), decoder_input_ids=written).logits[:, -1].float()
            scores = prepared.processors(written, logits)
            chosen, _ = choose(scores, None if uniforms is None else uniforms[rows, step])
            written = torch.cat((written, chosen[:, None]), 1)
            is_open = []
            for place, row in enumerate(rows):
                is_stopped = int(chosen[place]) in ends
                is_open.append(not is_stopped and step + 1 < request.limit(*pairs[row]))
                if not is_open[-1]:
                    ids = written[place, start.shape[1] :].tolist()
                    yield GeneratedSequence(*pairs[row], ids, "stop" if is_stopped else "length")
            rows = [row for row, stays in zip(rows, is_open) if stays]
            if not rows:
                return
            written = written[torch.tensor(is_open, device=written.device)]


def average_lagging(k: int, num_source: int, num_target: int) -> float:
    """Returns how many source tokens wait-k lags behind an ideal simultaneous translator. Ma et al. 2019.

    AL = 1/tau sum over t = 1..tau of g(t) - (t - 1) |x| / |y|, with g(t) = min(k + t - 1, |x|) tokens read before
    token t is written, and tau the first t at which the whole source has been read.

    Args:
        k: As in `WaitKEngine`.
        num_source: |x|, tokens of the source, at least 1.
        num_target: |y|, tokens of the translation, at least 1.

    Example:
        >>> average_lagging(3, 10, 10), average_lagging(100, 10, 10)
        (3.0, 10.0)
    """
    tau = min(max(1, num_source - k + 1), num_target)
    return sum(min(k + t, num_source) - t * num_source / num_target for t in range(tau)) / tau


def _padded(sources: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """The sources as a batch, filled up on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in sources], batch_first=True, padding_value=-1)
    return {"input_ids": ids.clamp(min=0).to(device), "attention_mask": ids.ge(0).long().to(device)}
