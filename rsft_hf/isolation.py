"""Isolation of measurements: evaluation mode, forked RNG state, and preserved trainer state."""

import contextlib
import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import Trainer

_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)
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
    plain = (int, float, str, np.generic, type(None))
    saved = {
        name: copied_containers(value)
        for name, value in vars(trainer).items()
        if (isinstance(value, plain) or type(value) in _CONTAINERS) and name not in _DATA_SETS
    }
    try:
        yield
    finally:
        for name, value in saved.items():
            _restore(trainer, name, value)


def copied_containers(value: Any) -> Any:
    """Returns a copy of a value's dictionaries, lists, sets and deques; what they hold, such as tensors, is shared.

    Example:
        >>> value = {"a": [1, (2,)]}
        >>> copied = copied_containers(value)
        >>> copied == value, copied["a"] is value["a"], copied["a"][1] is value["a"][1]
        (True, False, True)
    """
    if type(value) not in _CONTAINERS:
        return value
    copied = copy.copy(value)  # a defaultdict keeps its default, a deque its length
    if isinstance(value, dict):
        for key, item in value.items():
            copied[key] = copied_containers(item)
    elif isinstance(value, (list, deque)):
        for place, item in enumerate(value):
            copied[place] = copied_containers(item)
    return copied


def _restore(trainer: Trainer, name: str, value: Any) -> None:
    present = vars(trainer).get(name)
    if type(present) is not type(value) or type(value) not in _CONTAINERS:
        vars(trainer)[name] = value
        return
    present.clear()  # in place: a callback may hold a reference
    if isinstance(value, (list, deque)):
        present.extend(value)
    else:
        present.update(value)
