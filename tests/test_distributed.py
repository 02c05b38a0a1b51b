"""Two processes: equal to plain Trainer's two processes, to each other, and to the measurement of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import distributed_runs
import runs
from rsft_hf import measure_losses


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """Results of each of two gloo processes, from one launch."""
    output_dir = tmp_path_factory.mktemp("two_processes")
    script = Path(__file__).parent / "helpers" / "distributed_runs.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, script, output_dir], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output_dir / f"rank_{rank}.json").read_text()) for rank in (0, 1)], output_dir


@pytest.mark.parametrize("source", ["forward", "training"])
def test_equal_weights_on_two_processes_are_plain_trainer(ranks, source: str) -> None:
    for rank in ranks[0]:
        assert rank[f"equal_{source}"]["parameters"] == rank["plain"]["parameters"]
        assert rank[f"equal_{source}"]["losses"] == rank["plain"]["losses"]


def test_the_two_processes_draw_the_same_rows(ranks) -> None:
    first, second = ranks[0]
    for name in ("weighted_forward", "weighted_training"):
        assert first[name]["indices"] == second[name]["indices"]
        assert first[name]["parameters"] == second[name]["parameters"] != first["plain"]["parameters"]
        assert first[name]["table"] == second[name]["table"]


def test_both_processes_fill_the_ledger(ranks) -> None:
    """Epoch 0 reads all 26 rows, 13 a process: in epoch 1 every row has a loss of its own."""
    table = ranks[0][0]["weighted_training"]["table"]
    losses = [loss for epoch, loss in zip(table["epoch"], table["loss"], strict=True) if epoch == 1]
    assert len(losses) == runs.NUM_ROWS
    assert min(losses) > 0  # -1 stands for unknown


def test_the_label_report_reads_the_labels_of_both_processes(ranks) -> None:
    first, second = (rank["weighted_training"]["report"] for rank in ranks[0])
    assert first == second
    labels = [row["labels"] for row in runs.rows()]
    judged = set(first["given_label"])  # classes that the model never half learnt are left out, whole
    assert judged
    assert sorted(first["row"]) == [row for row, label in enumerate(labels) if label in judged]
    assert [labels[row] for row in first["row"]] == first["given_label"]
    if runs.RESUMES_PROCESSES:
        assert ranks[0][0]["resumed_training"]["report"]["margin"] == pytest.approx(first["margin"], rel=1e-6)


@pytest.mark.skipif(not runs.RESUMES_PROCESSES, reason="transformers before 5.18 cannot resume processes on a CPU")
@pytest.mark.parametrize("source", ["forward", "training"])
def test_two_processes_resume_exactly(ranks, source: str) -> None:
    for rank in ranks[0]:
        assert rank[f"resumed_{source}"]["parameters"] == rank[f"weighted_{source}"]["parameters"]


@pytest.mark.parametrize("name", ["llama_lm", "llama_label_smoothing"])
def test_tokens_of_a_window_are_counted_by_factor_over_both_processes(ranks, name: str) -> None:
    for rank in ranks[0]:
        (loss,) = rank[f"corrected_{name}"]["losses"]
        assert loss == pytest.approx(rank[f"corrected_{name}"]["expected"], rel=1e-5)


def test_two_processes_draw_the_same_labels_and_those_of_one(ranks, tmp_path: Path) -> None:
    first, second = (rank["predictive"] for rank in ranks[0])
    assert first == second
    assert any(label != -100 for label in first["labels"])
    proposed = [line for line in first["stored"] if line["round"] == 0]  # by the weights of the start
    expected = [line for line in distributed_runs.predictive(tmp_path)["stored"] if line["round"] == 0]
    assert len(proposed) == 35
    for ours, theirs in zip(proposed, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_two_processes_measure_what_one_does(ranks, tmp_path: Path) -> None:
    trainer = hf.Trainer(runs.bert(), runs.arguments(tmp_path), runs.collate, runs.rows())
    expected = measure_losses(trainer, batch_size=4).losses
    for rank in ranks[0]:
        torch.testing.assert_close(torch.tensor(rank["measured"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_two_processes_is_refused_by_one(ranks, tmp_path: Path) -> None:
    from rsft_hf import RejectionSamplingTrainer

    checkpoint = ranks[1] / "weighted_forward" / "checkpoint-10"
    with pytest.raises(ValueError, match="processes: 2 in the checkpoint, 1 now"):
        runs.trained(
            RejectionSamplingTrainer, tmp_path, resume=str(checkpoint), args={"per_device_train_batch_size": 2}
        )
