"""What generates a round, made ready for it: a whole model, the reference beside it, an engine that has the weights.

A generator with the model as it is trained enters; for the time of a block one that can be called leaves.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from rsft_hf.distributed import FailTogether
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.base import Engine, EngineOfAnyWeights, EngineWithWeights
from rsft_hf.engines.model_access import whole_model
from rsft_hf.generative.refusals import refuse_model, refuse_other_vocabulary
from rsft_hf.generative.stages import Generator
from rsft_hf.isolation import in_evaluation_mode

if TYPE_CHECKING:
    from rsft_hf.generative.by_hand import StagesByHand

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def ready(
    options: "StagesByHand",
    accelerator: Accelerator | None,
    generator: Generator,
    policy: Any,
    hands_over: bool = True,
) -> Iterator[Generator]:
    """Gives a generator that every process may call as often as it likes. Collective.

    Args:
        options: The resampler, for its reference model and whether to merge.
        accelerator: Knows the processes; None where there is one process, without a trainer.
        generator: With the trained model, or another one, which is taken as it is.
        policy: The trained model.
        hands_over: Whether an engine with weights of its own gets them here; else whoever calls hands them over.
    """
    with contextlib.ExitStack() as stack:
        model, reference = generator.model, generator.reference
        if model is policy or (reference is not None and options.reference_model == "base"):
            whole = stack.enter_context(whole_model(accelerator, policy, options.merge_adapter))
            model = whole if model is policy else model
            if reference is not None:
                reference = reference_opener(options.reference_model, whole, whole.device)
        if hands_over:
            hand_over(accelerator, generator.engine, model)
        yield replace(generator, model=model, reference=reference)


def hand_over(accelerator: Accelerator | None, engine: Engine, model: Any) -> None:
    """Brings an engine with weights of its own up to date; any other is as it was. Collective.

    Args:
        accelerator: As in `ready`.
        engine: Any.
        model: What generates, whole.
    """
    if not isinstance(engine, EngineWithWeights):
        return
    with torch.no_grad(), in_evaluation_mode(model):
        if accelerator is None:
            engine.hand_over(model, True)
            return
        with FailTogether(accelerator, f"handing the weights to {type(engine).__name__}"):
            engine.hand_over(model, accelerator.is_main_process)
        accelerator.wait_for_everyone()  # a server that the main process feeds answers all of them


def evaluation_engine(engine: Engine, model: Any, has_proposal: bool) -> Engine:
    """Returns what generates from the trained model when it is evaluated: the engine of the rounds where that can.

    One with weights of its own may hold a teacher's, or those of a proposal, in which the trained model's may not fit:
    then it is an engine in this process.

    Args:
        engine: Of the rounds.
        model: The trained one.
        has_proposal: Whether another model generates in the rounds.
    """
    is_fixed = isinstance(engine, EngineOfAnyWeights) and engine.is_fixed
    if not isinstance(engine, EngineWithWeights) or not (is_fixed or has_proposal):
        return engine
    logger.info(
        f"{type(engine).__name__} holds the weights of another model than the trained one, which is evaluated by an "
        "engine in this process."
    )
    return choose_engine("auto", model)


def log_probs_of_engine(options: "StagesByHand") -> tuple[str, ...]:
    """Returns which log probabilities the engine has to give: log p comes from the reference where there is one."""
    if not options.with_log_probs:
        return ()
    return ("log_q", "log_p") if options.reference_model is None else ("log_q",)


def reference_opener(
    reference: Any, model: Any, device: Any
) -> Callable[[], contextlib.AbstractContextManager[Any]] | None:
    """Returns what gives the reference model while it is needed, None where there is none."""
    if reference is None:
        return None
    if isinstance(reference, str):
        if reference != "base":
            raise ValueError(f'`reference_model`={reference!r} must be a model, "base" or None.')
        from peft import PeftModel  # an extra: whoever has an adapter has it

        if not isinstance(model, PeftModel):
            raise ValueError(
                'reference_model="base" is the model with its adapter off, and this model has none. Pass a model.'
            )

        @contextlib.contextmanager
        def without_adapter() -> Iterator[Any]:
            with model.disable_adapter():
                yield model

        return without_adapter
    refuse_model(reference)
    refuse_other_vocabulary(reference, model)
    reference.to(device)
    return lambda: contextlib.nullcontext(reference)
