"""Access to the whole model for generation: unwrapped, gathered from shards, adapters merged; restored afterwards.

`whole_model` yields a plain model on each process, with which no process waits for another; entering and leaving are
collective. `unsharded_copy` is a copy of an FSDP2 model with the weights gathered from all processes: generating with
the sharded model would gather every weight for each token, and deadlock on unequal lengths. `merged` merges a LoRA
adapter into its base weights for the duration of a block and restores every weight bit for bit.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, extract_model_from_parallel, is_compiled_module
from transformers.utils import is_peft_available

from rsft_hf.distributed import FailTogether


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
            model = stack.enter_context(unsharded_copy(accelerator, model))
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
    """Returns the module inside of DDP, DeepSpeed and `torch.compile`, in any order of wrapping."""
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


# Transformers would generate in lock-step for the first; the others would run the sharded model after all.
_OF_SHARDING = {"_is_fsdp_managed_module", "_fsdp_use_orig_params", "_compiled_call_impl"}

_OF_MODULES = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def is_sharded(model: torch.nn.Module) -> bool:
    """Returns whether FSDP2 has spread the weights over the processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def unsharded_copy(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[Any]:
    """Gives a whole model with the weights that a sharded one has at the entry. Collective.

    It takes the memory of all weights, in the dtypes of the shards, on every process, as long as the block lasts: room
    for them is made first, so that a process without it says so before the others wait for it; then one weight after
    the other is gathered. Tied weights stay tied, adapters come along, hooks do not. Quantised weights that FSDP leaves
    alone are shared with the model.

    Args:
        accelerator: Knows the processes and their device.
        model: Sharded by `fully_shard`, and not inside a forward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward one leaves the root's whole, perhaps in another dtype
    tensors = {id(values): values for values in (*model.parameters(), *model.buffers())}
    whole: dict[int, Any] = {}
    try:
        with FailTogether(accelerator, "making room for whole weights"):
            for name, values in tensors.items():
                whole[name] = _room_for(values, accelerator.device)
        with torch.no_grad():
            for name, values in tensors.items():
                if whole[name] is not values:
                    whole[name].copy_(_gathered(values, accelerator.device))
        yield _twin(model, dict(whole))
    finally:
        for name, values in whole.items():
            if values is not tensors[name]:
                values.data = torch.empty(0)  # at once, whoever still holds the twin


def _room_for(values: torch.Tensor, device: torch.device) -> Any:
    from torch.distributed.tensor import DTensor

    is_parameter = isinstance(values, torch.nn.Parameter)
    if is_parameter and type(values) not in (torch.nn.Parameter, DTensor):
        return values
    room = torch.empty(values.shape, dtype=values.dtype, device=device)
    return torch.nn.Parameter(room, requires_grad=False) if is_parameter else room


def _gathered(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    # Shards that are kept on the CPU go to the device first: NCCL gathers nothing else.
    moved: Any = values.to(device)
    return moved.full_tensor() if isinstance(values, DTensor) else moved


def _twin(model: torch.nn.Module, made: dict[int, Any]) -> Any:
    """The modules of a model over again, with other tensors.

    Args:
        model: FSDP adds a class to each of its modules and forbids copying them, so that they are made anew.
        made: What takes the place of each tensor, by its id; the modules join them.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if not is_compiled_module(module)]
    for module in modules:
        kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
        made[id(module)] = object.__new__(kind)
        torch.nn.Module.__init__(made[id(module)])
    for module in model.modules():
        if is_compiled_module(module):  # it would be compiled again for each width of a batch
            made[id(module)] = made[id(module._orig_mod)]
    left_out = (vars(torch.nn.Module()).keys() - _OF_MODULES) | _OF_SHARDING
    for module in modules:
        for name, value in vars(module).items():
            if name not in left_out and not _is_of_fsdp(value):
                vars(made[id(module)])[name] = _carried_over(value, made)
    return made[id(model)]


def _carried_over(value: Any, made: dict[int, Any]) -> Any:
    """An attribute of a module for its twin: what was made anew in it replaced, all else shared."""
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in made:
        return types.MethodType(value.__func__, made[id(value.__self__)])
    if type(value) is dict:
        return {key: _carried_over(item, made) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_carried_over(item, made) for item in value)
    return value


def _is_of_fsdp(value: Any) -> bool:
    """Whether it is a method that `register_fsdp_forward_method` has put over the module's own."""
    function = value.__func__ if isinstance(value, types.MethodType) else None
    return isinstance(function, types.FunctionType) and str(function.__globals__["__name__"]).startswith(
        "torch.distributed.fsdp"
    )


_EXACT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_REMEDY = "Use merge_adapter=False, which generates with the adapter beside its base."


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """Merges the active adapters into the base weights inside the block.

    peft's own unmerging subtracts what merging added, which rounds: here the merging is done on copies, and the weights
    themselves come back. That takes the memory of the weights merged into once more.

    Raises:
        ValueError: If the adapter cannot be merged.
    """
    check_mergeable(model)
    layers = [layer for layer in _adapter_layers(model) if not layer.merged]
    weights = [values for layer in layers for values in layer.get_base_layer().parameters()]
    kept = [values.data for values in weights]
    try:
        for values in weights:
            values.data = values.data.clone()
        try:
            with torch.no_grad():
                model.merge_adapter()
        except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"peft cannot merge {_name(model)}: {error}. {_REMEDY}") from error
        yield
    finally:
        try:
            with torch.no_grad():
                for layer in layers:
                    if layer.merged:
                        layer.unmerge()  # for its notes of what is merged; the weights come from `kept`
        finally:
            for values, data in zip(weights, kept, strict=True):
                values.data = data


def check_mergeable(model: Any) -> None:
    """Raises ValueError if the model has no adapter, or one that cannot be merged and taken out again exactly."""
    if not is_peft_model(model):
        raise ValueError(
            f"`merge_adapter=True` merges a PEFT adapter, and {type(model).__name__} has none. Leave it at False."
        )
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{_name(model)} learns a prompt, which no weight could take up. {_REMEDY}")
    names: dict[int, list[str]] = {}
    for name, values in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(values), []).append(name)
    for layer in _adapter_layers(model):
        base = layer.get_base_layer()
        weights = list(base.parameters())
        if not weights or not all(type(values) in _plain_kinds() and values.dtype in _EXACT for values in weights):
            raise ValueError(
                f"The base layer {type(base).__name__} holds quantised weights, into which an adapter cannot be merged "
                f"exactly. {_REMEDY}"
            )
        shared = next((names[id(values)] for values in weights if len(names[id(values)]) > 1), None)
        if shared is not None:
            raise ValueError(
                f"{' and '.join(shared)} are one tied weight: merged into it, the adapter of one would change the "
                f"other. {_REMEDY}"
            )


def _plain_kinds() -> set[type]:
    """Classes of parameters that hold numbers as they are; other subclasses hold codes."""
    kinds: set[type] = {torch.nn.Parameter}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        kinds.add(DTensor)  # before it is gathered
    return kinds


def _adapter_layers(model: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _name(model: Any) -> str:
    return str(model.active_peft_config.peft_type.value)


def without_wrappers(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model, adapters in place; any other model as it is."""
    return model.get_base_model() if is_peft_model(model) else model


def is_peft_model(model: Any) -> bool:
    """Returns whether the model is a `peft.PeftModel`, without importing peft where it is not installed."""
    if not is_peft_available():
        return False
    from peft import PeftModel  # an extra

    return isinstance(model, PeftModel)
