"""Every recipe on a few rows of its built-in data: `main`, then the saved model is loaded as a user loads it."""

import ast
import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf

from rsft_hf import load_candidates

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = RECIPES / "data"
NAMES = ("chatbot", "imdb_sentiment", "reward_model", "translation")
MAX_LINES, MAX_BYTES = 150, 1_000_000


def load(name: str) -> ModuleType:
    """The recipe, loaded from its file as a copy of it would be."""
    spec = importlib.util.spec_from_file_location(f"copied_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, output_dir: Path, **options: Any) -> dict[str, dict[str, float]]:
    options = {"output_dir": output_dir, "use_cpu": True, "disable_tqdm": True, **options}
    return load(name).main([word for key, value in options.items() for word in (f"--{key}", str(value))])


def head(source: Path, target: Path, num_rows: int) -> str:
    """The path of a copy with the first rows of a CSV or JSONL file."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[: num_rows + source.name.endswith(".csv")]), encoding="utf-8")
    return str(target)


def files(tmp_path: Path, name: str, num_rows: int = 48) -> dict[str, str]:
    """`train_file` and `validation_file` with a few rows of a built-in data set."""
    suffix = "jsonl" if name == "dialogues" else "csv"
    splits = {"train_file": "train", "validation_file": "test"}
    return {
        option: head(DATA / name / f"{split}.{suffix}", tmp_path / f"{split}.{suffix}", num_rows)
        for option, split in splits.items()
    }


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the reward-model recipe leaves."""
    folder = tmp_path_factory.mktemp("judge")
    data = files(folder, "dialogues")
    result = run("reward_model", folder / "out", config_name=DATA / "dialogues" / "reward_model",
                 num_train_epochs=2, learning_rate=1e-3, num_suspects=5, **data)  # fmt: skip
    assert set(result) == {"before", "after"}
    assert result["before"]["before_accuracy"] == pytest.approx(0.5, abs=0.25)
    return folder / "out"


def test_recipes_are_four_and_short_and_stand_alone() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.py")) == sorted(NAMES)
    for name in NAMES:
        text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_LINES, name
        tree = ast.parse(text)
        modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not modules & {"recipes", "experiments", "tests"}, name
        assert "sys.path" not in text, name
        table = (RECIPES / "README.md").read_text(encoding="utf-8")
        assert f"recipes/{name}.py" in table, f"{name} has no row in recipes/README.md"


def test_built_in_data_are_small_and_those_of_their_script() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.suffix != ".pyc") < MAX_BYTES
    from experiments.builtin import numbers, reviews
    from recipes.data import make

    rows = reviews.make_reviews(*make.NUM_REVIEWS)["train"]
    with (DATA / "reviews" / "train.csv").open(encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [row["text"] for row in rows]
    with (DATA / "numbers" / "test.csv").open(encoding="utf-8") as file:
        found = [row["de"] for row in csv.DictReader(file)]
    num_train, num_test = make.NUM_NUMBERS
    made = numbers.make_numbers(0, make.NUM_LABELLED, num_train, num_val=0, num_test=num_test)["test"]
    assert found == [row["de"] for row in made]


def test_imdb_sentiment(tmp_path: Path) -> None:
    result = run("imdb_sentiment", tmp_path / "out", config_name=DATA / "reviews" / "model", num_train_epochs=3,
                 warmup_epochs=1, num_suspects=7, learning_rate=1e-3, **files(tmp_path, "reviews"))  # fmt: skip
    assert 0 <= result["after"]["after_accuracy"] <= 1
    classify = hf.pipeline("text-classification", str(tmp_path / "out"))
    answers = classify(["The plot is dull.", "The acting is superb."])
    assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    with (tmp_path / "out" / "suspects.csv").open(encoding="utf-8") as file:
        suspects = list(csv.DictReader(file))
    with (tmp_path / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(suspects) == 7
    for suspect in suspects:
        row = rows[int(suspect["row"])]
        assert suspect["text"] == row["text"]
        assert suspect["given_label"] == row["label"]
    probabilities = [float(suspect["error_probability"]) for suspect in suspects]
    assert probabilities == sorted(probabilities, reverse=True)


def test_imdb_sentiment_leaves_out_rows_found_mislabelled(tmp_path: Path) -> None:
    words = [("good", "positive"), ("bad", "negative")]
    rows = ["text,label", *(f"The plot is {words[number % 2][0]}.,{words[number % 2][1]}" for number in range(160))]
    (tmp_path / "test.csv").write_text("\n".join(rows[:41]) + "\n")
    for number in (10, 50, 90, 130):  # lines of rows 9, 49, 89 and 129
        rows[number] = rows[number].replace("negative", "positive")
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    result = run("imdb_sentiment", tmp_path / "out", config_name=DATA / "reviews" / "model", num_train_epochs=6,
                 learning_rate=1e-3, per_device_train_batch_size=8, num_suspects=4, clean_labels=True,
                 train_file=tmp_path / "train.csv", validation_file=tmp_path / "test.csv")  # fmt: skip
    assert result["after"]["after_accuracy"] == 1
    with (tmp_path / "out" / "suspects.csv").open(encoding="utf-8") as file:
        suspects = list(csv.DictReader(file))
    assert sorted(int(suspect["row"]) for suspect in suspects) == [9, 49, 89, 129]
    assert {suspect["suggested_label"] for suspect in suspects} == {"negative"}


def test_labels_that_are_integers_keep_their_names(tmp_path: Path) -> None:
    rows = ["text,label", *(f"word {number % 3},{1 + number % 3}" for number in range(24))]
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
    run("imdb_sentiment", tmp_path / "out", config_name=DATA / "reviews" / "model", num_train_epochs=2,
        train_file=tmp_path / "train.csv", validation_file=tmp_path / "test.csv")  # fmt: skip
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "1", 1: "2", 2: "3"}


def test_translation(tmp_path: Path) -> None:
    result = run("translation", tmp_path / "out", model_name_or_path=DATA / "numbers" / "model", num_train_epochs=2,
                 num_candidates=4, temperature=1.0, max_new_tokens=24, learning_rate=1e-3,
                 **files(tmp_path, "numbers"))  # fmt: skip
    assert result["before"]["before_exact_match"] > 40  # the model has been trained on other numbers
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    output = model.generate(**tokenizer("three hundred and seven", return_tensors="pt"), max_new_tokens=24)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("drei")
    assert_exports(tmp_path / "out", num_candidates=2 * 48 * 4)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_chatbot(tmp_path: Path, judge: Path, lora_r: int) -> None:
    options = {"model_name_or_path": DATA / "dialogues" / "chat_model", "reward_model": judge, "num_candidates": 4}
    result = run("chatbot", tmp_path / "out", num_train_epochs=2, learning_rate=1e-3, max_new_tokens=24,
                 lora_r=lora_r, max_train_samples=32, max_eval_samples=16, **options,
                 **files(tmp_path, "dialogues"))  # fmt: skip
    assert {"before_reward", "before_rewards/copy/mean", "before_rewards/distinct/mean"} <= set(result["before"])
    generate = hf.pipeline("text-generation", str(tmp_path / "out"))
    (answer,) = generate([{"role": "user", "content": "is chess hard ?"}], max_new_tokens=24)
    assert answer["generated_text"][-1]["role"] == "assistant"
    start = hf.AutoModelForCausalLM.from_pretrained(options["model_name_or_path"], dtype=torch.float32)
    trained = generate.model.state_dict()
    assert any(not torch.equal(value, trained[name].float()) for name, value in start.state_dict().items())
    assert_exports(tmp_path / "out", num_candidates=2 * 32 * 4)


def test_reward_model(judge: Path) -> None:
    rate = hf.pipeline("text-classification", str(judge), function_to_apply="none")
    assert isinstance(rate("[CLS] is chess hard ? [SEP] endgames win matches . [SEP]")[0]["score"], float)
    with (judge / "suspects.csv").open(encoding="utf-8") as file:
        suspects = list(csv.DictReader(file))
    assert [list(row) for row in suspects] == [["chosen_text", "rejected_text", "excess_loss", "row"]] * 5


def test_one_file_alone_is_refused(tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="`--train_file` and `--validation_file` go together"):
            run(name, tmp_path / "out", train_file="train.csv")


def assert_exports(output: Path, num_candidates: int) -> None:
    candidates = load_candidates(output / "candidates")
    assert len(candidates) == num_candidates
    accepted = [json.loads(line) for line in (output / "accepted.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(accepted) == sum(candidates["is_accepted"]) > 0
    pairs = [json.loads(line) for line in (output / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pairs
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
