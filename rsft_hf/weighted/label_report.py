"""LabelReport: probability that each label is wrong, the label the model prefers, and the data set without the errors.

margins of the training steps (LabelMargins) -> label_errors -> LabelReport -> table, drop, relabel
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.utils import logging

from rsft_hf.checkpointing import load_state, state_directory
from rsft_hf.checks import check_interval
from rsft_hf.training_set import LABEL_COLUMNS
from rsft_hf.weighted.label_errors import error_probabilities, evidence, learning
from rsft_hf.weighted.label_margins import LabelMargins
from rsft_hf.weighted.labels import IGNORED, StoredLabels, stored_labels

logger = logging.get_logger(__name__)


class LabelReport:
    """Label errors that a training run found: their probability, their number, and the labels the model prefers.

    Margins count from the epoch in which the model has learnt the task, as little changes in the next one, for as many
    epochs as that took: later, it learns wrong labels by heart. The estimate is low where it cannot learn the task, or
    learns labels by heart at once: observe a plain run with the learning rate that generalises best.

    Args:
        margins: Margins of all labels over the run.
        kind: "class" (one label per row), "token" (a list of classes per row) or "multi_label" (a list of 0 and 1).
        column: Name of the label column.
        class_names: Names of the classes, for the tables; None for their numbers.

    Attributes:
        rows: Row of each label, shape (L,), int64.
        positions: Position of each label among the labels of its row, shape (L,), int64.
        labels: The given labels, shape (L,), int64, -1 for a label that was not read.
        suggestions: The labels that the model prefers, shape (L,), int64; the given one where it agrees.
        margins: Mean margin of each label, shape (L,), float64, NaN for a label that was not read in those epochs.
        probabilities: Probability that a label is wrong, shape (L,), float64, NaN for a label without a margin, or
            whose class the model has not learnt.
        agreement: Share of the labels of a class that the model agreed with in the best of these epochs, mean over the
            classes.

    Raises:
        RuntimeError: If no label has been read, or the margins cannot be assigned to the labels.

    Example:
        >>> from accelerate import Accelerator
        >>> from rsft_hf.weighted.criterion import Choices
        >>> margins, given = LabelMargins(lambda: torch.ones(100, dtype=torch.int64)), torch.arange(100) % 2
        >>> sizes = 2 + torch.arange(100) / 50
        >>> signs = torch.where(torch.arange(100) % 10 == 3, -1, 1)  # where the model prefers the other class
        >>> choices = Choices(given, 1 - given, signs * sizes)
        >>> margins.record(list(range(100)), choices, torch.ones(100, dtype=torch.bool))
        >>> margins.end_epoch(Accelerator(cpu=True))
        >>> report = LabelReport(margins, "class", "label")
        >>> report
        LabelReport(100 labels, about 10 wrong)
        >>> len(report.drop(datasets.Dataset.from_dict({"label": given.tolist()})))
        90
    """

    def __init__(
        self, margins: LabelMargins, kind: str, column: str = "labels", class_names: Sequence[str] | None = None
    ) -> None:
        if margins.problem is not None:
            raise RuntimeError(
                f"The margins of the training steps cannot be assigned to the labels: {margins.problem}. A label "
                "report needs one class, a list of classes (tokens), or a list of 0 and 1 (multi-label) per row."
            )
        if not margins.epochs or not bool((margins.labels >= 0).any()):
            raise RuntimeError(
                "No label has been read yet, or the loss does not compare classes (2 to 1,024). Call `label_report()` "
                'after an epoch of LossResampler(losses="training").'
            )
        # Stored as integers, the 0 and 1 of a multi-label task look like the classes of tokens, and as booleans these
        # look like those.
        self.kind = kind if kind == "class" else "multi_label" if margins.is_binary else "token"
        self._column, self._names = column, class_names
        self._num_per_row, self.labels = margins.num_per_row, margins.labels
        self.rows = torch.arange(len(self._num_per_row)).repeat_interleave(self._num_per_row)
        first = self._num_per_row.cumsum(0) - self._num_per_row
        self.positions = torch.arange(len(self.rows)) - first[self.rows]
        is_multi_label = self.kind == "multi_label"
        classes = 2 * self.positions + self.labels if is_multi_label else self.labels
        history = torch.stack([means for means, _ in margins.epochs])
        learnt = learning(history, classes, num_choices=2 if is_multi_label else None)
        self.agreement, self._is_trusted = learnt.agreement, learnt.is_trusted
        self.margins, rivals = evidence(margins, learnt.is_used)
        is_read = self.margins.isfinite()
        self._warn(is_read & ~learnt.is_learnt)
        self.suggestions = torch.where(self.margins < 0, rivals, self.labels)
        # Of a multi-label task each class is a problem of its own.
        groups = 2 * self.positions + self.suggestions if is_multi_label else self.suggestions
        is_judged = is_read & learnt.is_learnt
        self.probabilities = torch.full_like(self.margins, float("nan"))
        if bool(is_judged.any()):
            self.probabilities[is_judged] = error_probabilities(self.margins[is_judged], groups[is_judged])

    @classmethod
    def from_checkpoint(cls, directory: Path | str) -> "LabelReport":
        """Returns the report of a finished or interrupted run, from one of its checkpoints.

        Args:
            directory: Output folder, of which the last complete checkpoint is read, or a checkpoint.

        Raises:
            RuntimeError: If the checkpoint holds no margins of labels: see the class.
            ValueError: If there is no complete checkpoint, or it is not of a `LossResampler`.
        """
        numbers, tensors = load_state(state_directory(directory), "weighted")
        margins = LabelMargins.from_state(tensors)
        margins.problem = numbers.get("label_problem")
        return cls(margins, **numbers["labels"])

    def _warn(self, is_unlearnt: torch.Tensor) -> None:
        if not self._is_trusted:
            logger.warning(f"{self._not_learnt()} Do not trust the label report.")
        elif bool(is_unlearnt.any()):
            if self.kind == "multi_label":
                which = "yes or no at the positions"
                classes = self.positions[is_unlearnt].unique().tolist()
            else:
                which, classes = "the classes", self.labels[is_unlearnt].unique().tolist()
                names = list(self._names or [])
                classes = [names[one] if one < len(names) else one for one in classes]
            logger.warning(
                f"{int(is_unlearnt.sum())} labels of {which} {classes[:10]} are not judged: the model never agreed "
                "with half of them, so it has not learnt them."
            )

    @property
    def num_errors(self) -> float:
        """Expected number of wrong labels, among those that were read."""
        return float(self.probabilities.nansum())

    def __repr__(self) -> str:
        return f"LabelReport({len(self.labels)} labels, about {self.num_errors:.0f} wrong)"

    def table(self, dataset: datasets.Dataset | None = None, num_labels: int | None = None) -> datasets.Dataset:
        """Returns one line per label, most probably wrong first, for people to correct: `to_csv`, `to_parquet`.

        Args:
            dataset: Data set of the same rows, whose other columns (texts, say) are added.
            num_labels: Number of lines; all labels that were read by default.

        Returns:
            Columns `row`, `position` (not for "class"), `given_label`, `suggested_label`, `error_probability`, `margin`
            (mean over the reads of the label's logit minus the largest other one), and those of `dataset`.

        Raises:
            ValueError: As in `validate`.
        """
        num_read = int(self.probabilities.isfinite().sum())
        order = self.probabilities.nan_to_num(-1.0).argsort(descending=True, stable=True)
        order = order[: num_read if num_labels is None else min(num_labels, num_read)]
        columns = {
            "row": self.rows,
            "position": self.positions,
            "given_label": self.labels,
            "suggested_label": self.suggestions,
            "error_probability": self.probabilities,
            "margin": self.margins,
        }
        if self.kind == "class":
            del columns["position"]
        lines: dict[str, Any] = {name: values[order].tolist() for name, values in columns.items()}
        if self._names is not None and self.kind != "multi_label":
            for name in ("given_label", "suggested_label"):
                lines[name] = [self._names[label] for label in lines[name]]
        table = datasets.Dataset.from_dict(lines)
        if dataset is None:
            return table
        self.validate(dataset)
        hidden = {*table.column_names, self._label_column(dataset)}
        if not (shown := [name for name in dataset.column_names if name not in hidden]):
            return table
        others = dataset.with_format(None).select_columns(shown).select(lines["row"]).flatten_indices()
        return datasets.concatenate_datasets([table, others], axis=1)

    def validate(self, dataset: datasets.Dataset) -> None:
        """Raises unless a data set has the rows of the report: as many, and the same labels where it has labels.

        Rows are known by their labels alone: another order of rows with the same labels in the same order is not seen.

        Raises:
            TypeError: If it is no `datasets.Dataset`.
            ValueError: If it has another number of rows, or other labels.
        """
        self._check_length(dataset)
        column = self._label_column(dataset)
        stored, _ = self._read(dataset, column)
        if stored is not None:
            self._compare(dataset, column, stored)

    def drop(self, dataset: datasets.Dataset, threshold: float = 0.3) -> datasets.Dataset:
        """Returns the data set without the labels that are wrong with a probability above `threshold`.

        Rows with such a label are left out; of token labels only the label itself, which becomes -100.

        Args:
            dataset: The training set, or another data set of the same rows and labels.
            threshold: In [0, 1]; by default below a half, as a wrong label that stays costs more than a right one that
                goes.

        Raises:
            RuntimeError: If the model has not learnt the task: its `agreement` is not well above chance.
            ValueError: If `dataset` has other rows or labels.
        """
        is_wrong = self._is_wrong(threshold)
        if self.kind == "token":
            return self._with_labels(dataset, is_wrong, torch.full_like(self.labels, IGNORED))
        self._check_labels(dataset)
        is_kept = torch.ones(len(dataset), dtype=torch.bool).index_fill(0, self.rows[is_wrong], False)
        return dataset.select(is_kept.nonzero().flatten().tolist())

    def relabel(self, dataset: datasets.Dataset, threshold: float = 0.5) -> datasets.Dataset:
        """Returns the data set with the model's labels for those that are wrong with a probability above `threshold`.

        Args:
            dataset: The training set, or another data set of the same rows and labels.
            threshold: In [0, 1].

        Raises:
            RuntimeError: If the model has not learnt the task: its `agreement` is not well above chance.
            ValueError: If `dataset` has other rows or labels.
        """
        return self._with_labels(dataset, self._is_wrong(threshold), self.suggestions)

    def _not_learnt(self) -> str:
        return (
            f"The model agrees with {self.agreement:.0%} of the labels of a class, on average, in the best epoch that "
            "counts: it has not learnt the task, so it cannot tell which labels are wrong. Train for more epochs, or "
            "at another learning rate."
        )

    def _is_wrong(self, threshold: float) -> torch.Tensor:
        check_interval("threshold", threshold, "[0, 1]")
        if not self._is_trusted:
            raise RuntimeError(self._not_learnt())
        return self.probabilities > threshold

    def _with_labels(
        self, dataset: datasets.Dataset, is_changed: torch.Tensor, values: torch.Tensor
    ) -> datasets.Dataset:
        """The data set with other values for the changed labels, all of shape (L,)."""
        column, codes, stored = self._check_labels(dataset)
        feature = dataset.features[column]
        dtype = str(getattr(getattr(feature, "feature", feature), "dtype", ""))
        if dtype.startswith(("uint", "bool")) and bool((values[is_changed] < 0).any()):
            feature = datasets.List(datasets.Value("int64"))  # the others have no -100
            dataset = dataset.cast_column(column, feature)
        elif dtype == "bool" and not bool((values[is_changed] > 1).any()):
            values = values.bool()
        elif stored.no:
            values = values.masked_fill(values == 0, stored.no)
        labels = list(dataset.with_format(None)[column])
        for at in is_changed.nonzero().flatten().tolist():
            row = int(self.rows[at])
            value: Any = values[at].item()
            if self.kind == "class":
                labels[row] = codes[value] if codes is not None and value < len(codes) else value
                continue
            labels[row] = list(labels[row])
            labels[row][int(stored.places[at])] = value
        names = dataset.column_names
        changed = dataset.add_column("changed labels", labels, feature=feature).remove_columns(column)
        return changed.rename_column("changed labels", column).select_columns(names)

    def _label_column(self, dataset: datasets.Dataset) -> str | None:
        return next((name for name in (self._column, *LABEL_COLUMNS) if name in dataset.column_names), None)

    def _read(self, dataset: datasets.Dataset, column: str | None) -> tuple[StoredLabels | None, list[Any] | None]:
        """The labels of a column by number of class, None if it holds none, and what it holds for each class.

        The latter is None where that is the number of the class.
        """
        if column is None:
            return None, None
        stored = stored_labels(dataset, column)
        if (codes := self._codes(dataset, column, stored)) is None:
            return stored, None
        numbers = {code: number for number, code in enumerate(codes)}
        values = torch.tensor([numbers[code] for code in dataset.with_format(None)[column]])
        return StoredLabels("class", values, torch.ones_like(values), torch.zeros_like(values)), codes

    def _codes(self, dataset: datasets.Dataset, column: str, stored: StoredLabels | None) -> list[Any] | None:
        """What a column holds for each class, where it names them otherwise than by their number; else None."""
        if self._names is None or self.kind != "class":
            return None
        feature, names = dataset.features[column], list(self._names)
        codes: list[Any] = []
        if isinstance(feature, datasets.ClassLabel):
            codes = [feature.names.index(name) for name in names if name in feature.names]
        elif (dtype := str(getattr(feature, "dtype", ""))).endswith("string"):
            codes = names
        elif stored is not None and self._is_by_number(stored):
            return None
        elif dtype.startswith("int") and all(name.removeprefix("-").isdecimal() for name in names):
            codes = [int(name) for name in names]
        is_named = len(codes) == len(names) and set(dataset.unique(column)) <= set(codes)
        return codes if is_named else None

    def _is_by_number(self, stored: StoredLabels) -> bool:
        """Whether the labels are the very numbers that were trained on."""
        is_read = self.labels >= 0
        return torch.equal(stored.num_per_row, self._num_per_row) and torch.equal(
            stored.values[is_read], self.labels[is_read]
        )

    def _check_length(self, dataset: Any) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(f"`dataset` must be a datasets.Dataset, got {type(dataset).__name__}.")
        if len(dataset) != len(self._num_per_row):
            raise ValueError(
                f"`dataset` has {len(dataset)} rows and the report is of {len(self._num_per_row)}. Pass the training "
                "set, or one with the same rows in the same order."
            )

    def _check_labels(self, dataset: datasets.Dataset) -> tuple[str, list[Any] | None, StoredLabels]:
        """The label column, what it holds for each class, and its labels, after comparing them with the report's."""
        self._check_length(dataset)
        column = self._label_column(dataset)
        stored, codes = self._read(dataset, column)
        return str(column), codes, self._compare(dataset, column, stored)

    def _compare(self, dataset: datasets.Dataset, column: str | None, stored: StoredLabels | None) -> StoredLabels:
        """The labels of a column; raises ValueError unless they are those of the report."""
        kinds = {"class"} if self.kind == "class" else {"token", "multi_label"}
        if column is None or stored is None or stored.kind not in kinds:
            raise ValueError(
                f"`dataset` has no column {self._column!r} with labels as they were trained on ({self.kind}): its "
                f"columns are {dataset.column_names}. Rename the column, or encode its labels as integers."
            )
        if not torch.equal(stored.num_per_row, self._num_per_row):
            row = int((stored.num_per_row != self._num_per_row).int().argmax())
            raise ValueError(
                f"Row {row} of `dataset` has {int(stored.num_per_row[row])} labels and the report is of "
                f"{int(self._num_per_row[row])}. Pass the data set that was trained on."
            )
        is_other = (stored.values != self.labels) & (self.labels >= 0)
        if bool(is_other.any()):
            at = int(is_other.int().argmax())
            raise ValueError(
                f"Row {int(self.rows[at])} of `dataset` has the label {int(stored.values[at])} and was trained on with "
                f"{int(self.labels[at])}. Pass the training set, or one with the same rows in the same order."
            )
        return stored
