"""The chatbot experiment from end to end on a toy world: four arms, their figures, resume, and its errors."""

import csv
import json
import shutil

import datasets
import pytest
import transformers as hf

import toy_chat
from experiments import chatbot
from experiments.chat_data import load_prompts, supervised_rows
from experiments.chatbot import NUM_SAMPLES
from experiments.harness.arguments import ExperimentError

NUM_CONTEXTS = 12
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "data").mkdir()
    encoder = toy_chat.save_encoder(folder / "encoder")
    return {
        "dataset": toy_chat.save_dialogues(folder / "data"),
        "model_name_or_path": toy_chat.save_chat_model(folder / "chat"),
        "encoder": encoder,
        "reward_model": toy_chat.save_reward_model(folder / "a", encoder, seed=1),
        "judge_model": toy_chat.save_reward_model(folder / "b", encoder, seed=2),
    }


@pytest.fixture
def run(world, tmp_path):
    """Calls the experiment on two rounds of twelve contexts; more options may follow."""
    options = {
        **world,
        "eval_split": "dev",
        "max_train_contexts": NUM_CONTEXTS,
        "max_eval_contexts": 6,
        "max_test_contexts": 14,
        "max_prompt_length": 40,
        "max_new_tokens": 8,
        "num_candidates": 3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": 1e-2,
        "output_dir": tmp_path / "out",
        "report_to": "none",
        "min_words": 2,
        "on_nothing_accepted": "best",
    }
    fixed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return lambda *more: chatbot.main([*fixed, "--seeds", "1", *map(str, more)])


def test_four_arms_one_report(run, tmp_path, capsys):
    results = run("--seeds", 1, 2)
    assert [(result["arm"], result["seed"]) for result in results] == [
        (arm, seed) for seed in (1, 2) for arm in ("base", "supervised", "rejection", "control")
    ]
    steps = 2 * NUM_CONTEXTS // BATCH_SIZE
    for result in results:
        is_base, generates = result["arm"] == "base", result["arm"] in ("rejection", "control")
        assert result["metrics"]["steps"] == (0 if is_base else steps)
        assert [one["round"] for one in result["by_round"]] == ([0] if is_base else [0, 1, 2])
        assert result["by_round"][0] == results[0]["by_round"][0]  # every arm begins with the same model
        assert result["curve"] == [[one["round"], one["held_out_reward"]] for one in result["by_round"]]
        assert len(result["rounds"]) == (2 if generates else 0)
        assert 0 <= result["metrics"]["held_out_reward"] <= 1
        parts = {"relevance": 1.0, "consistency": 0.2, "copy": 0.5, "repetition": 0.5, "length": 0.2}
        expected = sum(weight * result["metrics"][name] for name, weight in parts.items())
        assert result["metrics"]["selecting_reward"] == pytest.approx(expected)
    assert results[0]["metrics"] == results[4]["metrics"]  # measured from the same streams whatever the seed

    output = tmp_path / "out"
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    with (output / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(results)
    for name in ("curve.png", "rounds.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    samples = (output / "samples.md").read_text()
    assert samples.count("## Context") == NUM_SAMPLES
    for name in ("human", "base", "supervised", "rejection", "control"):
        assert samples.count(f"\n| {name} | ") == NUM_SAMPLES
    report, printed = (output / "report.md").read_text(), capsys.readouterr().out
    for text in (report, printed):
        assert "2 seed(s): too few to call an arm better." in text
    assert "people's own responses" in report


def test_the_control_accepts_as_much_and_at_random(run, tmp_path):
    rejection, control = run("--arms", "rejection", "control", "--num_train_epochs", 1)
    stored = {
        arm: datasets.load_dataset(
            "parquet",
            data_files=str(tmp_path / "out" / arm / "seed_1" / "candidates" / "round-000" / "*.parquet"),
            split="train",
        ).to_pandas()
        for arm in ("rejection", "control")
    }
    assert (stored["rejection"]["text"] == stored["control"]["text"]).all()  # the same candidates
    accepted = {arm: table[table["is_accepted"]] for arm, table in stored.items()}
    assert len(accepted["rejection"]) > NUM_CONTEXTS / 3  # where all candidates were cut off, there is none
    assert sorted(accepted["rejection"]["prompt_id"]) == sorted(accepted["control"]["prompt_id"])
    best = stored["rejection"].groupby("prompt_id")["reward"].max().dropna().sort_index()  # NaN: filtered out
    assert accepted["rejection"].set_index("prompt_id")["reward"].sort_index().equals(best)
    assert accepted["control"]["reward"].sum() < accepted["rejection"]["reward"].sum()
    assert rejection["rounds"][0]["candidates/reward"] == control["rounds"][0]["candidates/reward"]


def test_the_selecting_reward_rises_by_selection(run):
    """Length alone, which a language model learns fast: rejection gains what the control does not."""
    weights = ("relevance", "consistency", "novelty")
    more = [word for name in weights for word in (f"--{name}_weight", 0)]
    more += [
        "--length_weight",
        1,
        "--min_words",
        7,
        "--max_words",
        8,
        "--max_train_contexts",
        48,
        "--max_new_tokens",
        9,
    ]
    rejection, control = run("--arms", "rejection", "control", "--num_train_epochs", 4, *more)
    gains = {run["arm"]: run["by_round"][-1]["selecting_reward"] - run["by_round"][0]["selecting_reward"]
             for run in (rejection, control)}  # fmt: skip
    assert "relevance" not in rejection["metrics"]
    assert rejection["rounds"][-1]["candidates/reward"] > control["rounds"][-1]["candidates/reward"]
    assert gains["rejection"] >= gains["control"]


def test_a_finished_run_is_read_again_and_another_one_refused(run, capsys):
    (first,) = run("--arms", "rejection")
    (again,) = run("--arms", "rejection", "--logging_steps", 3)
    assert again == json.loads(json.dumps(first))
    assert "rejection, seed 1: finished earlier" in capsys.readouterr().out
    with pytest.raises(ExperimentError, match=r"other options: relevance_weight was 1.0, is 2.0"):
        run("--arms", "rejection", "--relevance_weight", 2)


@pytest.mark.parametrize("arm", ["supervised", "rejection"])
def test_a_killed_run_goes_on_from_its_checkpoint(run, tmp_path, capsys, arm):
    options = ("--arms", arm, "--save_total_limit", 3)
    (whole,) = run(*options)
    folder = tmp_path / "out" / arm / "seed_1"
    (folder / "result.json").unlink()
    shutil.rmtree(hf.trainer_utils.get_last_checkpoint(str(folder)))
    capsys.readouterr()
    (resumed,) = run(*options)
    assert f"{arm}, seed 1: going on from {folder / 'checkpoint-3'}" in capsys.readouterr().out
    assert resumed["metrics"].pop("seconds") is None
    assert whole["metrics"].pop("seconds") > 0
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["by_round"] == whole["by_round"]
    assert resumed["samples"] == whole["samples"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--measured_temperature", "0"), "`--measured_temperature` 0.0 must be above 0"),
        (("--max_turns", "0"), "`--max_turns` 0 must be at least 1"),
        (("--min_words", "30"), r"`--min_words` 30 must lie in \[0, max_words\], and max_words is 25"),
        (("--arms", "best"), "`--arms` best: unknown"),
        (("--model_name_or_path", "nobody/nothing"), "`--model_name_or_path` 'nobody/nothing' could not be loaded"),
        (("--judge_model", "nobody/nothing"), "`--judge_model` 'nobody/nothing' could not be loaded"),
        (("--eval_split", "valid"), "`--eval_split` 'valid' is not in the data set"),
        (("--max_prompt_length", "1"), "`--train_split` 'train' has no context of at most 1 tokens"),
        (("--relevance_weight=0", "--consistency_weight=0", "--novelty_weight=0", "--length_weight=0"), "are all 0"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(run, tmp_path, more, message):
    with pytest.raises(ExperimentError, match=message):
        run(*more)
    assert not (tmp_path / "out").exists()


def test_a_model_does_not_judge_what_it_selected(run, world):
    with pytest.raises(ExperimentError, match="is the model that selects"):
        run("--judge_model", world["reward_model"])


def test_no_context_stands_in_two_splits_and_answers_are_closed(world):
    options = chatbot.ChatArguments(**world, train_split="train", eval_split="train+dev", max_prompt_length=40)
    tokenizer = chatbot.load_tokenizer(world["model_name_or_path"])
    prompts = load_prompts(options, tokenizer)
    contexts = [{repr(row["prompt"]) for row in rows} for rows in (prompts.train, prompts.watched, prompts.reported)]
    assert not contexts[0] & contexts[1]
    assert not contexts[1] & contexts[2]
    assert {row["prompt"][-1]["role"] for row in prompts.train} == {"user"}
    rows = supervised_rows(prompts.train.select(range(1)), tokenizer)
    assert len(rows) == 2
    learnt = [label for label in rows[0]["labels"] if label != -100]
    assert tokenizer.decode(learnt) == f"{prompts.train[0]['references'][0]} <end>"
