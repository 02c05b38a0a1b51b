"""One process or many: sums and broadcasts over the processes, and measurements that leave no trace in the RNGs.

Every function that communicates is collective: all processes call it, or none.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast


def sum_over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Returns the element-wise sum over all processes, on the CPU, equal on every process. Collective.

    Args:
        accelerator: Knows the processes and their device.
        values: Same shape and dtype on every process; one kind of number only, never integers carried as floats.
    """
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()


def broadcast_from_main(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Returns the main process's tensor on the CPU of every process. Collective.

    Args:
        accelerator: Knows the processes and their device.
        values: Same shape and dtype on every process.
    """
    if accelerator.num_processes == 1:
        return values
    return broadcast(values.to(accelerator.device).contiguous(), from_process=0).cpu()


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
