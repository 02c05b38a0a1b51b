"""The rows of a round, as a data set of fixed identity whose content is replaced between rounds.

Training rows enter, rows by index leave. It takes the place of the prompts in Trainer's loader.
"""

from collections.abc import Sequence

import torch

from rsft_hf.generative.encoding import IGNORED, Row


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
