"""LabelMargins: running mean of every label's margin over the training steps, the evidence of `LabelReport`.

A row has one label (a class), or several (the tags of its tokens, the classes of a multi-label task); the labels of all
rows lie in one array, row after row.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from rsft_hf.distributed import gather_lists, sum_over_processes
from rsft_hf.weighted.criterion import Choices

MAX_LABELS = 2**24  # of a data set; 28 bytes each
_QUEUE_LENGTH = 64  # micro-batches kept on the device before their margins are copied, in one synchronisation


@dataclass
class MarginSums:
    """Margins of L labels over the training steps that read them, all of shape (L,).

    Attributes:
        sums: Sum of the margins, float64.
        num_reads: Number of margins, int64.
        lowest: Lowest margin, float32, infinite for a label never read.
        rivals: Class that the model preferred to the label's at the lowest margin, int64, -1 for a label never read.
        labels: Class of the label, int64, -1 for a label never read.

    Example:
        >>> MarginSums.empty(2).num_reads.tolist()
        [0, 0]
    """

    sums: torch.Tensor
    num_reads: torch.Tensor
    lowest: torch.Tensor
    rivals: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def empty(cls, num_labels: int) -> "MarginSums":
        """Returns the sums before any label is read."""
        return cls(
            sums=torch.zeros(num_labels, dtype=torch.float64),
            num_reads=torch.zeros(num_labels, dtype=torch.int64),
            lowest=torch.full((num_labels,), float("inf")),
            rivals=torch.full((num_labels,), -1, dtype=torch.int64),
            labels=torch.full((num_labels,), -1, dtype=torch.int64),
        )

    def add(self, places: torch.Tensor, choices: Choices) -> None:
        """Adds the margins of labels at these places, shape (elements,); a place may occur more than once."""
        self.sums.index_add_(0, places, choices.margins.double())
        self.num_reads.index_add_(0, places, torch.ones_like(places))
        # Of equal places NumPy keeps the last, here the lowest margin; torch does not say which it keeps.
        order = choices.margins.argsort(descending=True, stable=True)
        at, margins = places[order].numpy(), choices.margins[order].numpy()
        self.labels.numpy()[at] = choices.labels[order].numpy()
        is_lower = margins < self.lowest.numpy()[at]
        self.lowest.numpy()[at[is_lower]] = margins[is_lower]
        self.rivals.numpy()[at[is_lower]] = choices.rivals[order].numpy()[is_lower]

    def over_processes(self, accelerator: Accelerator) -> "MarginSums":
        """Returns the sums over all processes, equal on every process. Collective."""
        if accelerator.num_processes == 1 or not len(self.sums):
            return self
        lowest, rivals, labels = (
            accelerator.gather(values.to(accelerator.device).unsqueeze(0)).cpu()
            for values in (self.lowest, self.rivals, self.labels)
        )
        process = lowest.argmin(0, keepdim=True)
        return MarginSums(
            sums=sum_over_processes(accelerator, self.sums),
            num_reads=sum_over_processes(accelerator, self.num_reads),
            lowest=lowest.gather(0, process).squeeze(0),
            rivals=rivals.gather(0, process).squeeze(0),
            labels=labels.amax(0),
        )


class LabelMargins:
    """Record of the margins of all labels of a data set, which costs nothing before the first margin.

    Args:
        count_labels: Returns the number of labels of each row, shape (N,), int64.

    Attributes:
        num_per_row: Those numbers, once a margin has been recorded.
        total: Sums over all processes at the last `merge`; None before the first.
        problem: Why the margins cannot be assigned to the labels, or None.

    Example:
        >>> margins = LabelMargins(lambda: torch.tensor([1, 1]))
        >>> choices = Choices(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([-2.0, 3.0]))
        >>> margins.record([1, 0], choices, torch.tensor([True, True]))
        >>> margins.merge(Accelerator(cpu=True))
        >>> margins.total.sums.tolist(), margins.total.labels.tolist()
        ([3.0, -2.0], [1, 0])
    """

    def __init__(self, count_labels: Callable[[], torch.Tensor]) -> None:
        self._count_labels = count_labels
        self.num_per_row = self._first_labels = torch.empty(0, dtype=torch.int64)
        self.problem: str | None = None
        self.total: MarginSums | None = None
        self._own: MarginSums | None = None
        self._queue: list[tuple[list[int], Choices, torch.Tensor]] = []

    def record(self, rows: list[int], choices: Choices, is_labelled: torch.Tensor) -> None:
        """Queues one micro-batch.

        Args:
            rows: Rows of the batch, in order.
            choices: Labels and margins of its elements, row after row, each of shape (elements,).
            is_labelled: Whether an element has a label, shape (elements,).
        """
        if self.problem is None:
            self._queue.append((rows, choices, is_labelled))
            if len(self._queue) >= _QUEUE_LENGTH:
                self._empty_queue()

    def merge(self, accelerator: Accelerator) -> None:
        """Sets `total` and `problem` from what all processes have recorded. Collective."""
        self._empty_queue()
        has_margins, problems = zip(*gather_lists(accelerator, [(self._own is not None, self.problem)]), strict=True)
        self.problem = next(filter(None, problems), None)
        if self.problem is None and any(has_margins):
            self.total = self._sums().over_processes(accelerator)

    def state(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Returns the totals so far, for `load`; nothing where there are none or they have a problem. Collective."""
        self.merge(accelerator)
        if self.total is None or self.problem is not None:
            return {}
        return {f"label_margin_{name}": values for name, values in vars(self.total).items()}

    def load(self, state: dict[str, torch.Tensor], is_main_process: bool) -> None:
        """Restores a state; the main process goes on from the totals, as they already are over all processes."""
        self._queue.clear()
        names = [f"label_margin_{field.name}" for field in dataclasses.fields(MarginSums)]
        if set(names) <= state.keys():
            self._own = self._sums()
            self.total = MarginSums(*(state[name] for name in names))
            if is_main_process:
                self._own = self.total

    def _sums(self) -> MarginSums:
        """This process's sums; the labels are counted at the first call."""
        if self._own is None:
            self.num_per_row = self._count_labels()
            self._first_labels = self.num_per_row.cumsum(0) - self.num_per_row
            if (num_labels := int(self.num_per_row.sum())) > MAX_LABELS:
                self.problem, num_labels = f"{num_labels} labels are more than {MAX_LABELS}", 0
            self._own = MarginSums.empty(num_labels)
        return self._own

    def _empty_queue(self) -> None:
        for rows, choices, is_labelled in self._queue:
            own, places = self._sums(), self._places(torch.tensor(rows), is_labelled.cpu())
            if places is not None:
                is_read = is_labelled.cpu() & choices.margins.cpu().isfinite()
                own.add(places[is_read], Choices(*(values.cpu()[is_read] for values in vars(choices).values())))
        self._queue.clear()

    def _places(self, rows: torch.Tensor, is_labelled: torch.Tensor) -> torch.Tensor | None:
        """Place of the label of each element, shape (elements,), meaningless without a label; None with a problem."""
        if self.problem is None and len(is_labelled) % len(rows):
            self.problem = f"the loss of {len(rows)} rows has {len(is_labelled)} elements"
        if self.problem is not None:
            return None
        is_labelled = is_labelled.reshape(len(rows), -1)
        found, stored = is_labelled.sum(1), self.num_per_row[rows]
        is_wrong = (found > 0) & (found != stored)
        if bool(is_wrong.any()):
            row = int(is_wrong.int().argmax())
            self.problem = (
                f"row {int(rows[row])} has {int(stored[row])} labels in the data set and {int(found[row])} in its batch"
            )
            return None
        return (self._first_labels[rows].unsqueeze(1) + is_labelled.cumsum(1) - 1).flatten()
