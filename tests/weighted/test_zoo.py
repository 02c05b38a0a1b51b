"""Oracle of per-example losses: number of cases, reproducibility, and a finite loss for every label."""

import math

import pytest
import torch

from zoo import CASES
from zoo_examples import LENGTHS


def test_the_zoo_is_complete():
    assert len(CASES) == 26
    assert len({case.name for case in CASES}) == 26


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_is_finite_where_there_is_a_label_and_equal_at_every_call(case, tmp_path):
    first, second = case.batch_of_one_losses(tmp_path), case.batch_of_one_losses(tmp_path)
    assert len(first) == len(LENGTHS)
    assert [i for i, loss in enumerate(first) if math.isnan(loss)] == list(case.unlabelled)
    assert torch.equal(torch.tensor(first).nan_to_num(), torch.tensor(second).nan_to_num())
    labelled = torch.tensor([loss for i, loss in enumerate(first) if i not in case.unlabelled])
    assert case.is_in_batch or labelled.std() > 0.1, "near-equal losses would hide a wrong order"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_trainer_takes_a_step(case, tmp_path):
    trainer = case.trainer(tmp_path, arguments={"max_steps": 1})
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    assert math.isfinite(trainer.train().training_loss)
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_mode_adds_no_noise(case, tmp_path):
    trainer = case.trainer(tmp_path)
    # A fresh batch each time: with label smoothing or a `compute_loss_func`, `compute_loss` takes the labels out of it.
    evaluated = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(trainer.train_dataset))
    trained = trainer.compute_loss(trainer.model.train(), trainer.data_collator(trainer.train_dataset))
    assert trained.item() == evaluated.item()
