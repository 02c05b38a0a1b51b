"""Engines that generate candidates."""

from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest
from rsft_hf.engines.continuous import ContinuousEngine
from rsft_hf.engines.endpoint.engine import EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.engines.vllm import VLLMEngine
from rsft_hf.engines.wait_k import WaitKEngine, average_lagging

__all__ = [
    "ContinuousEngine",
    "EndpointEngine",
    "Engine",
    "GenerateEngine",
    "GeneratedSequence",
    "GenerationRequest",
    "InFlightEngine",
    "SaveAndReload",
    "VLLMEngine",
    "WaitKEngine",
    "average_lagging",
]
