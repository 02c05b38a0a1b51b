"""Reads the losses of single elements out of a criterion that returns only their mean.

A `CriterionCapture` is active while a model computes its loss. It sees every call of a loss of
`torch.nn.functional`, lets it happen, and keeps the unreduced losses, so that any model and any loss function built
on these calls can be read. Which element belongs to which example is decided in `losses.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_MAX_MARGIN_CLASSES = 1024  # beyond that a margin is no longer cheap beside the loss itself


@dataclass(frozen=True)
class CriterionCall:
    """One call of a criterion: the losses of its elements and what their mean divides by.

    Attributes:
        losses: Unreduced losses, shape (elements,), class weights included, 0 where there is no label.
        normalisers: Share of each element in the denominator of the mean, shape (elements,): 1, or its class weight,
            or 0 where there is no label.
        num_classes: Size of the class dimension, None for a criterion without classes.
        margins: Logit of the label less the largest other logit, shape (elements,), None where not cheap.
    """

    losses: torch.Tensor
    normalisers: torch.Tensor
    num_classes: int | None = None
    margins: torch.Tensor | None = None


class CriterionCapture(TorchFunctionMode):
    """Records the criterion calls made while it is active, and scales the losses of rows if asked to.

    Without `row_factors` every call returns exactly what it would have returned, gradient included.

    Args:
        num_rows: Number of examples in the batch; elements are grouped by row, row-major.
        row_factors: Factor for the loss of each row, shape (num_rows,), >= 0. None leaves the loss as it is.
    """

    def __init__(self, num_rows: int, row_factors: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.row_factors = row_factors
        self.calls: list[CriterionCall] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Returns what `func` returns, after reading it if it is a criterion."""
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
            # Rows that count alike: the mean of c L is unbiased. Others (tokens, class weights): numerator and
            # denominator each estimate the uniform epoch's sum, and so does their ratio, up to O(1/batch).
            return losses.sum() / (normalisers if is_even else normalisers * factors).sum()
        if not is_even:
            raise RuntimeError(
                "`importance_correction` cannot correct a loss that is summed over tokens and divided by their number "
                "elsewhere (`num_items_in_batch`): rows of different length would be weighed wrongly. Set "
                "importance_correction=0."
            )
        return losses.sum()

    def _keep(self, losses: torch.Tensor, normalisers: torch.Tensor, **extra: Any) -> None:
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
        """Returns `F.cross_entropy` of the same arguments and keeps its elements."""
        options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index}
        has_indices = not target.is_floating_point()
        if has_indices and label_smoothing == 0.0 and not torch.is_autocast_enabled(input.device.type):
            # The two halves of F.cross_entropy, bit for bit; the log-softmax serves the loss and its elements.
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
        self._keep(
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
        """Returns `F.nll_loss` of the same arguments and keeps its elements."""
        options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index}
        with torch.no_grad():
            losses = F.nll_loss(input.detach(), target, reduction="none", **options)
        self._keep(
            losses,
            _class_normalisers(target, weight, ignore_index),
            num_classes=input.shape[1 if input.ndim > 1 else 0],
        )
        return F.nll_loss(input, target, reduction=reduction, **options)

    def ctc_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns `F.ctc_loss` of the same arguments and keeps its elements, one per sequence."""
        reduction = kwargs.get("reduction", "mean")
        with torch.no_grad():
            losses = F.ctc_loss(*args, **{**kwargs, "reduction": "none"})
            if reduction == "mean":
                losses = losses / _ctc_lengths(args, kwargs).to(losses)  # F.ctc_loss divides by length, then averages
        self._keep(losses, losses.new_ones(()))
        return F.ctc_loss(*args, **kwargs)

    def _margins(self, logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
        if logits.ndim != 2 or target.is_floating_point() or len(target) != self.num_rows:
            return None
        if not 2 <= logits.shape[1] <= _MAX_MARGIN_CLASSES:
            return None
        with torch.no_grad():
            # Question answering ignores the index one beyond the last class.
            labels = target.masked_fill(target.eq(ignore_index), 0).unsqueeze(1)
            label_logits = logits.gather(1, labels).squeeze(1)
            return (label_logits - logits.scatter(1, labels, float("-inf")).amax(1)).float()


def _elementwise(criterion: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A reader for criteria whose mean is the plain mean over elements; a NaN target is an element without label."""

    def read(
        capture: CriterionCapture, input: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        with torch.no_grad():
            losses = criterion(input.detach(), target, *args, **{**kwargs, "reduction": "none"})
            capture._keep(losses, (~target.isnan()).expand(losses.shape).flatten())
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
