"""Choice of the reading: the fastest way to per-example losses that reproduces batches of one on a few rows.

A reading that only seems right, because those rows are alike (equal weights, equal lengths), is found out by the losses
of other batches, which must be the mean or the sum of those of their rows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.isolation import forked_rng
from rsft_hf.memory import is_out_of_memory
from rsft_hf.weighted.losses import (
    Batch,
    Collate,
    Reading,
    Recording,
    compute_loss,
    has_label,
    raise_diverged,
    row_losses,
    slice_rows,
)

logger = logging.get_logger(__name__)

NUM_VERIFIED = 64  # rows of other batches by which a reading is verified, once in a run

NUM_COMPARED = 16  # of them are read alone, too

NUM_PROBED = 4  # rows in a probe batch

_MAX_PROBED = 64  # rows read until one with a loss is found

_NOT_ALONE = (
    "Such a loss (contrastive, triplet) is not defined for one example; train with the plain Trainer, or pass "
    "`per_example_loss` with a score of your own."
)

_NO_MEAN = "The loss of a batch is not that of its rows (a term, weights, or rows joined into one sequence)"

_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError)

_LARGEST_SHOWN = 5.0  # nats; beyond, rounding hides how a loss grows

_PADDED = ("The loss of an example depends on the padding of its batch", "Pad all rows alike")

_NUM_SEEDS = 4  # seeds by which a random collator is detected


class NotPerExampleError(ValueError):
    """Error for a loss that compares the examples of a batch with each other, so that no per-example loss exists.

    Example:
        >>> issubclass(NotPerExampleError, ValueError)
        True
    """


def find_reading(
    trainer: Trainer,
    model: torch.nn.Module,
    dataset: Sequence[Any],
    collate: Collate,
    batch_size: int,
    seed: int,
    num_verified: int = 0,
) -> Reading:
    """Returns the fastest reading that reproduces batches of one on a few labelled rows of the data set.

    Args:
        trainer: Trainer that computes the loss.
        model: Model in evaluation mode.
        dataset: Data set of the training loader.
        collate: Collator of the training loader. If it is random (masking, say), slices of the collated batch are used
            as batches of one.
        batch_size: Rows of the batches that the reading is for; a probe takes no more.
        seed: Seed of the collator during the probe.
        num_verified: Number of further rows, in batches, by which the reading is verified.

    Raises:
        NotPerExampleError: If the loss compares the examples of a batch with each other.
        ValueError: If none of the probed rows has a label, or none of their losses is finite.
    """
    width = min(NUM_PROBED, batch_size, len(dataset))
    if width == 1 < len(dataset):
        _refuse_contrast(trainer, model, dataset, collate, seed)
    try:
        batch, is_random, expected, scalar, recording = _labelled_probe(trainer, model, dataset, collate, width, seed)
    except _OneRowAtATimeError as error:
        _warn_of_batches_of_one(*error.args)
        single = find_reading(trainer, model, dataset, collate, batch_size=1, seed=seed)
        return dataclasses.replace(single, is_scored_singly=True)
    is_half = is_half_precision(trainer, model)
    others, alone = some_batches(dataset, collate, num_verified, width, seed), _alone(collate, seed)
    if not _is_joined(batch, width):
        if reading := _matching_reading(recording, expected, width, is_half):
            reading = dataclasses.replace(reading, is_collator_random=is_random)
            return _verified(trainer, model, reading, (scalar, recording, width), others, alone, is_half)
        # Sliced from the batch, the rows keep its padding: a match now means that the loss depends on the padding.
        sliced = _losses_alone(trainer, model, _cut(batch, width))
        if sliced is not None and (reading := _matching_reading(recording, sliced, width, is_half)):
            _warn_of_batches_of_one(*_PADDED)
            return dataclasses.replace(reading, is_scored_singly=True, is_collator_random=is_random)
    if _is_constant(expected):
        _validate_others(trainer, model, others, alone)
    _validate_repeated(trainer, model, dataset, collate, seed)
    _warn_of_batches_of_one(_NO_MEAN, "Pass `per_example_loss`")
    return Reading("single", is_collator_random=is_random, is_final=True)


def _refuse_contrast(
    trainer: Trainer, model: torch.nn.Module, dataset: Sequence[Any], collate: Collate, seed: int
) -> None:
    """Raises NotPerExampleError if two rows are compared with each other: of one row the loss says nothing."""
    _validate_repeated(trainer, model, dataset, collate, seed)
    try:
        _labelled_probe(trainer, model, dataset, collate, 2, seed)
    except NotPerExampleError:
        raise
    except (_OneRowAtATimeError, *_UNREADABLE):  # two rows together; of one at a time the error comes again
        return


def _cut(batch: Batch, num_rows: int) -> list[Batch]:
    """The rows of a batch, with its padding."""
    return [slice_rows(batch, row, num_rows) for row in range(num_rows)]


def _losses_alone(trainer: Trainer, model: torch.nn.Module, singles: list[Batch]) -> torch.Tensor | None:
    """The losses of batches of one; None if they cannot be read, cut from a batch whose rows do not lie one by one."""
    try:
        return _single_losses(trainer, model, singles)[0]
    except _UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        return None


class _OneRowAtATimeError(Exception):
    """The rows of a probe can be read one by one, but not together; its arguments are the cause and the remedy."""


def _labelled_probe(
    trainer: Trainer, model: torch.nn.Module, dataset: Sequence[Any], collate: Collate, width: int, seed: int
) -> tuple[Batch, bool, torch.Tensor, float, Recording]:
    """The first batch with a loss: whether its collator is random, its rows' losses alone, its loss, its recording."""
    if width > 1 and not _can_be_collated(dataset, collate, width, seed):
        raise _OneRowAtATimeError("Rows cannot be collated in one batch", "Pad all rows to one length")
    num_probes = min(_MAX_PROBED // width, -(-len(dataset) // width))
    num_diverged = num_zero = 0
    for attempt in range(num_probes):
        first = attempt * len(dataset) // num_probes
        examples = [dataset[row] for row in _probe_rows(dataset, first, width)]
        batch, is_random = _collated(examples, collate, seed)
        singles = _cut(batch, width) if is_random else [_collate([example], collate, seed) for example in examples]
        try:
            expected, recordings = _single_losses(trainer, model, singles)
        except _UNREADABLE as error:
            if not is_random or width == 1 or is_out_of_memory(error):
                raise
            cause = "The batches of a random collator cannot be cut into rows"
            raise _OneRowAtATimeError(cause, "Collate row by row") from error
        try:
            scalar, recording = compute_loss(trainer, model, batch, width)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if width == 1 or is_out_of_memory(error):
                raise
            cause = f"The model reads single rows but not {width} at once ({str(error)[:200]})"
            raise _OneRowAtATimeError(cause, "Mend its forward") from error
        _validate_per_example(scalar, recording, expected, recordings)
        is_finite, is_labelled = expected.isfinite(), not _is_unlabelled([recording])
        if bool((is_finite & (expected != 0)).any()) or (is_labelled and bool(is_finite.any())):
            return batch, is_random, expected, scalar, recording
        num_diverged += width * is_labelled
        num_zero += width * (not recording.calls and _has_labels(recordings))
    if num_diverged:
        raise_diverged(min(num_diverged, len(dataset)))
    if num_zero:
        raise NotPerExampleError(f"The loss of {min(num_zero, len(dataset))} labelled rows alone is 0. {_NOT_ALONE}")
    raise ValueError(
        f"None of {num_probes * width} rows spread over the data set has a loss: all labels are missing or "
        "ignored. Check that the label column survives `remove_unused_columns` and the collator."
    )


def _probe_rows(dataset: Sequence[Any], first: int, width: int) -> list[int]:
    return [(first + i * max(1, len(dataset) // width)) % len(dataset) for i in range(width)]


def _can_be_collated(dataset: Sequence[Any], collate: Collate, width: int, seed: int) -> bool:
    examples = [dataset[row] for row in _probe_rows(dataset, 0, width)]
    try:
        _collate(examples, collate, seed)
    except (ValueError, TypeError, RuntimeError):
        _collate(examples[:1], collate, seed)  # the collator's own error if it is not the number of rows
        return False
    return True


def _warn_of_batches_of_one(cause: str, remedy: str) -> None:
    logger.warning(f"{cause}, so each row is scored in a batch of its own, which is slower. {remedy} to avoid it.")


def _single_losses(
    trainer: Trainer, model: torch.nn.Module, singles: list[Batch]
) -> tuple[torch.Tensor, list[Recording]]:
    losses, recordings = zip(*(compute_loss(trainer, model, single, 1) for single in singles), strict=True)
    return torch.tensor(losses, dtype=torch.float64), list(recordings)


def _matching_reading(recording: Recording, expected: torch.Tensor, width: int, is_half: bool) -> Reading | None:
    relative, absolute = _tolerances(is_half)
    candidates = [
        Reading("criterion", is_mean, is_averaged) for is_averaged in (False, True) for is_mean in (True, False)
    ]
    for reading in [*candidates, Reading("outputs")]:
        losses = row_losses(recording, reading, width)
        # A row without a label is 0 here, and NaN or 0 in a batch of one, depending on a guard of its mean.
        if losses is not None and torch.allclose(
            losses.losses.double().cpu(), expected.nan_to_num(0.0), rtol=relative, atol=absolute
        ):
            is_fused = not recording.capture.calls and bool(recording.fused_calls)
            num_calls = len(recording.capture.calls) if reading.kind == "criterion" else 0
            return dataclasses.replace(reading, is_fused=is_fused, num_calls=num_calls)
    return None


def is_half_precision(trainer: Trainer, model: torch.nn.Module) -> bool:
    """Returns whether losses are computed in half precision."""
    return bool(trainer.args.bf16 or trainer.args.fp16 or next(model.parameters()).dtype != torch.float32)


def _tolerances(is_half: bool) -> tuple[float, float]:
    return (3e-2, 1e-3) if is_half else (1e-4, 1e-5)


def _is_joined(batch: Batch, num_rows: int) -> bool:
    """Whether the rows are joined into one sequence (padding-free): no tensor has as many entries for each of them."""
    sizes = [len(tensor) for tensor in _tensors(batch) if tensor.ndim]
    return num_rows > 1 and bool(sizes) and all(size % num_rows for size in sizes)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


def some_batches(
    dataset: Sequence[Any], collate: Collate, num_rows: int, width: int, seed: int
) -> Iterator[tuple[Batch, list[Any]]]:
    """Yields batches of rows at random, and their rows."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num_rows].tolist()
    for start in range(0, len(order), width):
        examples = [dataset[row] for row in order[start : start + width]]
        yield _collate(examples, collate, seed), examples


def _verified(
    trainer: Trainer,
    model: torch.nn.Module,
    reading: Reading,
    probe: tuple[float, Recording, int],
    batches: Iterator[tuple[Batch, list[Any]]],
    alone: Callable[[Any], Batch],
    is_half: bool,
) -> Reading:
    """The reading, unless other batches contradict it.

    The losses that it reads of their rows must be those of the rows alone, and the loss of a batch a mean or sum of
    them, as that of the probe is. It counts the criterion calls, of which a model with several heads makes more where a
    row has labels for all.
    """
    if reading.kind != "criterion" or reading.is_fused:
        return reading
    is_probe_explained, num_calls = _explains(reading, *probe, is_half), reading.num_calls
    is_explained, is_padded, is_random = True, False, reading.is_collator_random
    for number, (batch, examples) in enumerate(batches):
        num_rows = len(examples)
        scalar, recording = compute_loss(trainer, model, batch, num_rows)
        num_calls = max(num_calls, len(recording.capture.calls))
        is_explained &= _explains(reading, scalar, recording, num_rows, is_half) or not is_probe_explained
        if number * num_rows < NUM_COMPARED:
            agrees = partial(_agrees, trainer, model, reading, recording, is_half)
            if not agrees(_cut(batch, num_rows) if is_random else [alone(example) for example in examples]):
                is_explained &= not is_random and agrees(_cut(batch, num_rows))
                is_padded = True
    if not is_explained:
        _warn_of_batches_of_one(_NO_MEAN, "Pass `per_example_loss`")
        return Reading("single", is_collator_random=is_random, is_final=True)
    if is_padded:
        _warn_of_batches_of_one(*_PADDED)
    return dataclasses.replace(reading, num_calls=num_calls, is_scored_singly=is_padded)


def _explains(reading: Reading, scalar: float, recording: Recording, num_rows: int, is_half: bool) -> bool:
    """Whether the loss of a batch is a mean or sum of the losses that are read of its rows; True if it is unknown."""
    totals, (relative, absolute) = torch.tensor(_batch_losses(recording, reading, num_rows)), _tolerances(is_half)
    is_unknown = not len(totals) or not math.isfinite(scalar)
    return is_unknown or bool(torch.isclose(totals, torch.tensor(scalar), relative, absolute).any())


def _agrees(
    trainer: Trainer,
    model: torch.nn.Module,
    reading: Reading,
    recording: Recording,
    is_half: bool,
    singles: list[Batch],
) -> bool:
    """Whether the losses that are read of a batch are those of its rows in batches of their own."""
    losses, expected = row_losses(recording, reading, len(singles)), _losses_alone(trainer, model, singles)
    if expected is None:
        return True
    expected = expected.nan_to_num(0.0)
    if losses is None:
        return not bool(expected.any())
    found, (relative, absolute) = losses.losses.double().cpu(), _tolerances(is_half)
    if not bool((expected.isfinite() & found.isfinite()).all()):
        return True
    # Ten times the tolerance of the probe: what is booked on another row differs by more than rounding does.
    return torch.allclose(found, expected, rtol=10 * relative, atol=10 * absolute)


def _batch_losses(recording: Recording, reading: Reading, num_rows: int) -> list[float]:
    """The loss of a batch by its elements: sum and mean over the rows, and mean over the elements of each call."""
    rows, calls = row_losses(recording, reading, num_rows), recording.calls
    if rows is None or not bool(rows.is_labelled.any()):
        return []
    total = float(rows.losses.sum())
    by_element = sum(float(call.losses.sum() / call.normalisers.sum().clamp(min=1e-30)) for call in calls)
    by_element /= len(calls) if reading.is_averaged else 1
    return [total, total / num_rows, total / int(rows.is_labelled.sum()), by_element]


def _validate_per_example(
    scalar: float, recording: Recording, expected: torch.Tensor, singles: list[Recording]
) -> None:
    """Raises NotPerExampleError if classes come from the batch, or if the loss vanishes for a single example."""
    has_candidates_from_batch = len(expected) > 1 and any(
        call.num_classes is not None
        and all(
            len(single.calls) > number and call.num_classes == len(expected) * (single.calls[number].num_classes or 0)
            for single in singles
        )
        for number, call in enumerate(recording.calls)
    )
    vanishes_alone = scalar > 0 and bool((expected.abs() < 1e-4 * scalar).all())
    is_labelled = not _is_unlabelled(singles) if recording.calls else _has_labels(singles)
    if has_candidates_from_batch or (vanishes_alone and is_labelled):
        raise NotPerExampleError(_compares(len(expected), scalar, expected))


def _validate_others(
    trainer: Trainer,
    model: torch.nn.Module,
    batches: Iterator[tuple[Batch, list[Any]]],
    alone: Callable[[Any], Batch],
) -> None:
    """Raises NotPerExampleError if the rows of a batch have one loss alone, and the batch is no mean or sum of it."""
    for batch, examples in batches:
        scalar, recording = compute_loss(trainer, model, batch, len(examples))
        losses, _ = _single_losses(trainer, model, [alone(example) for example in examples])
        if _is_constant(losses) and _has_labels([recording]) and not _is_total(scalar, losses):
            raise NotPerExampleError(_compares(len(examples), scalar, losses))


def _validate_repeated(
    trainer: Trainer, model: torch.nn.Module, dataset: Sequence[Any], collate: Collate, seed: int
) -> None:
    """Raises NotPerExampleError if the loss of a row grows with copies of it as in-batch negatives say.

    -log of the share of the right pair among n copies and a others is log(a + b n), of which exp grows alike with each,
    and the loss itself with each doubling where there are no others. A mean stays, a sum doubles, a norm grows by a
    root of 2. Rows with a large loss do not show it, nor losses or collators that are random.
    """
    for row in _probe_rows(dataset, 0, min(NUM_PROBED, len(dataset))):
        losses = []
        for num_copies, shift in ((1, 0), (1, 1), (2, 0), (4, 0), (8, 0)):
            try:
                batch = _collate([dataset[row]] * num_copies, collate, seed + shift)
                losses.append(compute_loss(trainer, model, batch, num_copies)[0])
            except _UNREADABLE:  # a collator of distinct rows, a model of single rows, too little memory
                if num_copies == 1:
                    raise
                return
        one, other, *several = losses
        if not math.isclose(one, other, rel_tol=1e-6) or not max(losses) < _LARGEST_SHOWN:
            continue
        two, four, _ = several
        if _grow_alike([one, *several], (1, 1, 1)) or _grow_alike(map(math.exp, [one, *several]), (1, 2, 4)):
            raise NotPerExampleError(
                f"The loss compares the examples of a batch with each other: one example has loss {one:.4g}, and "
                f"beside 1 and 3 copies of itself {two:.4g} and {four:.4g}. {_NOT_ALONE}"
            )


def _grow_alike(values: Iterable[float], steps: Sequence[int]) -> bool:
    """Whether values grow by the same amount per step, up to 3 %."""
    found = list(values)
    growths = [(after - before) / step for before, after, step in zip(found, found[1:], steps, strict=False)]
    return min(growths) > 1e-3 and max(growths) <= 1.03 * min(growths)


def _compares(num_rows: int, scalar: float, alone: torch.Tensor) -> str:
    return (
        f"The loss compares the examples of a batch with each other: {num_rows} examples together have loss "
        f"{scalar:.4g}, alone {abs(alone[0]):.4g}. {_NOT_ALONE}"
    )


def _is_constant(losses: torch.Tensor) -> bool:
    """Whether several rows have the same loss, up to rounding."""
    return len(losses) > 1 and float(losses.max() - losses.min()) < 1e-6 + 1e-3 * float(losses.abs().max())


def _is_total(scalar: float, losses: torch.Tensor) -> bool:
    """Whether the loss of a batch is the mean or the sum of those of its rows."""
    totals = torch.stack([losses.mean(), losses.sum()])
    return bool(torch.isclose(totals, torch.tensor(scalar, dtype=totals.dtype), rtol=1e-2, atol=1e-5).any())


def _has_labels(singles: list[Recording]) -> bool:
    """Whether the labels of batches of one, where a model is given any, are labels of all rows."""
    return all(bool(has_label(single.labels, 1).all()) for single in singles)


def _is_unlabelled(recordings: list[Recording]) -> bool:
    """Whether no element of the recorded criterion calls has a label; True without any call."""
    return all(float(call.normalisers.sum()) == 0 for one in recordings for call in one.calls)


def _collated(examples: list[Any], collate: Collate, seed: int) -> tuple[Batch, bool]:
    """The collated batch of a seed, and whether other seeds give other batches."""
    batch = _collate(examples, collate, seed)
    return batch, not all(_same(batch, _collate(examples, collate, seed + shift)) for shift in range(1, _NUM_SEEDS))


def _collate(examples: list[Any], collate: Collate, seed: int) -> Batch:
    with forked_rng(seed):
        return collate([dict(row) if isinstance(row, Mapping) else row for row in examples])


def _alone(collate: Collate, seed: int) -> Callable[[Any], Batch]:
    return lambda example: _collate([example], collate, seed)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(_same(one, other) for one, other in zip(left, right, strict=True))
    return True
