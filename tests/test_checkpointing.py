"""Validation of a checkpoint against the resuming run, before the first step; incomplete checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer
from rsft_hf.weighted import Entropy
from zoo import CASES
from zoo_examples import Example

(CASE,) = [case for case in CASES if case.name == "bert_single_label"]
LAST = "checkpoint-2"


def train(
    output_dir: Path,
    resume: str | bool | None = None,
    resampler: LossResampler | None = None,
    rows: list[Example] | None = None,
    **arguments: Any,
) -> int:
    """Trains on seven rows in batches of three for two epochs, with a checkpoint after every step.

    Returns the number of steps begun; an error carries it as `num_steps`.
    """
    parts = CASE.build()
    parts = parts if rows is None else replace(parts, dataset=rows)
    counter = runs.StepCounter()
    trainer = replace(CASE, build=lambda: parts).trainer(
        output_dir,
        RejectionSamplingTrainer,
        {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **arguments},
        resampler=LossResampler(Proportional()) if resampler is None else resampler,
        callbacks=[counter],
    )
    try:
        trainer.train(resume)
    except ValueError as error:
        error.num_steps = counter.num_steps
        raise
    return counter.num_steps


def assert_refused(message: str, output_dir: Path, resume: str | bool, **parts: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(output_dir, resume, **parts)
    assert caught.value.num_steps == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with two checkpoints, in the middle of its first epoch."""
    folder = tmp_path_factory.mktemp("saved")
    assert train(folder, max_steps=2) == 2
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "run")


def other_rows() -> list[Example]:
    """The same rows, one of them with another label."""
    return [{**row, "labels": (row["labels"] + (number == 3)) % 3} for number, row in enumerate(CASE.build().dataset)]


def test_the_same_run_goes_on(run):
    assert train(run, str(run / LAST)) == 4  # two epochs of three steps, less two
    assert train(run, True) == 0  # from its own end: nothing is left to do


OTHER_RUNS = {
    "other_size": (
        {"rows": CASE.build().dataset[:6]},
        r"rows of the training set: 7 in the checkpoint, 6 now; draws per epoch: 7 in the checkpoint, 6 now",
    ),
    "other_rows": ({"rows": other_rows()}, r"\(fingerprint of the training set: \w+ in the checkpoint, \w+ now\)"),
    "other_order": ({"rows": CASE.build().dataset[::-1]}, r"\(fingerprint of the training set: \w+ in"),
    "other_draws": (
        {"resampler": LossResampler(num_draws=5)},
        r"\(draws per epoch: 7 in the checkpoint, 5 now\)",
    ),
    "other_batch_size": (
        {"per_device_train_batch_size": 2},
        r"\(rows per micro-batch and process: 3 in the checkpoint, 2 now\)",
    ),
    "other_accumulation": (
        {"gradient_accumulation_steps": 4},
        r"\(gradient accumulation steps: 1 in the checkpoint, 4 now\)",
    ),
    "other_strategy": (
        {"train_sampling_strategy": "sequential"},
        r"\(train_sampling_strategy: random in the checkpoint, sequential now\)",
    ),
    "several": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        r"rows per micro-batch and process: 3 in .*, 1 now; gradient accumulation steps: 1 in .*, 2 now",
    ),
    "other_losses": (
        {"resampler": LossResampler(losses="training")},
        r'saved with losses="forward" and this run has losses="training"',
    ),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_with_both_numbers(name, run):
    assert len(OTHER_RUNS) == 9
    parts, message = OTHER_RUNS[name]
    assert_refused(message, run, str(run / LAST), **parts)
    assert_refused(message, run, True, **parts)


def test_a_checkpoint_of_another_number_of_processes_is_refused(run):
    progress = run / LAST / "resampler" / "progress.json"
    numbers = json.loads(progress.read_text())
    assert numbers["settings"]["processes"] == 1
    numbers["settings"]["processes"] = 8
    progress.write_text(json.dumps(numbers))
    message = rf"Cannot resume from {run / LAST}: .*\(processes: 8 in the checkpoint, 1 now\)"
    assert_refused(message, run, str(run / LAST))


def test_a_checkpoint_of_a_plain_trainer_is_refused(tmp_path):
    parts = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    CASE.trainer(tmp_path, arguments=parts).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert_refused(r"holds no progress.json .*by a trainer without a resampler", tmp_path, str(checkpoint))
    assert_refused(r"No valid checkpoint found in output directory .* of 1 checkpoint folders", tmp_path, True)


def test_a_checkpoint_whose_resampler_was_deleted_is_refused_by_name_and_skipped_unnamed(run):
    shutil.rmtree(run / LAST / "resampler")
    assert_refused(r"resampler holds no progress.json and progress.safetensors", run, str(run / LAST))
    assert train(run, True) == 5  # from checkpoint-1
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder / "resampler")
    assert_refused(r"No valid checkpoint found in output directory .*Call train\(\) without", run, True)


@pytest.mark.parametrize("file", ["weighted.json", "weighted.safetensors", "progress.safetensors"])
def test_a_checkpoint_with_a_file_missing_is_refused_by_name(file, run):
    (run / LAST / "resampler" / file).unlink()
    stem = file.partition(".")[0]
    assert_refused(rf"resampler holds no {stem}\.json and {stem}\.safetensors", run, str(run / LAST))


def test_a_damaged_progress_file_is_skipped_unnamed_and_refused_with_its_folder(run):
    progress = run / LAST / "resampler" / "progress.json"
    progress.write_text(progress.read_text()[:20])
    assert_refused(str(run / LAST), run, str(run / LAST))
    assert train(run, True) == 5


def test_no_checkpoint_at_all_is_refused(tmp_path):
    assert_refused(r"No valid checkpoint found in output directory .* of 0 checkpoint folders", tmp_path, True)


@pytest.mark.parametrize("every_n_epochs", [1, 4])
def test_a_rule_that_needs_what_the_checkpoint_has_not_measured_still_runs(every_n_epochs, run):
    # The epoch goes on with its rows; the next one needs the new rule's statistics, due or not.
    resampler = LossResampler(Entropy(), every_n_epochs=every_n_epochs)
    assert train(run, str(run / LAST), resampler=resampler) == 4
