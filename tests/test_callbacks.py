"""Table of each round's candidates, on the terminal and in the trackers that support tables."""

import sys
import types
from pathlib import Path

import pytest
import transformers as hf
from transformers.integrations import TensorBoardCallback

import generators
import runs
from generative_runs import resampler, stored, trainer
from rsft_hf import CandidateTableCallback, RejectionSamplingTrainer
from rsft_hf.generative import RejectTruncated


class Table:
    def __init__(self, dataframe) -> None:
        self.dataframe = dataframe


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Logged dictionaries of a fake tracker."""
    told: list[dict] = []
    module = types.ModuleType("wandb")
    module.Table, module.log = Table, told.append
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("COLUMNS", "200")
    return told


def shown(tmp_path: Path, report_to: list[str], num_candidates: int = 6, **keywords):
    made = keywords.pop("made", None) or resampler()
    ours = trainer(tmp_path, made, callbacks=[CandidateTableCallback(num_candidates)], **keywords)
    ours.args.report_to = report_to
    ours.train()
    return ours


def test_every_round_is_printed_once(tmp_path: Path, capsys, wandb) -> None:
    shown(tmp_path, [], args={"num_train_epochs": 2})
    printed = capsys.readouterr().out
    assert [printed.count(f"Round {number}") for number in (0, 1, 2)] == [1, 1, 0]
    for word in ("prompt", "candidate", "reward", "verdict", "accepted", "rejected"):
        assert word in printed
    for number in (0, 1):
        for row in stored(tmp_path, number)[:6]:
            assert f"{row['reward']:.3f}" in printed
    assert wandb == []


def test_the_tracker_gets_the_stored_candidates(tmp_path: Path, wandb) -> None:
    shown(tmp_path, ["wandb"], args={"num_train_epochs": 2})
    assert [list(told) for told in wandb] == [["candidates/round_0"], ["candidates/round_1"]]
    for number in (0, 1):
        frame = wandb[number][f"candidates/round_{number}"].dataframe
        rows = stored(tmp_path, number)[:6]
        assert frame["prompt"].tolist() == [row["prompt"] for row in rows]
        assert frame["candidate"].tolist() == [row["text"] for row in rows]
        assert frame["reward"].tolist() == [f"{row['reward']:.3f}" for row in rows]
        assert frame["verdict"].tolist() == [row["verdict"] for row in rows]


def test_more_than_there_are_are_all(tmp_path: Path, wandb) -> None:
    shown(tmp_path, ["wandb"], 1000)
    assert len(wandb[0]["candidates/round_0"].dataframe) == len(stored(tmp_path)) == 36


def test_what_is_filtered_unjudged_or_a_message_is_shown_as_such(tmp_path: Path, wandb, capsys) -> None:
    def sometimes(completions, **_):
        return [None if not answer[0]["content"] else 1.0 for answer in completions]

    made = resampler(sometimes, filters=(RejectTruncated(),))
    rows = generators.prompts(9, conversational=True)
    shown(tmp_path, ["wandb"], 36, made=made, train_dataset=rows)
    frame = wandb[0]["candidates/round_0"].dataframe
    assert frame["prompt"].tolist()[::4] == [prompt[-1]["content"] for prompt in rows["prompt"]]
    verdicts = dict(zip(frame["verdict"], frame["reward"], strict=True))
    assert verdicts == {
        "filtered: RejectTruncated()": "-",
        "unjudged": "-",
        "accepted": "1.000",
        "rejected": "1.000",
    }


def test_brackets_are_text_and_not_style(tmp_path: Path, capsys, wandb) -> None:
    from rsft_hf.callbacks import show_table
    from rsft_hf.generative.candidates import Candidate

    show_table([Candidate(0, "[bold]a[/bold]", [1], "[/]", "stop", reward=1.0, verdict="accepted")], "Round [0]")
    printed = capsys.readouterr().out
    assert "[bold]a[/bold]" in printed
    assert "[/]" in printed


def test_control_characters_are_shown_and_not_obeyed(capsys) -> None:
    from rsft_hf.callbacks import show_table
    from rsft_hf.generative.candidates import Candidate

    hostile = "\x1b[2J\x1b]0;title\x07a\0b\ud800c\u202ed\x9be"
    show_table([Candidate(0, hostile, [1], hostile, "stop", reward=1.0, verdict="accepted")], "Round 0")
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\0", "\ud800", "\u202e", "\x9b"} & set(printed)
    assert "\\x1b[2J" in printed


def test_no_candidate_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_candidates`=0 must be an integer of at least 1"):
        CandidateTableCallback(0)


def test_other_trackers_get_the_table_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple] = []
    module = types.ModuleType("mlflow")
    module.log_table = lambda frame, name: logged.append((name, list(frame["candidate"])))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    writer = types.SimpleNamespace(add_text=lambda *told: logged.append(told))
    made = trainer(tmp_path, resampler(), callbacks=[CandidateTableCallback(2)])
    made.args.report_to = ["mlflow"]
    board = TensorBoardCallback.__new__(TensorBoardCallback)  # its package is not needed for what reads the writer
    board.tb_writer = writer
    made.callback_handler.callbacks.append(board)
    for event in ("on_train_begin", "on_log", "on_train_end"):
        monkeypatch.setattr(TensorBoardCallback, event, lambda *args, **kwargs: None)
    made.train()
    texts = [row["text"] for row in stored(tmp_path)[:2]]
    assert logged[0] == ("candidates/round_0.json", texts)
    name, table, step = logged[1]
    assert (name, step) == ("candidates/round_0", 0)
    assert table.splitlines()[:2] == ["| prompt | candidate | reward | verdict |", "| --- | --- | --- | --- |"]
    assert len(table.splitlines()) == 4


def test_a_trainer_without_candidates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CandidateTableCallback shows candidates, and LossResampler generates none"):
        runs.trained(RejectionSamplingTrainer, tmp_path, callbacks=[CandidateTableCallback()])
    with pytest.raises(RuntimeError, match="CandidateTableCallback needs a trainer with a resampler"):
        runs.trained(hf.Trainer, tmp_path, callbacks=[CandidateTableCallback()])
