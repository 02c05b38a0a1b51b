"""Validation of the rows and the labels of a run with pseudo-labels, and what is read of them once."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from transformers import Trainer

from rsft_hf.engines.model_access import unwrapped
from rsft_hf.weighted.labels import IGNORED, as_list, column_values, label_names, stored_column


def label_column(trainer: Trainer, row: Mapping[str, Any]) -> str:
    """Returns the name of the label column of a labelled row.

    Raises:
        ValueError: If it has none.
    """
    name = stored_column(trainer, row)
    if name is None:
        raise ValueError(
            f"`train_dataset` has no label column: none of {label_names(trainer)} is in {list(row)}. Rename it to "
            "`labels`."
        )
    return name


def label_kind(label: Any) -> str:
    """Returns "class", "token" or "multi_label", from one label.

    Raises:
        ValueError: If it is neither a class, nor classes of tokens, nor a list of 0.0 and 1.0.

    Example:
        >>> label_kind(2), label_kind([0, -100, 3]), label_kind([0.0, 1.0])
        ('class', 'token', 'multi_label')
    """
    value = as_list(label)
    if isinstance(value, (bool, int)):
        return "class"
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(one, int) for one in value):
            return "token"
        if all(isinstance(one, float) and one in (0.0, 1.0) for one in value):
            return "multi_label"
    raise ValueError(
        f"The label {label!r} is no class. PredictionResampler draws classes: an integer per row or token, or a list "
        "of 0.0 and 1.0."
    )


def validate_rows(resampler: Any, trainer: Trainer) -> None:
    """Raises ValueError if rows, model or arguments do not allow pseudo-labels.

    Args:
        resampler: A `PredictionResampler`.
        trainer: Trainer it is bound to.
    """
    if trainer.args.dataloader_persistent_workers:
        raise ValueError(
            "`dataloader_persistent_workers=True` keeps workers that hold the labels of the first round for ever. Set "
            "it to False."
        )
    unlabelled, labelled = resampler.unlabelled_dataset, trainer.train_dataset
    if isinstance(unlabelled, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
        raise ValueError("`unlabelled_dataset` must have a length and random access: a streamed one has neither.")
    model = unwrapped(trainer.model)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        raise ValueError(
            f"{type(model).__name__} generates text, whose labels are words. Take CandidateResampler for it, or a "
            "model with a head over classes."
        )
    outside = [row for row in resampler.doubtful_rows if not 0 <= row < len(labelled)]
    if outside:
        raise ValueError(f"`doubtful_rows` names row {outside[0]}, and `train_dataset` has {len(labelled)} rows.")
    if not len(unlabelled):
        return
    first = unlabelled[0]
    read = set(inspect.signature(model.forward).parameters) - set(label_names(trainer))
    if missing := sorted(read & set(labelled[0]) - set(first)):
        raise ValueError(
            f"`unlabelled_dataset` lacks the columns {missing}, which the model reads of `train_dataset`. Prepare both "
            "alike."
        )
    if extra := sorted(read & set(first) - set(labelled[0])):
        raise ValueError(
            f"`unlabelled_dataset` has the columns {extra}, which the model reads and `train_dataset` lacks. Prepare "
            "both alike."
        )
    if resampler.reference_column is not None and resampler.reference_column not in first:
        raise ValueError(
            f"`unlabelled_dataset` has no column {resampler.reference_column!r} (`reference_column`); it has "
            f"{list(first)}."
        )


def class_order(trained: torch.nn.Module, other: torch.nn.Module, kind: str) -> list[int] | None:
    """Returns the place of each class of the trained model in another model's; None if they agree or have no names.

    Raises:
        ValueError: If both name their classes, and not alike.
    """
    own, others = (_names_of(unwrapped(model)) for model in (trained, other))
    if own is None or others is None or own == others or len(own) != len(others):
        return None
    if set(own) != set(others) or kind == "multi_label":
        raise ValueError(
            f"The trained model has the classes {own}, and the teacher {others} (`config.id2label`). Take a teacher "
            "over the same labels" + (", in the same order" if set(own) == set(others) else "") + ", or, if only their "
            "names differ, set teacher.config.id2label = model.config.id2label."
        )
    return [others.index(name) for name in own]


def _names_of(model: torch.nn.Module) -> list[str] | None:
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, dict) or any(str(name).startswith("LABEL_") for name in names.values()):
        return None
    own = [str(names[number]) for number in sorted(names)]
    folded = [name.casefold() for name in own]
    return folded if len(set(folded)) == len(set(own)) else own


def labelled_units(dataset: Any, rows: Sequence[int], column: str, num_classes: int) -> torch.Tensor:
    """Returns the share of each class among the labels of some rows, shape (num_classes,), float64.

    Raises:
        ValueError: If a label is no class of the model.
    """
    counts = torch.zeros(num_classes, dtype=torch.float64)
    for row, given in zip(rows, column_values(dataset, column, rows), strict=True):
        value = as_list(given)
        if value is None:
            raise ValueError(f"Row {row} of `train_dataset` has no label. Leave it to `unlabelled_dataset`.")
        units = [int(one) for one in (value if isinstance(value, list) else [value]) if one not in (None, IGNORED)]
        if wrong := [one for one in units if not 0 <= one < num_classes]:
            raise ValueError(
                f"Row {row} of `train_dataset` has the label {wrong[0]}, and the model {num_classes} classes."
            )
        for one in units:
            counts[one] += 1
    return counts / counts.sum()
