"""The engine of vLLM, in the process and on the GPU of training; weights are pushed into it before each round.

A model enters at `hand_over`, prompts as token ids afterwards, candidates with log probabilities leave. How vLLM lays
out its memory is its own affair. Tested against a recorded contract of its interface only, never against vLLM itself.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from rsft_hf.generative.engines.allowed import refuse_settings
from rsft_hf.generative.engines.colocation import ColocatedLLM
from rsft_hf.generative.engines.completing import complete, end_tokens, prompts_in_order, whole_sequence, with_log_p
from rsft_hf.generative.engines.engine import GeneratedSequence, GenerationRequest, check_request
from rsft_hf.generative.settings import context_length

logger = logging.get_logger(__name__)

_OBEYED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings")
_TEMPERATURES = (0.01, 2.0)  # below vLLM raises it to .01 with a mere warning, above it fails


@dataclass
class VLLMEngine:
    """Generates with `vllm.LLM`, for decoder-only models without quantised weights.

    Tested against a recorded contract of vLLM's public interface only (tests/recorded_vllm.py), on no GPU. Weights take
    the way of TRL's colocate mode: the model's `load_weights`, adapters merged for the time, then `reset_prefix_cache`.

    Each candidate is a request with its own seed, so that the same request gives the same candidates as far as vLLM's
    kernels allow. log q is vLLM's own; log p is computed here, by the weights that are trained, and so differs from
    what vLLM's arithmetic would give. vLLM cuts by `min_p` before `top_k` and `top_p`, transformers after them. It
    keeps its share of the GPU while training.

    Args:
        llm_kwargs: For `vllm.LLM`, over this engine's own, such as `gpu_memory_utilization` (0.3 here: training shares
            the GPU) or `max_model_len`. With "tokenizer", a name or folder, stop strings can be used.
    """

    llm_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _llm: ColocatedLLM | None = field(default=None, init=False, repr=False)

    def hand_over(self, model: Any, is_main_process: bool) -> None:
        """Pushes the weights into this process's vLLM, which the first call starts.

        Args:
            model: In evaluation mode, whole and unwrapped.
            is_main_process: Without meaning here: each process has an engine of its own.

        Raises:
            ImportError: If vLLM is not installed.
            RuntimeError: If some weight of vLLM's model was left without a value.
            ValueError: If the model has an encoder, or an adapter that cannot be merged.
        """
        _refuse_encoder(model)
        if self._llm is None:
            self._llm = ColocatedLLM(model, self.llm_kwargs)
        self._llm.load(model)

    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields every candidate once.

        Raises:
            RuntimeError: If `hand_over` has not been called.
            ValueError: If the model has an encoder, the configuration holds settings that vLLM has not or applies
                otherwise, or a prompt leaves no room.
        """
        self.check(model, request.generation_config)
        check_request(request, context_length(model), is_encoder_decoder=False)
        if self._llm is None:
            raise RuntimeError(
                "VLLMEngine has no weights yet. Call hand_over(model, is_main_process) before each round."
            )
        return self._sequences(self._llm, model, request)

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Raises ValueError if the model has an encoder, or vLLM has not a setting or applies it otherwise."""
        _refuse_encoder(model)
        _refuse_sampling(config, self.llm_kwargs)

    def _sequences(self, llm: ColocatedLLM, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        chosen = [(prompt, index) for prompt in prompts_in_order(request) for index in range(request.num_candidates)]
        outputs = _outputs(llm, request, chosen)
        sequences = [_sequence(request, pair, output) for pair, output in zip(chosen, outputs)]
        whole = [one for one in sequences if one is not None]
        found = {(one.prompt, one.index) for one in whole}
        yield from with_log_p(model, request, whole)
        missing = [pair for pair in chosen if pair not in found]
        yield from complete(model, request, missing, type(self).__name__)


def sampling_params(request: GenerationRequest, prompt: int, index: int) -> dict[str, Any]:
    """Returns the keywords of vLLM's `SamplingParams` for one candidate.

    Args:
        request: What is asked for.
        prompt: Position of the prompt.
        index: Position of the candidate.
    """
    config = request.generation_config
    is_sampled = bool(config.do_sample)
    return {
        "n": 1,
        "seed": request.seeds[prompt][index],
        "max_tokens": request.limit(prompt, index),
        "temperature": config.temperature if is_sampled else 0.0,
        "top_k": (config.top_k or 0) if is_sampled else 0,
        "top_p": (config.top_p or 1.0) if is_sampled else 1.0,
        "min_p": (config.min_p or 0.0) if is_sampled else 0.0,
        "repetition_penalty": config.repetition_penalty or 1.0,
        "stop": _stop_strings(request),
        "stop_token_ids": end_tokens(request),
        "ignore_eos": True,  # the tokens that end are those of the request alone, not those of vLLM's tokenizer too
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may be one
        "detokenize": bool(_stop_strings(request)),
        "logprobs": 0 if request.with_log_probs else None,  # 0: of the sampled token alone
    }


def _outputs(llm: ColocatedLLM, request: GenerationRequest, chosen: list[tuple[int, int]]) -> list[Any]:
    """Returns vLLM's output of each candidate, none at all where it cannot be told which is whose."""
    asked = [list(request.prompts[prompt]) for prompt, _ in chosen]
    outputs = llm.generate(asked, [sampling_params(request, *pair) for pair in chosen])
    if [list(output.prompt_token_ids) for output in outputs] != asked:
        logger.warning(f"vLLM answered {len(outputs)} of {len(asked)} requests, or others than were asked.")
        return [None] * len(chosen)
    return outputs


def _sequence(request: GenerationRequest, pair: tuple[int, int], output: Any) -> GeneratedSequence | None:
    if output is None or len(output.outputs) != 1 or output.outputs[0].finish_reason not in ("stop", "length"):
        return None  # aborted, or not there
    completion, log_q = output.outputs[0], None
    if request.with_log_probs:
        if completion.logprobs is None:
            return None
        steps = zip(completion.token_ids, completion.logprobs)
        log_q = [step[token].logprob if token in step else torch.nan for token, step in steps]
    is_stopped = bool(_stop_strings(request)) and completion.finish_reason == "stop"
    return whole_sequence(request, pair, completion.token_ids, log_q, is_stopped)


def _refuse_encoder(model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f'vLLM runs decoder-only models, and {type(model).__name__} has an encoder. Use engine="inflight".'
        )


def _refuse_sampling(config: GenerationConfig, llm_kwargs: Mapping[str, Any]) -> None:
    remedy = 'Unset the others, or use engine="inflight" or "generate".'
    refuse_settings(config, _OBEYED, "vLLM", remedy)
    low, high = _TEMPERATURES
    if config.do_sample and not low <= config.temperature <= high:
        raise ValueError(f"vLLM samples at temperatures of {low} to {high}, and `temperature`={config.temperature}.")
    if config.stop_strings and "tokenizer" not in llm_kwargs:
        raise ValueError(
            f"`stop_strings`={config.stop_strings!r} are found in text, and vLLM was started without a tokenizer. Use "
            'VLLMEngine(llm_kwargs={"tokenizer": name_or_folder}).'
        )


def _stop_strings(request: GenerationRequest) -> list[str] | None:
    stops = request.generation_config.stop_strings
    return [stops] if isinstance(stops, str) else list(stops) if stops else None
