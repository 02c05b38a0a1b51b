"""Measuring without leaving a trace in the model or the trainer."""

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch inside the block and gives back the states they had before it."""
    # Collators and data sets draw from the global states, legacy NumPy's included.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
