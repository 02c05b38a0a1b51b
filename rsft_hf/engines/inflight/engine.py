"""Continuous batching engine (in-flight batching): waiting candidates are admitted as running ones finish.

`generate` runs a batch until its longest row has finished, and prefills a prompt once per candidate. Here a prompt is
prefilled once for all of its candidates, only running rows are computed, and free slots are refilled during decoding.
Models and settings that do not allow it go to `GenerateEngine`.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import StoppingCriteriaList
from transformers.utils import logging

from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest, check_request
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.generation_config import context_length
from rsft_hf.engines.inflight.compatibility import probe_request, probe_result, reason_against_inflight
from rsft_hf.engines.inflight.model_runner import CausalModelRunner, EncoderDecoderModelRunner
from rsft_hf.engines.inflight.scheduler import RunningBatch, Scheduler
from rsft_hf.engines.model_access import without_wrappers
from rsft_hf.engines.sampling import Prepared, ProcessorChains, prepare
from rsft_hf.memory import halve_batch_size

logger = logging.get_logger(__name__)

_SLOTS_ON_CPU, _SLOTS = 128, 256


@dataclass
class InFlightEngine(Engine):
    """Generates with candidates that enter and leave a common batch at any time.

    In fp32 a candidate depends on its own seed alone, not on the batch, the order or the number of processes; in half
    precision other company changes the last bits of the scores, so that this holds of its distribution only.

    Args:
        max_sequences: Maximum number of running sequences; 128 on a CPU and 256 elsewhere where None. Halved for good
            when memory runs out.
        max_tokens: Most tokens that all slots together may come to hold: with long prompts and answers there are fewer
            slots.
        prefill_tokens: Most tokens of prompts, padding included, that are read in one pass.
        fallback: Generates where slots do not fit: other caches than keys and values, beams, processors that look at
            more than a row, and models that fail the probe at the start.

    Raises:
        ValueError: If a number is below 1.
    """

    max_sequences: int | None = None
    max_tokens: int = 2**19
    prefill_tokens: int = 4096
    fallback: Engine = field(default_factory=GenerateEngine)

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_tokens", "prefill_tokens"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"`{name}`={value} must be at least 1.")
        self._verdicts: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self._said: set[str] = set()

    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields each candidate as it ends.

        Raises:
            ValueError: If a prompt is empty or fills the context.
        """
        if not request.prompts or not request.num_candidates:
            return
        check_request(request, context_length(model), bool(model.config.is_encoder_decoder))
        prepared, reason = self._prepared(model, request)
        if prepared is None or reason is not None:
            self._say(model, reason)
            yield from self.fallback(model, request)
            return
        left = {(prompt, index) for prompt in range(len(request.prompts)) for index in range(request.num_candidates)}
        slots = self._slots(model, request)
        while left:
            scheduler = self._scheduler(model, request, prepared, left, slots)
            try:
                for sequence in scheduler.run():
                    left.discard((sequence.prompt, sequence.index))
                    yield sequence
                return
            except (RuntimeError, MemoryError) as error:
                slots = self._with_less_memory(scheduler, slots, error)
            del scheduler

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_verdicts": None}  # what was tried out belongs to the models of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_verdicts": weakref.WeakKeyDictionary()})

    def _with_less_memory(self, scheduler: Scheduler, slots: int, error: Exception) -> int:
        """Returns the number of slots after an out-of-memory error; raises any other error, and that of one slot."""
        if scheduler.num_prefill_tokens > 1:
            self.prefill_tokens = halve_batch_size(scheduler.num_prefill_tokens, error, "prompt tokens")
            return slots
        fewer = halve_batch_size(scheduler.max_rows, error, "sequences")
        if scheduler.max_rows == slots:  # and not the few candidates of a small request
            self.max_sequences = fewer
        return fewer

    def _prepared(self, model: Any, request: GenerationRequest) -> tuple[Prepared | None, str | None]:
        """The request as `generate` prepares it, and the reason against continuous batching, if any."""
        if reason := reason_against_inflight(model, request):
            return None, reason
        shortest = min(range(len(request.prompts)), key=lambda row: len(request.prompts[row]))
        prepared = prepare(model, request, request.prompts[shortest])
        reason = reason_against_inflight(model, request, prepared)
        inner = without_wrappers(model)
        if reason is None and inner not in self._verdicts:
            self._verdicts[inner] = self._probe(model, request)
        return prepared, reason or self._verdicts[inner]

    def _probe(self, model: Any, request: GenerationRequest) -> str | None:
        trial = probe_request(request, without_wrappers(model))
        prepared = prepare(model, trial, trial.prompts[0])
        prepared = dataclasses.replace(prepared, criteria=StoppingCriteriaList())  # so that only the limits end a row
        every = {(prompt, 0) for prompt in range(len(trial.prompts))}
        start = prepared.input_ids[0].tolist() if model.config.is_encoder_decoder else []
        return probe_result(model, trial, lambda slots: self._scheduler(model, trial, prepared, every, slots), start)

    def _scheduler(
        self, model: Any, request: GenerationRequest, prepared: Prepared, left: set[tuple[int, int]], slots: int
    ) -> Scheduler:
        inner, pad = without_wrappers(model), request.generation_config.pad_token_id
        max_rows, is_encoder_decoder = min(slots, len(left)), bool(model.config.is_encoder_decoder)
        if is_encoder_decoder:
            longest = max(len(prompt) for prompt in request.prompts)
            runner: Any = EncoderDecoderModelRunner(inner, pad, max_rows, prepared.input_ids, longest)
            starts: Any = prepared.input_ids.tolist() * len(request.prompts)
        else:
            runner, starts = CausalModelRunner(inner, pad, max_rows), request.prompts
        chains = ProcessorChains(model, request, prepared)
        rows = RunningBatch(request, chains, prepared.criteria, starts, max_rows, inner.device)
        return Scheduler(runner, rows, request, left, self.prefill_tokens)

    def _slots(self, model: Any, request: GenerationRequest) -> int:
        most = self.max_sequences or (_SLOTS_ON_CPU if model.device.type == "cpu" else _SLOTS)
        longest = max(len(prompt) for prompt in request.prompts) + request.generation_config.max_new_tokens
        return max(1, min(most, self.max_tokens // longest))

    def _say(self, model: Any, reason: str | None) -> None:
        if reason not in self._said:
            self._said.add(str(reason))
            logger.warning(
                f"{type(model).__name__} generates with {type(self.fallback).__name__} instead of continuous batching, "
                f"the same candidates more slowly: {reason}."
            )
