"""Validation of `LossResampler`: options at construction, data and losses before the first step."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import runs
from rsft_hf import Chain, ClassBalanced, LossResampler, Proportional, RejectionSamplingTrainer, Tempered
from rsft_hf.weighted import Entropy, ExampleStatistics, Learnability, Margin, NotPerExampleError
from zoo import CASES

CASE = {case.name: case for case in CASES}


class Silent:
    """Callable object without `requires`."""

    def __call__(self, scores, statistics=None):
        return scores

    def __repr__(self):
        return "Silent()"  # names a case: it must be equal in every process


@dataclass(frozen=True)
class Softer(Tempered):
    """User-defined rule that inherits everything."""

    alpha: float = 0.25


OPTIONS = [
    ({"num_draws": 0}, ValueError, r"`num_draws`=0 must be an integer between 1 and 2147483648"),
    ({"num_draws": -1}, ValueError, r"`num_draws`=-1 must be an integer between 1 and 2147483648"),
    ({"num_draws": 2**31 + 1}, ValueError, r"`num_draws`=2147483649 must be an integer between 1 and 2147483648"),
    ({"num_draws": -0.5}, TypeError, r"`num_draws`=-0\.5 must be an integer between"),
    ({"num_draws": 5.0}, TypeError, r"`num_draws`=5\.0 must be an integer between"),
    ({"weighting": Proportional}, TypeError, r"`weighting` must be a rule such as Proportional\(\).*<class"),
    ({"weighting": "loss"}, TypeError, r"`weighting` must be a rule such as Proportional\(\).*'loss'"),
    ({"weighting": Silent()}, TypeError, r"does not say which statistics it reads.*`requires: ClassVar"),
    ({"losses": "both"}, ValueError, r"`losses`='both' must be \"forward\" or \"training\""),
    ({"weighting": Entropy(), "losses": "training"}, ValueError, r"Entropy\(\) reads \['entropies'\], which only"),
    ({"weighting": Chain(Margin(), Tempered()), "losses": "training"}, ValueError, r"reads \['margins'\]"),
    ({"importance_correction": 1.5}, ValueError, r"`importance_correction`=1\.5 must lie in \[0, 1\]"),
    ({"importance_correction": -0.1}, ValueError, r"`importance_correction`=-0\.1 must lie in \[0, 1\]"),
    ({"importance_correction": float("nan")}, ValueError, r"`importance_correction`=nan must lie in \[0, 1\]"),
    ({"ema_decay": 1.0}, ValueError, r"`ema_decay`=1\.0 must lie in \[0, 1\)"),
    ({"warmup_epochs": -1}, ValueError, r"`warmup_epochs`=-1 must be an integer of at least 0"),
    ({"uniform_final_epochs": 0.5}, TypeError, r"`uniform_final_epochs`=0\.5 must be an integer of at least 0"),
    ({"every_n_epochs": 0}, ValueError, r"`every_n_epochs`=0 must be an integer of at least 1"),
    ({"batch_size": 0}, ValueError, r"`batch_size`=0 must be an integer of at least 1"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[str(options) for options, *_ in OPTIONS])
def test_options_out_of_range_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        LossResampler(**options)


def test_a_rule_that_inherits_from_a_rule_is_a_rule():
    assert LossResampler(Softer()).weighting.requires == frozenset()


def trainer(output_dir: Path, resampler: Any = None, dataset: Any = None, case: str = "bert_single_label", **arguments):
    """Seven rows in batches of three, for one epoch; the trainer's `counter` counts its steps."""
    parts = CASE[case].build()
    parts = parts if dataset is None else replace(parts, dataset=dataset)
    counter = runs.StepCounter()
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


@dataclass(frozen=True)
class Returns:
    """Rule that multiplies by a factor and may return another shape."""

    factor: float = 1.0
    shape: tuple[int, ...] = (-1,)
    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        return (self.factor * scores).reshape(self.shape)


@dataclass(frozen=True)
class FailsOnRealLosses:
    """Rule that is valid on the evenly spaced losses of the trial, and invalid on real losses."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> torch.Tensor:
        return scores if bool((scores.diff().diff().abs() < 1e-9).all()) else scores - 100


def test_the_same_trainer_with_good_input_takes_its_steps(tmp_path):
    made = trainer(tmp_path, LossResampler(Returns()))
    made.train()
    assert made.counter.num_steps == 3  # 7 rows: 3, 3 and 1


def constant_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(())


RUNS = {
    "another_shape": (
        {"resampler": LossResampler(Returns(shape=(1, 7)))},
        r"returned weights of shape \(1, 7\) for 7 losses",
    ),
    "negative": ({"resampler": LossResampler(Returns(-1.0))}, r"Returns\(factor=-1\.0.* gave row 0 the weight -0\.5"),
    "function_of_another_shape": (
        {"resampler": LossResampler(lambda losses: losses.sum())},
        r"shape \(\) for 7 losses",
    ),
    "negative_function": (
        {"resampler": LossResampler(lambda losses: 1 - losses)},
        r"<lambda> \(test_resampler.py, line \d+\) gave row 4 the weight -0\.1",
    ),
    "nan_function": ({"resampler": LossResampler(lambda losses: (losses - 1).log())}, r"gave row 0 the weight nan"),
    "reference_too_short": (
        {"resampler": LossResampler(Learnability(torch.zeros(6)))},
        r"`reference_losses` has 6 entries but the data set has 7",
    ),
    "reference_too_long": (
        {"resampler": LossResampler(Learnability(torch.zeros(8)))},
        r"`reference_losses` has 8 entries",
    ),
    "correction_of_an_own_loss": (
        {"resampler": LossResampler(importance_correction=1.0), "case": "focal"},
        r"`importance_correction` scales the losses of torch.nn.functional .*an own loss.*importance_correction=0",
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
            "resampler": LossResampler(Proportional()),
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
    # A probe is as wide as the batches that are read: at most 4 rows of a scoring pass, 3 of a training step.
    for losses, width in (("forward", 4), ("training", 3)):
        message = rf"The loss compares the examples of a batch with each other: {width} examples together .* alone 0\."
        made = trainer(tmp_path, LossResampler(Proportional(), losses=losses), case=case.name)
        assert_refused_before_the_first_step(made, NotPerExampleError, message)


@pytest.mark.parametrize("source", ["forward", "training"])
@pytest.mark.parametrize(
    ("function", "rule"),
    [(lambda losses: losses, Proportional()), (lambda losses: (losses / losses.max()) ** 0.5, Tempered(0.5))],
    ids=["proportional", "tempered"],
)
def test_a_plain_function_is_the_same_rule_bit_for_bit(function, rule, source, tmp_path):
    ours, expected = (
        runs.trained(RejectionSamplingTrainer, tmp_path, resampler=LossResampler(weighting, losses=source))
        for weighting in (function, rule)
    )
    assert str(ours.resampler.table().to_dict()) == str(expected.resampler.table().to_dict())  # NaN is not equal to NaN
    assert runs.losses(ours) == runs.losses(expected)
    assert runs.largest_difference(ours, expected) == 0.0


def test_rows_are_drawn_in_proportion_to_a_plain_function(tmp_path):
    args = {"num_train_epochs": 1, "learning_rate": 0.0, "per_device_train_batch_size": 200}
    resampler = LossResampler(lambda losses: losses**2, num_draws=4_000)
    model = runs.bert(0.0, initializer_range=0.5)
    runs.trained(RejectionSamplingTrainer, tmp_path, args=args, model=model, resampler=resampler)
    table = resampler.table().to_pandas()
    excess = {}
    for exponent in (2, 1, -2):
        expected = table["loss"] ** exponent / (table["loss"] ** exponent).sum() * 4_000
        # Counts vary less than a Poisson number of the same mean, whose standard deviation is the root of the mean.
        excess[exponent] = float(((table["count"] - expected).abs() / expected**0.5).max())
    assert excess[2] < 4
    assert excess[1] > 4  # the law of the losses themselves
    assert excess[-2] > 4  # a reversed formula


def test_a_plain_function_gets_the_labelled_rows_in_data_set_order(tmp_path):
    seen = []

    def weights(losses: torch.Tensor) -> torch.Tensor:
        seen.append(losses)
        return torch.arange(1.0, len(losses) + 1)

    resampler = LossResampler(weights)
    CASE["bert_without_labels"].trainer(
        tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 1}, resampler=resampler
    ).train()
    losses = torch.tensor(resampler.table()["loss"][:])
    assert seen[-1].dtype == torch.float64
    assert torch.equal(seen[-1].float(), losses[[0, 1, 3, 4, 6]])  # rows 2 and 5 have no label
    assert resampler.table()["weight"][:] == pytest.approx([1 / 15, 2 / 15, 0, 3 / 15, 4 / 15, 0, 5 / 15])


@pytest.mark.parametrize(
    ("options", "num_epochs", "is_warned"),
    [
        ({"warmup_epochs": 1, "uniform_final_epochs": 1}, 2, True),
        ({"losses": "training"}, 1, True),
        ({"losses": "training", "uniform_final_epochs": 1}, 2, True),
        ({"warmup_epochs": 1, "uniform_final_epochs": 1}, 3, False),
        ({"losses": "training"}, 2, False),
        ({}, 1, True),
        ({"weighting": Proportional()}, 1, False),
    ],
)
def test_a_run_whose_epochs_are_all_uniform_says_so(tmp_path, caplog, options, num_epochs, is_warned):
    args = {"num_train_epochs": num_epochs}
    ours = runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=LossResampler(**options))
    lines = [record.getMessage() for record in caplog.records if "No epoch of this run is resampled" in record.message]
    assert len(lines) == is_warned
    weights = {epoch: set() for epoch in range(num_epochs)}
    for row in ours.resampler.table():
        weights[row["epoch"]].add(row["weight"])
    assert all(len(values) == 1 for values in weights.values()) == is_warned


def test_num_draws_may_be_a_fraction_of_the_rows(tmp_path):
    resampler = LossResampler(num_draws=0.4)
    ours = runs.trained(RejectionSamplingTrainer, tmp_path, args={"num_train_epochs": 2}, resampler=resampler)
    assert [sum(row["count"] for row in resampler.table() if row["epoch"] == epoch) for epoch in (0, 1)] == [
        round(0.4 * runs.NUM_ROWS)
    ] * 2
    assert ours.num_examples(ours.get_train_dataloader()) == round(0.4 * runs.NUM_ROWS)
