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
