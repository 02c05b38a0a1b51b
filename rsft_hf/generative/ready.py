"""What generates a round, made ready for it: a whole model, the reference beside it, an engine that has the weights.

A generator with the model as it is trained enters; for the time of a block one that can be called leaves.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from rsft_hf.distributed import FailTogether
from rsft_hf.generative.engines.engine import EngineWithWeights
from rsft_hf.generative.refusals import refuse_model, refuse_other_vocabulary
from rsft_hf.generative.stages import Generator
from rsft_hf.generative.whole_model import whole_model
from rsft_hf.undisturbed import in_evaluation_mode

if TYPE_CHECKING:
    from rsft_hf.generative.by_hand import StagesByHand


@contextlib.contextmanager
def ready(
    options: "StagesByHand", accelerator: Accelerator | None, generator: Generator, policy: Any
) -> Iterator[Generator]:
    """Gives a generator that every process may call as often as it likes. Collective.

    Args:
        options: The resampler, for its reference model and whether to merge.
        accelerator: Knows the processes; None where there is one process, without a trainer.
        generator: With the trained model, or another one, which is taken as it is.
        policy: The trained model.
    """
    with contextlib.ExitStack() as stack:
        model, reference = generator.model, generator.reference
        if model is policy or (reference is not None and options.reference_model == "base"):
            whole = stack.enter_context(whole_model(accelerator, policy, options.merge_adapter))
            model = whole if model is policy else model
            if reference is not None:
                reference = reference_opener(options.reference_model, whole, whole.device)
        if isinstance(generator.engine, EngineWithWeights):
            _hand_over(accelerator, generator.engine, model)
        yield replace(generator, model=model, reference=reference)


def _hand_over(accelerator: Accelerator | None, engine: EngineWithWeights, model: Any) -> None:
    with torch.no_grad(), in_evaluation_mode(model):
        if accelerator is None:
            engine.hand_over(model, True)
            return
        with FailTogether(accelerator, f"handing the weights to {type(engine).__name__}"):
            engine.hand_over(model, accelerator.is_main_process)
        accelerator.wait_for_everyone()  # a server that the main process feeds answers all of them


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
