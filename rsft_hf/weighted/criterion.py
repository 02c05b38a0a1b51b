"""CriterionCapture: intercepts the losses of `torch.nn.functional`, to read their elements and scale their rows.

It is active while a trainer computes the loss of a batch, and keeps the unreduced losses of every call.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_MAX_MARGIN_CLASSES = 1024  # with more classes, a margin is not cheap compared with the loss


@dataclass(frozen=True)
class CriterionCall:
    """Intercepted call of a criterion: the losses of its elements and the denominators of their mean.

    Attributes:
        losses: Unreduced losses, shape (elements,), class weights included, 0 where there is no label.
        normalisers: Share of each element in the denominator of the mean, shape (elements,): 1, or its class weight,
            or 0 where there is no label.
        num_classes: Size of the class dimension, None for a criterion without classes.
        choices: The labels against the model's other choices, None if they are not cheap to compare.
    """

    losses: torch.Tensor
    normalisers: torch.Tensor
    num_classes: int | None = None
    choices: "Choices | None" = None


@dataclass(frozen=True)
class Choices:
    """Label of each element against the class that the model prefers among the others, all of shape (elements,).

    Attributes:
        labels: Class of the label, int64; of a binary criterion 0 or 1.
        rivals: Class with the largest logit among the others, int64.
        margins: Logit of the label minus that of the rival; of a binary criterion the other class has logit 0, and the
            margin of an element of weight 0 among several of a row is NaN: its label is not read.
        is_binary: Whether the criterion is binary.
    """

    labels: torch.Tensor
    rivals: torch.Tensor
    margins: torch.Tensor
    is_binary: bool = False


class CriterionCapture(TorchFunctionMode):
    """Intercepts the calls of criteria while it is active, and scales the losses of rows by factors.

    Without `row_factors` every call returns exactly what it returns without the interception, gradient included.

    Args:
        num_rows: Number of examples in the batch; elements are grouped by row, row-major.
        row_factors: Factor for the loss of each row, shape (num_rows,), >= 0. None leaves the loss unchanged.
        is_count_weighted: Whether the count that divides a sum elsewhere is weighted by the same factors.

    Attributes:
        calls: The intercepted calls, in order.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
        >>> with CriterionCapture(num_rows=2) as capture:
        ...     loss = F.cross_entropy(logits, torch.tensor([0, 0]))  # the mean of ln 2 and 50
        >>> [round(value, 3) for value in capture.calls[0].losses.tolist()]
        [0.693, 50.0]
    """

    def __init__(self, num_rows: int, row_factors: torch.Tensor | None = None, is_count_weighted: bool = False) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.row_factors, self.is_count_weighted = row_factors, is_count_weighted
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
        counts = self.calls[-1].normalisers.to(losses).reshape(self.num_rows, -1).sum(1)
        if reduction == "mean":
            return losses.sum() / corrected_count(counts, row_factors.to(losses))
        if not self.is_count_weighted and not is_even(counts):
            raise RuntimeError(
                "`importance_correction` cannot correct this loss: it is summed over tokens and divided by a number "
                "other than Trainer's `num_items_in_batch`, so rows of different length would be weighted wrongly. "
                "Set importance_correction=0."
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
            choices=choices_of(input, target, ignore_index),
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

    def binary_cross_entropy_with_logits(
        self, input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Returns `F.binary_cross_entropy_with_logits` of the same arguments and records its elements."""
        loss = _elementwise(F.binary_cross_entropy_with_logits)(self, input, target, *args, **kwargs)
        if input.shape == target.shape:
            with torch.no_grad():
                labels, logits = target.flatten(), input.flatten().float()
                margins = (2 * labels - 1) * logits
                weight = args[0] if args else kwargs.get("weight")
                if weight is not None and input.ndim > 1 and input.shape[-1] > 1:
                    margins = margins.masked_fill(weight.expand_as(input).flatten() == 0, float("nan"))
                choices = Choices(labels.gt(0.5).long(), labels.le(0.5).long(), margins, True)
            self.calls[-1] = dataclasses.replace(self.calls[-1], choices=choices)
        return loss


def choices_of(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> Choices | None:
    """Returns the labels against the other classes, None if there are no classes or too many of them.

    Args:
        logits: Shape (elements, classes).
        labels: Classes, shape (elements,), int64.
        ignore_index: Label of an element without one, for which class 0 stands in.

    Example:
        >>> choices_of(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1])).margins.tolist()
        [2.0]
    """
    if logits.ndim != 2 or labels.is_floating_point() or not 2 <= logits.shape[1] <= _MAX_MARGIN_CLASSES:
        return None
    with torch.no_grad():
        # Question-answering heads ignore the index one beyond the last class.
        classes = labels.masked_fill(labels.eq(ignore_index), 0).unsqueeze(1)
        others, rivals = logits.scatter(1, classes, float("-inf")).max(1)
        return Choices(classes.squeeze(1), rivals, (logits.gather(1, classes).squeeze(1) - others).float())


def is_even(counts: torch.Tensor) -> bool:
    """Returns whether all rows of a batch count alike in its mean."""
    return bool((counts == counts[0]).all())


def corrected_count(counts: torch.Tensor, row_factors: torch.Tensor) -> torch.Tensor:
    """Returns the denominator of a mean whose rows are scaled by factors c.

    Rows that count alike: their number, as the mean of c L is unbiased. Others (tokens, class weights): sum of c n;
    numerator and denominator each estimate the uniform epoch's sum, so their ratio is unbiased up to O(1/batch).

    Args:
        counts: Tokens, or sum of class weights, of each row, shape (rows,).
        row_factors: Shape (rows,).

    Example:
        >>> float(corrected_count(torch.tensor([1.0, 9.0]), torch.tensor([2.0, 1.0])))
        11.0
    """
    return (counts if is_even(counts) else counts * row_factors).sum()


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
        )
    },
    F.binary_cross_entropy_with_logits: CriterionCapture.binary_cross_entropy_with_logits,
}
