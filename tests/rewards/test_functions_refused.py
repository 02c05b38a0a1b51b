"""What the reward contract refuses, with the function, the value and the remedy in the message."""

import functools

import pytest
from torch import nn

import reward_parts
from rsft_hf.rewards import ExactMatch
from rsft_hf.rewards.functions import RewardFunctions

PROMPTS, COMPLETIONS, IDS = ["p", "q"], ["a", "b"], [[5], [6]]


def good(completions, **kwargs):
    return [0.0] * len(completions)


def returning(value):
    def answer(**kwargs):
        return value

    return answer


def call(functions, columns=None):
    return RewardFunctions(functions)(PROMPTS, COMPLETIONS, IDS, columns or {})


WRONG_ANSWERS = [
    ([1.0], ValueError, "`answer` returned 1 rewards for 2 completions"),
    ([1.0, float("nan")], ValueError, "`answer` returned nan for completion 1"),
    ([float("-inf"), 1.0], ValueError, "`answer` returned -inf for completion 0"),
    ([1.0, "2"], TypeError, "`answer` returned '2' for completion 1"),
    ([1.0, [2.0]], TypeError, r"`answer` returned \[2.0\] for completion 1"),
    (None, TypeError, "`answer` returned a NoneType"),
    (1.0, TypeError, "`answer` returned a float"),
    ("ab", TypeError, "`answer` returned a str"),
    ({0: 1.0, 1: 2.0}, TypeError, "`answer` returned a dict"),
]


@pytest.mark.parametrize(("value", "kind", "message"), WRONG_ANSWERS)
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_wrong_answers_are_refused(value, kind, message, is_async):
    async def answer(**kwargs):
        return value

    with pytest.raises(kind, match=message):
        call([good, answer if is_async else returning(value)])


def test_an_undeclared_coroutine_is_refused():
    async def judge(**kwargs):
        return [1.0, 1.0]

    with pytest.raises(TypeError, match=r"returned a coroutine.*async def"):
        call(lambda **kwargs: judge(**kwargs))


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_an_error_inside_names_the_function_and_keeps_its_cause(is_async):
    def broken(**kwargs):
        raise KeyError("solution")

    async def broken_too(**kwargs):
        raise KeyError("solution")

    function = broken_too if is_async else broken
    with pytest.raises(RuntimeError, match=f"`{function.__name__}` raised KeyError: 'solution'") as caught:
        call([good, function])
    assert isinstance(caught.value.__cause__, KeyError)


def by_position(completions, /, **kwargs): ...


def without_kwargs(completions, prompts): ...


UNCALLABLE = [
    (3, r"`reward_funcs\[1\]` is a int"),
    (ExactMatch, r"is the class ExactMatch.*ExactMatch\(\.\.\.\)"),
    (by_position, r"`by_position` takes \['completions'\] by position"),
    (without_kwargs, r"`without_kwargs` does not take \['completion_ids', .*\*\*kwargs"),
    (functools.partial(without_kwargs, prompts=[]), r"`without_kwargs` does not take"),
    (nn.Linear(1, 1), "Linear is a module without a transformers configuration"),
]


@pytest.mark.parametrize(("function", "message"), UNCALLABLE)
def test_what_cannot_be_called_is_refused_at_once(function, message):
    with pytest.raises(TypeError, match=message):
        RewardFunctions([good, function])


CONSTRUCTIONS = [
    ({"functions": []}, "`reward_funcs` is empty"),
    ({"functions": good, "weights": [1, 2]}, "`reward_weights` has 2 entries for 1 reward functions"),
    ({"functions": good, "weights": [float("nan")]}, r"`reward_weights`=\[nan\] must be finite"),
    ({"functions": [good, good], "processing_classes": [None]}, "`reward_processing_classes` has 1 entries for 2"),
    ({"functions": good, "processing_classes": "tokenizer"}, "belongs to a function, which is no model"),
]


@pytest.mark.parametrize(("keywords", "message"), CONSTRUCTIONS)
def test_wrong_constructions_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(**keywords)


def test_reward_models_that_are_none_are_refused():
    tokenizer = reward_parts.word_tokenizer()
    with pytest.raises(ValueError, match=r"has 3 labels.*ModelReward"):
        RewardFunctions(reward_parts.bert_classifier(3), processing_classes=tokenizer)
    with pytest.raises(ValueError, match="does not say where its tokenizer is"):
        RewardFunctions(reward_parts.bert_classifier(1))
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no `pad_token` and no `eos_token`"):
        RewardFunctions(reward_parts.bert_classifier(1), processing_classes=tokenizer)


def test_an_untrained_head_is_refused(tmp_path):
    reward_parts.bert_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the weights \['classifier.bias', 'classifier.weight'\]"):
        RewardFunctions(str(tmp_path), processing_classes=reward_parts.word_tokenizer())


def test_absent_columns_are_found_before_the_first_call():
    def accuracy(completions, solution, strictness=1, **kwargs):
        raise AssertionError

    functions = RewardFunctions([good, accuracy, ExactMatch("gold")])
    with pytest.raises(ValueError, match=r"`accuracy` needs the column `solution`.*columns are \['gold'\]"):
        functions.check(["prompt", "gold"])
    with pytest.raises(ValueError, match="`exact_match` needs the column `gold`"):
        functions.check(["solution"])
    functions.check(["prompt", "gold", "solution"])
    with pytest.raises(ValueError, match="`accuracy` needs"):
        functions(PROMPTS, COMPLETIONS, IDS, {"gold": ["x", "y"]})


def test_columns_that_would_break_a_call_are_refused():
    def narrow(*, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, solution=None): ...

    RewardFunctions(narrow).check(["prompt", "solution"])
    with pytest.raises(ValueError, match=r"`narrow` does not take the columns \['source'\]"):
        RewardFunctions(narrow).check(["source"])
    with pytest.raises(ValueError, match=r"\['prompts'\] bear names of the reward contract"):
        RewardFunctions(good).check(["prompts"])


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"2 prompts, but \{'completions': 1\}"):
        RewardFunctions(good)(PROMPTS, ["a"], IDS, {})
    with pytest.raises(ValueError, match=r"2 prompts, but \{'solution': 3\}"):
        RewardFunctions(good)(PROMPTS, COMPLETIONS, IDS, {"solution": ["x"] * 3})

    def logs_too_little(completions, log_extra, **kwargs):
        log_extra("parsed", ["x"])
        return good(completions)

    with pytest.raises(ValueError, match="`logs_too_little` logged 1 values in the column `parsed` for 2"):
        call(logs_too_little)
