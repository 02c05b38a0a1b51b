"""Isolation of measurements: what a loss writes into its trainer is taken back."""

from collections import defaultdict, deque
from pathlib import Path

import torch
import transformers as hf

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingMixin
from rsft_hf.isolation import preserved_trainer_state


class Logging(RejectionSamplingMixin, hf.Trainer):
    """Keeps the losses of its steps, as a user's class for plots does."""

    def __init__(self, *args, **kwargs) -> None:
        self.seen, self.by_mode, self.last = [], defaultdict(lambda: defaultdict(list)), deque(maxlen=2)
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss[0] if isinstance(loss, tuple) else loss
        self.seen.append(value.detach())
        self.by_mode["train"]["losses"].append(value.detach())
        self.last.append(value.detach())
        return loss


def test_tensors_in_the_lists_of_a_trainer_are_those_of_its_steps(tmp_path: Path) -> None:
    for resampler in (LossResampler(), LossResampler(Proportional())):
        trainer = runs.trained(Logging, tmp_path, resampler=resampler)
        assert len(trainer.seen) == len(trainer.by_mode["train"]["losses"]) == len(runs.losses(trainer))
        assert list(trainer.last) == trainer.seen[-2:]


def test_containers_keep_their_identity_and_data_sets_are_not_copied(tmp_path: Path) -> None:
    trainer = hf.Trainer(runs.bert(), runs.arguments(tmp_path), runs.collate, runs.rows())
    trainer.counts, trainer.names, inner = {"a": [torch.ones(1)]}, {"x"}, trainer.train_dataset
    counts, names = trainer.counts, trainer.names
    with preserved_trainer_state(trainer):
        trainer.counts["a"].append(2)
        trainer.counts["b"] = 3
        trainer.train_dataset.append({})
    assert trainer.counts is counts
    assert (counts, names) == ({"a": [torch.ones(1)]}, {"x"})
    assert trainer.train_dataset is inner
    assert len(inner) == runs.NUM_ROWS + 1
