"""The model to generate with, whole on each process, however it is wrapped or sharded in training.

A model as the trainer has it enters; for the time of a block a plain one leaves, with which no process waits for
another. Entering and leaving are collective.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel

from rsft_hf.distributed import FailTogether
from rsft_hf.generative.merging import merged
from rsft_hf.generative.unsharded import is_sharded, unsharded_twin


@contextlib.contextmanager
def whole_model(accelerator: Accelerator | None, model: Any, merge_adapter: bool = False) -> Iterator[Any]:
    """Gives the model to generate with, which has the weights that training has at the entry. Collective.

    | trained as | what is given | memory it takes, per process |
    |---|---|---|
    | plain, DDP, ZeRO 1 and 2, `torch.compile` | the module inside the wrappers | none |
    | FSDP2 | an unsharded twin | all weights |
    | ZeRO-3 | the module, its weights gathered | all weights |
    | any of them, `merge_adapter=True` | the same, merged | the weights merged into, once more |

    FSDP2 has been run with two processes on a CPU (gloo), sharded by `fully_shard`, by accelerate and by
    `from_pretrained`, and not on GPUs. **ZeRO-3 has not been run at all**: it follows the documentation of
    `deepspeed.zero.GatheredParameters`. A model compiled in place (`model.compile()`) stays so, and is compiled again
    for other widths of a batch.

    Args:
        accelerator: Knows the processes; None where there is one process, without a trainer.
        model: As it is trained, wrapped or not.
        merge_adapter: Whether the adapter of a PEFT model is merged into the base weights, which come back bit for bit.

    Raises:
        RuntimeError: Under FSDP2, if training has not begun: only then are the weights where they belong.
        ValueError: If the adapter cannot be merged, or the model is sharded and `accelerator` None.
    """
    model = unwrapped(model)
    with contextlib.ExitStack() as stack:
        if is_sharded(model):
            if accelerator is None:
                raise ValueError(
                    f"{type(model).__name__} is sharded by FSDP2. Generate inside of "
                    "`with whole_model(accelerator, model) as whole:`, on every process."
                )
            model = stack.enter_context(unsharded_twin(accelerator, model))
        elif accelerator is not None and accelerator.distributed_type == DistributedType.FSDP:
            raise RuntimeError("Under FSDP2 the model can generate once training has begun. Call train() first.")
        elif accelerator is not None and _is_zero3(accelerator):
            stack.enter_context(_gathered_by_deepspeed(accelerator, model))
        if merge_adapter:
            together = FailTogether(accelerator, "merging the adapter") if accelerator else contextlib.nullcontext()
            with together:
                stack.enter_context(merged(model))
        yield model


def unwrapped(model: Any) -> Any:
    """Returns the module inside of DDP, DeepSpeed and `torch.compile`, in whatever order they stand."""
    # A compiled wrapper would be compiled again for each width of a batch.
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def _is_zero3(accelerator: Accelerator) -> bool:
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return is_deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3


@contextlib.contextmanager
def _gathered_by_deepspeed(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Gathers the weights that ZeRO-3 has spread, and keeps its hooks and transformers from spreading them again.

    Written from the documentation and never run.
    """
    import deepspeed  # an extra: whoever trains with it has it
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    wrapper = accelerator.deepspeed_engine_wrapped  # None before training: no hooks yet
    offload = None if wrapper is None else wrapper.engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        try:
            if offload is not None:
                _remove_hooks(offload, model)
            unset_hf_deepspeed_config()  # else `generate` waits for every process at each token
            yield
        finally:
            set_hf_deepspeed_config(accelerator.state.deepspeed_plugin.hf_ds_config)
            if offload is not None:
                coordinator = offload.get_param_coordinator()
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()  # it foresees which weights come next, and has missed some
                offload._register_deepspeed_module(offload.module)


def _remove_hooks(offload: Any, model: Any) -> None:
    """Takes away the hooks that would give each weight back after the forward pass of its module."""
    for values in model.parameters():
        values.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
