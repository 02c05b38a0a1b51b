"""What an engine may offer beyond its call, each a protocol of its own; without any it is an engine all the same.

A round asks for them by `isinstance`. Nothing here generates.
"""

from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

from transformers import GenerationConfig


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
