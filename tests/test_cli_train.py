"""`rsft-hf generate` and `train`: options from YAML and the command line, the runs they make, and what is refused."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import rsft_hf
from rsft_hf import (
    CandidateResampler,
    Chain,
    Clipped,
    Deduplicate,
    LossResampler,
    RejectionSamplingSeq2SeqTrainer,
    Tempered,
    Threshold,
    TopKPerPrompt,
)
from rsft_hf.acceptance import Sequence
from rsft_hf.cli import build_parser, main
from rsft_hf.cli.options import described, given_pairs, read_config, resolved, split_options
from rsft_hf.cli.train import _argument_names, _given
from rsft_hf.generative import RejectEmpty
from rsft_hf.rewards import ChrfReward

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "data"
TRANSLATION = {
    "model_name_or_path": str(DATA / "numbers" / "model"),
    "prompt_column": "en",
    "reference_column": "de",
    "reward_funcs": 'ChrfReward(reference_column="de")',
    "num_candidates": 3,
    "generation_config": {"do_sample": True, "max_new_tokens": 24, "top_k": 0},
    "max_train_samples": 16,
    "num_train_epochs": 2,
    "learning_rate": "1e-3",
    "per_device_train_batch_size": 8,
    "logging_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}
CHAT = {
    "model_name_or_path": str(DATA / "dialogues" / "chat_model"),
    "train_file": str(DATA / "dialogues" / "train.jsonl"),
    "max_train_samples": 8,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_length": 64,
}


def config(path: Path, options: dict) -> Path:
    """A YAML file of options; numbers such as 1e-3 are written as people write them."""
    text = yaml.safe_dump(options).replace("'1e-3'", "1e-3")
    path.write_text(text)
    return path


def run(capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_translator_is_that_of_the_same_python(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"train_file": str(DATA / "numbers/train.csv"), "validation_file": str(DATA / "numbers/test.csv")}
    path = config(tmp_path / "c.yaml", TRANSLATION | files | {"num_candidates": 9})
    found = run(capsys, "train", "--config", path, "--output_dir", tmp_path / "cli", "--num_candidates", 3)
    assert f"The model is in {tmp_path / 'cli'}" in found
    assert "rewards/chrf/mean" in found

    names = ("num_train_epochs", "per_device_train_batch_size", "logging_strategy", "report_to", "disable_tqdm")
    args = hf.Seq2SeqTrainingArguments(
        str(tmp_path / "python"), learning_rate=1e-3, save_strategy="no", **{name: TRANSLATION[name] for name in names}
    )
    hf.set_seed(args.seed)
    rows = hf_rows("numbers/train.csv").shuffle(args.seed).select(range(16))
    sampling = hf.GenerationConfig(**TRANSLATION["generation_config"])
    columns = {"prompt_column": "en", "reference_column": "de"}
    rewards = ChrfReward(reference_column="de")
    resampler = CandidateResampler(rewards, num_candidates=3, generation_config=sampling, **columns)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(TRANSLATION["model_name_or_path"], dtype=torch.float32)
    for part in (model.model.encoder, model.model.decoder):
        part.embed_positions.requires_grad_(False)
    trainer = RejectionSamplingSeq2SeqTrainer(
        model, args, train_dataset=rows, eval_dataset=hf_rows("numbers/test.csv"), resampler=resampler,
        processing_class=hf.AutoTokenizer.from_pretrained(TRANSLATION["model_name_or_path"]),
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    ours, theirs = weights(tmp_path / "cli"), weights(tmp_path / "python")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "Rejection sampling" in (tmp_path / "cli" / "README.md").read_text()


def hf_rows(name: str):
    from datasets import load_dataset

    return load_dataset("csv", data_files=str(DATA / name), split="train")


def test_stages_by_hand_end_in_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"train_file": str(DATA / "numbers/train.csv")}
    path = config(tmp_path / "c.yaml", TRANSLATION | files)
    found = run(
        capsys, "generate", tmp_path / "made", "--config", path, "--max_prompt_length", 30, "--on_long_prompt", "drop"
    )
    assert found == f"48 candidates of 16 prompts are in {tmp_path / 'made'}\n"
    reward = 'ChrfReward(reference_column="de")'
    run(capsys, "score", tmp_path / "made", tmp_path / "scored", "--reward", reward)
    run(capsys, "accept", tmp_path / "scored", tmp_path / "accepted", "--rule", "TopKPerPrompt(1)")
    assert len(rsft_hf.export_sft(tmp_path / "accepted")) == 16
    prompts = tmp_path / "made" / "prompts" / "prompts.parquet"
    words = ("--candidates", tmp_path / "made", "--train_file", prompts, "--prompt_column", "prompt")
    run(capsys, "train", "--config", path, *words, "--num_train_epochs", 1, "--output_dir", tmp_path / "out")
    store = rsft_hf.load_candidates(tmp_path / "out")
    assert sorted(store["text"][:]) == sorted(rsft_hf.load_candidates(tmp_path / "made")["text"][:])


def test_generation_needs_no_trl(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    words = ("--train_file", CHAT["train_file"], "--max_train_samples", 4, "--num_candidates", 2)
    sampling = ("--generation_config", "{max_new_tokens: 8}")
    found = run(
        capsys, "generate", tmp_path / "made", "--model_name_or_path", CHAT["model_name_or_path"], *words, *sampling
    )
    assert found == f"8 candidates of 4 prompts are in {tmp_path / 'made'}\n"


def test_an_interrupted_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = TRANSLATION | {"train_file": str(DATA / "numbers/train.csv"), "save_strategy": "epoch"}
    path = config(tmp_path / "c.yaml", options)
    run(capsys, "train", "--config", path, "--output_dir", tmp_path / "out", "--eval_strategy", "no")  # YAML's false
    whole = weights(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()  # the last was not saved completely
    words = ("--resume_from_checkpoint", "true")
    run(capsys, "train", "--config", path, "--output_dir", tmp_path / "out", *words)
    resumed = weights(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_chat_model_learns_by_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = config(
        tmp_path / "c.yaml", CHAT | {"generation_config": {"max_new_tokens": 8}, "num_candidates": 2, "filters": []}
    )
    rewards = ("--reward_funcs", "RepetitionPenalty()", "CopyPenalty()", "--reward_weights", 1, 0.5)
    words = ("--lora_r", 4, "--on_nothing_accepted", "best", "--output_dir", tmp_path / "out", "--bf16", "false")
    run(capsys, "train", "--config", path, *rewards, *words)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    store = rsft_hf.load_candidates(tmp_path / "out")
    assert len(store) == 16
    assert {"rewards/repetition", "rewards/copy"} <= set(store.column_names)


def test_rows_with_answers_are_weighted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"prompt": f"guess {word}", "completion": f"i like {word} too"} for word in "swimming painting chess".split()
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 4)) + "\n")
    options = CHAT | {"train_file": str(tmp_path / "rows.jsonl"), "weighting": "Tempered(0.5)", "losses": "forward"}
    path = config(tmp_path / "c.yaml", options)
    run(capsys, "train", "--config", path, "--output_dir", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    assert "| weighting | Tempered(alpha=0.5) |" in card


def test_pairs_of_texts_are_weighted_for_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame = pandas.read_csv(DATA / "numbers/train.csv", names=["prompt", "completion"], skiprows=1)
    frame.head(16).to_parquet(tmp_path / "rows.parquet")
    names = ("model_name_or_path", "report_to", "disable_tqdm", "save_strategy", "num_train_epochs")
    path = config(tmp_path / "c.yaml", {name: TRANSLATION[name] for name in names})
    words = ("--train_file", tmp_path / "rows.parquet", "--output_dir", tmp_path / "out", "--warmup_epochs", 1)
    run(capsys, "train", "--config", path, *words)
    assert "Training set: 16 rows" in (tmp_path / "out" / "README.md").read_text()


def test_rows_of_the_command_line_take_the_place_of_those_of_the_file(tmp_path: Path) -> None:
    rows = {"dataset_name": "a/b", "validation_split": "test", "validation_file": "v.csv"}
    path = config(tmp_path / "c.yaml", {**rows, "num_candidates": 3})
    words = ["train", "--config", str(path), "--train_file", "mine.csv"]
    options, rest = build_parser().parse_known_args(words)
    assert _given(options, given_pairs(rest)) == {
        "num_candidates": 3,
        "train_file": "mine.csv",
        "validation_file": "v.csv",
    }


def test_two_processes_train_together(tmp_path: Path) -> None:
    options = TRANSLATION | {"train_file": str(DATA / "numbers/train.csv"), "use_cpu": True, "num_train_epochs": 1}
    path = config(tmp_path / "c.yaml", options | {"output_dir": str(tmp_path / "out")})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "rsft_hf"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "train", "--config", path], capture_output=True, text=True, env=environment, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The model is in") == 1
    assert len(rsft_hf.load_candidates(tmp_path / "out")) == 48


@pytest.mark.parametrize("made", [CandidateResampler, LossResampler])
def test_options_and_their_help_are_those_of_the_resamplers(made: type) -> None:
    texts = described(made.__name__)
    assert set(texts) == set(inspect.signature(made).parameters) - {"reward_processing_classes"}
    assert all(len(text) > 20 for text in texts.values())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("weighting", "Chain(Tempered(0.5), Clipped(0.9))", Chain(Tempered(0.5), Clipped(0.9))),
        ("acceptance", "Sequence(TopKPerPrompt(2), Threshold(minimum=0.1))",
         Sequence(TopKPerPrompt(2), Threshold(minimum=0.1))),
        ("filters", "RejectEmpty", [RejectEmpty()]),
        ("filters", [], []),
        ("dedup", "Deduplicate()", Deduplicate()),
        ("engine", "auto", "auto"),
        ("reward_funcs", ["ChrfReward()", "org/model"], [ChrfReward(), "org/model"]),
        ("eval_reward_funcs", "math:sqrt", [__import__("math").sqrt]),
        ("per_example_loss", "math:sqrt", __import__("math").sqrt),
        ("acceptance", None, None),
        ("num_draws", 0.5, 0.5),
    ],
)  # fmt: skip
def test_text_becomes_the_object_that_it_names(name: str, value, expected) -> None:
    assert repr(resolved({name: value})[name]) == repr(expected)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_of_the_recipes_hold_known_options(path: Path) -> None:
    given = read_config(path)
    is_encoder_decoder = path.stem == "translation"
    name, groups = split_options(given, _argument_names(is_encoder_decoder))
    keywords = resolved(groups["resampler"])
    if "reward_funcs" in keywords:  # without reward models, which are names on the hub
        keywords["reward_funcs"] = [one for one in keywords["reward_funcs"] if not isinstance(one, str)]
    assert isinstance(getattr(rsft_hf, name)(**keywords), rsft_hf.Resampler)
    assert groups["args"]["learning_rate"] < 1e-3


GOOD = {**CHAT, "output_dir": "{folder}/out"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candiates": 3}, "`num_candiates` is no option. Did you mean num_candidates?"),
        ({"learning_rat": 1}, "`learning_rat` is no option. Did you mean learning_rate?"),
        ({"weighting": "Tempered(0.5)", "reward_funcs": "ChrfReward()"},
         "`weighting` is an option of LossResampler, and this run has a CandidateResampler."),
        ({"num_candidates": 3}, "`num_candidates` is an option of CandidateResampler, and this run has a LossRes"),
        ({"resampler": "Candidates"}, "`resampler`='Candidates' is none of CandidateResampler, LossResampler."),
        ({"output_dir": None}, "`output_dir` is missing"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"train_file": "{folder}/none.jsonl"}, "none.jsonl' is no file"),
        ({"train_file": "{folder}/c.yaml"}, "c.yaml' is none of .jsonl, .json, .csv, .parquet"),
        ({"train_file": None}, "Give the rows by `train_file` or by `dataset_name`"),
        ({"dataset_name": "org/data"}, "Give the rows by `train_file` or by `dataset_name`"),
        ({"weighting": "Temperd(0.5)"}, "'Temperd' is no weighting. Did you mean Tempered?"),
        ({"reward_funcs": "ChrfReward("}, "'ChrfReward(' is no reward with literal arguments"),
        ({"reward_funcs": "ChrfReward()", "generation_config": 5}, "`generation_config`=5 is no mapping"),
        ({"reward_funcs": "ChrfReward()", "acceptance": "TopKPerPrompt(0)"}, "`k`=0 must be an integer"),
        ({"reward_funcs": "ChrfReward()", "generation_config": {"temperatur": 0.5}},
         "`temperatur` is no setting of `generation_config`. Did you mean temperature?"),
        ({"learning_rate": "abc"}, "`learning_rate`='abc' is no number."),
        ({"max_train_samples": "four"}, "`max_train_samples`='four' must be an integer"),
        ({"lora_r": -1}, "`lora_r`=-1 must be an integer"),
        ({"dtype": "float99"}, "`dtype`='float99' is none of float32"),
        ({"model_name_or_path": "no/such"}, "`model_name_or_path`='no/such' cannot be loaded"),
        ({"max_prompt_length": 5}, "`max_prompt_length` is an option of CandidateResampler"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_training(tmp_path: Path, capsys, options: dict, message: str) -> None:
    given = {name: value for name, value in (GOOD | options).items() if value is not None}
    given = {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in given.items()}
    assert main(["train", "--config", str(config(tmp_path / "c.yaml", given))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "holds no options by name"), ("a: [", "is no YAML"), (None, "c.yaml is no file")],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_words_that_belong_to_no_option_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "chat.yaml"]) == 2
    assert "'chat.yaml' belongs to no option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["accept", "a", "b", "--rule", "RSO", "--sed", "1"])
    assert "unrecognized arguments: --sed 1" in capsys.readouterr().err


def test_all_help_shows_the_training_arguments(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: rsft-hf train")
    assert shown.index("--num_candidates") < shown.index("--learning_rate")
