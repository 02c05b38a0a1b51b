"""Interface of generation engines: the request, the generated sequence, the engine and its optional capabilities.

An engine is a callable from a model and a `GenerationRequest` (prompts as token ids, one random seed per candidate) to
`GeneratedSequence`s, yielded as they finish. It handles no text, reward or data set. Optional capabilities are
protocols: facts that candidates depend on, checks before the run, weight sync.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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
        tokenizer: Needed for stop strings, and by servers that return text.
        limits: Most tokens of each candidate, in [1, max_new_tokens], laid out as `seeds`; None means `max_new_tokens`
            for all. A candidate that reaches its limit ends with the reason "length".
        expected_lengths: Tokens that the candidates of each prompt will take, on average, such as those of the last
            round; engines may begin with the longest. None where nothing is known.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[Sequence[int]]
    generation_config: GenerationConfig
    with_log_probs: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    limits: Sequence[Sequence[int]] | None = None
    expected_lengths: Sequence[float] | None = None

    @property
    def num_candidates(self) -> int:
        """Candidates of each prompt."""
        return len(self.seeds[0]) if self.seeds else 0

    def limit(self, prompt: int, index: int) -> int:
        """Returns the most tokens of a candidate."""
        most: int = self.generation_config.max_new_tokens
        return most if self.limits is None else min(most, self.limits[prompt][index])


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


@runtime_checkable
class EngineWithWeights(Engine, Protocol):
    """An engine that runs weights of its own, elsewhere, which have to be brought up to date before a round."""

    def hand_over(self, model: Any, is_main_process: bool) -> None:
        """Takes over the weights of a model. Called on every process before each round with something left to generate.

        The same before each evaluation that the engine generates for.

        Whoever calls waits for all processes afterwards, so that a server may be fed by the main process alone.

        Args:
            model: In evaluation mode, whole and unwrapped.
            is_main_process: Whether this process is the first of the run.
        """
        ...


def check_request(request: GenerationRequest, context_length: int | None, is_encoder_decoder: bool) -> None:
    """Raises if a request cannot be served, before anything is generated.

    Args:
        request: What is asked for.
        context_length: Most positions that the model reads; None where there is no limit.
        is_encoder_decoder: Whether prompt and answer are read apart.

    Raises:
        ValueError: If a prompt is empty or leaves no room for the answer, or seeds or limits do not fit the prompts.
    """
    most = request.generation_config.max_new_tokens
    for name, rows in (("seeds", request.seeds), ("limits", request.limits)):
        if rows is not None and [len(row) for row in rows] != [request.num_candidates] * len(request.prompts):
            raise ValueError(
                f"`{name}` must hold {request.num_candidates} numbers for each of {len(request.prompts)} prompts, got "
                f"rows of {sorted({len(row) for row in rows})} for {len(rows)} prompts."
            )
    if request.limits is not None and any(limit < 1 for row in request.limits for limit in row):
        raise ValueError("`limits` holds a number below 1: a candidate has at least one token.")
    for prompt, ids in enumerate(request.prompts):
        if not len(ids):
            raise ValueError(
                f"Prompt {prompt} has no tokens, and nothing can be continued from nothing. Drop it, or begin prompts "
                "with a token such as the tokenizer's `bos_token`."
            )
        needed = len(ids) if is_encoder_decoder else len(ids) + most
        if context_length is not None and needed > context_length:
            raise ValueError(
                f"Prompt {prompt} has {len(ids)} tokens"
                + ("" if is_encoder_decoder else f", with `max_new_tokens`={most} it takes {needed}")
                + f", and the model reads {context_length}. Shorten the prompt"
                + ("." if is_encoder_decoder else " or lower `max_new_tokens`.")
            )


@runtime_checkable
class EngineWithFacts(Protocol):
    """An engine whose candidates depend on more than the model, the seeds and the configuration."""

    def facts(self) -> dict[str, Any]:
        """Returns what else they depend on, as JSON: candidates of other facts are not mixed with them."""
        ...


@runtime_checkable
class EngineWithChecks(Protocol):
    """An engine that can say beforehand what it cannot do."""

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Raises if no candidate could be generated so, while nothing has been spent.

        Args:
            model: What is to generate.
            config: Complete: see `settings.sampling_config`.
            log_probs: Which are wanted of the engine itself, of "log_q" and "log_p".

        Raises:
            ValueError: If a setting, the model or a log probability is beyond it.
        """
        ...


@runtime_checkable
class EngineOfAnyWeights(Protocol):
    """An engine with weights of its own that need not be those of the model it is called with.

    Attributes:
        is_fixed: Whether it keeps the weights that it has, so that its candidates are another model's.
    """

    is_fixed: bool


def check_engine(engine: Any, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
    """Raises ValueError if an engine that can say so beforehand cannot do what is wanted; see `EngineWithChecks`."""
    if isinstance(engine, EngineWithChecks):
        engine.check(model, config, log_probs)


def engine_facts(engine: Any) -> dict[str, Any] | None:
    """Returns what an engine says its candidates depend on, None if it says nothing."""
    return engine.facts() if isinstance(engine, EngineWithFacts) else None
