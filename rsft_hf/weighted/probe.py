"""Chooses how per-example losses are read, by trying it on rows of the data set.

A trainer, a model and a data set enter, a `Reading` leaves, or an error if the loss belongs to no example.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.isolation import forked_rng
from rsft_hf.weighted.losses import (
    Batch,
    Collate,
    Reading,
    Recording,
    compute_loss,
    row_losses,
    slice_rows,
)

logger = logging.get_logger(__name__)

_NUM_PROBED = 4
_MAX_PROBES = 16
_NUM_SEEDS = 4


class NotPerExampleError(ValueError):
    """The loss compares the examples of a batch with each other, so no example has a loss of its own."""


def find_reading(
    trainer: Trainer, model: torch.nn.Module, dataset: Sequence[Any], collate: Collate, seed: int
) -> Reading:
    """Returns the fastest reading that reproduces batches of one, tried on a few labelled rows of the data set.

    Args:
        trainer: Computes the loss.
        model: In evaluation mode.
        dataset: Rows as the training loader sees them.
        collate: The collator of the training loader. If it is random (masking, say), rows of the collated batch
            stand for batches of one.
        seed: Seed of the collator's randomness while it is probed.

    Raises:
        NotPerExampleError: If the loss belongs to the batch and not to its examples.
        ValueError: If none of the probed rows has a label.
    """
    width = min(_NUM_PROBED, len(dataset))
    num_probes = min(_MAX_PROBES, -(-len(dataset) // width))
    for attempt in range(num_probes):
        first = attempt * len(dataset) // num_probes
        rows = [(first + i * max(1, len(dataset) // width)) % len(dataset) for i in range(width)]
        examples = [dataset[row] for row in rows]
        batch, is_random = _collated(examples, collate, seed)
        singles = (
            [slice_rows(batch, row, width) for row in range(width)]
            if is_random
            else [_collated([example], collate, seed)[0] for example in examples]
        )
        expected, alone = _losses_alone(trainer, model, singles)
        scalar, recording = compute_loss(trainer, model, batch, width)
        _refuse_batch_losses(scalar, recording, expected, alone)
        if bool((expected.isfinite() & (expected != 0)).any()) or not _is_unlabelled([recording]):
            break
    else:
        raise ValueError(
            f"None of {num_probes * width} rows spread over the data set has a loss: all labels are missing or "
            "ignored. Check that the label column survives `remove_unused_columns` and the collator."
        )
    is_half = trainer.args.bf16 or trainer.args.fp16 or next(model.parameters()).dtype != torch.float32
    if reading := _first_that_agrees(recording, expected, width, is_half):
        return dataclasses.replace(reading, is_collator_random=is_random)
    # Cut from the batch, the rows keep its padding: if they agree now, it is the padding that the loss depends on.
    cut, _ = _losses_alone(trainer, model, [slice_rows(batch, row, width) for row in range(width)])
    reading = _first_that_agrees(recording, cut, width, is_half)
    _warn_of_batches_of_one("the padding" if reading else "a term")
    reading = dataclasses.replace(reading, depends_on_padding=True) if reading else Reading("single")
    return dataclasses.replace(reading, is_collator_random=is_random)


def _warn_of_batches_of_one(cause: str) -> None:
    remedy = "Pad all rows to one length" if cause == "the padding" else "Pass `per_example_loss`"
    logger.warning(
        f"The loss of an example depends on {cause} of its batch, so each is scored in a batch of its own: exact, but "
        f"slower. {remedy} to avoid it."
    )


def _losses_alone(
    trainer: Trainer, model: torch.nn.Module, singles: list[Batch]
) -> tuple[torch.Tensor, list[Recording]]:
    losses, recordings = zip(*(compute_loss(trainer, model, single, 1) for single in singles), strict=True)
    return torch.tensor(losses, dtype=torch.float64), list(recordings)


def _first_that_agrees(recording: Recording, expected: torch.Tensor, width: int, is_half: bool) -> Reading | None:
    relative, absolute = (3e-2, 1e-3) if is_half else (1e-4, 1e-5)
    candidates = [
        Reading("criterion", is_mean, is_averaged) for is_averaged in (False, True) for is_mean in (True, False)
    ]
    for reading in [*candidates, Reading("outputs")]:
        losses = row_losses(recording, reading, width)
        # A row without a label is 0 here, and NaN or 0 in a batch of one, as its mean is guarded or not.
        if losses is not None and torch.allclose(
            losses.losses.double().cpu(), expected.nan_to_num(0.0), rtol=relative, atol=absolute
        ):
            return reading
    return None


def _refuse_batch_losses(scalar: float, recording: Recording, expected: torch.Tensor, ones: list[Recording]) -> None:
    has_candidates_from_batch = len(expected) > 1 and any(
        call.num_classes is not None
        and all(
            len(one.calls) > number and call.num_classes == len(expected) * (one.calls[number].num_classes or 0)
            for one in ones
        )
        for number, call in enumerate(recording.calls)
    )
    vanishes_alone = scalar > 0 and bool((expected == 0).all())
    if has_candidates_from_batch or (vanishes_alone and recording.calls and not _is_unlabelled(ones)):
        raise NotPerExampleError(
            f"The loss compares the examples of a batch with each other: {len(expected)} examples together have loss "
            f"{scalar:.4g}, alone {expected[0]:.4g}. Such a loss (contrastive, triplet) belongs to no example; train "
            "with the plain Trainer, or pass `per_example_loss` with a score of your own."
        )


def _is_unlabelled(recordings: list[Recording]) -> bool:
    """Whether none of the elements that a criterion saw has a label; True where no criterion was seen."""
    return all(float(call.normalisers.sum()) == 0 for one in recordings for call in one.calls)


def _collated(examples: list[Any], collate: Collate, seed: int) -> tuple[Batch, bool]:
    """The batch that a seed gives, and whether another seed gives another one."""

    def collated(shift: int = 0) -> Batch:
        with forked_rng(seed + shift):
            return collate([dict(row) if isinstance(row, Mapping) else row for row in examples])

    batch = collated()
    return batch, not all(_same(batch, collated(shift)) for shift in range(1, _NUM_SEEDS))


def _same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left if isinstance(left[key], torch.Tensor))
