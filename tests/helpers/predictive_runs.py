"""Runs with pseudo-labels on tiny models: classes of rows, and of tokens."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf

import runs
from rsft_hf import RejectionSamplingTrainer
from rsft_hf.predictive import PredictionResampler

POOL = [{**row, "labels": 1 - row["labels"], "truth": row["labels"]} for row in runs.rows(60)[26:]]


def resampler(**options: Any) -> PredictionResampler:
    return PredictionResampler(**{"unlabelled_dataset": POOL, "reference_column": "truth", **options})


def trained(folder: Path, made: PredictionResampler | None = None, **keywords: Any) -> hf.Trainer:
    return runs.trained(RejectionSamplingTrainer, folder, resampler=made or resampler(), **keywords)


def logged(trainer: hf.Trainer, name: str) -> list[float]:
    return [line[f"pseudo_labels/{name}"] for line in trainer.state.log_history if f"pseudo_labels/{name}" in line]


def token_rows(num_rows: int, with_labels: bool = True) -> list[dict[str, Any]]:
    """The class of a token is whether it is even; the first token of a row has no label."""
    made = []
    for row in runs.rows(num_rows):
        ids = row["input_ids"]
        labels = {"labels": [-100, *(token % 2 for token in ids[1:])]} if with_labels else {}
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), **labels})
    return made


def token_trainer(folder: Path, made: PredictionResampler, **options: Any) -> hf.Trainer:
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), pad_token="0", padding_side=options.pop("side", "right")
    )
    config = hf.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    torch.manual_seed(0)
    args = runs.arguments(folder, **{"num_train_epochs": 12, "learning_rate": 2e-2, **options})
    return RejectionSamplingTrainer(
        hf.BertForTokenClassification(config), args, train_dataset=token_rows(40), resampler=made,
        data_collator=hf.DataCollatorForTokenClassification(tokenizer), processing_class=tokenizer,
    )  # fmt: skip


def _tokenizer() -> Any:
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({str(number): number for number in range(50)}, "0"))
