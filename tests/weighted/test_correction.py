"""Losses that the importance correction can scale, and those whose denominators it cannot reach."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer

WEIGHTS = torch.tensor([1.0, 4.0, 0.5])


class Tagger(nn.Module):
    """Classes of tokens; the loss as its kind says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head, self.kind = nn.Embedding(50, 8), nn.Linear(8, 3), kind

    def forward(self, input_ids, labels=None, **inputs: Any):
        logits = self.head(self.words(input_ids))
        loss = {} if labels is None else {"loss": loss_of(self.kind, logits, labels)}
        return {**loss, "logits": logits}


class CountedTagger(Tagger):
    """Takes Trainer's count, and heeds it if its kind says so."""

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs: Any):
        logits = self.head(self.words(input_ids))
        return {"loss": loss_of(self.kind, logits, labels, num_items_in_batch), "logits": logits}


def loss_of(kind: str, logits: torch.Tensor, labels: torch.Tensor, count: Any = None) -> torch.Tensor:
    flat, classes = logits.flatten(0, 1), labels.flatten()
    is_labelled = classes != -100
    if kind == "mean":
        return F.cross_entropy(flat, classes)
    if kind == "weighted mean":
        return F.cross_entropy(flat, classes, weight=WEIGHTS)
    if kind == "sum by count":
        return F.cross_entropy(flat, classes, reduction="sum") / (is_labelled.sum() if count is None else count)
    if kind == "sum":
        return F.cross_entropy(flat, classes, reduction="sum")
    if kind == "sum by own count":
        return F.cross_entropy(flat, classes, reduction="sum") / is_labelled.sum()
    losses = F.cross_entropy(flat, classes, reduction="none")
    if kind == "elements by own count":
        return losses.sum() / is_labelled.sum()
    if kind == "mean of means":
        means = losses.reshape(labels.shape).sum(1) / is_labelled.reshape(labels.shape).sum(1)
        return means.mean()
    weights = WEIGHTS[classes.clamp(min=0)] * is_labelled  # "weights by hand"
    return (losses * weights).sum() / weights.sum()


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 50, (2 + 5 * (number % 3),), generator=generator).tolist() for number in range(24)]
    return [{"input_ids": row, "labels": [word % 3 for word in row]} for row in ids]


def trained(folder: Path, model: nn.Module, resampler: LossResampler, **keywords: Any) -> hf.Trainer:
    return runs.trained(
        RejectionSamplingTrainer, folder, model=model, train_dataset=rows(), data_collator=runs.pad_tokens,
        resampler=resampler, **keywords,
    )  # fmt: skip


CORRECTABLE = [
    (Tagger, "mean", False), (Tagger, "weighted mean", False), (Tagger, "mean of means", False),
    (CountedTagger, "sum by count", True), (CountedTagger, "mean", False),
]  # fmt: skip
NOT_CORRECTABLE = [
    (Tagger, "sum"), (Tagger, "sum by own count"), (Tagger, "elements by own count"), (Tagger, "weights by hand"),
    (CountedTagger, "sum by own count"), (CountedTagger, "elements by own count"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "kind", "is_counted"), CORRECTABLE)
def test_losses_whose_denominators_are_scaled_are_corrected(tmp_path, made, kind: str, is_counted: bool) -> None:
    resampler = LossResampler(Proportional(), importance_correction=1.0)
    trained(tmp_path, made(kind), resampler)
    assert resampler.source.importance_correction == 1.0
    assert resampler.source.heeds_count is is_counted


@pytest.mark.parametrize(("made", "kind"), NOT_CORRECTABLE)
def test_losses_with_a_count_of_their_own_are_not(tmp_path, made, kind: str, caplog) -> None:
    with pytest.raises(ValueError, match=r"divided by another number than Trainer's `num_items_in_batch`"):
        trained(tmp_path / "asked", made(kind), LossResampler(Proportional(), importance_correction=1.0))
    safe = LossResampler()
    trained(tmp_path / "safe", made(kind), safe)
    assert safe.source.importance_correction == 0.0
    assert "The losses of this model cannot be corrected for the draws" in caplog.text


@pytest.mark.parametrize(("kind", "is_right"), [("sum by count", True), ("sum by own count", False)])
def test_a_loss_function_is_tried_as_a_training_step_calls_it(tmp_path, kind: str, is_right: bool) -> None:
    def function(outputs, labels, num_items_in_batch=None):
        return loss_of(kind, outputs["logits"], labels, num_items_in_batch)

    safe = LossResampler()
    trained(tmp_path, Tagger("mean"), safe, compute_loss_func=function)
    assert safe.source.importance_correction == float(is_right)


@pytest.mark.parametrize("seed", range(4))
def test_rows_without_labels_do_not_cost_the_correction(tmp_path, seed: int) -> None:
    data = rows()
    for number in torch.randperm(24, generator=torch.Generator().manual_seed(100 + seed))[:16].tolist():
        data[number]["labels"] = [-100] * len(data[number]["labels"])
    resampler = LossResampler(Proportional(), importance_correction=1.0)
    runs.trained(
        RejectionSamplingTrainer, tmp_path, model=CountedTagger("sum by count"), train_dataset=data,
        data_collator=runs.pad_tokens, resampler=resampler, args={"seed": seed, "num_train_epochs": 1},
    )  # fmt: skip
    assert resampler.source.heeds_count
