"""The sentiment experiment from end to end: three arms, label noise, resume, and its errors, on a few rows."""

import csv
import json

import datasets
import pytest

from experiments import sentiment
from experiments.builtin.reviews import make_reviews
from experiments.harness.arguments import ExperimentError

NUM_ROWS = 40
BATCH_SIZE = 8


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reviews")
    for split, rows in make_reviews(num_train=60, num_test=20).items():
        datasets.Dataset.from_list(rows).to_csv(str(folder / f"{split}.csv"))
    return str(folder)


@pytest.fixture
def run(reviews, tmp_path):
    """Calls the experiment on two epochs of forty rows; more options may follow."""
    options = {
        "dataset": reviews,
        "model_name_or_path": "builtin",
        "group_column": "phenomenon",
        "max_train_samples": NUM_ROWS,
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH_SIZE,
        "eval_steps": 5,
        "output_dir": tmp_path / "out",
    }
    fixed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return lambda *more: sentiment.main([*fixed, "--seeds", "1", *map(str, more)])


def test_three_arms_one_report(run, tmp_path, capsys):
    results = run("--label_noise", 0.25, "--seeds", 1, 2, "--num_draws", 30)
    assert [(result["arm"], result["seed"]) for result in results] == [
        ("plain", 1), ("rejection", 1), ("control", 1), ("plain", 2), ("rejection", 2), ("control", 2)
    ]  # fmt: skip
    for result in results:
        rows_per_epoch = NUM_ROWS if result["arm"] == "plain" else 30
        assert result["metrics"]["draws"] == 2 * rows_per_epoch
        assert result["curve"][-1] == [2 * rows_per_epoch, result["metrics"]["accuracy"]]
        assert result["flipped"]["of_rows"] == 0.25
        num_epochs = 0 if result["arm"] == "plain" else 2
        assert len(result["resampling"]) == len(result["weight_percentiles"]) == num_epochs
        assert sum(group["rows"] for group in result["groups"].values()) == 20
        hits = sum(group["rows"] * group["accuracy"] for group in result["groups"].values())
        assert hits / 20 == pytest.approx(result["metrics"]["accuracy"])
    assert results[0]["flipped"]["of_draws"] == 0.25

    output = tmp_path / "out"
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    with (output / "results.csv").open() as file:
        assert [float(line["accuracy"]) for line in csv.DictReader(file)] == [
            result["metrics"]["accuracy"] for result in results
        ]
    for name in ("accuracy.png", "resampling.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    report, printed = (output / "report.md").read_text(), capsys.readouterr().out
    for text in (report, printed):
        assert "Share of rows with a changed label" in text
        assert "2 seed(s): too few to call an arm better." in text


def test_arms_of_a_seed_differ_in_the_resampler_alone(run, caplog):
    """Where every epoch is uniform they train alike, bit for bit, and the user is told so."""
    plain, rejection, control = run("--warmup_epochs", 1, "--uniform_final_epochs", 1)
    assert "leave none of 2 epochs to resample: all arms train alike" in caplog.text
    for result in (rejection, control):
        assert result["curve"] == plain["curve"]
        assert {**result["metrics"], "seconds": 0} == {**plain["metrics"], "seconds": 0}
        assert [epoch["acceptance_rate"] for epoch in result["resampling"]] == [1.0, 1.0]


def test_the_control_draws_as_unevenly_as_the_rejection_arm(run):
    _, rejection, control = run("--num_train_epochs", 1)
    for name in ("envelope_M", "acceptance_rate", "effective_sample_size"):
        assert rejection["resampling"][0][name] == pytest.approx(control["resampling"][0][name], rel=1e-9)
    assert rejection["weight_percentiles"] == control["weight_percentiles"]


def test_a_finished_run_is_read_again_and_another_one_refused(run, capsys):
    (first,) = run("--arms", "plain")
    (again,) = run("--arms", "plain", "--weighting", "tempered:0.5", "--logging_steps", 3)  # neither concerns the arm
    assert again == json.loads(json.dumps(first))
    assert "plain, seed 1: finished earlier" in capsys.readouterr().out
    with pytest.raises(ExperimentError, match=r"other options: learning_rate was 0.0005, is 0.001"):
        run("--arms", "plain", "--learning_rate", "1e-3")
    (anew,) = run("--arms", "plain", "--learning_rate", "1e-3", "--overwrite_output_dir")
    assert anew["curve"] != first["curve"] or anew["metrics"] != first["metrics"]


@pytest.mark.parametrize("arm", ["plain", "rejection"])
def test_a_killed_run_goes_on_from_its_checkpoint(run, tmp_path, capsys, arm):
    options = ("--arms", arm, "--save_strategy", "steps", "--save_steps", 4)
    (whole,) = run(*options)
    folder = tmp_path / "out" / arm / "seed_1"
    (folder / "result.json").unlink()
    (tmp_path / "out" / arm / "seed_1" / "checkpoint-10").rename(tmp_path / "last")
    (resumed,) = run(*options)
    assert f"{arm}, seed 1: going on from {folder / 'checkpoint-8'}" in capsys.readouterr().out
    assert resumed["metrics"].pop("seconds") is None
    assert whole["metrics"].pop("seconds") > 0
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["curve"] == whole["curve"]
    assert resumed["weight_percentiles"] == whole["weight_percentiles"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--label_noise", "1.5"), r"`--label_noise` 1.5 must lie in \[0, 1\)"),
        (("--positive_fraction", "0"), r"`--positive_fraction` 0.0 must lie in \(0, 1\)"),
        (("--max_length", "1"), "`--max_length` 1 must be at least 2"),
        (("--arms", "best"), "`--arms` best: unknown"),
        (("--weighting", "loss"), "`--weighting` 'loss' is unknown"),
        (("--model_name_or_path", "nobody/nothing"), "`--model_name_or_path` 'nobody/nothing' could not be loaded"),
        (("--eval_strategy", "sometimes"), "sometimes"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(run, tmp_path, more, message):
    with pytest.raises(ExperimentError, match=message):
        run(*more)
    assert not (tmp_path / "out").exists()
