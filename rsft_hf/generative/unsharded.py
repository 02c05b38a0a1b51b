"""A whole model beside one that FSDP2 shards: the same modules, each weight gathered from all processes.

A sharded model enters, a twin without a trace of FSDP leaves. To generate with the sharded one would gather every
weight again for each token, and wait for ever if another process has fewer tokens to make.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module

from rsft_hf.distributed import FailTogether

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
def unsharded_twin(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[Any]:
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
