"""The command line: a file of completions becomes training data in four commands; errors; a quick `--help`."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import rsft_hf
import runs
from rsft_hf import LossResampler, RejectionSamplingTrainer
from rsft_hf.cli import build_parser, main

ROWS = [
    {"prompt": "2 + 2 =", "completions": ["4", "5", "four"], "answer": "4"},
    {"prompt": "3 + 3 =", "completions": ["7", "6"], "answer": "6"},
]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (tmp_path / "rewards.py").write_text(
        "def is_right(completions, answer, **columns):\n"
        "    return [float(text == right) for text, right in zip(completions, answer)]\n"
    )
    return tmp_path / "samples.jsonl"


def run(capsys: pytest.CaptureFixture, *words: object) -> str:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_four_commands_make_training_data(samples: Path, capsys: pytest.CaptureFixture) -> None:
    folder = samples.parent
    found = run(capsys, "import", samples, folder / "imported")
    assert found == f"5 candidates of 2 prompts are in {folder / 'imported'}\n"
    found = run(
        capsys, "score", folder / "imported", folder / "scored", "--reward", f"{folder / 'rewards.py'}:is_right"
    )
    assert found == f"5 candidates scored, 0 to 1, mean 0.4, in {folder / 'scored'}\n"
    found = run(capsys, "accept", folder / "scored", folder / "accepted", "--rule", "Threshold(minimum=0.5)")
    assert found.startswith("2 of 5 candidates accepted by Threshold(minimum=0.5")
    run(capsys, "export", "sft", folder / "accepted", folder / "new" / "sft.jsonl")
    rows = [json.loads(line) for line in (folder / "new" / "sft.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "2 + 2 =", "completion": "4"}, {"prompt": "3 + 3 =", "completion": "6"}]
    run(capsys, "export", "dpo", folder / "accepted", folder / "dpo.parquet", "--min_margin", 0.5)
    dpo = datasets.load_dataset("parquet", data_files=str(folder / "dpo.parquet"), split="train")
    assert dpo["chosen"][:] == ["4", "6"]
    run(capsys, "export", "kto", folder / "accepted", folder / "kto.csv")
    assert (folder / "kto.csv").read_text().splitlines()[:2] == ["prompt,completion,label", "2 + 2 =,4,True"]


def test_rewards_of_several_kinds_are_combined(samples: Path, capsys: pytest.CaptureFixture) -> None:
    folder = samples.parent
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]))
    run(capsys, "import", samples, folder / "imported", "--max_candidates", 2)
    run(capsys, "score", folder / "imported", folder / "scored", "--reward", f"{folder / 'rewards.py'}:is_right",
        "--reward", "LengthWindow(1, 3)", "--reward_weights", "1", "0.5", "--prompts", prompts)  # fmt: skip
    scored = rsft_hf.load_candidates(folder / "scored")
    assert scored["reward"][:] == [1.5, 0.5, 0.5, 1.5]
    assert run(capsys, "accept", folder / "scored", folder / "a", "--rule", "TopKPerPrompt").startswith("2 of 4")


def test_all_exports_are_a_repository(samples: Path, capsys: pytest.CaptureFixture) -> None:
    folder = samples.parent
    run(capsys, "import", samples, folder / "imported")
    run(capsys, "score", folder / "imported", folder / "scored", "--reward", f"{folder / 'rewards.py'}:is_right")
    run(capsys, "accept", folder / "scored", folder / "accepted", "--rule", "TopKPerPrompt")
    found = run(capsys, "export", "all", folder / "accepted", folder / "shared")
    assert found.startswith("README.md, candidates, ")
    accepted = datasets.load_dataset(str(folder / "shared"), "sft", split="train")
    assert accepted[:] == rsft_hf.export_sft(folder / "accepted")[:]


def test_a_run_is_reported_and_its_labels_ranked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{**row, "text": f"text {number}"} for number, row in enumerate(runs.rows())]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    observer = LossResampler(losses="training", warmup_epochs=2)
    output_dir = tmp_path / "out"
    runs.trained(RejectionSamplingTrainer, output_dir, resampler=observer, args={"save_strategy": "epoch"})
    capsys.readouterr()
    found = run(capsys, "report", output_dir, "--data", tmp_path / "rows.jsonl")
    assert found == f"The report is in {output_dir / 'report.html'}\n"
    assert "text 0" in (output_dir / "report.html").read_text()
    report = observer.label_report()
    found = run(
        capsys, "suspects", output_dir, tmp_path / "s.csv", "--data", tmp_path / "rows.jsonl", "--num_labels", 5
    )
    assert f"{runs.NUM_ROWS} labels, about {report.num_errors:.0f} wrong; 5 are in" in found
    table = datasets.load_dataset("csv", data_files=str(tmp_path / "s.csv"), split="train")
    expected = report.table(num_labels=5)
    assert table["row"][:] == expected["row"][:]
    assert table["text"][:] == [f"text {row}" for row in expected["row"]]
    assert table["error_probability"][:] == pytest.approx(expected["error_probability"][:])
    for name, order in (("same", rows), ("shuffled", rows[::-1])):
        datasets.Dataset.from_list(order).select_columns(["text", "labels"]).to_csv(str(tmp_path / f"{name}.csv"))
    run(capsys, "suspects", output_dir, tmp_path / "t.csv", "--data", tmp_path / "same.csv")
    assert main(["suspects", str(output_dir), str(tmp_path / "u.csv"), "--data", str(tmp_path / "shuffled.csv")]) == 2
    assert "Pass the training set, or one with the same rows in the same order" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "{folder}"], "holds neither candidates nor a complete checkpoint"),
        (["report", "{folder}/done", "--max_candidates", "0"], "`max_candidates`=0 must be an integer"),
        (["suspects", "{folder}", "{folder}/x.csv"], "of 0 checkpoint folders none was saved completely"),
        (["import", "{folder}/none.jsonl", "{folder}/x"], "none.jsonl is no file"),
        (["import", "{folder}/samples.jsonl", "{folder}/x", "--prompt", "q"], "`prompt`='q' is no column of the data"),
        (["score", "{folder}/done", "{folder}/x", "--reward", "none.py:f"], "none.py is no file"),
        (["score", "{folder}/done", "{folder}/x", "--reward", "{folder}/rewards.py:is_write"],
         "rewards.py:is_write' names nothing. Did you mean is_right?"),
        (["score", "{folder}/done", "{folder}/x", "--reward", "ChrfRewards()"],
         "'ChrfRewards' is no reward. Did you mean ChrfReward?"),
        (["score", "{folder}/done", "{folder}/x", "--reward", "no_such_module:f"], "No module named 'no_such_module'"),
        (["accept", "{folder}/done", "{folder}/x", "--rule", "TopKPerPromt(1)"],
         "'TopKPerPromt' is no acceptance rule. Did you mean TopKPerPrompt?"),
        (["accept", "{folder}/done", "{folder}/x", "--rule", "TopKPerPrompt(0)"], "`k`=0 must be an integer"),
        (["accept", "{folder}/done", "{folder}/x", "--rule", "__import__('os').system('true')"],
         "is no acceptance rule with literal arguments"),
        (["accept", "{folder}/done", "{folder}/x", "--rule", "Threshold(minimum=open('x'))"],
         "'open' is no acceptance rule."),
        (["accept", "{folder}/done", "{folder}/x", "--rule", "Sequence(TopKPerPrompt(1), Threshold(minimum=a.b()))"],
         "is no acceptance rule with literal arguments"),
        (["export", "sft", "{folder}/done", "{folder}/x.txt"], "holds no candidates that were accepted"),
        (["export", "sft", "{folder}/nothing", "{folder}/x.jsonl"], "nothing holds no candidates"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(samples: Path, capsys, words: list[str], message: str) -> None:
    folder = samples.parent
    run(capsys, "import", samples, folder / "done")
    assert main([word.format(folder=folder) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rsft-hf {words[0]}: ")
    assert message in error
    assert "Traceback" not in error


def test_an_output_of_another_kind_is_refused(samples: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": "a", "completion": "b", "score": 1.0}]
    samples.write_text("\n".join(map(json.dumps, rows)) + "\n")
    folder = samples.parent
    run(capsys, "import", samples, folder / "imported")
    run(capsys, "accept", folder / "imported", folder / "accepted", "--rule", "TopKPerPrompt(1)")
    assert main(["export", "sft", str(folder / "accepted"), str(folder / "x.txt")]) == 2
    assert "is none of .jsonl, .csv, .parquet" in capsys.readouterr().err
    samples.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}], "completion": "b", "score": 1.0}))
    run(capsys, "import", samples, folder / "talks")
    run(capsys, "accept", folder / "talks", folder / "taken", "--rule", "TopKPerPrompt(1)")
    assert main(["export", "sft", str(folder / "taken"), str(folder / "x.csv")]) == 2
    assert "A CSV file cannot hold the conversations of ['prompt', 'completion']" in capsys.readouterr().err


def test_the_environment_names_the_versions(capsys: pytest.CaptureFixture) -> None:
    found = run(capsys, "env")
    assert all(name in found for name in ("python", "torch", "transformers", "datasets", "devices"))
    assert rsft_hf.__version__ in found


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rsft_hf.cli import build_parser; text = build_parser().format_help();"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy; print(text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: rsft-hf")
    done = subprocess.run(
        [sys.executable, "-m", "rsft_hf", "export", "--help"], capture_output=True, text=True, check=True
    )
    assert "sft,dpo,kto" in done.stdout


def test_every_command_and_option_is_described() -> None:
    actions = build_parser()._subparsers._group_actions[0]
    assert set(actions.choices) == {
        "import",
        "generate",
        "score",
        "accept",
        "export",
        "train",
        "report",
        "suspects",
        "env",
    }
    for parser in actions.choices.values():
        assert parser.description
        assert all(action.help for action in parser._actions)
        parser.format_help()  # a percent sign in a text would fail here


def test_names_are_imported_at_their_first_use() -> None:
    assert set(rsft_hf.__all__) == set(rsft_hf._MODULES)
    assert set(rsft_hf.__all__) <= set(dir(rsft_hf))
    assert rsft_hf.weighted.Tempered is rsft_hf.Tempered
    assert rsft_hf.rewards.__name__ == "rsft_hf.rewards"
    with pytest.raises(AttributeError, match=r"module 'rsft_hf' has no attribute 'Tempred'"):
        rsft_hf.Tempred  # noqa: B018
