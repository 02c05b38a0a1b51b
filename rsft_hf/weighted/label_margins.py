"""LabelMargins: mean margin of every label in the training steps of each epoch, the evidence of `LabelReport`.

A row has one label (a class), or several (the tags of its tokens, the classes of a multi-label task); the labels of all
rows lie in one array, row after row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from rsft_hf.distributed import gather_lists, sum_over_processes
from rsft_hf.weighted.criterion import Choices

MAX_LABELS = 2**23  # of a data set; 8 bytes each and epoch
_QUEUE_LENGTH = 64  # micro-batches kept on the device before their margins are copied, in one synchronisation


@dataclass
class MarginSums:
    """Margins of L labels over the training steps of an epoch, all of shape (L,).

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
    """Record of the margins of all labels of a data set by epoch, which costs nothing before the first margin.

    Args:
        count_labels: Returns the number of labels of each row, shape (N,), int64.

    Attributes:
        num_per_row: Those numbers, once a margin has been recorded.
        labels: Class of each label, shape (L,), int64, -1 for a label never read.
        epochs: Mean margins, float32, NaN for a label not read, and rivals, int32, both of shape (L,), of each epoch.
        is_binary: Whether each label is a yes or no of its own, as those of a multi-label task.
        problem: Why the margins cannot be assigned to the labels, or None.

    Example:
        >>> margins = LabelMargins(lambda: torch.tensor([1, 1]))
        >>> choices = Choices(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([-2.0, 3.0]))
        >>> margins.record([1, 0], choices, torch.tensor([True, True]))
        >>> margins.end_epoch(Accelerator(cpu=True))
        >>> [values.tolist() for values in (*margins.epochs[0], margins.labels)]
        [[3.0, -2.0], [0, 1], [1, 0]]
    """

    def __init__(self, count_labels: Callable[[], torch.Tensor]) -> None:
        self._count_labels = count_labels
        self.num_per_row = self._first_labels = self.labels = torch.empty(0, dtype=torch.int64)
        self.epochs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.is_binary = False
        self.problem: str | None = None
        self._own: MarginSums | None = None
        self._queue: list[tuple[list[int], Choices, torch.Tensor]] = []

    def record(self, rows: list[int], choices: Choices, is_labelled: torch.Tensor) -> None:
        """Queues one micro-batch.

        Args:
            rows: Rows of the batch, in order.
            choices: Labels and margins of its elements, row after row, each of shape (elements,).
            is_labelled: Whether an element has a label, shape (elements,).
        """
        self.is_binary = choices.is_binary
        if self.problem is None:
            self._queue.append((rows, choices, is_labelled))
            if len(self._queue) >= _QUEUE_LENGTH:
                self._empty_queue()

    def end_epoch(self, accelerator: Accelerator) -> None:
        """Appends what all processes have recorded to `epochs`, or sets `problem`. Collective."""
        total = self._over_processes(accelerator)
        if total is not None:
            self._append(total)

    def _append(self, total: MarginSums) -> None:
        self.labels = torch.maximum(self.labels, total.labels)
        self.epochs.append(((total.sums / total.num_reads).float(), total.rivals.int()))
        self._own = MarginSums.empty(len(self.labels))

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> "LabelMargins":
        """Returns the margins of a saved state; an epoch that it interrupted counts as ended."""
        margins = cls(lambda: state.get("label_num_per_row", torch.empty(0, dtype=torch.int64)))
        margins.load(state, is_main_process=True)
        if bool(margins._sums().num_reads.any()):
            margins._append(margins._sums())
        return margins

    def state(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Returns the epochs and the sums of the current one, for `load`; nothing without margins. Collective."""
        total = self._over_processes(accelerator)
        if total is None:
            return {}
        state = {f"label_{name}": values for name, values in vars(total).items()}
        state |= {"label_classes": self.labels, "label_num_per_row": self.num_per_row}
        state["label_is_binary"] = torch.tensor(self.is_binary)
        if self.epochs:
            state["label_epoch_margins"], state["label_epoch_rivals"] = map(torch.stack, zip(*self.epochs, strict=True))
        return state

    def load(self, state: dict[str, torch.Tensor], is_main_process: bool) -> None:
        """Restores a state; the sums go to the main process, as they already are over all processes."""
        self._queue.clear()
        if "label_classes" not in state:
            return
        own = self._sums()
        if is_main_process:
            own = MarginSums(*(state[f"label_{name}"] for name in vars(own)))
        self._own, self.labels = own, state["label_classes"]
        self.is_binary = bool(state.get("label_is_binary", False))
        if "label_epoch_margins" in state:
            self.epochs = list(zip(state["label_epoch_margins"], state["label_epoch_rivals"], strict=True))

    def _over_processes(self, accelerator: Accelerator) -> MarginSums | None:
        """The sums of the current epoch over all processes; None without any, or with a problem. Collective."""
        self._empty_queue()
        has_margins, problems = zip(*gather_lists(accelerator, [(self._own is not None, self.problem)]), strict=True)
        self.problem = next(filter(None, problems), None)
        if self.problem is not None or not any(has_margins):
            return None
        return self._sums().over_processes(accelerator)

    def _sums(self) -> MarginSums:
        """This process's sums of the current epoch; the labels are counted at the first call."""
        if self._own is None:
            self.num_per_row = self._count_labels()
            self._first_labels = self.num_per_row.cumsum(0) - self.num_per_row
            if (num_labels := int(self.num_per_row.sum())) > MAX_LABELS:
                self.problem, num_labels = f"{num_labels} labels are more than {MAX_LABELS}", 0
            self._own, self.labels = MarginSums.empty(num_labels), torch.full((num_labels,), -1)
        return self._own

    def _empty_queue(self) -> None:
        for rows, choices, is_labelled in self._queue:
            own, places = self._sums(), self._places(torch.tensor(rows), is_labelled.cpu())
            if places is not None:
                is_read = is_labelled.cpu() & choices.margins.cpu().isfinite()
                labels, rivals, margins = choices.labels, choices.rivals, choices.margins
                read = Choices(labels.cpu()[is_read], rivals.cpu()[is_read], margins.cpu()[is_read])
                own.add(places[is_read], read)
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
