"""The rows of a round, as a data set of fixed identity whose content is replaced between rounds.

Training rows enter, rows by index leave. It takes the place of the prompts in Trainer's loader.
"""

from collections.abc import Sequence

import torch
from transformers.utils import logging

from rsft_hf.generative.encoding import IGNORED, Row
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
