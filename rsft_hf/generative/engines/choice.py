"""From what a user names to an engine."""

from typing import Any

from transformers.utils import logging

from rsft_hf.generative.engines.engine import Engine
from rsft_hf.generative.engines.generate import GenerateEngine

logger = logging.get_logger(__name__)

NAMES = ("auto", "generate")


def choose_engine(engine: str | Engine, model: Any) -> Engine:
    """Returns an engine: the object given, or the one that a name stands for.

    Args:
        engine: "auto", "generate", or an object with the call of `Engine`.
        model: What is to generate.

    Raises:
        TypeError: If it is neither a name nor callable.
        ValueError: If the name is unknown.
    """
    if isinstance(engine, str):
        if engine not in NAMES:
            raise ValueError(f"`engine`={engine!r} is unknown. Use one of {', '.join(map(repr, NAMES))}, or an Engine.")
        logger.info(f"engine={engine!r}: {type(model).__name__} generates with its own `generate`.")
        return GenerateEngine()
    if isinstance(engine, type) or not isinstance(engine, Engine):
        raise TypeError(f"`engine` must be a name or an Engine object such as GenerateEngine(), got {engine!r}.")
    return engine
