"""Per-example losses of a batch, for any model and any loss function, by intercepting the criterion.

The loss of an example is the loss that the trainer reports for a batch of that example alone. `record_loss` records the
computation of a batch's loss: the calls of a criterion, the model's outputs, the loss function outside of the model.
`Reading` tells how per-example losses follow from them:

- `criterion`: from the intercepted calls;
- `outputs`: from a loss function outside of the model, called on one row of the outputs at a time;
- `given`: from the user's `per_example_loss`;
- `single`: from batches of one example, exact for every model, but slow.

`reading.find_reading` takes the first that reproduces batches of one on rows of the data set.
"""

import contextlib
import copy
import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate.utils import recursively_apply
from transformers import Trainer

from rsft_hf.weighted.criterion import Choices, CriterionCall, CriterionCapture, choices_of, corrected_count

Batch = Any  # what a collator returns: a mapping (BatchEncoding, BatchFeature, dict), a tuple or a tensor

Collate = Callable[[Sequence[Any]], Any]

PerExampleLoss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Reading:
    """Method of reading per-example losses from the computation of a batch's loss.

    Attributes:
        kind: "criterion", "outputs", "given" (the user's `per_example_loss`) or "single".
        is_mean: Whether a row's loss is the mean over its elements, not their sum ("criterion" only).
        is_averaged: Whether the losses of several criterion calls are averaged, not added ("criterion" only).
        is_scored_singly: Whether a scoring pass takes batches of one, because the loss of a row changes with the
            padding of its batch, or because rows of different length cannot be collated. A training step gives the
            row's loss in its own batch.
        is_collator_random: Whether the collator is random, as with masking: a row without a label in one batch may
            have one in the next.
        is_fused: Whether the losses come from the log-probabilities of a fused head, which cannot be scaled.
        num_calls: Criterion calls of a batch ("criterion" only).
        is_final: Whether no faster one is looked for again before the next epochs.

    Example:
        >>> Reading("criterion", is_mean=False).is_averaged
        False
    """

    kind: str
    is_mean: bool = True
    is_averaged: bool = False
    is_scored_singly: bool = False
    is_collator_random: bool = False
    is_fused: bool = False
    num_calls: int = 0
    is_final: bool = False


class RowLosses(NamedTuple):
    """Losses of the rows of a batch, on the model's device.

    Attributes:
        losses: Shape (num_rows,), float32; 0 for a row without a label. NaN and infinity come from the model.
        is_labelled: Shape (num_rows,), bool.
    """

    losses: torch.Tensor
    is_labelled: torch.Tensor


@dataclass
class Recording:
    """Record of the computation of one batch's loss.

    Attributes:
        capture: The intercepted criterion calls.
        outputs: Model outputs.
        labels: Labels passed to the model or to the loss function.
        loss_function: The trainer's loss function outside of the model, as `(outputs, labels) -> loss`.
        loss_arguments: The outputs and labels it was called with.
        fused_calls: Token log-probabilities of a fused head, as criterion calls.
        is_smoothed: Whether the factors scaled the losses of the label smoother.
        is_aligned: Whether each label is that of the logits at its place, as the label smoother has them.
    """

    capture: CriterionCapture
    outputs: Any = None
    labels: Any = None
    loss_function: Callable[[Any, Any], torch.Tensor] | None = None
    loss_arguments: tuple[Any, Any] | None = None
    fused_calls: list[CriterionCall] = field(default_factory=list)
    is_smoothed: bool = False
    is_aligned: bool = False

    @property
    def calls(self) -> list[CriterionCall]:
        """The criterion calls; without any, the token log-probabilities of a fused head."""
        return self.capture.calls or self.fused_calls

    def row_margins(self) -> torch.Tensor | None:
        """Returns the margin of the label of each row, shape (num_rows,); None unless each row has one, of classes."""
        choices, _ = self.label_choices or (None, None)
        return None if choices is None or len(choices.margins) != self.capture.num_rows else choices.margins

    @functools.cached_property
    def label_choices(self) -> tuple[Choices, torch.Tensor] | None:
        """The labels against the model's other choices, and which elements have a label; None if unknown."""
        if len(self.calls) == 1 and (choices := self.calls[0].choices) is not None:
            return choices, self.calls[0].normalisers > 0
        logits, labels = logits_of(self.outputs), self.labels
        if self.calls or logits is None or not isinstance(labels, torch.Tensor):
            return None
        if self.is_aligned and logits.shape[:-1] == labels.shape:
            logits, labels = logits.flatten(end_dim=-2), labels.flatten()
        if labels.ndim != 1 or (not self.is_aligned and bool((labels >= logits.shape[-1]).any())):
            return None  # ordinal labels, say, of one more class than there are logits
        choices = choices_of(logits.detach(), labels)  # label smoothing, or a loss of the user's own
        return None if choices is None else (choices, labels.ne(-100))


@contextlib.contextmanager
def record_loss(
    trainer: Trainer,
    model: torch.nn.Module,
    num_rows: int,
    row_factors: torch.Tensor | None = None,
    is_count_weighted: bool = False,
) -> Iterator[Recording]:
    """Records the loss that `trainer` computes inside the block, without changing it.

    Args:
        trainer: Trainer whose `compute_loss_func` and `label_smoother` are recorded, and restored afterwards.
        model: Model whose outputs are recorded.
        num_rows: Number of examples in the batch.
        row_factors: As in `CriterionCapture`: scales the loss of each row.
        is_count_weighted: As in `CriterionCapture`.
    """
    recording = Recording(CriterionCapture(num_rows, row_factors, is_count_weighted))

    def record_outputs(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        recording.outputs = outputs
        recording.labels = kwargs.get("labels")
        recording.fused_calls = _fused_calls(outputs)

    def recorded(name: str, criterion: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            recording.loss_arguments, recording.labels = (outputs, labels), labels
            row_kwargs = {**kwargs, "num_items_in_batch": None}
            recording.loss_function = lambda outputs, labels: criterion(outputs, labels, *args, **row_kwargs)
            recording.is_aligned = name == "label_smoother" and not kwargs.get("shift_labels", False)
            if name == "label_smoother" and row_factors is not None:
                recording.is_smoothed = True
                return _scaled_smoothing(criterion, (outputs, labels), row_factors, **kwargs)
            return criterion(outputs, labels, *args, **kwargs)

        return call

    names = ("compute_loss_func", "label_smoother")
    original = {name: vars(trainer)[name] for name in names if vars(trainer).get(name) is not None}
    hook = model.register_forward_hook(record_outputs, with_kwargs=True)
    try:
        for name, criterion in original.items():
            setattr(trainer, name, recorded(name, _given_count(criterion, recording.capture.calls)))
        with recording.capture:
            yield recording
    finally:
        hook.remove()
        vars(trainer).update(original)


def _given_count(criterion: Callable[..., torch.Tensor], calls: list[CriterionCall]) -> Callable[..., torch.Tensor]:
    """The loss function, called with the number of labels where it divides by one and none is counted.

    Args:
        criterion: The loss function.
        calls: Recorded calls of criteria, which lose those of a first attempt.
    """

    def call(outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        num_calls = len(calls)
        try:
            return criterion(outputs, labels, *args, **kwargs)
        except (TypeError, AttributeError):
            if kwargs.get("num_items_in_batch", 0) is not None or not isinstance(labels, torch.Tensor):
                raise
            del calls[num_calls:]
            return criterion(outputs, labels, *args, **{**kwargs, "num_items_in_batch": labels.ne(-100).sum()})

    return call


def compute_loss(
    trainer: Trainer,
    model: torch.nn.Module,
    batch: Batch,
    num_rows: int,
    *,
    num_items: float | None = None,
    **scaling: Any,
) -> tuple[float, Recording]:
    """Returns the trainer's own loss of a collated batch, as a number, and its recording; without gradient.

    Args:
        trainer: Trainer that computes the loss.
        model: Its model.
        batch: Collated rows.
        num_rows: Number of them.
        num_items: `num_items_in_batch`, as a training step passes it; none by default.
        **scaling: `row_factors` and `is_count_weighted` of `record_loss`.
    """
    inputs = trainer._prepare_inputs(copy.copy(batch))  # `compute_loss` may take the labels out of its inputs
    count = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items, device=trainer.args.device)}
    recorder = record_loss(trainer, model, num_rows, **scaling)
    averages, trainer.args.average_tokens_across_devices = trainer.args.average_tokens_across_devices, False
    try:  # with a count of all processes Trainer multiplies the loss by their number; this count is of one batch
        with torch.no_grad(), trainer.compute_loss_context_manager(), recorder as recording:
            loss = trainer.compute_loss(model, inputs, **count)
    finally:
        trainer.args.average_tokens_across_devices = averages
    return float(loss), recording


def row_losses(recording: Recording, reading: Reading, num_rows: int) -> RowLosses | None:
    """Returns the loss of each row of a recorded batch, without synchronising with the device.

    Args:
        recording: From `record_loss`.
        reading: From `reading.find_reading`; its kind is "criterion" or "outputs".
        num_rows: Number of examples in the batch.

    Returns:
        The losses, or None if no call was recorded or its elements do not split into rows.
    """
    if reading.kind == "criterion":
        return _from_calls(recording.calls, reading, num_rows)
    if reading.kind == "outputs" and recording.loss_function is not None and recording.loss_arguments is not None:
        with torch.no_grad():
            return _from_outputs(recording.loss_function, recording.loss_arguments, num_rows)
    return None


def given_losses(per_example_loss: PerExampleLoss, recording: Recording, num_rows: int) -> RowLosses:
    """Returns the losses of the user's `per_example_loss(outputs, labels)`.

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


def has_label(labels: Any, num_rows: int) -> torch.Tensor:
    """Returns the mask of rows with a label that is not ignored (-100) or NaN, shape (num_rows,), bool."""
    if not isinstance(labels, torch.Tensor) or labels.numel() % num_rows:
        return torch.ones(num_rows, dtype=torch.bool)
    is_ignored = labels.isnan() if labels.is_floating_point() else labels.eq(-100)
    return (~is_ignored).reshape(num_rows, -1).any(1)


def slice_rows(values: Any, row: int, num_rows: int) -> Any:
    """Returns row `row` of a batch or of model outputs: every tensor with first dimension `num_rows` is sliced.

    Mappings and named tuples keep their type: BatchEncoding, BatchFeature, ModelOutput, dict. An entry of a batch that
    is a list, such as the boxes of each image, is sliced like a tensor.
    """
    if type(values) is dict or isinstance(values, UserDict):
        lists = {name: one for name, one in values.items() if type(one) is list and len(one) == num_rows}
        values = copy.copy(values)
        values.update({name: one[row : row + 1] for name, one in lists.items()})
    return recursively_apply(
        lambda tensor: tensor[row : row + 1] if tensor.ndim and len(tensor) == num_rows else tensor, values
    )


def logits_of(outputs: Any) -> torch.Tensor | None:
    """Returns the logits of model outputs, or None without an entry of that name."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    return logits if isinstance(logits, torch.Tensor) else None


def validate_losses(losses: torch.Tensor, is_labelled: torch.Tensor, rows: Sequence[int]) -> None:
    """Raises ValueError if a labelled row's loss is NaN or infinite: names the row, or the model if it is every row.

    All of shape (len(rows),).
    """
    is_invalid = is_labelled & ~losses.isfinite()
    num_invalid = int(is_invalid.sum())
    if num_invalid > 1 and num_invalid == int(is_labelled.sum()):
        raise_diverged(num_invalid)
    if num_invalid:
        position = int(is_invalid.nonzero()[0])
        raise ValueError(
            f"Row {rows[position]} of the training set has loss {float(losses[position])}, which cannot be a weight. "
            "Repair or remove the row, or train in a wider number format if the loss overflows."
        )


def raise_diverged(num_rows: int) -> NoReturn:
    """Raises ValueError for losses that are not finite on any of `num_rows` labelled rows."""
    raise ValueError(
        f"The losses of all {num_rows} measured rows are NaN or infinite: the model has diverged. Return to an earlier "
        "checkpoint, and lower the learning rate, clip gradients, or train in a wider number format."
    )


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


def _scaled_smoothing(
    smoother: Callable[..., torch.Tensor],
    arguments: tuple[Any, torch.Tensor],
    row_factors: torch.Tensor,
    shift_labels: bool = False,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The label smoother's loss with the loss of each row scaled; its denominator is `corrected_count`."""
    outputs, labels = arguments
    num_rows = len(row_factors)
    counts = labels[..., 1:] if shift_labels else labels
    counts = counts.ne(-100).reshape(num_rows, -1).sum(1)
    factors = row_factors.to(labels.device)
    losses = [
        smoother(slice_rows(outputs, row, num_rows), slice_rows(labels, row, num_rows), shift_labels=shift_labels)
        * (factors[row] * counts[row])
        for row in counts.nonzero().flatten().tolist()  # the mean over no token is NaN
    ]
    total = torch.stack(losses).sum()
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / corrected_count(counts, factors)


def _from_outputs(
    criterion: Callable[[Any, Any], torch.Tensor], arguments: tuple[Any, Any], num_rows: int
) -> RowLosses:
    outputs, labels = arguments
    losses = [
        criterion(slice_rows(outputs, row, num_rows), slice_rows(labels, row, num_rows)) for row in range(num_rows)
    ]
    # A mean guarded against division by zero is 0 for a row without labels, which has no loss nevertheless.
    return _labelled(torch.stack([loss.detach() for loss in losses]), has_label(labels, num_rows))


def _labelled(losses: torch.Tensor, is_labelled: torch.Tensor) -> RowLosses:
    is_labelled = is_labelled.to(losses.device)
    return RowLosses(torch.where(is_labelled, losses.float(), 0.0), is_labelled)


def _fused_calls(outputs: Any) -> list[CriterionCall]:
    # TRL's fused language-model head calls no criterion: it returns token log-probabilities, 0 where ignored.
    if not isinstance(outputs, Mapping) or outputs.get("log_probs") is None or outputs.get("label_mask") is None:
        return []
    mask = outputs["label_mask"].detach().float()
    return [CriterionCall(-(outputs["log_probs"].detach().float() * mask).flatten(), mask.flatten())]
