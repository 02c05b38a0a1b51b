"""Engine over transformers' continuous batching, `model.generate_batch`, with its paged KV cache.

It admits waiting requests as others finish, shares one prefill among the candidates of a prompt, and uses flash
attention and CUDA graphs on a GPU. It supports few sampling settings (others are refused), draws all candidates from
one stream, and may return partial results, which are completed.
"""

import contextlib
import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest, check_request
from rsft_hf.engines.completion import complete, prompts_longest_first, whole_sequence, with_log_p
from rsft_hf.engines.generation_config import check_settings_supported, context_length
from rsft_hf.isolation import forked_rng, in_evaluation_mode
from rsft_hf.memory import halve_batch_size, is_out_of_memory

logger = logging.get_logger(__name__)

# Older versions generate forked candidates and leave them out of what they return (seen in 5.17, right in 5.23).
_FORKS = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)

_PAGE = 256  # tokens of a page of the cache; the library's default

_SHARE_TO_FILL = 0.8  # it admits nothing while less than 15 % of the pages is free


@dataclass(frozen=True)
class Call:
    """Candidates that one call of `generate_batch` generates: of each prompt as many, all up to the same length.

    Attributes:
        limit: Most tokens of each, at least their own limits.
        prompts: Positions of the prompts.
        indices: Positions of the candidates of each prompt, of equal number.
    """

    limit: int
    prompts: list[int] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Prompt and index of each candidate."""
        return [(prompt, index) for prompt, chosen in zip(self.prompts, self.indices) for index in chosen]


@dataclass
class ContinuousEngine(Engine):
    """Generates with `model.generate_batch`, for decoder-only models.

    Unlike in the exact engines a candidate depends on its company: all draw from one generator, seeded by all their
    seeds. The same request gives the same candidates on the same device where the library's schedule is the same.
    Its loop runs in a thread, which autocast does not reach: the model computes in the type of its weights there.

    Args:
        max_requests: Most candidates generated at a time; halved, and kept so, when their cache does not fit.
        max_batch_tokens: Most tokens of one forward pass, prompts included.
        num_blocks: Pages of 256 tokens in the cache; None takes what `max_requests` of the longest can need, where the
            library would take 60 to 90 % of the memory.

    Raises:
        ValueError: If any of them is below 1.
    """

    max_requests: int = 64
    max_batch_tokens: int = 1024
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_batch_tokens", "num_blocks"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"`{name}`={value} must be at least 1.")

    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields every candidate once, call by call, longest expected answers first.

        Raises:
            ValueError: If the model has an encoder, the configuration holds settings that the library ignores, or a
                prompt leaves no room.
        """
        self.check(model, request.generation_config)
        check_request(request, context_length(model), is_encoder_decoder=False)
        return self._sequences(model, request)

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Raises ValueError if the model has an encoder, or the library ignores an active setting."""
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"generate_batch runs decoder-only models, and {type(model).__name__} has an encoder. Use "
                'engine="inflight" or "generate".'
            )
        remedy = 'Unset the others, or use engine="inflight" or "generate".'
        check_settings_supported(config, ("temperature", "top_k", "top_p"), "generate_batch", remedy)

    def _sequences(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        missing: list[tuple[int, int]] = []
        for call in split(request):
            sequences = self._whole(model, request, call)
            found = {(one.prompt, one.index) for one in sequences}
            missing.extend(pair for pair in call.pairs if pair not in found)
            with torch.autocast(model.device.type, enabled=False):  # p as q: autocast does not reach the loop
                sequences = with_log_p(model, request, sequences)
            yield from sequences
        yield from complete(model, request, missing, type(self).__name__)

    def _whole(self, model: Any, request: GenerationRequest, call: Call) -> list[GeneratedSequence]:
        """Runs a call and returns its candidates that ended properly."""
        outputs = defaultdict(list)
        for output in self._outputs(model, request, call):
            # Known by their prompt: names and order of the requests that were forked differ between versions.
            outputs[tuple(output.prompt_ids)].append(output)
        sequences = []
        for prompt, index in call.pairs:
            of_prompt = outputs[tuple(request.prompts[prompt])]
            output = of_prompt.pop(0) if of_prompt else None
            if output is not None and output.error is None:  # one that failed does not raise
                sequences.append(
                    whole_sequence(request, (prompt, index), output.generated_tokens, output.logprobs or None)
                )
        return [one for one in sequences if one is not None]

    def _outputs(self, model: Any, request: GenerationRequest, call: Call) -> list[Any]:
        while True:
            try:
                return self._generate_batch(model, request, call)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    logger.warning(f"generate_batch failed: {error}")
                    return []
                if self.num_blocks is not None:
                    raise
                self.max_requests = halve_batch_size(self.max_requests, error, "requests")

    def _generate_batch(self, model: Any, request: GenerationRequest, call: Call) -> list[Any]:
        config = copy.deepcopy(request.generation_config)
        config.max_new_tokens = call.limit
        config.num_return_sequences = len(call.indices[0]) if _FORKS else 1
        repeats = 1 if _FORKS else len(call.indices[0])
        inputs = [list(request.prompts[prompt]) for prompt in call.prompts for _ in range(repeats)]
        seed = _common_seed(request, call.pairs)
        batching = ContinuousBatchingConfig(
            num_blocks=self._pages(inputs, call),
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=self.max_requests,
            allow_block_sharing=not _FORKS,  # where it shares, it sorts the prompts by their tokens
            return_logprobs=request.with_log_probs,
            seed=seed % 2**32,
        )
        with forked_rng(seed), in_evaluation_mode(model), _attention_kept(model):
            model.destroy_cached_continuous_batching_manager()  # it would hold keys of older weights
            results = model.generate_batch(inputs, generation_config=config, continuous_batching_config=batching)
        return list(results.values())

    def _pages(self, inputs: list[list[int]], call: Call) -> int:
        if self.num_blocks is not None:
            return self.num_blocks
        # A prompt is forked whole, beyond `max_requests` if need be.
        num_alive = min(len(call.pairs), self.max_requests + len(call.indices[0]))
        pages_each = math.ceil((max(map(len, inputs)) + call.limit) / _PAGE)
        return math.ceil(num_alive * pages_each / _SHARE_TO_FILL) + 1


def split(request: GenerationRequest) -> Iterator[Call]:
    """Yields the calls that a request takes: one, unless limits differ or prompts need no more candidates.

    Limits are rounded up to powers of two, since each call has a start and a tail; what is beyond a limit is cut off.
    """
    most = request.generation_config.max_new_tokens
    calls: dict[tuple[int, int], Call] = {}
    for prompt in prompts_longest_first(request):
        by_limit = defaultdict(list)
        for index in range(request.num_candidates):
            by_limit[min(most, 1 << (request.limit(prompt, index) - 1).bit_length())].append(index)
        for limit, indices in by_limit.items():
            call = calls.setdefault((limit, len(indices)), Call(limit))
            call.prompts.append(prompt)
            call.indices.append(indices)
    yield from sorted(calls.values(), key=lambda call: -call.limit)


def _common_seed(request: GenerationRequest, pairs: Sequence[tuple[int, int]]) -> int:
    """Returns one seed in [0, 2**63) that depends on the seeds of all these candidates."""
    key = ",".join(str(request.seeds[prompt][index]) for prompt, index in pairs).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def _attention_kept(model: Any) -> Iterator[None]:
    """Gives back the attention that a call replaces, which it forgets when it fails."""
    implementation = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
