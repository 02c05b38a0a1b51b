"""Training rows of a round: the pool that replaces the prompts in Trainer's loader, and how rows enter it.

The pool is a data set of fixed identity; its content is replaced between rounds.
"""

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import IGNORED, Encoder, Row
from rsft_hf.generative.prompts import PromptSet
from rsft_hf.rejection import MANY_REPEATS, sample_parts

logger = logging.get_logger(__name__)


class PackedRows(Sequence[Row]):
    """Training rows in flat arrays of int32: 8 bytes a token, where lists take some 70.

    Args:
        rows: With `input_ids` and `labels`; read one by one.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._tokens = {"input_ids": array("i"), "labels": array("i")}
        self._ends = {"input_ids": array("q", [0]), "labels": array("q", [0])}
        self.num_trained = array("q")  # tokens of each row that count in the loss
        for row in rows:
            for name, tokens in self._tokens.items():
                tokens.extend(row[name])
                self._ends[name].append(len(tokens))
            self.num_trained.append(sum(label != IGNORED for label in row["labels"]))

    def __len__(self) -> int:
        return len(self.num_trained)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = {name: self._tokens[name][ends[index] : ends[index + 1]].tolist() for name, ends in self._ends.items()}
        return {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": row["labels"]}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the rows as flat tensors."""
        state = {f"pool_{name}": torch.from_numpy(np.array(tokens)) for name, tokens in self._tokens.items()}
        return state | {f"pool_{name}_ends": torch.from_numpy(np.array(ends)) for name, ends in self._ends.items()}

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor]) -> "PackedRows":
        """Returns the rows that `state` wrote."""
        rows = cls()
        for name in rows._tokens:
            rows._tokens[name] = array("i", tensors[f"pool_{name}"].numpy().tobytes())
            rows._ends[name] = array("q", tensors[f"pool_{name}_ends"].numpy().tobytes())
        labels, ends = tensors["pool_labels"], tensors["pool_labels_ends"]
        trained = torch.cat((torch.zeros(1, dtype=torch.int64), (labels != IGNORED).cumsum(0)))
        rows.num_trained = array("q", trained[ends].diff().tolist())
        return rows


class CandidatePool(torch.utils.data.Dataset[Row]):
    """Supervised rows, which stay, followed by the accepted candidates of the round, which are replaced.

    Args:
        supervised: Rows with `input_ids`, `attention_mask` and `labels`.
    """

    def __init__(self, supervised: Sequence[Row] = ()) -> None:
        self.supervised = list(supervised)
        self.accepted = PackedRows()

    def replace(self, accepted: Iterable[Row]) -> None:
        """Takes the accepted rows of a new round."""
        self.accepted = PackedRows(accepted)

    def __len__(self) -> int:
        return len(self.supervised) + len(self.accepted)

    def __getitem__(self, index: int) -> Row:
        if index < len(self.supervised):
            return self.supervised[index]
        if not self.accepted:
            raise RuntimeError("There are no rows to train on before the first round, which train() begins with.")
        return self.accepted[index - len(self.supervised)]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the accepted rows as flat tensors."""
        return self.accepted.state()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` returned."""
        self.accepted = PackedRows.from_state(tensors)

    def num_tokens(self, indices: Sequence[int]) -> int:
        """Returns the tokens of some rows that count in the loss, repeats included."""
        counts = [sum(label != IGNORED for label in row["labels"]) for row in self.supervised]
        counts.extend(self.accepted.num_trained)
        return sum(counts[index] for index in indices)


def draw_rows(
    pool: CandidatePool, num_draws: int, supervised_fraction: float, generator: torch.Generator
) -> torch.Tensor:
    """Returns the rows of an epoch, shape (num_draws,), int64: supervised and accepted ones in their shares, shuffled.

    Args:
        pool: Holds rows.
        num_draws: Rows of an epoch.
        supervised_fraction: Share of supervised rows; all are where nothing was accepted.
        generator: CPU generator; it alone is moved.
    """
    num_supervised = round(supervised_fraction * num_draws) if pool.accepted else num_draws
    supervised, accepted = torch.arange(len(pool)).split([len(pool.supervised), len(pool.accepted)])
    # Equal weights: whole permutations, pass after pass, so that no row is repeated before all were read.
    parts = [(supervised, num_supervised), (accepted, num_draws - num_supervised)]
    indices = sample_parts([(rows, torch.ones(len(rows)), count) for rows, count in parts], generator)
    num_distinct = len(indices.unique())
    if num_draws > MANY_REPEATS * num_distinct:
        logger.warning(
            f"The {num_distinct} rows of this round are each read {num_draws / num_distinct:.0f} times to fill "
            f"{num_draws} draws. Accept more of the candidates, or lower `num_draws`."
        )
    if len(accepted) > MANY_REPEATS * (num_read := num_draws - num_supervised) > 0:
        logger.warning(
            f"Of the {len(accepted)} accepted rows of this round {num_read} are read, and the others never. Raise "
            "`num_draws`, the rows trained on per round, or accept fewer of the candidates."
        )
    return indices


def encode_candidates(candidates: Iterable[Candidate], encoder: Encoder) -> Iterator[Row]:
    """Yields the training rows of the accepted among the candidates, in their order.

    Args:
        candidates: Judged.
        encoder: Knows the model's tokens.
    """
    prompt_id, prompt_ids = None, list[int]()
    for candidate in candidates:
        if candidate.is_accepted:
            if candidate.prompt_id != prompt_id:  # the candidates of a prompt follow each other
                prompt_id, prompt_ids = candidate.prompt_id, encoder.prompt_ids(candidate.prompt, candidate.row)
            token_ids = candidate.token_ids
            if not token_ids and candidate.text:  # imported, as text alone
                token_ids = encoder.completion_ids(candidate.prompt, candidate.text, candidate.row)
            yield encoder.training_row(prompt_ids, token_ids)


def reference_candidate(prompts: PromptSet, prompt_id: int, column: str, encoder: Encoder) -> Candidate:
    """Returns the reference answer of a prompt as an accepted candidate, marked as what it is."""
    prompt, row = prompts.row(prompt_id)
    reference = row[column]
    if not reference:
        raise ValueError(f"Row {prompt_id} has no reference in the column {column!r}. Give one, or drop the row.")
    if isinstance(reference, list) and isinstance(reference[0], str):
        reference = reference[0]  # several references: the first
    ids = encoder.completion_ids(prompt, reference, row)
    text = reference if isinstance(reference, str) else encoder.text(ids)
    return dataclasses.replace(
        Candidate(prompt_id, prompt, ids, text, "reference", attempt=-1, index=-1, row=row),
        is_accepted=True,
        verdict="fallback",
        rule='on_nothing_accepted="reference"',
    )


def supervised_rows(config: CandidateConfig, encoder: Encoder) -> list[Row]:
    """Returns the encoded rows of `supervised_dataset`; none where it is None."""
    rows: list[Row] = []
    if config.supervised_dataset is None:
        return rows
    prompts = PromptSet(config.supervised_dataset, config.prompt_column)
    for number in range(len(prompts)):
        row = config.supervised_dataset[number]
        if "input_ids" in row and "labels" in row:
            rows.append(
                {
                    "input_ids": list(row["input_ids"]),
                    "attention_mask": list(row.get("attention_mask", [1] * len(row["input_ids"]))),
                    "labels": list(row["labels"]),
                }
            )
        elif config.prompt_column in row and "completion" in row:
            prompt, columns = prompts.row(number)
            answer = encoder.completion_ids(prompt, columns["completion"], columns)
            rows.append(encoder.training_row(encoder.prompt_ids(prompt, columns), answer))
        else:
            raise ValueError(
                f"Row {number} of `supervised_dataset` has the columns {list(row)}. It needs {config.prompt_column!r} "
                "and 'completion', or 'input_ids' and 'labels'."
            )
    return rows
