"""The comparison with transformers' own Trainer tests, on a test file of the same kind."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trainer_tests.py"

TESTS = """
import tempfile

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.a * x, labels)}


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(LIST)


LIST = [{"x": float(number), "labels": 2.0 * number} for number in range(8)]


def trained(rows, **args):
    settings = TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True, disable_tqdm=True, **args)
    trainer = Trainer(Line(), settings, train_dataset=rows)
    return trainer, trainer.train()


def test_trains():
    trainer, output = trained(LIST, num_train_epochs=2)
    assert output.global_step == 2
    assert type(trainer).__name__ == "Trainer"


def test_iterable_data():
    assert trained(Rows(), max_steps=2)[1].global_step == 2


def test_only_the_original():
    assert transformers.Trainer.__mro__[1] is object


def test_fails_anyhow():
    assert False
"""


def test_tests_that_pass_with_plain_trainer_alone_are_listed(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "test_of_another_version.py").write_text("from transformers import NoLonger", encoding="utf-8")
    command = [sys.executable, SCRIPT, "--json", tmp_path / "found.json", tmp_path, "--", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passing"] == 3
    names = sorted(name.rpartition(".")[2] for name in found["differing"])
    assert names == ["test_iterable_data", "test_only_the_original"]
    assert "whose rows cannot be chosen by index" in str(found["differing"])


def test_a_run_without_a_passing_test_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_of_another_version.py").write_text("from transformers import NoLonger", encoding="utf-8")
    command = [sys.executable, SCRIPT, tmp_path, "--", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 1
    assert "No test of" in done.stderr
