"""What cannot be trained on is refused by a message that names it, before the first step.

What the trainer can see is refused at construction; what needs the losses is refused in `train()`, where a callback
holds that no step has begun. Wrong options and checkpoints of other runs have files of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
import transformers as hf

from rsft_hf import ClassBalanced, LossResampler, Proportional, RejectionSamplingTrainer
from rsft_hf.weighted import Entropy, ExampleStatistics, Learnability, NotPerExampleError
from zoo import CASES

CASE = {case.name: case for case in CASES}


class StepCounter(hf.TrainerCallback):
    def __init__(self):
        self.num_steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.num_steps += 1


def trainer(output_dir: Path, resampler: Any = None, dataset: Any = None, case: str = "bert_single_label", **arguments):
    """Seven rows in batches of three, for one epoch; the trainer's `counter` counts its steps."""
    parts = CASE[case].build()
    parts = parts if dataset is None else replace(parts, dataset=dataset)
    counter = StepCounter()
    made = replace(CASE[case], build=lambda: parts).trainer(
        output_dir,
        RejectionSamplingTrainer,
        {"num_train_epochs": 1, **arguments},
        resampler=resampler,
        callbacks=[counter],
    )
    made.counter = counter
    return made


def assert_refused_before_the_first_step(made: RejectionSamplingTrainer, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        made.train()
    assert made.counter.num_steps == 0


def rows() -> list[dict[str, Any]]:
    return CASE["bert_single_label"].build().dataset


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows())


class WithoutLength(torch.utils.data.Dataset):
    def __getitem__(self, row: int) -> dict[str, Any]:
        return rows()[row]


@dataclass(frozen=True)
class Returns:
    """A rule that multiplies by a factor and returns another shape, if told to."""

    factor: float = 1.0
    shape: tuple[int, ...] = (-1,)
    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        return (self.factor * scores).reshape(self.shape)


@dataclass(frozen=True)
class FailsOnRealLosses:
    """A rule that no trial on evenly spaced losses shows to be wrong."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        return scores if bool((scores.diff().diff().abs() < 1e-9).all()) else scores - 100


def test_the_same_trainer_with_good_input_takes_its_steps(tmp_path):
    made = trainer(tmp_path, LossResampler(Returns()))
    made.train()
    assert made.counter.num_steps == 3  # 7 rows: 3, 3 and 1


DATASETS = {
    "iterable": (Stream, r"`train_dataset` is a Stream, whose rows cannot be chosen by index"),
    "streamed": (
        lambda: datasets.Dataset.from_list(rows()).to_iterable_dataset(),
        r"`train_dataset` is a IterableDataset, whose rows cannot be chosen by index. .* without `streaming=True`",
    ),
    "without_length": (WithoutLength, r"`train_dataset` \(WithoutLength\) has no length. Give it a `__len__`"),
    "empty_list": (list, r"`train_dataset` has no rows. Check the split name"),
    "empty": (lambda: datasets.Dataset.from_list(rows()).select([]), r"`train_dataset` has no rows"),
    "splits": (
        lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(rows())),
        r"`train_dataset` is a DatasetDict",
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_without_rows_to_choose_from_is_refused_at_construction(name, tmp_path):
    make, message = DATASETS[name]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, dataset=make())


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


def constant_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(())


RUNS = {
    "another_shape": (
        {"resampler": LossResampler(Returns(shape=(1, 7)))},
        r"returned weights of shape \(1, 7\) for 7 losses",
    ),
    "negative": ({"resampler": LossResampler(Returns(-1.0))}, r"Returns\(factor=-1\.0.* gave row 0 the weight -0\.5"),
    "proposal": (
        {"resampler": LossResampler(proposal=torch.ones(6))},
        r"`proposal` has 6 entries for a data set of 7 rows",
    ),
    "reference_too_short": (
        {"resampler": LossResampler(Learnability(torch.zeros(6)))},
        r"`reference_losses` has 6 entries but the data set has 7",
    ),
    "reference_too_long": (
        {"resampler": LossResampler(Learnability(torch.zeros(8)))},
        r"`reference_losses` has 8 entries",
    ),
    "correction_of_smoothed_labels": (
        {"resampler": LossResampler(importance_correction=1.0), "case": "bert_label_smoothing"},
        r"`importance_correction` scales the losses of torch.nn.functional .*label smoothing.*importance_correction=0",
    ),
    "training_losses_of_a_router": (
        {"resampler": LossResampler(losses="training"), "case": "mixtral_router_loss"},
        r'losses="training" needs losses that can be read from the training step',
    ),
    "entropy_of_a_regression": (
        {"resampler": LossResampler(Entropy()), "case": "bert_regression"},
        r"Entropy, Margin and LeastConfidence need logits over at least two classes, got shape \(\d, 1\)",
    ),
    "classes_of_tags": (
        {"resampler": LossResampler(ClassBalanced()), "case": "bert_token_classification"},
        r"ClassBalanced needs one integer class per row",
    ),
    "no_labels": (
        {"dataset": [{**row, "labels": -100} for row in rows()]},
        r"None of \d+ rows spread over the data set has a loss: all labels are missing or ignored",
    ),
    "infinite_loss": (
        {
            "case": "bert_regression",
            "dataset": [
                {**row, "labels": float("inf") if number == 5 else row["labels"]}
                for number, row in enumerate(CASE["bert_regression"].build().dataset)
            ],
        },
        r"Row 5 of the training set has loss inf, which cannot be a weight. Repair or remove the row",
    ),
    "given_losses_of_another_shape": (
        {"resampler": LossResampler(per_example_loss=constant_loss)},
        r"`per_example_loss` returned shape \(\) for \d examples",
    ),
    "negative_on_real_losses": ({"resampler": LossResampler(FailsOnRealLosses())}, r"gave row 0 the weight -9\d\."),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_work_fails_before_its_first_step(name, tmp_path):
    parts, message = RUNS[name]
    assert_refused_before_the_first_step(trainer(tmp_path, **parts), ValueError, message)


def test_a_contrastive_loss_belongs_to_no_example(tmp_path):
    (case,) = [case for case in CASES if case.is_in_batch]
    message = r"The loss compares the examples of a batch with each other: 4 examples together .* alone 0\."
    for losses in ("forward", "training"):
        made = trainer(tmp_path, LossResampler(losses=losses), case=case.name)
        assert_refused_before_the_first_step(made, NotPerExampleError, message)
