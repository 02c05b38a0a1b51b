"""Every recipe on a few rows of its built-in data: `main`, then the saved model is loaded as a user loads it."""

import ast
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf

from recipe_runs import DATA, NAMES, RECIPES, files, load, run
from rsft_hf import load_candidates
from rsft_hf.predictive import load_pseudo_labels

MAX_LINES, MAX_BYTES = 150, 2_000_000


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


def test_recipes_are_thirteen_and_short_and_stand_alone() -> None:
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


def test_translation(tmp_path: Path) -> None:
    result = run("translation", tmp_path / "out", model_name_or_path=DATA / "numbers" / "model", num_train_epochs=2,
                 num_candidates=4, temperature=1.0, max_new_tokens=24, learning_rate=1e-3, bleu_tokenize="char",
                 **files(tmp_path, "numbers"))  # fmt: skip
    assert result["before"]["before_bleu"] > 40  # of characters; that of words is 0
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
    assert [list(row) for row in suspects] == [["chosen_text", "rejected_text", "row", "excess_loss"]] * 5


def test_topic_classification(tmp_path: Path) -> None:
    options = {"config_name": DATA / "commands" / "model", "label_column": "intent", "num_train_epochs": 3}
    found = files(tmp_path, "commands", num_rows=96)
    result = run("topic_classification", tmp_path / "out", class_balanced=True, learning_rate=1e-3, **options, **found)
    assert result["before"]["before_worst_class"] <= result["after"]["after_accuracy"]
    classify = hf.pipeline("text-classification", str(tmp_path / "out"))
    intents = {row["intent"] for row in read_lines(found["train_file"])}
    assert classify("wake me at noon")[0]["label"] in intents


def test_token_classification(tmp_path: Path) -> None:
    options = {"config_name": DATA / "commands" / "model", "label_column": "tags", "num_train_epochs": 10}
    found = files(tmp_path, "commands", num_rows=96)
    result = run("token_classification", tmp_path / "out", learning_rate=2e-3, **options, **found)
    assert result["after"]["after_entity_f1"] > result["before"]["before_entity_f1"]
    tag = hf.pipeline("token-classification", str(tmp_path / "out"))
    assert {found["entity"] for found in tag("play some jazz")} <= set(tag.model.config.label2id)


def test_tokens_without_entities_have_no_entity_score(tmp_path: Path) -> None:
    rows = [{"words": ["one", "dog"], "pos": ["NUM", "NOUN"]}, {"words": ["run", "on"], "pos": ["VERB", "ADP"]}] * 8
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    result = run("token_classification", tmp_path / "out", config_name=DATA / "commands" / "model", num_train_epochs=1,
                 token_column="words", label_column="pos", train_file=tmp_path / "train.jsonl",
                 validation_file=tmp_path / "test.jsonl")  # fmt: skip
    assert {"after_accuracy", "after_macro_f1"} <= set(result["after"])
    assert "after_entity_f1" not in result["after"]


def test_self_training(tmp_path: Path) -> None:
    options = {"config_name": DATA / "commands" / "model", "label_column": "intent", "num_train_epochs": 6}
    found = files(tmp_path, "commands", num_rows=96)
    result = run(
        "self_training", tmp_path / "out", num_per_class=4, warmup_epochs=3, learning_rate=2e-3, **options, **found
    )
    assert 0 <= result["after"]["after_accuracy"] <= 1
    labels = load_pseudo_labels(tmp_path / "out")
    assert set(labels["round"]) == {0, 1, 2}
    assert "reference" in labels.column_names
    assert hf.pipeline("text-classification", str(tmp_path / "out"))("call anna")[0]["score"] <= 1


def test_self_training_with_texts_of_ones_own(tmp_path: Path) -> None:
    rows = [(f"{word} {number % 5}", label) for number in range(20) for word, label in (("play", "a"), ("call", "b"))]
    write_csv(tmp_path / "train.csv", [{"text": text, "label": label} for text, label in rows[:12]])
    write_csv(tmp_path / "test.csv", [{"text": text, "label": label} for text, label in rows[20:]])
    write_csv(tmp_path / "more.csv", [{"text": text} for text, _ in rows])
    paths = {"train_file": tmp_path / "train.csv", "validation_file": tmp_path / "test.csv"}
    run("self_training", tmp_path / "out", config_name=DATA / "commands" / "model", num_train_epochs=3, warmup_epochs=2,
        unlabelled_file=tmp_path / "more.csv", **paths)  # fmt: skip
    labels = load_pseudo_labels(tmp_path / "out", only_accepted=False)
    assert len(labels) == 40
    assert "reference" not in labels.column_names


def test_image_classification(tmp_path: Path) -> None:
    result = run("image_classification", tmp_path / "out", digits=True, num_train_epochs=1, max_train_samples=64)
    assert 0 <= result["after"]["after_balanced_accuracy"] <= 1
    look = hf.pipeline("image-classification", str(tmp_path / "out"))
    assert look(PIL.Image.new("L", (8, 8)))[0]["label"] in "0123456789"


def test_question_answering(tmp_path: Path) -> None:
    result = run("question_answering", tmp_path / "out", config_name=DATA / "facts" / "model", max_length=32,
                 doc_stride=12, num_train_epochs=2, learning_rate=2e-3, **files(tmp_path, "facts"))  # fmt: skip
    assert set(result["after"]) == {"after_exact_match", "after_f1"}
    assert result["after"]["after_f1"] >= result["after"]["after_exact_match"]
    assert hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").config.vocab_size > 4


def test_the_best_answer_is_the_best_span_of_any_window() -> None:
    recipe = load("question_answering")
    context = "anna has a red dog"
    spans = [(0, 4), (5, 8), (9, 10), (11, 14), (15, 18)]
    window = {"offsets": [None, None, *spans], "starts": np.zeros(7), "ends": np.zeros(7)}
    window["starts"][5], window["ends"][6] = 3.0, 3.0
    other = {"offsets": [None, None, *spans], "starts": np.full(7, 1.0), "ends": np.zeros(7)}
    assert recipe.best_answer(context, [other, window], True) == "red dog"
    assert recipe.best_answer(context, [window], True, most=1) != "red dog"
    beside = {**other, "starts": other["starts"] + np.eye(7)[0] * 50}  # a window without the answer is sure of none
    assert recipe.best_answer(context, [beside, window], True) == "red dog"
    assert recipe.best_answer(context, [beside], True) == ""
    window["starts"][0] = window["ends"][0] = 9.0
    assert recipe.best_answer(context, [beside, window], True) == ""
    assert recipe.best_answer(context, [beside, window], False) == "red dog"  # all questions have one in training


def test_voice_assistant(tmp_path: Path) -> None:
    result = run("voice_assistant", tmp_path / "out", config_name=DATA / "commands" / "parser", token_column="tokens",
                 tag_column="tags", num_supervised=24, supervised_epochs=2, num_train_epochs=1, num_candidates=2,
                 learning_rate=1e-3, max_new_tokens=16, **files(tmp_path, "commands"))  # fmt: skip
    assert "after_rewards/is_right/mean" in result["after"]
    assert len(load_candidates(tmp_path / "out")) == 24 * 2
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_parses_are_read() -> None:
    recipe = load("voice_assistant")
    turn = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    true = '{"intent": "call", "slots": {"contact": "anna", "time": "noon"}}'
    answers = ['{"slots": {"time": "noon", "contact": "anna"}, "intent": "call"}', '{"intent": "call", "slots": {}}',
               "call", "[1]", '{"intent": "call"', "3"]  # fmt: skip
    assert recipe.is_right([turn(text) for text in answers], [true] * 6) == [1, 0, 0, 0, 0, 0]
    assert recipe.has_intent([turn(text) for text in answers], [true] * 6) == [1, 1, 0, 0, 0, 0]


def test_math_reasoning(tmp_path: Path) -> None:
    result = run("math_reasoning", tmp_path / "out", model_name_or_path=DATA / "sums" / "model", instruction="",
                 num_train_epochs=2, num_candidates=4, max_new_tokens=48, learning_rate=1e-3,
                 **files(tmp_path, "sums", num_rows=24))  # fmt: skip
    assert result["before"]["before_pass@4"] >= result["before"]["before_pass@1"] > 0
    candidates = load_candidates(tmp_path / "out")
    assert len(candidates) == 24 * 4  # one round
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_results_are_verified() -> None:
    recipe = load("math_reasoning")
    answers = ["#### 12", "it is 3 + 9 = 12 .\n#### 12", "#### 12.0", "#### 21", "no number", "12"]
    assert recipe.is_right([[{"content": one}] for one in answers], ["12"] * 6) == [1, 1, 1, 0, 0, 1]


def test_summarization(tmp_path: Path) -> None:
    result = run("summarization", tmp_path / "out", model_name_or_path=DATA / "meetings" / "model", prefix="",
                 num_train_epochs=1, num_candidates=2, max_new_tokens=24, temperature=1.0, learning_rate=1e-3,
                 **files(tmp_path, "meetings", num_rows=24))  # fmt: skip
    assert result["before"]["before_rouge1"] > 50
    assert len(load_candidates(tmp_path / "out")) == 24 * 2
    hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_rewards_of_summaries() -> None:
    recipe = load("summarization")
    assert recipe.length_near_reference(["a b", "", "a b c d"], ["a b", "a", "a b"]) == [1, 0, 0.5]
    rows = {"prompts": ["#Person1#: hi Anna : yes"] * 3, "reference": ["Anna meets Person1", "Anna", "nobody"]}
    assert recipe.coverage(["Anna agrees", "somebody", "x"], **rows) == [0.5, 0, 1]


def test_simultaneous_translation(tmp_path: Path) -> None:
    result = run("simultaneous_translation", tmp_path / "out", model_name_or_path=DATA / "numbers" / "model",
                 num_train_epochs=1, num_candidates=2, max_new_tokens=24, bleu_tokenize="char",
                 **files(tmp_path, "numbers", num_rows=24))  # fmt: skip
    lagging = [lag for lag, _ in result["before"].values()]
    assert lagging == sorted(lagging)
    assert result["before"]["full"][1] > result["before"]["1"][1]
    assert (tmp_path / "out" / "latency.png").stat().st_size > 5000
    hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_sources_are_cut_where_the_labels_could_have_been_written() -> None:
    recipe = load("simultaneous_translation")
    torch.manual_seed(0)
    batch = {"attention_mask": torch.ones(400, 8, dtype=torch.long), "labels": torch.arange(10).repeat(400, 1)}
    cut = recipe.cut_sources(batch)
    lengths, labels = cut["attention_mask"].sum(1), cut["labels"].ne(-100).sum(1)
    is_cut = lengths < 8
    assert 0.1 < float(is_cut.float().mean()) < 0.5
    assert (labels[~is_cut] == 10).all()
    assert (labels[is_cut] <= lengths[is_cut]).all()  # k = 1 writes one for each that it reads
    assert (labels[is_cut] >= 1).all()


def test_make_runs_every_recipe() -> None:
    makefile = (RECIPES.parent / "Makefile").read_text(encoding="utf-8")
    demos = makefile[makefile.index("demo-sentiment:") : makefile.index("test: lint")]
    demos = demos.replace("$(RECIPE)", "recipes")
    assert {name for name in NAMES if f"recipes/{name}.py" in demos} == set(NAMES)
    assert f"= {len(NAMES)} " in demos


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def assert_exports(output: Path, num_candidates: int) -> None:
    candidates = load_candidates(output / "candidates")
    assert len(candidates) == num_candidates
    accepted = [json.loads(line) for line in (output / "accepted.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(accepted) == sum(candidates["is_accepted"]) > 0
    pairs = [json.loads(line) for line in (output / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pairs
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
