"""Logits processors for rows of different ages: the same scores as `generate` gives each candidate alone.

The scores of all rows in flight enter, processed scores leave. Processors that look at nothing but scores run over all
rows at once; those that look at tokens or at how many there are run over rows of the same age.
"""

from collections import defaultdict
from typing import Any

import torch
from transformers import LogitsProcessorList, generation

from rsft_hf.generative.engines.engine import GenerationRequest
from rsft_hf.generative.engines.preparation import Prepared, prepare

_SCORES_ALONE = (
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.InfNanRemoveLogitsProcessor,
    generation.LogitNormalization,
    generation.MinPLogitsWarper,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
)


class Chains:
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
    return type(processor) in _SCORES_ALONE
