"""Training rows of a run with pseudo-labels: labelled rows, which stay, and others with the labels accepted last.

Also the store of what was accepted: one Parquet file per round in `<output_dir>/pseudo_labels`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rsft_hf.weighted.labels import IGNORED, as_list, column_values

FOLDER = "pseudo_labels"


class PseudoLabels:
    """Labels of the unlabelled rows: one run of units per row, -100 where none is accepted.

    Args:
        values: Label of each unit, shape (U,), int64.
        rows: Row of each unit, shape (U,), int64, ascending.
        kind: "class", "token" or "multi_label".
    """

    def __init__(self, values: torch.Tensor, rows: torch.Tensor, kind: str) -> None:
        self.values, self.rows, self.kind = values, rows, kind
        distinct, counts = rows.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        self._spans = dict(
            zip(distinct.tolist(), zip((ends - counts).tolist(), ends.tolist(), strict=True), strict=True)
        )

    @classmethod
    def none(cls, kind: str) -> "PseudoLabels":
        """Returns labels of no row."""
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), kind)

    def accepted_rows(self) -> torch.Tensor:
        """Returns the rows with an accepted label, shape (n,), int64, ascending."""
        return self.rows[self.values != IGNORED].unique()

    def units(self, row: int) -> list[int]:
        """Returns the labels of a row's units; none for a row without any."""
        first, last = self._spans.get(row, (0, 0))
        return self.values[first:last].tolist()

    def label(self, row: int, blank: Any) -> Any:
        """Returns the label of a row as its column holds it.

        Args:
            row: Number of the row.
            blank: What the column holds of a row without a label: of tokens, -100 where none is wanted.
        """
        units = self.units(row)
        if not units:
            return blank
        if self.kind == "class":
            return units[0]
        if self.kind == "multi_label":
            return [float(unit) for unit in units]
        if (num_wanted := sum(one != IGNORED for one in blank)) != len(units):
            raise ValueError(
                f"Unlabelled row {row} has {num_wanted} tokens to label, and predictions of {len(units)}: the collator "
                "cuts rows, or a transform changes their length. Cut them to the model's length in the data set."
            )
        remaining = iter(units)
        return [next(remaining) if one != IGNORED else IGNORED for one in blank]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the labels as tensors."""
        return {"pseudo_values": self.values, "pseudo_rows": self.rows}


class SemiLabelledRows(torch.utils.data.Dataset[Any]):
    """Labelled rows, followed by those whose labels are drawn.

    Args:
        labelled: Rows with labels.
        unlabelled: Rows without; what their label column holds is not read, but for the tokens that it marks.
        doubtful: Numbers of labelled rows that are not trusted: they take a place behind `unlabelled`, too.
        columns: Names of label columns: the first is that of the labelled rows, the others must not reach a collator.
        kind: "class", "token" or "multi_label".
    """

    def __init__(
        self, labelled: Any, unlabelled: Any, doubtful: Sequence[int], columns: Sequence[str], kind: str
    ) -> None:
        self._labelled, self._unlabelled, self._doubtful = labelled, unlabelled, doubtful
        self._column, *self._others = columns
        self.trusted = sorted(set(range(len(labelled))) - set(doubtful))
        example = dict(labelled[self.trusted[0]]) if self.trusted else {}
        self._example: Any = example.get(self._column)
        self._read = set(example)  # a collator would look for what only unlabelled rows have in all of them
        self.pseudo = PseudoLabels.none(kind)

    @property
    def num_labelled(self) -> int:
        """Number of the rows with labels that are trusted."""
        return len(self.trusted)

    @property
    def num_unlabelled(self) -> int:
        """Number of the rows whose labels are drawn."""
        return len(self._unlabelled) + len(self._doubtful)

    def __len__(self) -> int:
        return self.num_labelled + self.num_unlabelled

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.num_labelled:
            return dict(self._labelled[self.trusted[index]])
        row = self.unlabelled_row(index - self.num_labelled)
        return row | {self._column: self._stored(self.pseudo.label(index - self.num_labelled, row[self._column]))}

    def input_row(self, number: int) -> dict[str, Any]:
        """Returns a row whose label is drawn, with a blank label, as a collator takes it."""
        row = self.unlabelled_row(number)
        return row | {self._column: self._stored(row[self._column])}

    def unlabelled_row(self, number: int) -> dict[str, Any]:
        """Returns a row whose label is drawn, with a blank label: a number or a list."""
        row = self.given_row(number)
        if self.pseudo.kind == "class":
            blank: Any = IGNORED
        elif self.pseudo.kind == "multi_label":
            blank = [0.0] * len(self._example)
        else:
            marks = as_list(row.get(self._column))
            blank = _wanted_tokens(row) if marks is None else [0 if one is None else min(one, 0) for one in marks]
        kept = {name: value for name, value in row.items() if name in self._read and name not in self._others}
        return kept | {self._column: blank}

    def _stored(self, label: Any) -> Any:
        """A label as the labelled rows hold theirs: a collator stacks both."""
        if not isinstance(self._example, torch.Tensor):
            return label
        return torch.tensor(label, dtype=self._example.dtype)

    def given_row(self, number: int) -> dict[str, Any]:
        """Returns a row whose label is drawn, as its data set holds it."""
        is_doubtful = number >= len(self._unlabelled)
        return dict(
            self._labelled[self._doubtful[number - len(self._unlabelled)]] if is_doubtful else self._unlabelled[number]
        )

    def given_values(self, numbers: Sequence[int], column: str) -> list[Any]:
        """Returns a column of some of these rows, as their data sets hold it.

        None for a row without it, and for the label of a doubtful row, which is what is in doubt.
        """
        unlabelled = self._unlabelled
        is_stored = isinstance(unlabelled, datasets.Dataset) and column in unlabelled.column_names
        stored = column_values(unlabelled, column) if is_stored else []  # a whole row may be an image to decode
        is_label = column in (self._column, *self._others)

        def value(number: int) -> Any:
            if number < len(stored):
                return stored[number]
            is_doubted = is_label and number >= len(unlabelled)
            return None if is_doubted else self.given_row(number).get(column)

        return [value(number) for number in numbers]


def _wanted_tokens(row: Mapping[str, Any]) -> list[int]:
    """0 for every token that is attended to, -100 for padding and, where the row marks them, special tokens."""
    if (ids := as_list(row.get("input_ids"))) is None:
        raise ValueError(
            f"An unlabelled row has neither labels nor `input_ids`, but {list(row)}: add a label column with 0 for "
            "every unit that is to be labelled and -100 for the others."
        )
    is_read = as_list(row.get("attention_mask")) or [1] * len(ids)
    is_special = as_list(row.get("special_tokens_mask")) or [0] * len(ids)
    return [0 if read and not special else IGNORED for read, special in zip(is_read, is_special, strict=True)]


class InputRows(torch.utils.data.Dataset[Any]):
    """The unlabelled rows with blank labels, as the model is asked about them."""

    def __init__(self, rows: SemiLabelledRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows.num_unlabelled

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._rows.input_row(number)


def write_round(directory: Path, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes the proposals of a round into `directory`, one line per row; later rounds there are of another run."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("round-*.parquet"):
        if _round_of(file) > number:
            file.unlink()
    draft = folder / f"round-{number:03d}.incomplete"
    pq.write_table(pa.table({"round": [number] * len(columns["row"]), **columns}), draft)
    draft.replace(draft.with_suffix(".parquet"))


def _round_of(file: Path) -> int:
    return int(file.stem.removeprefix("round-"))


def load_pseudo_labels(directory: Path | str, only_accepted: bool = True) -> datasets.Dataset:
    """Returns the labels that a run proposed, one line per round and row.

    Columns: `round`, `row` (of the unlabelled data set, doubtful labelled rows behind it), `label` (a class; for tokens
    and multi-label a list, -100 where rejected), `confidence` (largest probability, mean over tokens), `probability`
    (of acceptance, mean over tokens), `is_accepted`, and `reference`, the true label where it is known.

    Args:
        directory: The run's `output_dir`.
        only_accepted: Whether to leave out rows of which nothing was accepted.

    Raises:
        FileNotFoundError: If there are none.
    """
    files = sorted((Path(directory) / FOLDER).glob("round-*.parquet"), key=_round_of)
    if not files:
        raise FileNotFoundError(f"{Path(directory) / FOLDER} holds no round. Give the `output_dir` of a run.")
    parts = [datasets.Dataset.from_parquet(str(file)) for file in files]
    rows = datasets.concatenate_datasets(parts)
    return rows.filter(lambda accepted: accepted, input_columns="is_accepted") if only_accepted else rows
