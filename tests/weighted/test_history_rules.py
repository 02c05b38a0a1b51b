"""Rules that read earlier epochs, in a run; and the warning of draws that collapse."""

import datasets
import pytest
import torch

import runs
from rsft_hf import Chain, LossResampler, Proportional, RejectionSamplingTrainer, Tempered
from rsft_hf.weighted import ErrorSet, ExampleStatistics, LeaveOutSuspects
from rsft_hf.weighted.history_rules import mean_excess_losses
from rsft_hf.weighted.targets import collapse


def weights_of(resampler: LossResampler, epoch: int) -> list[float]:
    return [row["weight"] for row in resampler.table() if row["epoch"] == epoch]


@pytest.mark.parametrize(("losses", "first"), [("forward", 1), ("training", 2)])
def test_suspects_are_left_out_once_two_epochs_are_measured(tmp_path, losses, first):
    """A forward pass measures before the first epoch, a training step during it."""
    resampler = LossResampler(Chain(Tempered(0.0), LeaveOutSuspects(0.25)), losses=losses)
    args = {"num_train_epochs": 4, "learning_rate": 1e-2}
    runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=resampler)
    num_left_out = runs.NUM_ROWS // 4
    for epoch in range(4):
        assert weights_of(resampler, epoch).count(0.0) == (num_left_out if epoch >= first else 0)
    out = {row for row, weight in enumerate(weights_of(resampler, 3)) if weight == 0}
    assert out == set(resampler.history.suspects(num_left_out)["row"][:])  # of the epochs before
    counts = [row["count"] for row in resampler.table() if row["epoch"] == 3]
    assert all(counts[row] == 0 for row in out)


def test_a_row_left_out_keeps_its_history_and_a_row_never_read_is_no_suspect():
    history = torch.tensor([[9.0, 1.0, float("nan"), 1.0], [float("nan"), 0.5, float("nan"), 0.75]])
    for fraction, expected in ((0.5, [0, 1, 1, 1]), (0.7, [0, 1, 1, 0])):  # of the three that were read
        weights = LeaveOutSuspects(fraction)(torch.ones(4), ExampleStatistics(loss_history=history))
        assert weights.tolist() == expected
    with pytest.raises(ValueError, match="LeaveOutSuspects needs the statistic `loss_history`, which was not measured"):
        LeaveOutSuspects()(torch.ones(4))
    with pytest.raises(ValueError, match=r"`fraction`=1\.0 must lie in \[0, 1\)"):
        LeaveOutSuspects(1.0)
    with pytest.raises(ValueError, match=r"`upweight`=0\.5 must lie in \[1, inf\)"):
        ErrorSet(0.5)


def test_the_excess_of_a_row_is_over_the_medians_of_the_epochs_that_read_it():
    """Read in the easy epoch alone, the last row has the smallest loss and yet the largest excess."""
    history = torch.tensor([[10.0, 11.0, 12.0, float("nan")], [1.0, 1.0, 1.0, 5.0]])
    assert mean_excess_losses(history).tolist() == [-0.5, 0.0, 0.5, 4.0]
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights = LeaveOutSuspects(0.25)(scores, ExampleStatistics(loss_history=history))  # one of four
    assert weights.tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="LeaveOutSuspects"):
        LeaveOutSuspects(0.25)(-scores, ExampleStatistics(loss_history=history))


def test_a_row_is_wrong_if_its_margin_is_negative_and_not_at_0():
    margins = torch.tensor([[-0.1, 0.0, 0.1]])
    assert ErrorSet(3.0)(torch.zeros(3), ExampleStatistics(margin_history=margins)).tolist() == [3, 1, 1]
    with pytest.raises(ValueError, match="ErrorSet needs the statistic `margin_history`"):
        ErrorSet()(torch.zeros(3))


def test_an_error_set_without_margins_is_refused():
    nan = float("nan")
    with pytest.raises(ValueError, match=r"ErrorSet reads the margin of each row's label, and this loss gives none"):
        ErrorSet()(torch.zeros(2), ExampleStatistics(margin_history=torch.tensor([[nan, nan], [1.0, 1.0]])))
    margins = torch.tensor([[-1.0, nan]])  # the second row was not read
    assert ErrorSet(3.0)(torch.zeros(2), ExampleStatistics(margin_history=margins)).tolist() == [3, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_error_set_is_that_of_the_first_measured_epoch(tmp_path, smoothing):
    resampler = LossResampler(ErrorSet(5.0), losses="training")
    args = {"num_train_epochs": 4, "learning_rate": 1e-2, "label_smoothing_factor": smoothing}
    runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=resampler)
    margins = torch.tensor([row["margin"] for row in resampler.table() if row["epoch"] == 1])
    expected = torch.where(margins < 0, 5.0, 1.0)
    assert 0 < int((margins < 0).sum()) < runs.NUM_ROWS
    for epoch in (1, 2, 3):
        assert weights_of(resampler, epoch) == pytest.approx((expected / expected.sum()).tolist(), rel=1e-6)


@pytest.mark.parametrize("losses", ["forward", "training"])
def test_the_error_set_is_found_at_the_end_of_warm_up(tmp_path, losses):
    made = LossResampler(ErrorSet(5.0), losses=losses, warmup_epochs=3)
    runs.trained(RejectionSamplingTrainer, tmp_path, resampler=made, args={"num_train_epochs": 5})
    table = made.table().to_pandas().set_index("epoch")
    margins, weights = table.loc[3, "margin"].to_numpy(), table.loc[4, "weight"].to_numpy()
    assert 0 < (margins < 0).sum() < len(margins)
    assert ((weights > 1.5 * weights.min()) == (margins < 0)).all()


@pytest.mark.parametrize("rule", [Chain(Tempered(0.0), LeaveOutSuspects(0.25)), ErrorSet()], ids=repr)
def test_a_resumed_run_draws_by_the_same_history(tmp_path, rule):
    args = {"num_train_epochs": 4, "save_strategy": "epoch", "learning_rate": 1e-2}
    made = lambda: LossResampler(rule, losses="training")  # noqa: E731
    whole = runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=made())
    middle = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[1]
    cut = runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=made(), resume=str(middle))
    assert runs.largest_difference(whole, cut) == 0.0
    assert str(whole.resampler.table().to_dict()) == str(cut.resampler.table().to_dict())


def one_row(losses: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(losses)) == 3, 1e6, 1.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "have collapsed" in record.message]


def test_draws_of_few_rows_are_warned_of_once(tmp_path, caplog):
    runs.trained(RejectionSamplingTrainer, tmp_path, resampler=LossResampler(one_row))
    (message,) = warnings(caplog)
    assert f"of epoch 0 have collapsed: an effective sample size of 1.0 of {runs.NUM_ROWS} rows" in message
    caplog.clear()
    for rule in (None, Proportional()):
        runs.trained(RejectionSamplingTrainer, tmp_path, resampler=LossResampler(rule))
    assert warnings(caplog) == []


def test_draws_of_one_class_are_warned_of(tmp_path, caplog):
    dataset = datasets.Dataset.from_list(runs.rows())
    is_first = torch.tensor(dataset["labels"][:]) == dataset["labels"][0]
    share = float(is_first.double().mean())
    resampler = LossResampler(lambda losses: is_first.double())
    runs.trained(RejectionSamplingTrainer, tmp_path, train_dataset=dataset, resampler=resampler)
    (message,) = warnings(caplog)
    assert f"100% of the draws are of class {dataset['labels'][0]}, which has {share:.0%} of the rows" in message


def test_few_draws_of_a_rare_class_are_no_collapse():
    labels = (torch.arange(1000) < 10).long()
    rows = torch.arange(500, 1000)
    assert collapse(torch.ones(1000), rows, labels) is None  # 5 draws of class 1 were to be expected
    assert (
        collapse(torch.ones(1000), rows.repeat(4), labels)
        == "100% of the draws are of class 0, which has 99% of the rows"
    )
    assert collapse(torch.ones(1000), rows, torch.full((1000,), -100)) is None


def test_draws_of_labels_that_are_probably_wrong_are_a_collapse():
    rows, errors = torch.arange(100), torch.where(torch.arange(100) < 10, 0.9, 0.02)
    errors[99] = float("nan")
    drawn = torch.cat([torch.arange(10).repeat(3), torch.arange(10, 80)])  # 30 of 100: .3 * .9 + .7 * .02 = .28
    assert collapse(torch.ones(100), drawn, None, errors) == (
        "28% of the draws have a label that is probably wrong, and 11% of the rows"
    )
    assert collapse(torch.ones(100), rows, None, errors) is None
    assert collapse(torch.ones(100), drawn, None, errors / 2) is None
