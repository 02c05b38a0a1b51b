"""Validation of the trainer's arguments, at construction."""

from pathlib import Path
from typing import Any

import pytest

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer


def trainer(output_dir: Path, resampler: Any = None, **arguments: Any) -> RejectionSamplingTrainer:
    return RejectionSamplingTrainer(
        model=runs.bert(),
        args=runs.arguments(output_dir, **arguments),
        train_dataset=runs.rows(),
        data_collator=runs.collate,
        resampler=resampler,
    )


@pytest.mark.parametrize("resampler", [Proportional(), LossResampler, "loss"])
def test_what_is_no_resampler_is_refused(resampler, tmp_path):
    with pytest.raises(TypeError, match=r"`resampler` must be a Resampler object such as LossResampler\(\), got"):
        trainer(tmp_path, resampler)


SETTINGS = {
    "dispatch_batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        r"`dispatch_batches=True` lets the main process read every batch",
    ),
    "batch_rebalance": (
        {"train_sampling_strategy": "batch_rebalance"},
        r'`train_sampling_strategy="batch_rebalance"` fixes the batches for the whole run',
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_take_the_order_from_the_sampler_are_refused_at_construction(name, tmp_path):
    arguments, message = SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)
