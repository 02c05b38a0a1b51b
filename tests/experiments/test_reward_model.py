"""The reward model experiment: dialogues in three forms, halves that share nothing, a model that others can load."""

import json
import os

import datasets
import numpy as np
import pytest
import torch
import transformers as hf

import toy_chat
from experiments import chat_data, reward_model
from experiments.chat_data import load_relevance
from experiments.harness.arguments import ExperimentError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "data").mkdir()
    return {"data": toy_chat.save_dialogues(folder / "data"), "encoder": toy_chat.save_encoder(folder / "encoder")}


@pytest.fixture
def run(world, tmp_path):
    options = {
        "dataset": world["data"],
        "model_name_or_path": world["encoder"],
        "output_dir": tmp_path / "out",
        "num_train_epochs": 1,
        "learning_rate": 2e-3,
        "max_length": 40,
        "report_to": "none",
        "disable_tqdm": True,
    }
    fixed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return lambda *more: reward_model.main([*fixed, *map(str, more)])


def test_it_learns_and_others_can_load_it(run, world, tmp_path):
    """The last colour but one word of the context decides: chance is .5, and the saved model says what was measured."""
    result = run("--num_train_epochs", 12, "--save_strategy", "no")
    assert result["auc_adversarial"] > 0.7
    assert result["auc_random"] > 0.7
    relevance = load_relevance(str(tmp_path / "out"), "reward_model", batch_size=8)
    test = chat_data.load_dialogues(world["data"], "test")
    rows = chat_data.judged_responses(test, seed=0)
    probabilities = np.array(
        relevance(prompts=[row["messages"][:-1] for row in rows], completions=[row["messages"][-1:] for row in rows])
    )
    again = reward_model.figures_of(np.log(probabilities / (1 - probabilities)), rows)
    for name, value in again.items():
        assert value == pytest.approx(result[name], abs=1e-3), name


def test_a_finished_model_is_read_again_and_another_one_refused(run, capsys):
    first = run("--max_train_contexts", 8, "--half", "a")
    assert run("--max_train_contexts", 8, "--half", "a") == json.loads(json.dumps(first))
    assert "finished earlier" in capsys.readouterr().out
    with pytest.raises(ExperimentError, match="other options: half was a, is b"):
        run("--max_train_contexts", 8, "--half", "b")


def test_a_killed_run_goes_on_from_its_checkpoint(run, tmp_path):
    options = ("--max_train_contexts", 16, "--save_strategy", "steps", "--save_steps", 2)
    whole = run(*options)
    (tmp_path / "out" / "result.json").unlink()
    last = hf.trainer_utils.get_last_checkpoint(str(tmp_path / "out"))
    os.rename(last, tmp_path / "away")
    assert hf.trainer_utils.get_last_checkpoint(str(tmp_path / "out")) is not None
    assert run(*options) == whole


def test_fewer_layers_and_responses(run, tmp_path):
    result = run("--num_hidden_layers", 1, "--responses_per_context", 1, "--max_train_contexts", 10)
    assert result["pairs"] == 10 * 3  # one of each kind
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_turns", "1"), "`--max_turns` 1 must be at least 2"),
        (("--half", "c"), "c"),
        (("--train_split", "train+valid"), r"`--train_split` 'valid' is not in the data set. Use one of"),
        (("--model_name_or_path", "nobody/nothing"), "`--model_name_or_path` 'nobody/nothing' could not be loaded"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(run, tmp_path, more, message):
    with pytest.raises(ExperimentError, match=message):
        run(*more)
    assert not (tmp_path / "out").exists()


def test_area_under_curve_against_all_pairs():
    generator = np.random.default_rng(0)
    positives, negatives = generator.integers(0, 6, 40).astype(float), generator.integers(0, 6, 30).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert reward_model.area_under_curve(positives, negatives) == pytest.approx(np.mean(pairs))


def test_figures_within_a_context_ignore_the_level_of_the_context():
    """Context 1 rates everything 10 higher: over all pairs 3 of 4 are right, within a context all of them.

    Accuracy: both positives lie above 0, one negative of two does not: (1 + 1 / 2) / 2.
    """
    rows = [{"kind": kind, "context_id": number} for number in (0, 1) for kind in ("positive", "random")]
    figures = reward_model.figures_of(np.array([1.0, 0.0, 11.0, 10.0]), rows)
    assert figures == {"auc_random": 0.75, "auc_within_context_random": 1.0, "accuracy_random": 0.75}


def test_halves_share_no_conversation(world):
    whole = chat_data.load_dialogues(world["data"], "train+dev")
    halves = [chat_data.half_of(whole, half) for half in chat_data.HALVES]
    assert sum(map(len, halves)) == len(chat_data.half_of(whole, "all")) == len(whole)
    begins = [{row["context"][0] for row in half} for half in halves]
    assert all(begins)
    assert not begins[0] & begins[1]


@pytest.mark.parametrize("form", ["dialog", "messages"])
def test_other_forms_of_dialogue(tmp_path, form):
    turns = [["hi", "ho", "he"], ["yes", "no"], ["alone"]]
    if form == "messages":
        chats = [[{"role": "system", "content": "be brief"}] + chat_data.as_messages(one) for one in turns]
        datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_parquet(str(tmp_path / "train.parquet"))
    else:
        datasets.Dataset.from_list([{"dialog": one} for one in turns]).to_parquet(str(tmp_path / "train.parquet"))
    found = chat_data.load_dialogues(str(tmp_path), "train")
    assert found["context"][:] == [["hi", "ho"], ["yes"]]  # one turn is no context with a response
    assert found["positive_responses"][:] == [["he"], ["no"]]
    rows = chat_data.judged_responses(found, seed=0)
    assert {row["messages"][-1]["content"] for row in rows if row["kind"] == "random"} <= {"he", "no"}
    for row in rows:
        positive = {"ho": "he", "yes": "no"}[row["messages"][-2]["content"]]
        assert row["label"] == float(row["kind"] == "positive") == float(row["messages"][-1]["content"] == positive)


def test_unknown_columns_are_named(tmp_path):
    datasets.Dataset.from_list([{"text": "hi"}]).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ExperimentError, match=r"The data set has the columns text\. Dialogues need `context`"):
        chat_data.load_dialogues(str(tmp_path), "train")


def test_roles_end_with_the_user():
    assert [one["role"] for one in chat_data.as_messages(list("abcd"))] == ["assistant", "user"] * 2
    assert [one["content"] for one in chat_data.as_messages(list("abcde"), max_turns=3)] == ["c", "d", "e"]


def test_two_towers_start_from_the_cosine_of_the_encoder(world, run, tmp_path):
    """Without a step of training the logit is 8 (cosine - 0.3), the cosine being that of the encoder's mean vectors."""
    run("--architecture", "two_towers", "--learning_rate", 0, "--max_train_contexts", 2)
    relevance = load_relevance(str(tmp_path / "out"), "reward_model", batch_size=3)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    encoder = hf.AutoModel.from_pretrained(world["encoder"]).eval()
    contexts = [["red ?"], ["sky is blue .", "what now ?"], ["red ?"]]
    responses = ["it is red .", "blue .", "grey"]

    def mean_vector(text: str) -> torch.Tensor:
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            return encoder(input_ids=inputs["input_ids"]).last_hidden_state[0].mean(0)

    expected = []
    for turns, response in zip(contexts, responses, strict=True):
        first = mean_vector("[CLS]" + "".join(f" {turn} [SEP]" for turn in turns))
        cosine = torch.cosine_similarity(first, mean_vector(f"[CLS] {response} [SEP]"), dim=0)
        expected.append(torch.sigmoid(8 * (cosine - 0.3)).item())
    answers = [[{"role": "assistant", "content": text}] for text in responses]
    found = relevance(prompts=[chat_data.as_messages(turns) for turns in contexts], completions=answers)
    assert found == pytest.approx(expected, abs=1e-5)


def test_two_towers_learn_and_keep_no_vector_over_a_step(run, tmp_path):
    """Figures of the model in memory, whose context vectors were known, are those of the model loaded afresh."""
    result = run("--architecture", "two_towers", "--num_train_epochs", 3, "--max_eval_contexts", 20)
    relevance = load_relevance(str(tmp_path / "out"), "reward_model", batch_size=8).model
    model, tokenizer = relevance.model, relevance.tokenizer
    prompts = [chat_data.as_messages(["red ?"])] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("red .", "blue .")]
    before = relevance(prompts=prompts, completions=completions)
    inputs = tokenizer("[CLS] red ? [SEP] red . [SEP]", add_special_tokens=False, return_tensors="pt")
    model.train()
    loss = model(inputs["input_ids"], inputs["attention_mask"], labels=torch.ones(1, 1)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    after = relevance(prompts=prompts, completions=completions)
    model._known.clear()
    assert after == relevance(prompts=prompts, completions=completions) != before
    assert result["auc_random"] > 0.5


def test_two_towers_want_a_bert(run, tmp_path):
    folder = toy_chat.save_chat_model(tmp_path / "llama")
    with pytest.raises(ExperimentError, match=r"needs a BERT, and .* is a llama"):
        run("--architecture", "two_towers", "--model_name_or_path", folder)
