"""The loss of each example of a batch, for any model and any loss function.

The definition is the loss that the trainer reports for the example alone, in a batch of one. Three readings reach it:
`criterion` (the calls of `torch.nn.functional` made while the loss is computed), `outputs` (a loss function that
stands outside the model, called on one row of the outputs at a time) and `single` (a batch of one: exact for every
model, slow). `probe.find_reading` takes the first that reproduces batches of one on rows of the data set itself. A
batch enters, its losses leave; which rows the batch holds, and what the losses are for, is not known here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import Trainer

from rsft_hf.weighted.criterion import CriterionCall, CriterionCapture

Batch = Mapping[str, Any]
Collate = Callable[[Sequence[Any]], Any]
PerExampleLoss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Reading:
    """How the losses of the rows are read from one computation of the loss.

    Attributes:
        kind: "criterion", "outputs", "given" (the user's `per_example_loss`) or "single".
        is_mean: Whether a row's loss is the mean over its elements, not their sum ("criterion" only).
        is_averaged: Whether the losses of several criterion calls are averaged, not added ("criterion" only).
        depends_on_padding: Whether the loss of a row changes with the padding of its batch. A training step then
            says what the row cost there; a scoring pass takes batches of one.
        is_collator_random: Whether the same rows are collated differently each time, as by random masking: a row
            that shows no label in one batch may show one in the next.
    """

    kind: str
    is_mean: bool = True
    is_averaged: bool = False
    depends_on_padding: bool = False
    is_collator_random: bool = False


@dataclass
class Recording:
    """What was seen while a loss was computed."""

    capture: CriterionCapture
    outputs: Any = None
    labels: Any = None
    outside_call: Callable[[Any, Any], torch.Tensor] | None = None
    outside_arguments: tuple[Any, Any] | None = None
    fused_calls: list[CriterionCall] = field(default_factory=list)

    @property
    def calls(self) -> list[CriterionCall]:
        """The criterion calls; where there were none, the token log-probabilities that a fused head returned."""
        return self.capture.calls or self.fused_calls

    def row_margins(self) -> torch.Tensor | None:
        """Returns the margins of the only criterion call, shape (num_rows,), or None."""
        return self.calls[0].margins if len(self.calls) == 1 else None


@contextlib.contextmanager
def record_loss(
    trainer: Trainer, model: torch.nn.Module, num_rows: int, row_factors: torch.Tensor | None = None
) -> Iterator[Recording]:
    """Records the loss that `trainer` computes inside the block, without changing it.

    Args:
        trainer: Its `compute_loss_func` and `label_smoother` are listened to, and put back afterwards.
        model: The model whose outputs are kept.
        num_rows: Number of examples in the batch.
        row_factors: As in `CriterionCapture`: scales the loss of each row.
    """
    recording = Recording(CriterionCapture(num_rows, row_factors))

    def keep_outputs(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        recording.outputs = outputs
        recording.labels = kwargs.get("labels")
        recording.fused_calls = _fused_calls(outputs)

    def listen(criterion: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            recording.outside_arguments, recording.labels = (outputs, labels), labels
            row_kwargs = {**kwargs, "num_items_in_batch": None}
            recording.outside_call = lambda outputs, labels: criterion(outputs, labels, *args, **row_kwargs)
            return criterion(outputs, labels, *args, **kwargs)

        return call

    outside = {
        name: criterion
        for name in ("compute_loss_func", "label_smoother")
        if (criterion := vars(trainer).get(name)) is not None
    }
    hook = model.register_forward_hook(keep_outputs, with_kwargs=True)
    try:
        for name, criterion in outside.items():
            setattr(trainer, name, listen(criterion))
        with recording.capture:
            yield recording
    finally:
        hook.remove()
        for name, criterion in outside.items():
            setattr(trainer, name, criterion)


class RowLosses(NamedTuple):
    """The losses of the rows of a batch, on the model's device.

    Attributes:
        losses: Shape (num_rows,), float32; NaN or infinite only if the model says so, 0 for a row without a label.
        is_labelled: Shape (num_rows,), bool.
    """

    losses: torch.Tensor
    is_labelled: torch.Tensor


def row_losses(recording: Recording, reading: Reading, num_rows: int) -> RowLosses | None:
    """Returns the loss of each row of a recorded batch, without waiting for the device.

    Args:
        recording: From `record_loss`.
        reading: From `probe.find_reading`; its kind is "criterion" or "outputs".
        num_rows: Number of examples in the batch.

    Returns:
        The losses, or None if nothing was recorded, or not in a form that splits into rows.
    """
    if reading.kind == "criterion":
        return _from_calls(recording.calls, reading, num_rows)
    if reading.kind == "outputs" and recording.outside_call is not None and recording.outside_arguments is not None:
        with torch.no_grad():
            return _from_outputs(recording.outside_call, recording.outside_arguments, num_rows)
    return None


def compute_loss(trainer: Trainer, model: torch.nn.Module, batch: Batch, num_rows: int) -> tuple[float, Recording]:
    """Returns the trainer's own loss of a collated batch, as a number, and its recording; no gradient is kept."""
    inputs = dict(trainer._prepare_inputs(dict(batch)))
    with torch.no_grad(), trainer.compute_loss_context_manager(), record_loss(trainer, model, num_rows) as recording:
        loss = trainer.compute_loss(model, inputs)
    return float(loss), recording


def given_losses(per_example_loss: PerExampleLoss, recording: Recording, num_rows: int) -> RowLosses:
    """Returns what the user's `per_example_loss(outputs, labels)` says.

    Raises:
        ValueError: If it does not return one loss per row.
    """
    with torch.no_grad():
        losses = torch.as_tensor(per_example_loss(recording.outputs, recording.labels)).detach()
    if losses.shape != (num_rows,):
        raise ValueError(
            f"`per_example_loss` returned shape {tuple(losses.shape)} for {num_rows} examples. Return one loss per "
            f"example, shape ({num_rows},)."
        )
    return _labelled(losses, has_label(recording.labels, num_rows))


def slice_rows(values: Any, row: int, num_rows: int) -> Any:
    """Returns row `row` of a batch or of model outputs: every tensor whose first dimension is `num_rows` is cut."""
    if isinstance(values, torch.Tensor):
        return values[row : row + 1] if values.ndim and len(values) == num_rows else values
    if isinstance(values, Mapping):
        cut = {key: slice_rows(value, row, num_rows) for key, value in values.items()}
        return type(values)(**cut) if type(values) is not dict else cut
    if isinstance(values, (tuple, list)):
        return type(values)(slice_rows(value, row, num_rows) for value in values)
    return values


def _from_calls(calls: list[CriterionCall], reading: Reading, num_rows: int) -> RowLosses | None:
    if not calls or any(call.losses.numel() % num_rows for call in calls):
        return None
    total, is_labelled = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    for call in calls:
        losses = call.losses.reshape(num_rows, -1).sum(1)
        normalisers = call.normalisers.reshape(num_rows, -1).sum(1)
        total = total.to(losses) + (losses / normalisers.clamp(min=1e-30) if reading.is_mean else losses)
        is_labelled = is_labelled.to(losses.device) | (normalisers > 0)
    return _labelled(total / len(calls) if reading.is_averaged else total, is_labelled)


def _from_outputs(
    criterion: Callable[[Any, Any], torch.Tensor], arguments: tuple[Any, Any], num_rows: int
) -> RowLosses:
    outputs, labels = arguments
    losses = [
        criterion(slice_rows(outputs, row, num_rows), slice_rows(labels, row, num_rows)) for row in range(num_rows)
    ]
    # A guarded mean is 0 for a row without labels: it has no loss all the same.
    return _labelled(torch.stack([loss.detach() for loss in losses]), has_label(labels, num_rows))


def _labelled(losses: torch.Tensor, is_labelled: torch.Tensor) -> RowLosses:
    is_labelled = is_labelled.to(losses.device)
    return RowLosses(torch.where(is_labelled, losses.float(), 0.0), is_labelled)


def has_label(labels: Any, num_rows: int) -> torch.Tensor:
    """Returns which rows have a label that is not ignored (-100) or NaN, shape (num_rows,), bool."""
    if not isinstance(labels, torch.Tensor) or labels.numel() % num_rows:
        return torch.ones(num_rows, dtype=torch.bool)
    is_ignored = labels.isnan() if labels.is_floating_point() else labels.eq(-100)
    return (~is_ignored).reshape(num_rows, -1).any(1)


def _fused_calls(outputs: Any) -> list[CriterionCall]:
    # TRL's fused language-model head calls no criterion: it returns token log-probabilities, 0 where ignored.
    if not isinstance(outputs, Mapping) or outputs.get("log_probs") is None or outputs.get("label_mask") is None:
        return []
    mask = outputs["label_mask"].detach().float()
    return [CriterionCall(-(outputs["log_probs"].detach().float() * mask).flatten(), mask.flatten())]


def logits_of(outputs: Any) -> torch.Tensor | None:
    """Returns the logits of model outputs, or None where there are none by that name."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return logits if isinstance(logits, torch.Tensor) else None
