"""Engine over vLLM in the training process, with weight sync into it before each round.

`sync_weights` copies the weights as TRL's colocate mode does (`VLLMGeneration`, TRL 1.16, for vLLM 0.22 to 0.31);
vLLM's `reload_weights` would read the first checkpoint again. Tested against a recorded contract of vLLM's interface
only, never against vLLM itself.
"""

import contextlib
import copy
import os
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest, check_request
from rsft_hf.engines.completion import complete, prompts_longest_first, whole_sequence, with_log_p
from rsft_hf.engines.generation_config import check_settings_supported, context_length, end_tokens
from rsft_hf.engines.model_access import merged, without_wrappers
from rsft_hf.isolation import forked_rng

_SETTINGS = {
    "distributed_executor_backend": "external_launcher",  # one engine in each process, its model within reach
    "logprobs_mode": "processed_logprobs",  # log q; by default those of the raw distribution
    "gpu_memory_utilization": 0.3,
    "enable_prefix_caching": True,  # the candidates of a prompt are requests of their own
    "generation_config": "vllm",  # what is in force comes with the request, not from a file
    "load_format": "dummy",  # the weights are pushed
}


class ColocatedLLM:
    """A `vllm.LLM` with the architecture of a model, and with its weights after `load`.

    Args:
        model: A transformers model, or one with an adapter.
        llm_kwargs: For `vllm.LLM`, over this file's own.

    Raises:
        ImportError: If vLLM is not installed.
    """

    def __init__(self, model: Any, llm_kwargs: Mapping[str, Any]) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(f"VLLMEngine needs vLLM ({error}): pip install rsft-hf[vllm]") from error
        inside = without_wrappers(model)
        config = copy.deepcopy(inside.config)
        config.architectures = [type(inside).__name__]  # unset in a model built from its config
        self._folder = tempfile.TemporaryDirectory()
        config.save_pretrained(self._folder.name)
        own = {**_SETTINGS, "model": self._folder.name, "skip_tokenizer_init": "tokenizer" not in llm_kwargs}
        self._is_quantised = "quantization" in llm_kwargs
        with forked_rng(0), _launched():  # vLLM seeds the global generators
            self.llm: Any = LLM(**{**own, **llm_kwargs})
        self._params = SamplingParams

    @torch.no_grad()
    def load(self, model: Any) -> None:
        """Copies the weights of a model, its adapter merged for the time.

        Raises:
            RuntimeError: If some weight of vLLM's model got no value.
            ValueError: If the adapter cannot be merged.
        """
        inside = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        adapted = contextlib.nullcontext() if without_wrappers(model) is model else merged(model)
        with adapted:
            loaded = inside.load_weights(checkpoint_weights(model))
        # The check with which vLLM ends its own loading; quantised weights go by other names.
        left = set() if loaded is None else {name for name, _ in inside.named_parameters()} - set(loaded)
        if left and not self._is_quantised:
            raise RuntimeError(
                f"vLLM's model has {len(left)} weights that got no value, such as {min(left)}: it names them otherwise "
                "than transformers does, and would generate nonsense. Use another engine for this model."
            )
        if self.llm.reset_prefix_cache() is False:  # its keys are those of the old weights
            raise RuntimeError(
                "vLLM could not empty its prefix cache, as requests of an interrupted generation are unfinished: new "
                "candidates would begin from states of the old weights. Start again in a new process."
            )

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[Any]:
        """Returns vLLM's outputs, away from autocast and from the global generators.

        Args:
            prompts: Token ids of each.
            params: Keywords of vLLM's `SamplingParams` for each.
        """
        if not prompts:
            return []
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with forked_rng(0), torch.autocast(device, enabled=False):
            return list(self.llm.generate(inputs, [self._params(**one) for one in params], use_tqdm=False))


def checkpoint_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a model under the names they have without an adapter; tied ones once.

    Args:
        model: A transformers model, or a PEFT model whose adapter is merged at the moment.
    """
    inside = without_wrappers(model)
    for name, values in inside.named_parameters():
        if inside is not model:  # the names that TRL gives them
            if model.base_model.prefix in name or "original_module" in name:
                continue
            name = name.replace(".base_layer", "").replace(f".modules_to_save.{model.active_adapter}", "")
        yield name, values.detach()


@contextlib.contextmanager
def _launched() -> Iterator[None]:
    """Names the only process as a launcher would, for vLLM to read; where there is a launcher it has done so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    added = {name: value for name, value in alone.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


logger = logging.get_logger(__name__)

_OBEYED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings")

_TEMPERATURES = (0.01, 2.0)  # below vLLM raises it to .01 with a mere warning, above it fails


@dataclass
class VLLMEngine(Engine):
    """Generates with `vllm.LLM`, for decoder-only models without quantised weights.

    Tested against a recorded contract of vLLM's public interface only (tests/helpers/recorded_vllm.py), on no GPU.
    Weights are copied as in TRL's colocate mode: the model's `load_weights` with adapters merged, then
    `reset_prefix_cache`.

    Each candidate is a request with its own seed, so that the same request gives the same candidates as far as vLLM's
    kernels allow. log q is vLLM's own; log p is computed here, by the weights that are trained, and so differs from
    what vLLM's arithmetic would give. vLLM cuts by `min_p` before `top_k` and `top_p`, transformers after them. It
    keeps its share of the GPU while training.

    Args:
        llm_kwargs: For `vllm.LLM`, over this engine's own, such as `gpu_memory_utilization` (0.3 here: training shares
            the GPU) or `max_model_len`. With "tokenizer", a name or folder, stop strings can be used.
    """

    has_own_weights: ClassVar[bool] = True
    llm_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _llm: ColocatedLLM | None = field(default=None, init=False, repr=False)

    def sync_weights(self, model: Any, is_main_process: bool) -> None:
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
            RuntimeError: If `sync_weights` has not been called.
            ValueError: If the model has an encoder, the configuration holds settings that vLLM has not or applies
                otherwise, or a prompt leaves no room.
        """
        self.check(model, request.generation_config)
        own = self.llm_kwargs.get("max_model_len"), context_length(model)
        lengths = [length for length in own if isinstance(length, int) and length > 0]  # -1: vLLM finds its own
        check_request(request, min(lengths, default=None), is_encoder_decoder=False)
        if self._llm is None:
            raise RuntimeError(
                "VLLMEngine has no weights yet. Call sync_weights(model, is_main_process) before each round."
            )
        return self._sequences(self._llm, model, request)

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Raises ValueError if the model has an encoder, or vLLM has not a setting or applies it otherwise."""
        _refuse_encoder(model)
        _refuse_sampling(config, self.llm_kwargs)

    def _sequences(self, llm: ColocatedLLM, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        chosen = [
            (prompt, index) for prompt in prompts_longest_first(request) for index in range(request.num_candidates)
        ]
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
        "stop_token_ids": end_tokens(request.generation_config),
        "ignore_eos": True,  # the tokens that end are those of the request alone, not those of vLLM's tokenizer too
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may be one
        "detokenize": bool(_stop_strings(request)),
        "logprobs": 0 if request.with_log_probs else None,  # 0: of the sampled token alone
    }


def _outputs(llm: ColocatedLLM, request: GenerationRequest, chosen: list[tuple[int, int]]) -> list[Any]:
    """Returns vLLM's output of each candidate; none if outputs and candidates cannot be matched."""
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
    check_settings_supported(config, _OBEYED, "vLLM", remedy)
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
