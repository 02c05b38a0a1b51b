"""One process or many: sums and broadcasts over the processes, and measurements that leave no trace in the RNGs.

Every function that communicates is collective: all processes call it, or none.
"""

from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from transformers import Trainer


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


def gather_lists(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """Returns the lists of all processes, joined in the order of the processes, equal on every process. Collective."""
    return values if accelerator.num_processes == 1 else list(gather_object(values))


def object_from_main(accelerator: Accelerator, value: Any) -> Any:
    """Returns the main process's object, which can be pickled, on every process. Collective."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value], from_process=0)[0]


class FailTogether:
    """Surrounds work that each process does by itself: if one fails, all raise, and none waits for it. Collective.

    Args:
        accelerator: Knows the processes.
        work: What is done inside, for the message.

    Raises:
        RuntimeError: On the processes that did not fail themselves; there the own error goes on.
    """

    def __init__(self, accelerator: Accelerator, work: str) -> None:
        self._accelerator, self._work = accelerator, work

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return  # interrupted from outside, not failed: the others are interrupted too
        reasons = gather_lists(self._accelerator, [] if error is None else [f"{type(error).__name__}: {error}"])
        if error is None and reasons:
            raise RuntimeError(f"Another process failed while {self._work}: {reasons[0]}")


def run_seed(trainer: Trainer) -> int:
    """Returns the seed of a run's draws, equal on every process: the one a plain Trainer shuffles with. Collective."""
    seed = trainer.args.data_seed
    seed = (torch.initial_seed() if seed is None else seed) % 2**62
    return int(broadcast_from_main(trainer.accelerator, torch.tensor(seed)))
