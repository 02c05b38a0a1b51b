"""The weights that a round's training starts from: a snapshot of those the run began with.

A model enters; its trainable parameters are written once, and put back whenever a round starts from the base.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_base(model: torch.nn.Module, path: Path) -> None:
    """Writes the trainable parameters: of a PEFT model its adapter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".incomplete")
    save_file({name: values.detach().cpu().contiguous().clone() for name, values in _trainable(model).items()}, draft)
    draft.replace(path)


def restore_base(model: torch.nn.Module, path: Path) -> None:
    """Puts the trainable parameters back to what `save_base` wrote.

    Raises:
        RuntimeError: If the file is absent, or belongs to other parameters.
    """
    if not path.is_file():
        raise RuntimeError(f'round_start="base" finds no {path}, which the first round writes. Begin the run anew.')
    saved, parameters = load_file(path), _trainable(model)
    if saved.keys() != parameters.keys():
        raise RuntimeError(f"{path} holds other parameters than the model. Begin the run anew, in another folder.")
    with torch.no_grad():
        for name, values in parameters.items():
            values.copy_(saved[name])


def _trainable(model: torch.nn.Module) -> dict[str, Any]:
    return {name: values for name, values in model.named_parameters() if values.requires_grad}
