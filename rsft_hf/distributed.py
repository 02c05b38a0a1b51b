"""Collective operations over the processes: sums, broadcasts, gathered lists, shared failures and the run's seed.

Every function that communicates is collective: all processes call it, or none.
"""

from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from transformers import Trainer


def launched_processes() -> Accelerator:
    """Returns an accelerator for the processes that `accelerate launch` or `torchrun` started, without a trainer."""
    # Without `cpu=True` accelerate takes each process of torchrun for the only one where there is no GPU.
    return Accelerator(cpu=not torch.accelerator.is_available())


def sum_over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Returns the element-wise sum over all processes, on the CPU, equal on every process. Collective.

    Args:
        accelerator: Accelerator of the trainer.
        values: Same shape and dtype on every process; integers must not be passed as floats, which round them.
    """
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()


def broadcast_from_main(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Returns the main process's tensor on the CPU of every process. Collective.

    Args:
        accelerator: Accelerator of the trainer.
        values: Same shape and dtype on every process.
    """
    if accelerator.num_processes == 1:
        return values
    return broadcast(values.to(accelerator.device).contiguous(), from_process=0).cpu()


def gather_lists(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """Returns the concatenated lists of all processes, equal on every process. Collective."""
    return values if accelerator.num_processes == 1 else list(gather_object(values))


def object_from_main(accelerator: Accelerator, value: Any) -> Any:
    """Returns the main process's object on every process; it must be picklable. Collective."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value], from_process=0)[0]


class FailTogether:
    """Context for work that each process does alone: if one fails, all raise instead of waiting for it. Collective.

    Args:
        accelerator: Accelerator of the trainer.
        work: Description of the work for the message, such as "scoring round 3".

    Raises:
        RuntimeError: On the processes that did not fail; a process that failed raises its own error.

    Example:
        >>> with FailTogether(Accelerator(cpu=True), "scoring"):
        ...     1 / 0
        Traceback (most recent call last):
        ...
        ZeroDivisionError: division by zero
    """

    def __init__(self, accelerator: Accelerator, work: str) -> None:
        self._accelerator, self._work = accelerator, work

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return  # an interrupt from outside, which reaches the other processes, too
        reasons = gather_lists(self._accelerator, [] if error is None else [f"{type(error).__name__}: {error}"])
        if error is None and reasons:
            raise RuntimeError(f"Another process failed while {self._work}: {reasons[0]}")


def run_seed(trainer: Trainer) -> int:
    """Returns the seed of the run's draws, equal on every process: that of a plain Trainer's shuffle. Collective."""
    seed = trainer.args.data_seed
    seed = (torch.initial_seed() if seed is None else seed) % 2**62
    return int(broadcast_from_main(trainer.accelerator, torch.tensor(seed)))
