"""Isolation of measurements: evaluation mode, forked RNG state, and preserved trainer state."""

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import Trainer

_DATA_SETS = ("train_dataset", "eval_dataset")  # lists that no loss changes


@contextlib.contextmanager
def in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turns off dropout and the like inside the block, then restores the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seeds the RNGs of Python, NumPy and torch inside the block, then restores their states."""
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


@contextlib.contextmanager
def preserved_trainer_state(trainer: Trainer) -> Iterator[None]:
    """Restores the counters and metric lists that a trainer updates when it computes a loss, as TRL's do."""
    kinds = (int, float, str, dict, list, set, deque, type(None))
    saved = {
        name: _copied(value)
        for name, value in vars(trainer).items()
        if isinstance(value, kinds) and name not in _DATA_SETS
    }
    try:
        yield
    finally:
        for name, value in saved.items():
            _restore(trainer, name, value)


def _copied(value: Any) -> Any:
    """A copy of the containers of a value; what they hold in the end, such as tensors, is shared."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # a defaultdict stays one
        copied.update({key: _copied(item) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return copy.copy(value) if isinstance(value, (set, deque)) else value


def _restore(trainer: Trainer, name: str, value: Any) -> None:
    present = vars(trainer).get(name)
    if isinstance(present, dict):  # in place: a callback may hold a reference
        present.clear()
        present.update(value)
    elif isinstance(present, (list, deque)):
        present.clear()
        present.extend(value)
    else:
        vars(trainer)[name] = value
