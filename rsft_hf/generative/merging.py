"""An adapter merged into its base weights for the time of a block, after which every base weight is what it was.

A PEFT model enters, and leaves bit for bit. What cannot be merged, or not be taken out again exactly, is refused.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils import is_peft_available

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
    refuse_unmergeable(model)
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


def refuse_unmergeable(model: Any) -> None:
    """Raises ValueError if the model has no adapter, or one that cannot be merged and taken out again exactly."""
    if is_peft_available():
        from peft import PeftModel
    if not is_peft_available() or not isinstance(model, PeftModel):
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
