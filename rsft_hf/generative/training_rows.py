"""Training rows of a round: the pool that replaces the prompts in Trainer's loader, and how rows enter it.

The pool is a data set of fixed identity; its content is replaced between rounds.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from transformers.utils import logging

from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import IGNORED, Encoder, Row
from rsft_hf.generative.prompts import PromptSet
from rsft_hf.rejection import rejection_sample

logger = logging.get_logger(__name__)

_MANY_REPEATS = 10


class CandidatePool(torch.utils.data.Dataset[Row]):
    """Supervised rows, which stay, followed by the accepted candidates of the round, which are replaced.

    Args:
        supervised: Rows with `input_ids`, `attention_mask` and `labels`.
    """

    def __init__(self, supervised: Sequence[Row] = ()) -> None:
        self.supervised = list(supervised)
        self.accepted: list[Row] = []

    def replace(self, accepted: Sequence[Row]) -> None:
        """Takes the accepted rows of a new round."""
        self.accepted = list(accepted)

    def __len__(self) -> int:
        return len(self.supervised) + len(self.accepted)

    def __getitem__(self, index: int) -> Row:
        if index < len(self.supervised):
            return self.supervised[index]
        if not self.accepted:
            raise RuntimeError("There are no rows to train on before the first round, which train() begins with.")
        return self.accepted[index - len(self.supervised)]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the accepted rows as flat tensors of int32."""
        flat = {"lengths": [len(row["input_ids"]) for row in self.accepted]}
        flat["label_lengths"] = [len(row["labels"]) for row in self.accepted]
        flat |= {name: [token for row in self.accepted for token in row[name]] for name in ("input_ids", "labels")}
        return {f"pool_{name}": torch.tensor(values, dtype=torch.int32) for name, values in flat.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` returned."""
        ids = tensors["pool_input_ids"].split(tensors["pool_lengths"].tolist())
        labels = tensors["pool_labels"].split(tensors["pool_label_lengths"].tolist())
        self.accepted = [
            {"input_ids": row.tolist(), "attention_mask": [1] * len(row), "labels": answer.tolist()}
            for row, answer in zip(ids, labels, strict=True)
        ]

    def num_tokens(self, indices: Sequence[int]) -> int:
        """Returns the tokens of some rows that count in the loss, repeats included."""
        return sum(label != IGNORED for index in indices for label in self[index]["labels"])


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
    rows = []
    # Equal weights: whole permutations, pass after pass, so that no row is repeated before all were read.
    if num_supervised:
        rows.append(rejection_sample(torch.ones(len(pool.supervised)), num_supervised, generator))
    if num_supervised < num_draws:
        drawn = rejection_sample(torch.ones(len(pool.accepted)), num_draws - num_supervised, generator)
        rows.append(len(pool.supervised) + drawn)
    indices = torch.cat(rows)[torch.randperm(num_draws, generator=generator)]
    num_distinct = len(indices.unique())
    if num_draws > _MANY_REPEATS * num_distinct:
        logger.warning(
            f"The {num_distinct} rows of this round are each read {num_draws / num_distinct:.0f} times to fill "
            f"{num_draws} draws. Accept more of the candidates, or lower `num_draws`."
        )
    return indices


def encode_candidates(candidates: Iterable[Candidate], encoder: Encoder) -> list[Row]:
    """Returns the training rows of the accepted among the candidates, in their order.

    Args:
        candidates: Judged.
        encoder: Knows the model's tokens.
    """
    prompt_ids: dict[int, list[int]] = {}
    rows = []
    for candidate in candidates:
        if candidate.is_accepted:
            if candidate.prompt_id not in prompt_ids:
                prompt_ids[candidate.prompt_id] = encoder.prompt_ids(candidate.prompt, candidate.row)
            rows.append(encoder.training_row(prompt_ids[candidate.prompt_id], candidate.token_ids))
    return rows


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
