"""Several tasks in one run: shares held, weights and envelope per task, in a function and in training."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingMixin, RejectionSamplingTrainer
from rsft_hf.weighted.targets import target_weights
from rsft_hf.weighted.tasks import Tasks

NAMES = ["a"] * 20 + ["b"] * 6
ROWS = [{**row, "task": name} for row, name in zip(runs.rows(), NAMES, strict=True)]


def test_each_task_has_its_share_whatever_its_losses() -> None:
    losses = torch.tensor([1.0] * 20 + [100.0, 200.0, 300.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    tasks = Tasks(NAMES)
    weights = target_weights(Proportional(), losses, {}, None, tasks)
    assert float(weights[:20].sum()) == pytest.approx(20 / 26)
    assert weights[20:].tolist() == pytest.approx([6 / 26 * share for share in (1 / 6, 2 / 6, 3 / 6, 0, 0, 0)])
    drawn = tasks.draw(weights, 26_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=26).double()
    assert counts[:20].sum() == 20_000  # held exactly
    assert torch.allclose(counts / 26_000, weights, atol=0.01)


def test_a_task_is_named_by_the_value_of_a_tensor_and_none_by_nan() -> None:
    names = [torch.tensor(1), np.int64(1), 1, float("nan"), None, torch.tensor(float("nan"))]
    assert [rows.tolist() for rows in Tasks(names).rows] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"The task of row 1 is \['a', 'b'\]. Name one task per row"):
        Tasks(["a", ["a", "b"]])


def test_a_task_whose_weights_are_0_is_drawn_uniformly() -> None:
    losses = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    weights = target_weights(Proportional(), losses, {}, None, Tasks([0, 0, 1, 1]))
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 4, 1 / 4])


def test_a_row_without_a_label_is_not_drawn_and_a_task_without_any_is_named() -> None:
    nan = float("nan")
    losses = torch.tensor([2.0, nan, 1.0, 1.0], dtype=torch.float64)
    weights = target_weights(Proportional(), losses, {}, None, Tasks(["x", "x", "y", "y"]))
    assert weights.tolist() == pytest.approx([0.5, 0, 0.25, 0.25])
    losses = torch.tensor([nan, nan, 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="No row of the task 'x' has a loss"):
        target_weights(Proportional(), losses, {}, None, Tasks(["x", "x", "y", "y"]))


@pytest.mark.parametrize("num_draws", [1, 7, 26, 100])
def test_counts_sum_to_the_draws(num_draws: int) -> None:
    tasks = Tasks([number % 3 for number in range(8)])
    counts = tasks.counts(num_draws, torch.Generator().manual_seed(1))
    assert sum(counts) == num_draws
    assert all(abs(count - num_draws * len(rows) / 8) < 1 for count, rows in zip(counts, tasks.rows, strict=True))


def test_a_small_task_is_drawn_as_often_as_its_share_says() -> None:
    tasks, generator = Tasks(["a"] * 45 + ["b"] * 3 + ["c"] * 2), torch.Generator().manual_seed(0)
    counts = torch.tensor([tasks.counts(10, generator) for _ in range(4000)]).double()
    assert counts.mean(0).tolist() == pytest.approx([9.0, 0.6, 0.4], abs=0.03)
    assert set(counts.sum(1).tolist()) == {10}
    state = generator.get_state()
    assert tasks.counts(100, generator) == [90, 6, 4]
    assert torch.equal(generator.get_state(), state)  # whole shares need no chance


def test_draws_repeat_with_the_seed() -> None:
    tasks = Tasks(["a"] * 3 + ["b"] * 5 + ["c"] * 2)
    weights = torch.ones(10, dtype=torch.float64)
    draws = [tasks.draw(weights, 50, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("is_dataset", [True, False])
def test_every_epoch_of_a_run_holds_the_shares(tmp_path: Path, is_dataset: bool) -> None:
    rows: Any = datasets.Dataset.from_list(ROWS) if is_dataset else ROWS
    made = LossResampler(Proportional(), task_column="task")
    collate = lambda rows: runs.collate([{k: v for k, v in row.items() if k != "task"} for row in rows])  # noqa: E731
    runs.trained(RejectionSamplingTrainer, tmp_path, resampler=made, train_dataset=rows, data_collator=collate)
    table = made.table().to_pandas()
    for _, epoch in table.groupby("epoch"):
        assert epoch["count"][:20].sum() == 20
        assert epoch["weight"][:20].sum() == pytest.approx(20 / 26)
        assert epoch["weight"].nunique() > 10


def test_no_such_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` has no column 'kind'; it has"):
        runs.trained(RejectionSamplingTrainer, tmp_path, resampler=LossResampler(task_column="kind"))


class Distilling(RejectionSamplingMixin, hf.Trainer):
    """Half of the loss is the teacher's: what a user writes in `compute_loss`."""

    teacher = runs.bert(initializer_range=0.5).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            targets = self.teacher(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits.softmax(
                -1
            )
        loss = 0.5 * outputs.loss + 0.5 * torch.nn.functional.cross_entropy(outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss


def test_distillation_in_compute_loss_is_weighted_by_its_own_loss(tmp_path: Path) -> None:
    """The loss of a row is that of the teacher and the label, as a batch of that row alone gives it."""
    made = LossResampler(Proportional(), losses="forward")
    runs.trained(Distilling, tmp_path, resampler=made, args={"num_train_epochs": 1, "learning_rate": 0.0})
    model, found = runs.bert().eval(), made.table()["loss"][:]
    for row, loss in zip(runs.rows(), found, strict=True):
        batch = runs.collate([row])
        with torch.no_grad():
            expected = Distilling.compute_loss(Distilling.__new__(Distilling), model, batch)
        assert loss == pytest.approx(float(expected), rel=1e-4)
