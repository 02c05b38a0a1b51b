"""History of the measured epochs: table of losses and weights, suspect rows, saved state."""

import math

import pytest
import torch
import transformers as hf

import runs
from rsft_hf import LossResampler, RejectionSamplingTrainer
from rsft_hf.checkpointing import load_state, save_state
from rsft_hf.weighted.history import EpochHistory

NAN = math.nan


def history_of(losses: list[list[float]], indices: list[list[int]] | None = None) -> EpochHistory:
    history = EpochHistory()
    for epoch, row in enumerate(losses):
        values = torch.tensor(row, dtype=torch.float64)
        drawn = torch.tensor(indices[epoch] if indices else [0])
        history.append(epoch, values, -values, values.nan_to_num(0.0) + 1, drawn)
    return history


def test_table_by_hand():
    history = history_of([[NAN, NAN, NAN], [1.0, 0.0, NAN]], [[0, 1, 2, 2], [0, 0, 0, 1]])
    table = history.table()
    assert table.column_names == ["epoch", "row", "loss", "margin", "weight", "count"]
    assert table["epoch"][:] == [0, 0, 0, 1, 1, 1]
    assert table["row"][:] == [0, 1, 2, 0, 1, 2]
    assert table["count"][:] == [1, 1, 2, 3, 1, 0]
    assert table["weight"][:] == pytest.approx([1 / 3] * 3 + [2 / 4, 1 / 4, 1 / 4])
    assert [str(loss) for loss in table["loss"][:]] == ["nan"] * 3 + ["1.0", "0.0", "nan"]
    assert table["margin"][3:5] == [-1, 0]


def test_suspects_by_hand():
    # Medians 2 and 1. Excess: row 0 (0 + -1) / 2, row 1 (3 + 5) / 2, row 2 (-1 + 0) / 2; row 3 was never measured.
    history = history_of([[NAN] * 4, [2.0, 5.0, 1.0, NAN], [0.0, 6.0, 1.0, NAN]])
    suspects = history.suspects(2)
    assert suspects["row"][0] == 1
    assert suspects["excess_loss"][:] == [4, -0.5]
    assert suspects["losses"][0] == [5, 6]  # the epoch before the first measurement is left out
    assert suspects["margins"][0] == [-5, -6]
    assert len(history.suspects(100)) == 3


def test_each_epoch_keeps_the_rows_that_it_measured_itself():
    history = EpochHistory()
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for epoch, is_fresh in enumerate(([True, True, False], [False, True, True])):
        values = losses[epoch]
        history.append(epoch, values, -values, values, torch.tensor([0]), torch.tensor(is_fresh))
    current = torch.tensor([7.0, 8.0, 9.0])
    measured = history.measured(current, -current, torch.tensor([True, False, False]))
    expected = torch.tensor([[1.0, 2.0, NAN], [NAN, 5.0, 6.0], [7.0, NAN, NAN]])
    torch.testing.assert_close(measured["loss_history"], expected, equal_nan=True)
    torch.testing.assert_close(measured["margin_history"], -expected, equal_nan=True)


def test_suspects_finds_the_planted_rows_worst_first():
    generator = torch.Generator().manual_seed(0)
    falling = [(4 - epoch) * torch.rand(200, generator=generator) for epoch in range(4)]
    planted = {150: 9.0, 3: 7.0, 77: 5.0}
    for losses in falling:
        for row, loss in planted.items():
            losses[row] = loss
    history = history_of([losses.tolist() for losses in falling])
    assert history.suspects(3)["row"][:] == [150, 3, 77]


def test_history_goes_on_from_its_state(tmp_path):
    history = history_of([[1.0, NAN], [0.5, 2.0]], [[0, 0, 1], [1, 1, 1]])
    save_state(tmp_path, "history", {"epochs": history.epochs}, history.state())
    numbers, tensors = load_state(tmp_path, "history")
    resumed = EpochHistory()
    resumed.load(numbers["epochs"], tensors)
    for one in (history, resumed):
        one.append(2, torch.zeros(2), torch.zeros(2), torch.ones(2), torch.tensor([0]))
    assert str(resumed.table().to_dict()) == str(history.table().to_dict())
    assert resumed.table()["epoch"][:] == [0, 0, 1, 1, 2, 2]
    empty = EpochHistory()
    empty.load([], {})
    assert empty.state() == {}


def test_a_history_without_epochs_says_so():
    with pytest.raises(RuntimeError, match=r"Nothing has been resampled yet. Call `table\(\)` after"):
        EpochHistory().table()
    for history in (EpochHistory(), history_of([[NAN, NAN]])):
        with pytest.raises(RuntimeError, match=r"No epoch has been measured yet"):
            history.suspects(5)
    with pytest.raises(ValueError, match=r"`num_suspects`=0 must be an integer of at least 1"):
        history_of([[1.0]]).suspects(0)


@pytest.mark.parametrize("logging", ["steps", "no"])
def test_an_observed_plain_run_counts_all_of_its_epochs(tmp_path, logging, caplog):
    """Uniform epochs with recorded losses: plain Trainer bit for bit, and the last epoch is among the evidence."""
    plain = runs.trained(hf.Trainer, tmp_path, args={"logging_strategy": logging})
    for num_epochs in (1, 3):
        resampler = LossResampler(losses="training", warmup_epochs=num_epochs)
        args = {"num_train_epochs": num_epochs, "logging_strategy": logging}
        ours = runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=resampler)
        suspects = resampler.suspects(runs.NUM_ROWS).to_list()
        assert len(suspects) == runs.NUM_ROWS
        assert {len(row["losses"]) for row in suspects} == {num_epochs}
    assert runs.largest_difference(plain, ours) == 0.0
    assert not [record for record in caplog.records if "No epoch of this run is resampled" in record.message]
    # What an epoch more would have found: the ledger's line of the last epoch.
    source = resampler.source
    source.ledger.merge(ours.accelerator)
    last = {row["row"]: row["losses"][-1] for row in suspects}
    assert [last[row] for row in range(runs.NUM_ROWS)] == pytest.approx(source.ledger.losses.tolist(), rel=1e-6)
