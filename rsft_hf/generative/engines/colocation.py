"""vLLM in the process that trains: how it is started, and how it gets the weights.

A model enters, its weights end in vLLM's own copy. The way is that of TRL's colocate mode (`VLLMGeneration`, TRL 1.16,
for vLLM 0.22 to 0.31), which is maintained; vLLM's `reload_weights` would read the first checkpoint again.
"""

import contextlib
import copy
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rsft_hf.generative.engines.refusal import without_wrappers
from rsft_hf.generative.merging import merged
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
        self.llm.reset_prefix_cache()  # its keys are those of the old weights

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
