"""Data of users through the recipes: names, columns, splits, orders of classes, languages in one column."""

import csv
import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers as hf

from recipe_runs import DATA, NAMES, data_set, load, run
from rsft_hf import load_candidates


def test_labels_that_are_integers_keep_their_names(tmp_path: Path) -> None:
    rows = ["text,label", *(f"word {number % 3},{1 + number % 3}" for number in range(24))]
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
    run("imdb_sentiment", tmp_path / "out", config_name=DATA / "reviews" / "model", num_train_epochs=2,
        train_file=tmp_path / "train.csv", validation_file=tmp_path / "test.csv")  # fmt: skip
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "1", 1: "2", 2: "3"}


@pytest.mark.parametrize("name", ["imdb_sentiment", "topic_classification", "self_training"])
def test_held_out_classes_in_another_order_are_those_of_the_same_names(tmp_path: Path, name: str) -> None:
    words = {"good": "fine", "bad": "awful"}
    for split, names in (("train", ["bad", "good"]), ("test", ["good", "bad"])):
        rows = [{"text": words[label], "label": names.index(label)} for label in ("good", "bad") * 12]
        dataset = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=names))
        dataset.to_parquet(str(tmp_path / f"{split}.parquet"))
    paths = {"train_file": tmp_path / "train.parquet", "validation_file": tmp_path / "test.parquet"}
    options = {"config_name": DATA / "reviews" / "model", "num_train_epochs": 12, "learning_rate": 3e-3, **paths}
    if name == "self_training":
        options |= {"num_per_class": 8, "per_device_train_batch_size": 4}
    result = run(name, tmp_path / "out", **options)
    assert result["after"]["after_accuracy"] == 1.0


@pytest.mark.parametrize("names", [["O", "B-day"], ["B-day", "O"], None])
def test_held_out_tags_are_those_of_the_same_names(tmp_path: Path, names: list[str] | None) -> None:
    tags = ["O", "B-day"] * 4
    wrong = tags[:3] + tags[:5]  # of a long sentence the last five words, which other rows of three tokens hold
    for split, order, long_tags in (("train", ["O", "B-day"], tags), ("test", names, wrong)):
        rows = [
            {"tokens": ["play", "tomorrow"], "tags": tags[:2]},
            {"tokens": ["play", "tomorrow"] * 4, "tags": long_tags},
        ]
        dataset = datasets.Dataset.from_list(rows * 8)
        if order:
            dataset = dataset.cast_column("tags", datasets.List(datasets.ClassLabel(names=order)))
        dataset.to_parquet(str(tmp_path / f"{split}.parquet"))
    result = run("token_classification", tmp_path / "out", config_name=DATA / "commands" / "model",
                 train_file=tmp_path / "train.parquet", validation_file=tmp_path / "test.parquet", max_length=5,
                 label_column="tags", num_train_epochs=12, learning_rate=3e-3)  # fmt: skip
    assert result["after"]["after_accuracy"] == 0.5


def test_all_recipes_take_a_data_set_by_the_same_options() -> None:
    for name in NAMES:
        options = {field.name for field in dataclasses.fields(load(name).ScriptArguments)}
        assert {"dataset_name", "dataset_config", "train_split", "validation_split"} <= options, name
        assert any(option.endswith("_column") for option in options), name


@pytest.mark.parametrize("name", ["imdb_sentiment", "topic_classification"])
def test_a_data_set_by_name_with_its_own_columns_and_splits(tmp_path: Path, name: str) -> None:
    rows = [{"sentence": f"The plot is {word}.", "gold": word} for word in ["good", "bad"] * 12]
    path = data_set(tmp_path / "data", train=rows, validation=rows[:6])
    result = run(name, tmp_path / "out", config_name=DATA / "reviews" / "model", num_train_epochs=2,
                 dataset_name=path, validation_split="validation", text_column="sentence",
                 label_column="gold")  # fmt: skip
    assert 0 <= result["after"]["after_accuracy"] <= 1
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize("has_prompt", [False, True])
def test_reward_model_reads_texts_of_other_columns(tmp_path: Path, has_prompt: bool) -> None:
    prompt = {"question": "is chess hard ?"} if has_prompt else {}
    rows = [{**prompt, "better": "endgames win matches .", "worse": "i like soup ."}] * 8
    path = data_set(tmp_path / "data", train=rows[:4], validation=rows)
    run("reward_model", tmp_path / "out", config_name=DATA / "dialogues" / "reward_model", num_train_epochs=2,
        dataset_name=path, train_split="validation", validation_split="train", chosen_column="better",
        rejected_column="worse", prompt_column="question")  # fmt: skip
    with (tmp_path / "out" / "suspects.csv").open(encoding="utf-8") as file:
        text = next(csv.DictReader(file))["chosen_text"]
    assert text.split("[SEP]")[-2].removeprefix("[CLS]").strip() == "endgames win matches ."
    assert ("is chess hard ?" in text) == has_prompt


def test_reward_model_takes_whole_conversations_beside_their_prompt_and_leaves_out_long_pairs(tmp_path: Path) -> None:
    talk = lambda text: [{"role": "user", "content": "is chess hard ?"}, {"role": "assistant", "content": text}]  # noqa: E731
    short = {"prompt": "is chess hard ?", "chosen": talk("endgames win ."), "rejected": talk("i like soup .")}
    long = {"prompt": "is " * 50, "chosen": talk("endgames win . " * 30), "rejected": talk("i like soup . " * 30)}
    path = data_set(tmp_path / "data", train=[long] + [short] * 4, test=[short] * 3 + [long] * 3)
    result = run("reward_model", tmp_path / "out", config_name=DATA / "dialogues" / "reward_model", num_train_epochs=8,
                 dataset_name=path, learning_rate=3e-3, max_length=40)  # fmt: skip
    with (tmp_path / "out" / "suspects.csv").open(encoding="utf-8") as file:
        suspects = list(csv.DictReader(file))
    assert suspects[0]["chosen_text"].count("is chess hard ?") == 1
    assert {row["row"] for row in suspects} == {"1", "2", "3", "4"}  # in the data set
    assert result["after"]["after_accuracy"] == 1.0  # of the pairs that fit


@pytest.mark.parametrize("name", ["translation", "simultaneous_translation"])
def test_both_languages_in_one_column(tmp_path: Path, name: str) -> None:
    rows = [{"id": str(number), "translation": {"en": "one", "fr": f"un {number}"}} for number in range(8)]
    path = data_set(tmp_path / "data", train=rows, validation=rows)
    columns = {"source_column": "translation.en", "target_column": "translation.fr"}
    extra = {"num_train_epochs": 1, "num_candidates": 2, "max_new_tokens": 24}
    run(name, tmp_path / "out", model_name_or_path=DATA / "numbers" / "model", dataset_name=path, **columns, **extra)
    assert {row["prompt"] for row in load_candidates(tmp_path / "out")} == {"one"}


def test_voice_assistant_names_the_classes_that_are_stored_as_numbers(tmp_path: Path) -> None:
    features = datasets.Features({
        "words": datasets.List(datasets.Value("string")),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B-city", "I-city"])),
        "intent": datasets.ClassLabel(names=["weather", "call"]),
    })  # fmt: skip
    rows = [{"words": ["rain", "in", "new", "york"], "tags": [0, 0, 1, 2], "intent": 0}]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    recipe = load("voice_assistant")
    script = recipe.ScriptArguments(str(tmp_path / "data"), token_column="words", tag_column="tags")
    (parse,) = recipe.load_commands(script, "train", None, 1, seed=0)["parse"]
    assert json.loads(parse) == {"intent": "weather", "slots": {"city": "new york"}}


def test_image_classification_takes_names_of_classes_and_a_part_of_a_split(tmp_path: Path) -> None:
    pixels = {"pixels": datasets.Image(), "animal": datasets.Value("string")}
    rows = {"pixels": [np.full((8, 8, 3), 20 * row, dtype=np.uint8) for row in range(12)], "animal": ["dog", "cat"] * 6}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(pixels)).to_parquet(tmp_path / "data" / "train.parquet")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **size)).save_pretrained(tmp_path / "model")
    hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    try:
        hf.AutoImageProcessor.from_pretrained(tmp_path / "model")
    except ImportError:
        pytest.skip("AutoImageProcessor of this transformers needs torchvision")
    run("image_classification", tmp_path / "out", dataset_name=tmp_path / "data", train_split="train[:8]",
        validation_split="train[8:]", image_column="pixels", label_column="animal", num_train_epochs=1,
        model_name_or_path=tmp_path / "model")  # fmt: skip
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "cat", 1: "dog"}


def test_one_file_alone_is_refused(tmp_path: Path) -> None:
    for name in NAMES:
        if name == "image_classification":
            continue  # a folder instead of files
        with pytest.raises(ValueError, match="`--train_file` and `--validation_file` go together"):
            run(name, tmp_path / "out", train_file="train.csv")


RESULTS = [
    (r"3\sqrt{13}", r"so \boxed{3\sqrt{13}}", 1.0), (r"3\sqrt{13}", "#### 3", 0.0),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{\left( 3, \frac{\pi}{2} \right)}", 1.0),
    (r"10\pi", "#### 10", 0.0), ("2k+2", "#### 2", 0.0), ("6 - 5i", "#### 5", 0.0), ("18", "#### 18.0", 1.0),
    ("18", "#### **18**", 1.0), ("18", "#### 18 x", 1.0), ("no", "#### on", 0.0),
    ("5,000", "it is 5000", 1.0), ("9 (apples)", "#### 9", 1.0), ("yes", "#### yes", 1.0), ("yes", "#### no", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("result", "solution", "reward"), RESULTS)
def test_results_may_be_formulas_and_words(result: str, solution: str, reward: float) -> None:
    assert load("math_reasoning").is_right([[{"content": solution}]], [result]) == [reward]


def test_problems_may_be_conversations_and_answers_lists_or_absent(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "1 + 1"}]
    path = data_set(tmp_path / "data", train=[{"question": turn, "answer": ["2"]}, {"question": turn, "answer": None}])
    recipe = load("math_reasoning")
    (row,) = recipe.load_problems(recipe.ScriptArguments(str(path), instruction="Add."), "train", None, 9, seed=0)
    assert row == {"prompt": [{"role": "user", "content": "Add.\n\n1 + 1"}], "result": "2"}


TAGS = [
    (["O", "B-genre", "E-genre", "S-artist"], {"genre": "a b", "artist": "c"}),
    (["o", "b-genre", "i-genre", "O"], {"genre": "a b"}),
    (["genre", "O", "O", "O"], None),
    (["O", "B", "O", "O"], None),
]


@pytest.mark.parametrize(("tags", "slots"), TAGS, ids=str)
def test_slots_are_read_from_tags_of_several_schemes(tmp_path: Path, tags: list[str], slots: dict | None) -> None:
    path = data_set(tmp_path / "data", train=[{"words": ["x", "a", "b", "c"], "tags": tags, "intent": "play"}])
    recipe = load("voice_assistant")
    script = recipe.ScriptArguments(str(path), token_column="words", tag_column="tags")
    if slots is None:
        with pytest.raises(ValueError, match="is none of O, B-slot and I-slot"):
            recipe.load_commands(script, "train", None, 1, seed=0)
        return
    (parse,) = recipe.load_commands(script, "train", None, 1, seed=0)["parse"]
    assert json.loads(parse)["slots"] == slots


def test_rows_without_a_text_or_a_label_are_left_out_and_suspects_count_in_the_data_set(tmp_path: Path, capsys) -> None:
    rows = [{"text": text, "label": label} for text, label in ((None, 0), ("fine", 1), ("", 1), ("awful", 0))]
    rows = [*rows, {"text": "unknown", "label": -1}, *rows[1::2] * 6]
    dataset = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    dataset.to_parquet(str(tmp_path / "train.parquet"))
    paths = {"train_file": tmp_path / "train.parquet", "validation_file": tmp_path / "train.parquet"}
    options = {"config_name": DATA / "reviews" / "model", "num_train_epochs": 3, "max_train_samples": 8}
    run("imdb_sentiment", tmp_path / "out", **options, **paths)
    assert "3 of 17 rows of train have no text or no label" in capsys.readouterr().out
    with (tmp_path / "out" / "suspects.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            assert rows[int(line["source_row"])]["text"] == line["text"]


def test_a_question_whose_answer_is_an_empty_text_has_none(tmp_path: Path) -> None:
    answers = [{"text": ["blue"], "answer_start": [11]}, {"text": [""], "answer_start": [-1]}]
    rows = [{"question": q, "context": "the sky is blue .", "answers": a} for q, a in zip(("sky ?", "sea ?"), answers)]
    path = data_set(tmp_path / "data", train=rows * 8, validation=rows * 2)
    result = run("question_answering", tmp_path / "out", config_name=DATA / "facts" / "model", max_length=40,
                 doc_stride=16, num_train_epochs=30, learning_rate=3e-3, dataset_name=path)  # fmt: skip
    assert result["after"]["after_exact_match"] >= 50


def test_a_reward_model_of_one_epoch_has_no_suspects(tmp_path: Path) -> None:
    rows = [{"prompt": "is chess hard ?", "chosen": "endgames win matches .", "rejected": "i like soup ."}] * 8
    path = data_set(tmp_path / "data", train=rows, test=rows)
    run("reward_model", tmp_path / "out", config_name=DATA / "dialogues" / "reward_model", num_train_epochs=1,
        dataset_name=path)  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "suspects.csv").exists()


def test_self_training_without_an_epoch_to_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`--warmup_epochs`=5 is no less than 3"):
        run("self_training", tmp_path / "out", num_train_epochs=3)


def test_tags_that_are_missing_are_ignored_and_unknown_ones_named(tmp_path: Path) -> None:
    rows = [{"tokens": ["play", "tomorrow"], "tags": ["O", None]}, {"tokens": ["play"], "tags": ["O"]}] * 4
    recipe = load("token_classification")
    for name, held_out, match in (("a", rows, None), ("b", [*rows, {"tokens": ["x"], "tags": ["B-y"]}], "B-y")):
        path = data_set(tmp_path / name, train=rows, test=held_out)
        script = recipe.ScriptArguments(str(path), label_column="tags")
        if match:
            with pytest.raises(ValueError, match=r"The split 'test' has the tags \['B-y'\], which no training row has"):
                recipe.load_splits(script)
        else:
            splits, names = recipe.load_splits(script)
            assert (names, splits["test"]["tags"][0]) == (["O"], [0, -100])
