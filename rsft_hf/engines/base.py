"""Interface of generation engines: the request, the generated sequence, and the engine with its optional methods.

An engine is a callable from a model and a `GenerationRequest` (prompts as token ids, one random seed per candidate) to
`GeneratedSequence`s, yielded as they finish. It handles no text, reward or data set. Optional methods: facts that
candidates depend on, checks before the run, weight sync.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    """Request for candidates of several prompts.

    Attributes:
        prompts: Token ids of each prompt.
        seeds: Seeds of each prompt's candidates, `num_candidates` each, in [0, 2**63).
        generation_config: Complete: see `generation_config.sampling_config`.
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


class Engine(ABC):
    """Generator of candidates; the same request gives the same candidates where arithmetic allows (fp32).

    Subclasses implement `__call__`; the other methods are optional.

    Attributes:
        has_own_weights: Whether the engine runs a copy of the weights, elsewhere, which `sync_weights` updates.

    Example:
        >>> class Echo(Engine):
        ...     def __call__(self, model, request):
        ...         for prompt, ids in enumerate(request.prompts):
        ...             for index in range(request.num_candidates):
        ...                 yield GeneratedSequence(prompt, index, list(ids), "length")
        >>> request = GenerationRequest([[5, 6]], [[1, 2]], GenerationConfig(max_new_tokens=2))
        >>> [one.token_ids for one in Echo()(None, request)]
        [[5, 6], [5, 6]]
    """

    has_own_weights: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields every candidate of every prompt once, in any order.

        Args:
            model: In evaluation mode, unwrapped, on its device.
            request: Prompts, seeds and sampling options.
        """

    @property
    def is_fixed(self) -> bool:
        """Whether the engine keeps its own weights, so that its candidates are another model's."""
        return False

    def facts(self) -> dict[str, Any] | None:
        """Returns what candidates depend on beside model, seeds and configuration, as JSON; None for nothing else.

        Candidates of different facts are never mixed.
        """
        return None

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Validate model and configuration before anything is generated; by default everything is accepted.

        Args:
            model: Model that is to generate.
            config: Complete configuration, as `generation_config.sampling_config` returns it.
            log_probs: Those that the engine itself must provide, of "log_q" and "log_p".

        Raises:
            ValueError: If the engine does not support a setting, the model or a log probability.
        """
        return

    def sync_weights(self, model: Any, is_main_process: bool) -> None:
        """Copies the weights of a model to the engine; nothing by default.

        Called on every process before each round with something left to generate, and before each evaluation that the
        engine generates for. The caller waits for all processes afterwards, so that the main process alone may feed a
        server.

        Args:
            model: In evaluation mode, whole and unwrapped.
            is_main_process: Whether this process is the first of the run.
        """
        return


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
