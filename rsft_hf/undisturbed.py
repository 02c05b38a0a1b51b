"""Measuring without leaving a trace in the model or the trainer."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer


@contextlib.contextmanager
def in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turns dropout and the like off inside the block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Puts back the counters and metric lists that a trainer keeps of its own losses (TRL's do)."""
    plain = (int, float, str, dict, list, set, type(None))
    kept = {
        name: copy.deepcopy(value)
        for name, value in vars(trainer).items()
        if isinstance(value, plain) and _is_plain(value)
    }
    try:
        yield
    finally:
        for name, value in kept.items():
            _restore(trainer, name, value)


def _restore(trainer: Trainer, name: str, value: Any) -> None:
    present = vars(trainer).get(name)
    if isinstance(present, dict):  # in place: a callback may hold it
        present.clear()
        present.update(value)
    elif isinstance(present, list):
        present[:] = value
    else:
        vars(trainer)[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, Sequence | set) and not isinstance(value, str):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
