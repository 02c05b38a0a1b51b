"""Ledger of training losses: averages worked out by hand, unlabelled rows, saved state."""

import math
from types import SimpleNamespace

import pytest
import torch

from rsft_hf.checkpointing import load_state, save_state
from rsft_hf.weighted.loss_source import LossLedger
from rsft_hf.weighted.losses import RowLosses

NAN = math.nan
ALONE = SimpleNamespace(num_processes=1)


def record(ledger: LossLedger, rows: list[int], losses: list[float | None], margins: list[float] | None = None) -> None:
    """Records a micro-batch; None is a row without a label."""
    is_labelled = torch.tensor([loss is not None for loss in losses])
    values = torch.tensor([0.0 if loss is None else loss for loss in losses])
    ledger.record(rows, RowLosses(values, is_labelled), None if margins is None else torch.tensor(margins))


def equal(left: torch.Tensor, right: list[float]) -> bool:
    return torch.allclose(left, torch.tensor(right, dtype=left.dtype), rtol=0, atol=1e-12, equal_nan=True)


def test_losses_are_averaged_over_epochs_by_hand():
    ledger = LossLedger(4, ema_decay=0.75)
    assert equal(ledger.losses, [NAN] * 4)
    record(ledger, [0, 2], [8.0, 4.0])
    assert equal(ledger.losses, [NAN] * 4)  # it waits for the end of the epoch
    ledger.merge(ALONE)
    assert equal(ledger.losses, [8, NAN, 4, NAN])  # the first loss counts whole
    record(ledger, [2, 1], [0.0, 5.0])
    ledger.merge(ALONE)
    assert equal(ledger.losses, [8, 5, 3, NAN])  # .75 * 4 + .25 * 0 = 3; row 0 was not seen
    ledger.merge(ALONE)
    assert equal(ledger.losses, [8, 5, 3, NAN])  # an epoch without a step changes nothing
    record(ledger, [2], [1.0])
    ledger.merge(ALONE)
    assert equal(ledger.losses, [8, 5, 2.5, NAN])  # .75 * 3 + .25 * 1


def test_without_decay_the_last_epoch_counts():
    ledger = LossLedger(2, ema_decay=0.0)
    for loss in (4.0, 1.0):
        record(ledger, [0], [loss])
        ledger.merge(ALONE)
    assert equal(ledger.losses, [1, NAN])


def test_a_row_drawn_several_times_enters_with_the_mean_of_its_losses():
    ledger = LossLedger(3, ema_decay=0.5)
    record(ledger, [1, 1, 0], [1.0, 3.0, 7.0], margins=[0.0, 1.0, -2.0])
    record(ledger, [1], [8.0], margins=[5.0])
    ledger.merge(ALONE)
    assert equal(ledger.losses, [7, 4, NAN])  # (1 + 3 + 8) / 3
    assert equal(ledger.logit_margins, [-2, 2, NAN])  # (0 + 1 + 5) / 3
    record(ledger, [1, 1], [0.0, 4.0])
    ledger.merge(ALONE)
    assert equal(ledger.losses, [7, 3, NAN])  # .5 * 4 + .5 * (0 + 4) / 2: one epoch is one step of the average
    assert equal(ledger.logit_margins, [-2, NAN, NAN])  # seen, but by a criterion without margins


def test_neither_the_order_nor_the_size_of_the_batches_matters():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, (200,), generator=generator)
    losses = torch.randint(64, (200,), generator=generator) / 8  # sums without rounding
    results = []
    for order, size in (
        (torch.arange(200), 1),
        (torch.randperm(200, generator=generator), 7),
        (torch.arange(200), 200),
    ):
        ledger = LossLedger(11, ema_decay=0.9)
        for batch in order.split(size):  # 200 batches of one: more than the queue holds
            record(ledger, rows[batch].tolist(), losses[batch].tolist())
        ledger.merge(ALONE)
        results.append(ledger.losses)
    expected = [losses[rows == row].double().mean().item() for row in range(10)] + [NAN]
    assert len(results) == 3
    assert all(equal(result, expected) for result in results)


def test_rows_without_a_label_are_known_and_have_no_loss():
    ledger = LossLedger(4, ema_decay=0.5)
    record(ledger, [0, 1, 2], [2.0, None, None])
    record(ledger, [2], [6.0])
    ledger.merge(ALONE)
    assert equal(ledger.losses, [2, NAN, 6, NAN])  # row 2 had a label once of twice: the mean is over that once
    assert ledger.is_unlabelled[1]
    assert not ledger.is_unlabelled[3]  # not seen is not unlabelled


def test_a_label_that_comes_later_makes_the_row_known():
    ledger = LossLedger(2, ema_decay=0.5)
    for loss in (None, 3.0, None):  # as when words are masked at random, and a short row has none
        record(ledger, [0], [loss])
        ledger.merge(ALONE)
    assert equal(ledger.losses, [3, NAN])


def test_a_measurement_of_all_rows_enters_the_average():
    ledger = LossLedger(3, ema_decay=0.75)
    ledger.replace(torch.tensor([4.0, 2.0, NAN], dtype=torch.float64), torch.tensor([1.0, -1.0, NAN]).double())
    assert equal(ledger.losses, [4, 2, NAN])
    assert ledger.is_unlabelled.tolist() == [False, False, True]
    ledger.replace(torch.tensor([0.0, 6.0, NAN], dtype=torch.float64), torch.tensor([2.0, 3.0, NAN]).double())
    assert equal(ledger.losses, [3, 3, NAN])  # .75 * 4 + 0, .75 * 2 + .25 * 6
    assert equal(ledger.logit_margins, [2, 3, NAN])  # margins are the last ones


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_a_loss_that_cannot_be_a_weight_is_named_with_its_row(loss):
    ledger = LossLedger(100, ema_decay=0.0)
    record(ledger, [5, 6], [1.0, None])
    record(ledger, [40, 73], [1.0, loss])
    with pytest.raises(ValueError, match=rf"Row 73 of the training set has loss {loss}, which cannot be a weight"):
        ledger.merge(ALONE)


def test_a_ledger_goes_on_from_its_state_as_if_never_stopped(tmp_path):
    def steps(ledger: LossLedger, part: int) -> LossLedger:
        if part == 0:
            record(ledger, [0, 1, 1], [3.0, 1.0, None], margins=[1.0, 2.0, 3.0])
            ledger.merge(ALONE)
            record(ledger, [1, 2], [5.0, 0.5], margins=[0.5, 0.25])  # in the middle of an epoch
        else:
            record(ledger, [2, 3], [1.5, None], margins=[0.75, 0.0])
            ledger.merge(ALONE)
        return ledger

    unbroken = steps(steps(LossLedger(5, 0.25), 0), 1)
    stopped = steps(LossLedger(5, 0.25), 0)
    save_state(tmp_path, "ledger", {}, stopped.state(ALONE))
    resumed = LossLedger(5, 0.25)
    resumed.load(load_state(tmp_path, "ledger")[1], is_main_process=True)
    steps(resumed, 1)
    # Row 1: .25 * 1 + .75 * 5; row 2: (.5 + 1.5) / 2, half of it seen before the stop.
    assert equal(resumed.losses, [3, 4, 1, NAN, NAN])
    assert equal(resumed.logit_margins, [1, 0.5, 0.5, NAN, NAN])
    for name, values in unbroken.state(ALONE).items():
        assert torch.equal(values.nan_to_num(-1), resumed.state(ALONE)[name].nan_to_num(-1)), name
    # What waited is the sum over all processes already: the others must not add it again.
    other = LossLedger(5, 0.25)
    other.load(load_state(tmp_path, "ledger")[1], is_main_process=False)
    assert equal(other.state(ALONE)["ledger_loss_sums"], [0] * 5)
    assert equal(other.losses, [3, 1, NAN, NAN, NAN])
