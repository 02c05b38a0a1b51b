"""From what a user names to an engine."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from transformers.utils import logging

from rsft_hf.engines.base import Engine
from rsft_hf.engines.continuous import ContinuousEngine
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine

logger = logging.get_logger(__name__)

_BY_NAME: dict[str, Callable[[], Engine]] = {
    "auto": InFlightEngine,
    "inflight": InFlightEngine,
    "generate": GenerateEngine,
    "continuous": ContinuousEngine,
}

NAMES = tuple(_BY_NAME)


def choose_engine(engine: str | Engine, model: Any) -> Engine:
    """Returns an engine: the object given, or the one that a name stands for.

    "auto" is the engine with slots, which was measured to be the fastest of those in this process on a CPU
    (`benchmarks/generation.py`), and leaves what it cannot do to `generate`. A server, and vLLM, want to be named: they
    hold weights of their own.

    Args:
        engine: "auto", "inflight", "generate", "continuous", or an Engine object.
        model: What is to generate.

    Raises:
        TypeError: If it is neither a name nor an Engine.
        ValueError: If the name is unknown.
    """
    if isinstance(engine, str):
        if engine not in NAMES:
            raise ValueError(f"`engine`={engine!r} is unknown. Use one of {', '.join(map(repr, NAMES))}, or an Engine.")
        chosen = _BY_NAME[engine]()
        if engine == "auto":
            logger.info(f'engine="auto" takes {type(chosen).__name__} for {type(model).__name__}: {_why(model)}.')
        return chosen
    if isinstance(engine, type) or not isinstance(engine, Engine):
        raise TypeError(f"`engine` must be a name or an Engine object such as GenerateEngine(), got {engine!r}.")
    return engine


def _why(model: Any) -> str:
    device = model.device.type
    reason = "candidates that have ended leave at once and a prompt is read once, where its cache and settings allow it"
    if device != "cpu" and find_spec("vllm") is not None:
        return f"{reason}; vLLM is installed, and VLLMEngine may be faster on {device}, at the price of a second model"
    return reason
