"""Rows without a label are left out of the draws, and no others are."""

from typing import Any

import torch

from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer, measure_losses
from rsft_hf.weighted import Learnability
from zoo import CASES

CASE = {case.name: case for case in CASES}
UNLABELLED = [2, 5]


def weights_of_epoch(resampler: LossResampler, epoch: int) -> list[float]:
    return [line["weight"] for line in resampler.table() if line["epoch"] == epoch]


def test_rows_without_a_label_are_never_drawn(tmp_path):
    resampler = LossResampler(Proportional(), num_draws=40)
    CASE["bert_without_labels"].trainer(
        tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 1}, resampler=resampler
    ).train()
    counts = resampler.table()["count"][:]
    assert sum(counts) == 40
    assert [row for row, count in enumerate(counts) if count == 0] == UNLABELLED
    assert [row for row, weight in enumerate(weights_of_epoch(resampler, 0)) if weight == 0] == UNLABELLED
    assert resampler.metrics()["resampling/excluded_rows"] == 2


def test_learnability_takes_a_measured_reference_that_is_nan_where_there_is_no_label(tmp_path):
    case = CASE["bert_without_labels"]
    reference = measure_losses(case.trainer(tmp_path)).losses
    assert reference.isnan().nonzero().flatten().tolist() == UNLABELLED
    resampler = LossResampler(Learnability(reference - 1))
    case.trainer(tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 1}, resampler=resampler).train()
    # The model is the reference: every loss is 1 above, so the five rows with a label share the weight.
    expected = [0.0 if row in UNLABELLED else 0.2 for row in range(7)]
    assert torch.allclose(torch.tensor(weights_of_epoch(resampler, 0)), torch.tensor(expected), atol=1e-4)


class Hiding:
    """A collator that hides each label with probability .4, as one that masks words at random may do to short rows."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.collate([{**row, "labels": -100} if torch.rand(()) < 0.4 else row for row in rows])


def test_a_row_whose_label_was_hidden_once_is_drawn_again(tmp_path):
    resampler = LossResampler(losses="training", num_draws=14)
    trainer = CASE["bert_single_label"].trainer(
        tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 4}, resampler=resampler
    )
    trainer.data_collator = Hiding(trainer.data_collator)
    trainer.train()
    assert bool(resampler.source.ledger.is_unlabelled.any())  # some label was hidden
    for epoch in range(4):
        assert min(weights_of_epoch(resampler, epoch)) > 0
