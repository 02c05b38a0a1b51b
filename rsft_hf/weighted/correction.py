"""Test of the importance correction: whether scaled rows give the loss that it promises, on a few batches.

A loss that is a mean or a sum of its rows' losses may be scaled row by row. One that is a mean over tokens, or by class
weights, needs a denominator that is scaled with them, as that of `torch.nn.functional` is, and `num_items_in_batch` of
Trainer; a count of the loss function's own is not.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Trainer

from rsft_hf.weighted.criterion import corrected_count
from rsft_hf.weighted.losses import Batch, Reading, Recording, compute_loss, row_losses
from rsft_hf.weighted.reading import is_half_precision

_RELATIVE, _ABSOLUTE = 1e-3, 1e-5
_RELATIVE_HALF = 3e-2


def heeds_count(trainer: Trainer, model: torch.nn.Module, batches: Iterable[tuple[Batch, Any]]) -> bool:
    """Returns whether the loss is divided by the `num_items_in_batch` given, as the first that is not 0 shows.

    True where all are 0, of rows without labels.
    """
    for batch, examples in batches:
        eight, sixteen = (compute_loss(trainer, model, batch, len(examples), num_items=n)[0] for n in (8.0, 16.0))
        if eight and math.isfinite(eight):
            return abs(2 * sixteen - eight) <= 1e-2 * abs(eight)
    return True


def is_corrected(
    trainer: Trainer, model: torch.nn.Module, reading: Reading, batches: Iterable[tuple[Batch, Any]], is_counted: bool
) -> bool:
    """Returns whether the loss of batches with scaled rows is the corrected one.

    Args:
        trainer: Trainer that computes the loss.
        model: Model in evaluation mode.
        reading: Reading of its losses, of kind "criterion".
        batches: Batches, and their rows.
        is_counted: Whether the loss is divided by `num_items_in_batch`.
    """
    relative = _RELATIVE_HALF if is_half_precision(trainer, model) else _RELATIVE

    def is_close(left: float, right: float) -> bool:
        return abs(left - right) <= relative * abs(right) + _ABSOLUTE

    for batch, examples in batches:
        num_rows = len(examples)
        scalar, recording = compute_loss(trainer, model, batch, num_rows)
        rows = row_losses(recording, reading, num_rows)
        if rows is None or not bool(rows.losses.isfinite().all()) or not bool(rows.is_labelled.any()):
            continue
        factors = torch.linspace(0.5, 1.5, num_rows)
        expected, count = _expected(recording, factors)
        scaling = {"row_factors": factors, "is_count_weighted": is_counted}
        try:
            found, _ = compute_loss(trainer, model, batch, num_rows, num_items=count if is_counted else None, **scaling)
        except RuntimeError as error:
            if "importance_correction" not in str(error):
                raise
            return False
        total = float(rows.losses.sum())
        if any(is_close(scalar, total / one) for one in (1, num_rows, max(1, int(rows.is_labelled.sum())))):
            continue  # each row's part depends on no other row
        if not is_close(found, expected / (len(recording.calls) if reading.is_averaged else 1)):
            return False
    return True


def _expected(recording: Recording, factors: torch.Tensor) -> tuple[float, float]:
    """The corrected loss, the sum over the calls, and the count of its elements, each scaled by its row's factor."""
    loss = count = 0.0
    for call in recording.calls:
        sums = call.losses.reshape(len(factors), -1).sum(1).cpu()
        counts = call.normalisers.reshape(len(factors), -1).sum(1).cpu()
        loss += float((sums * factors).sum() / corrected_count(counts, factors).clamp(min=1e-30))
        count += float((counts * factors).sum())
    return loss, count
