"""Per-example losses of a batch, for any model and any loss function, by intercepting the criterion.

The loss of an example is the loss that the trainer reports for a batch of that example alone. `CriterionCapture` is
active while the trainer computes a batch's loss: it intercepts the calls of the losses of `torch.nn.functional` and
keeps the unreduced losses. `Reading` tells how per-example losses follow from them:

- `criterion`: from the intercepted calls;
- `outputs`: from a loss function outside of the model, called on one row of the outputs at a time;
- `given`: from the user's `per_example_loss`;
- `single`: from batches of one example, exact for every model, but slow.

`measurement.find_reading` takes the first that reproduces batches of one on rows of the data set.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch.overrides import TorchFunctionMode
from transformers import Trainer

_MAX_MARGIN_CLASSES = 1024  # with more classes, a margin is not cheap compared with the loss

Batch = Any  # what a collator returns: a mapping (BatchEncoding, BatchFeature, dict), a tuple or a tensor

Collate = Callable[[Sequence[Any]], Any]

PerExampleLoss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class CriterionCall:
    """Intercepted call of a criterion: the losses of its elements and the denominators of their mean.

    Attributes:
        losses: Unreduced losses, shape (elements,), class weights included, 0 where there is no label.
        normalisers: Share of each element in the denominator of the mean, shape (elements,): 1, or its class weight,
            or 0 where there is no label.
        num_classes: Size of the class dimension, None for a criterion without classes.
        margins: Logit of the label minus the largest other logit, shape (elements,), None if not cheap.
    """

    losses: torch.Tensor
    normalisers: torch.Tensor
    num_classes: int | None = None
    margins: torch.Tensor | None = None


class CriterionCapture(TorchFunctionMode):
    """Intercepts the calls of criteria while it is active, and scales the losses of rows by factors.

    Without `row_factors` every call returns exactly what it returns without the interception, gradient included.

    Args:
        num_rows: Number of examples in the batch; elements are grouped by row, row-major.
        row_factors: Factor for the loss of each row, shape (num_rows,), >= 0. None leaves the loss unchanged.

    Attributes:
        calls: The intercepted calls, in order.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
        >>> with CriterionCapture(num_rows=2) as capture:
        ...     loss = F.cross_entropy(logits, torch.tensor([0, 0]))  # the mean of ln 2 and 50
        >>> [round(value, 3) for value in capture.calls[0].losses.tolist()]
        [0.693, 50.0]
    """

    def __init__(self, num_rows: int, row_factors: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.row_factors = row_factors
        self.calls: list[CriterionCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Returns what `func` returns, after recording its losses if it is a criterion."""
        kwargs = kwargs or {}
        read = _CRITERIA.get(func)
        if read is None or kwargs.get("size_average") is not None or kwargs.get("reduce") is not None:
            return func(*args, **kwargs)
        if self.row_factors is None:
            return read(self, *args, **kwargs)
        return self._scaled(self.row_factors, func, read, *args, **kwargs)

    def _scaled(
        self, row_factors: torch.Tensor, func: Callable[..., Any], read: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        reduction = kwargs.pop("reduction", "mean")
        num_calls = len(self.calls)
        with torch.no_grad():
            read(self, *args, **kwargs, reduction="none")
        losses = func(*args, **kwargs, reduction="none")
        if func is F.ctc_loss and reduction == "mean":
            losses = losses / _ctc_lengths(args, kwargs).to(losses)
        if len(self.calls) == num_calls or losses.numel() % self.num_rows:
            raise RuntimeError(
                f"`importance_correction` cannot scale rows: {func.__name__} returned {losses.numel()} losses for "
                f"{self.num_rows} examples. Set importance_correction=0."
            )
        factors = row_factors.to(losses).repeat_interleave(losses.numel() // self.num_rows)
        losses = losses * factors.reshape(losses.shape)
        if reduction == "none":
            return losses
        normalisers = self.calls[-1].normalisers.to(losses)
        rows = normalisers.reshape(self.num_rows, -1).sum(1)
        is_even = bool((rows == rows[0]).all())
        if reduction == "mean":
            # Rows of equal count: the mean of c L is unbiased. Others (tokens, class weights): numerator and
            # denominator each estimate the uniform epoch's sum, so their ratio is unbiased up to O(1/batch).
            return losses.sum() / (normalisers if is_even else normalisers * factors).sum()
        if not is_even:
            raise RuntimeError(
                "`importance_correction` cannot correct a loss that is summed over tokens and divided by their number "
                "elsewhere (`num_items_in_batch`): rows of different length would be weighted wrongly. Set "
                "importance_correction=0."
            )
        return losses.sum()

    def _record(self, losses: torch.Tensor, normalisers: torch.Tensor, **extra: Any) -> None:
        losses = losses.detach().float().flatten()
        normalisers = normalisers.detach().float().expand(losses.shape)
        self.calls.append(CriterionCall(torch.where(normalisers > 0, losses, 0.0), normalisers, **extra))

    def cross_entropy(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Returns `F.cross_entropy` of the same arguments and records its elements."""
        options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index}
        has_indices = not target.is_floating_point()
        if has_indices and label_smoothing == 0.0 and not torch.is_autocast_enabled(input.device.type):
            # The two steps of F.cross_entropy, bit for bit; loss and elements share the log-softmax.
            log_probs = F.log_softmax(input, dim=min(1, input.ndim - 1))
            loss = F.nll_loss(log_probs, target, reduction=reduction, **options)
            with torch.no_grad():
                losses = F.nll_loss(log_probs.detach(), target, reduction="none", **options)
        else:
            options["label_smoothing"] = label_smoothing
            loss = F.cross_entropy(input, target, reduction=reduction, **options)
            with torch.no_grad():
                losses = F.cross_entropy(input.detach(), target, reduction="none", **options)
        normalisers = _class_normalisers(target, weight, ignore_index) if has_indices else losses.new_ones(())
        self._record(
            losses,
            normalisers,
            num_classes=input.shape[-1 if input.ndim == 1 else 1],
            margins=self._margins(input, target, ignore_index),
        )
        return loss

    def nll_loss(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """Returns `F.nll_loss` of the same arguments and records its elements."""
        options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index}
        with torch.no_grad():
            losses = F.nll_loss(input.detach(), target, reduction="none", **options)
        self._record(
            losses,
            _class_normalisers(target, weight, ignore_index),
            num_classes=input.shape[1 if input.ndim > 1 else 0],
        )
        return F.nll_loss(input, target, reduction=reduction, **options)

    def ctc_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns `F.ctc_loss` of the same arguments and records its elements, one per sequence."""
        reduction = kwargs.get("reduction", "mean")
        with torch.no_grad():
            losses = F.ctc_loss(*args, **{**kwargs, "reduction": "none"})
            if reduction == "mean":
                losses = losses / _ctc_lengths(args, kwargs).to(losses)  # F.ctc_loss divides by length, then averages
        self._record(losses, losses.new_ones(()))
        return F.ctc_loss(*args, **kwargs)

    def _margins(self, logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
        if logits.ndim != 2 or target.is_floating_point() or len(target) != self.num_rows:
            return None
        if not 2 <= logits.shape[1] <= _MAX_MARGIN_CLASSES:
            return None
        with torch.no_grad():
            # Question-answering heads ignore the index one beyond the last class.
            labels = target.masked_fill(target.eq(ignore_index), 0).unsqueeze(1)
            label_logits = logits.gather(1, labels).squeeze(1)
            return (label_logits - logits.scatter(1, labels, float("-inf")).amax(1)).float()


def _elementwise(criterion: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Recording function for criteria with a plain mean over elements; a NaN target is an element without label."""

    def read(
        capture: CriterionCapture, input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        with torch.no_grad():
            losses = criterion(input.detach(), target, *args, **{**kwargs, "reduction": "none"})
            capture._record(losses, (~target.isnan()).expand(losses.shape).flatten())
        return criterion(input, target, *args, **kwargs)

    return read


def _class_normalisers(target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    is_labelled = target.ne(ignore_index).flatten()
    if weight is None:
        return is_labelled
    return torch.where(is_labelled, weight[target.flatten().masked_fill(~is_labelled, 0)], 0.0)


def _ctc_lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    lengths = args[3] if len(args) > 3 else kwargs["target_lengths"]
    return torch.as_tensor(lengths).clamp(min=1)


_CRITERIA: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    F.cross_entropy: CriterionCapture.cross_entropy,
    F.nll_loss: CriterionCapture.nll_loss,
    F.ctc_loss: CriterionCapture.ctc_loss,
    **{
        criterion: _elementwise(criterion)
        for criterion in (
            F.mse_loss,
            F.l1_loss,
            F.smooth_l1_loss,
            F.huber_loss,
            F.binary_cross_entropy,
            F.binary_cross_entropy_with_logits,
        )
    },
}


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

    Example:
        >>> Reading("criterion", is_mean=False).is_averaged
        False
    """

    kind: str
    is_mean: bool = True
    is_averaged: bool = False
    is_scored_singly: bool = False
    is_collator_random: bool = False


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
    """

    capture: CriterionCapture
    outputs: Any = None
    labels: Any = None
    loss_function: Callable[[Any, Any], torch.Tensor] | None = None
    loss_arguments: tuple[Any, Any] | None = None
    fused_calls: list[CriterionCall] = field(default_factory=list)

    @property
    def calls(self) -> list[CriterionCall]:
        """The criterion calls; without any, the token log-probabilities of a fused head."""
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
        trainer: Trainer whose `compute_loss_func` and `label_smoother` are recorded, and restored afterwards.
        model: Model whose outputs are recorded.
        num_rows: Number of examples in the batch.
        row_factors: As in `CriterionCapture`: scales the loss of each row.
    """
    recording = Recording(CriterionCapture(num_rows, row_factors))

    def record_outputs(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        recording.outputs = outputs
        recording.labels = kwargs.get("labels")
        recording.fused_calls = _fused_calls(outputs)

    def recorded(criterion: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            recording.loss_arguments, recording.labels = (outputs, labels), labels
            row_kwargs = {**kwargs, "num_items_in_batch": None}
            recording.loss_function = lambda outputs, labels: criterion(outputs, labels, *args, **row_kwargs)
            return criterion(outputs, labels, *args, **kwargs)

        return call

    loss_functions = {
        name: criterion
        for name in ("compute_loss_func", "label_smoother")
        if (criterion := vars(trainer).get(name)) is not None
    }
    hook = model.register_forward_hook(record_outputs, with_kwargs=True)
    try:
        for name, criterion in loss_functions.items():
            setattr(trainer, name, recorded(criterion))
        with recording.capture:
            yield recording
    finally:
        hook.remove()
        for name, criterion in loss_functions.items():
            setattr(trainer, name, criterion)


def compute_loss(trainer: Trainer, model: torch.nn.Module, batch: Batch, num_rows: int) -> tuple[float, Recording]:
    """Returns the trainer's own loss of a collated batch, as a number, and its recording; without gradient."""
    inputs = trainer._prepare_inputs(copy.copy(batch))  # `compute_loss` may take the labels out of its inputs
    with torch.no_grad(), trainer.compute_loss_context_manager(), record_loss(trainer, model, num_rows) as recording:
        loss = trainer.compute_loss(model, inputs)
    return float(loss), recording


def row_losses(recording: Recording, reading: Reading, num_rows: int) -> RowLosses | None:
    """Returns the loss of each row of a recorded batch, without synchronising with the device.

    Args:
        recording: From `record_loss`.
        reading: From `measurement.find_reading`; its kind is "criterion" or "outputs".
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

    Mappings and named tuples keep their type: BatchEncoding, BatchFeature, ModelOutput, dict.
    """
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
