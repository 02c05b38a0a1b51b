"""Reports: numbers against the run they tell of, texts that are inert, and the page in a headless Chromium."""

import base64
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf

import generative_runs
import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer, ReportCallback
from rsft_hf.generative import import_candidates
from rsft_hf.report import Run, read_run, write_report
from rsft_hf.report.figures import curves, generative_figures, weighted_figures
from rsft_hf.report.rounds import RoundSummary, browsed_candidates, summarize_round
from rsft_hf.weighted.history import EpochHistory

HOSTILE = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7 * 7 }}\0"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def trained(folder: Path, **options: Any) -> hf.Trainer:
    """A weighted run with a report at its end, and a checkpoint per epoch."""
    rows = datasets.Dataset.from_list(runs.rows()).add_column(
        "text", [f"text of row {n}" for n in range(runs.NUM_ROWS)]
    )
    made = LossResampler(Proportional(), losses="training", warmup_epochs=1)
    args = {"save_strategy": "epoch", "num_train_epochs": 4, **options}
    callbacks = [ReportCallback]
    return runs.trained(
        RejectionSamplingTrainer, folder, train_dataset=rows, resampler=made, args=args, callbacks=callbacks
    )


def packed(page: str) -> dict[str, Any]:
    """The candidates that a page holds."""
    data = re.search(r'id="candidates-data">([^<]*)<', page)
    assert data
    return json.loads(gzip.decompress(base64.b64decode(data[1])))


def dom(page: Path, view: str = "", *options: str) -> str:
    """The page after its scripts have run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", *options]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{page}{view}"], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


def test_a_finished_run_and_its_folder_have_one_report(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    live, read = Run.from_trainer(trainer), read_run(tmp_path, trainer.train_dataset)
    assert read.history.epochs == live.history.epochs == [0, 1, 2, 3]
    for name in ("loss", "weight", "count"):
        torch.testing.assert_close(read.history.epochs_of(name), live.history.epochs_of(name), equal_nan=True)
    assert read.measured["loss_history"].shape == (4, runs.NUM_ROWS)  # the epoch that the checkpoint ended, too
    for name, values in live.measured.items():
        torch.testing.assert_close(read.measured[name], values, equal_nan=True)
    torch.testing.assert_close(read.label_report.probabilities, live.label_report.probabilities, equal_nan=True)
    page = (tmp_path / "report.html").read_text()
    assert write_report(tmp_path, tmp_path / "again.html", dataset=trainer.train_dataset).is_file()
    assert (tmp_path / "again.html").read_text() == page
    row = int(live.history.epochs_of("count").sum(0).argmax())
    assert f"text of row {row}" in page


def test_a_run_is_read_at_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    trained(tmp_path)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    first = read_run(checkpoints[0])
    assert first.history.epochs == [0]
    assert len(first.measured["loss_history"]) == 1
    assert max(line["epoch"] for line in first.log_history) == 1


def test_rounds_by_hand(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completions": ["one", "two"], "scores": [1.0, 0.0]},
        {"prompt": "b", "completions": ["three"], "scores": [None]},
    ]
    folder = import_candidates(rows, tmp_path / "store", score="scores")
    summary = summarize_round(folder)
    assert summary.prompt_ids.tolist() == [0, 0, 1]
    np.testing.assert_equal(summary.rewards, [1.0, 0.0, np.nan])
    assert summary.is_accepted.tolist() == [False] * 3
    shown = browsed_candidates([folder], 10)
    assert shown["prompts"] == ["a", "b"]
    assert (shown["prompt"], shown["text"]) == ([0, 0, 1], ["one", "two", "three"])
    assert (shown["reward"], shown["total"]) == ([1.0, 0.0, None], 3)
    assert browsed_candidates([folder], 2)["text"] == ["one", "two"]  # every second prompt


def test_the_browser_holds_the_stored_candidates(tmp_path: Path) -> None:
    generative_runs.trained(tmp_path, args={"num_train_epochs": 2}, callbacks=[ReportCallback()])
    found = packed((tmp_path / "report.html").read_text())
    stored = [row for number in (0, 1) for row in generative_runs.stored(tmp_path, number)]
    assert found["text"] == [row["text"] for row in stored]
    assert [found["prompts"][place] for place in found["prompt"]] == [row["prompt"] for row in stored]
    assert found["verdict"] == [row["verdict"] for row in stored]
    assert found["total"] == len(stored) == 2 * 36


def test_the_report_of_a_shorter_run_shows_no_rounds_of_the_longer_one(tmp_path: Path) -> None:
    still = {"lr_scheduler_type": "constant"}
    generative_runs.trained(tmp_path, args={"num_train_epochs": 2, **still})
    generative_runs.trained(tmp_path, args={"num_train_epochs": 1, **still}, callbacks=[ReportCallback()])
    assert packed((tmp_path / "report.html").read_text())["total"] == 36


def figures_of(found: list[Any]) -> dict[str, Any]:
    return {figure.title: json.loads(figure.json) for figure in found}


def test_boxes_and_difficulty_by_hand() -> None:
    """Ten prompts of two candidates each; prompt p has the rewards p and p + 1 and its better one is accepted."""
    rewards = np.array([value for prompt in range(10) for value in (prompt, prompt + 1)], dtype=float)
    is_accepted = np.arange(20) % 2 == 1
    one = RoundSummary("round-000", np.repeat(np.arange(10), 2), rewards, is_accepted, np.zeros(20, dtype=int))
    found = figures_of(generative_figures([one]))
    assert list(found) == ["Rewards", "Acceptance by difficulty"]  # no lengths are known
    every, accepted = found["Rewards"]["data"]
    assert (every["median"], accepted["median"]) == ([5.0], [5.5])
    assert every["mean"] == [5.0]
    assert accepted["lowerfence"] == pytest.approx([1.45])  # of 1 to 10
    (bars,) = found["Acceptance by difficulty"]["data"]
    assert bars["y"] == [0.5] * 10


def test_harder_prompts_come_first() -> None:
    rewards = np.array([1.0, 1.0, 0.0, 0.0])
    one = RoundSummary("r", np.array([5, 5, 3, 3]), rewards, rewards > 0, np.ones(4, dtype=int))
    (bars,) = figures_of(generative_figures([one]))["Acceptance by difficulty"]["data"]
    assert bars["y"] == [0.0, 1.0]


def test_data_map_by_hand() -> None:
    history, losses = EpochHistory(), torch.tensor([[0.0, np.log(2), np.nan], [0.0, 0.0, 1.0]], dtype=torch.float64)
    for epoch, values in enumerate(losses):
        history.append(epoch, values, -values, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1]))
    run = Run("run", history=history, measured=history.measured())
    found = figures_of(weighted_figures(run))
    assert list(found) == ["Losses", "Weights", "Data map"]
    points = found["Data map"]["data"][0]
    assert points["text"] == ["row 0", "row 1"]  # row 2 was measured once
    decoded = [np.frombuffer(base64.b64decode(points[axis]["bdata"]), points[axis]["dtype"]) for axis in "yx"]
    assert decoded[0].tolist() == pytest.approx([1.0, 0.75])  # exp(-ln 2) = 1/2
    assert decoded[1].tolist() == pytest.approx([0.0, 0.25])
    assert found["Weights"]["data"][0]["median"] == pytest.approx([2 / 3, 2 / 3])  # of 2 draws, 2 / 6 each


def test_curves_are_of_numbers_that_change() -> None:
    lines = [
        {"epoch": e, "loss": 1 / e, "eval_x": 0.5, "eval_runtime": e, "other": e, "eval_text": "a"} for e in (1, 2)
    ]
    (figure,) = curves(lines, ("loss", "eval_"), "title", "caption")
    (trace,) = json.loads(figure.json)["data"]
    assert (trace["x"], trace["y"]) == ([1.0, 2.0], [1.0, 0.5])
    assert curves(lines[:1], ("loss",), "title", "caption") == []


def hostile_report(tmp_path: Path) -> Path:
    rows = [{"prompt": HOSTILE, "completions": [HOSTILE, "harmless <b>"], "scores": [1.0, 2.0]}]
    import_candidates(rows, tmp_path / "candidates" / "round-000", score="scores")
    history = EpochHistory()
    losses = torch.tensor([1.0, 2.0])
    history.append(0, losses, -losses, losses, torch.tensor([0, 1]))
    dataset = datasets.Dataset.from_dict({"text": [HOSTILE, HOSTILE]})
    lines = [{"epoch": epoch, f"eval_{HOSTILE}": epoch, "loss": epoch} for epoch in (1.0, 2.0)]
    run = Run(
        HOSTILE, lines, history, history.measured(), dataset=dataset, rounds=[tmp_path / "candidates" / "round-000"]
    )
    return write_report(run, tmp_path / "report.html")


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    path = hostile_report(tmp_path)
    page = path.read_text()
    assert "<script>document.title" not in page
    assert "<img src=x" not in page
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", page, re.DOTALL)[0]  # no template is evaluated twice
    shown = dom(path)
    assert "<title>&lt;/script&gt;" in shown
    assert "<img" not in shown
    assert "harmless &lt;b&gt;" in shown


def test_filters_of_the_page_select_candidates(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"prompt {number}", "completions": ["Apple", "pear"], "scores": [number / 10, 1.0]}
        for number in range(60)
    ]
    folder = import_candidates(rows, tmp_path / "store", score="scores")
    page = write_report(folder, tmp_path / "report.html")
    count = lambda view: re.search(r'id="count"[^>]*>([^<]*)<', dom(page, view))[1]  # noqa: E731
    assert count("") == "120 of 120 candidates"
    assert count("#candidates?search=apple") == "60 of 120 candidates"
    assert count("#candidates?search=prompt+59") == "2 of 120 candidates"
    assert count("#candidates?minimum=1.5&maximum=2") == "6 of 120 candidates"  # 1.5, 1.6, ... 2.0
    shown = dom(page, "#candidates?order=highest")
    assert re.findall(r"<td>(\d\.\d+)</td>", shown)[:2] == ["5.900", "5.800"]
    assert "Page 1 of 5" in shown


def test_the_page_draws_in_both_themes(tmp_path: Path) -> None:
    page = trained(tmp_path) and tmp_path / "report.html"
    light, dark = dom(page), dom(page, "", "--force-dark-mode")
    assert light.count('class="main-svg"') == dark.count('class="main-svg"') > 0
    assert "rgb(28, 32, 38)" in light
    assert "rgb(232, 235, 239)" in dark


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither candidates nor a complete checkpoint"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="`path` is missing"):
        write_report(Run("run"))
    trained(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"`dataset` has 2 rows and the run was trained on {runs.NUM_ROWS}"):
        write_report(tmp_path / "run", dataset=datasets.Dataset.from_dict({"text": ["a", "b"]}))
    trainer = hf.Trainer(runs.bert(), runs.arguments(tmp_path), runs.collate, runs.rows(), callbacks=[ReportCallback()])
    with pytest.raises(RuntimeError, match="ReportCallback needs a trainer with a resampler"):
        trainer.train()
