"""The seam between a round and what generates: an engine is a callable, and yields sequences as they finish.

Prompts enter as token ids, each candidate with the seed of its own random stream; token ids, the reason of the end and
log probabilities leave. An engine knows no text, no reward and no data set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GeneratedSequence:
    """One sampled continuation.

    Attributes:
        prompt: Position of the prompt among those given to the engine.
        index: Position of the candidate among those of its prompt.
        token_ids: Sampled tokens, an end-of-sequence token included; no padding.
        finish_reason: "stop" if an end token or stop string came, "length" if the limit did.
        log_q: Log probability of each token under the processed distribution it was sampled from, shape
            (len(token_ids),), float32, nats; None where not asked for.
        log_p: The same under the raw distribution of the model.
    """

    prompt: int
    index: int
    token_ids: list[int]
    finish_reason: str
    log_q: torch.Tensor | None = None
    log_p: torch.Tensor | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """What an engine is asked for.

    Attributes:
        prompts: Token ids of each prompt.
        seeds: Seeds of each prompt's candidates, `num_candidates` each, in [0, 2**63).
        generation_config: Complete: see `settings.sampling_config`.
        with_log_probs: Whether to gather log q and log p.
        tokenizer: Needed for stop strings only.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[Sequence[int]]
    generation_config: GenerationConfig
    with_log_probs: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def num_candidates(self) -> int:
        """Candidates of each prompt."""
        return len(self.seeds[0]) if self.seeds else 0


@runtime_checkable
class Engine(Protocol):
    """Generates candidates; the same request gives the same candidates where arithmetic allows (fp32)."""

    def __call__(self, model: torch.nn.Module, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields every candidate of every prompt once, in any order.

        Args:
            model: In evaluation mode, unwrapped, on its device.
            request: Prompts, seeds and how to sample.
        """
        ...
