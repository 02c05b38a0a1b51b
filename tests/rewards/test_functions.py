"""The reward contract: what functions are given, how answers combine, and that TRL's functions serve unchanged."""

import asyncio
import functools
import random
import threading
import unittest.mock

import numpy as np
import pytest
import torch
from torch import nn

import reward_parts
from rsft_hf.rewards import ExactMatch
from rsft_hf.rewards.functions import RewardFunctions

PROMPTS, COMPLETIONS, IDS = ["p", "p", "q"], ["aa", "b", "cccc"], [[5, 5], [6], [7, 7, 7, 7]]


def lengths(completions, **kwargs):
    return [float(len(text)) for text in completions]


def one(completions, **kwargs):
    return [1.0] * len(completions)


def score(functions, columns=None, **keywords):
    return RewardFunctions(functions, **keywords)(PROMPTS, COMPLETIONS, IDS, columns or {})


def test_the_sum_is_weighted_over_those_that_answered():
    def sometimes(completions, **kwargs):
        return [None, 10.0, None]

    def never(completions, **kwargs):
        return [None, None, None]

    scores = score([lengths, sometimes, never], weights=[0.5, 2.0, 7.0])
    assert scores.rewards.tolist() == [1.0, 20.5, 2.0]  # .5*2, .5*1 + 2*10, .5*4
    assert scores.rewards.dtype == torch.float64
    assert list(scores.by_function) == ["lengths", "sometimes", "never"]
    assert scores.by_function["sometimes"].isnan().tolist() == [True, False, True]
    assert score([sometimes]).rewards.isnan().tolist() == [True, False, True]
    assert score([never]).rewards.isnan().all()


def test_keywords_are_those_of_the_contract():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    columns = {"solution": ["x", "y", "z"], "prompt": PROMPTS, "completion": COMPLETIONS, "completion_ids": IDS}
    RewardFunctions([spy])(PROMPTS, COMPLETIONS, IDS, columns, trainer_state="state")
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "solution", "trainer_state", "log_extra", "log_metric"
    }  # fmt: skip
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, IDS)
    assert (seen["solution"], seen["trainer_state"]) == (["x", "y", "z"], "state")


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, True],
        (1.0, 2.5, np.float32(1)),
        np.array([1, 2.5, 1]),
        torch.tensor([1.0, 2.5, 1.0]),
        [torch.tensor(1), torch.tensor(2.5), np.True_],
    ],
    ids=["python", "tuple", "numpy", "torch", "of tensors"],
)
def test_any_list_of_numbers_is_an_answer(values):
    assert score([lambda **kwargs: values]).rewards.tolist() == [1.0, 2.5, 1.0]


def test_equal_names_are_told_apart():
    functions = RewardFunctions([one, lengths, one, functools.partial(one), named("one_2")])
    assert functions.names == ["one", "lengths", "one_2", "one_3", "one_2_2"]


def named(name):
    def function(completions, **kwargs):
        return [0.0] * len(completions)

    function.__name__ = name
    return function


def test_an_object_that_answers_to_any_attribute_is_a_plain_function():
    mock = unittest.mock.Mock(side_effect=lambda completions, **kwargs: [2.0] * len(completions))
    functions = RewardFunctions(mock)
    assert functions.names == ["Mock"]
    functions.check(["prompt", "solution"])
    assert functions(PROMPTS, COMPLETIONS, IDS, {}).rewards.tolist() == [2.0] * 3


def test_extras_and_metrics_are_collected():
    def first(completions, log_extra, log_metric, **kwargs):
        log_extra("parsed", [text.upper() for text in completions])
        log_metric("seen", 1)
        log_metric("seen", 4)
        return one(completions)

    def second(completions, log_extra, log_metric, **kwargs):
        log_extra("parsed", [0, 1, 2])
        log_metric("seen", 1.0)
        return one(completions)

    scores = score([first, second])
    assert scores.extras == {"parsed": ["AA", "B", "CCCC"], "second/parsed": [0, 1, 2]}
    assert scores.metrics == {"seen": 2.0}  # (1 + 4 + 1) / 3


def test_no_completions_call_nothing():
    def refuse(**kwargs):
        raise AssertionError

    scores = RewardFunctions([refuse])([], [], [], {})
    assert scores.rewards.shape == (0,)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_may_change_what_it_is_given(is_async):
    """What it was given is trained on, and given to the next function."""

    def destroy(prompts, completions, completion_ids, **columns):
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            prompt[0]["content"] = "gone"
            prompt.append({"role": "assistant", "content": "gone"})
            ids.clear()
        completions.sort(key=str, reverse=True)
        columns["wanted"].clear()
        return [1.0] * len(prompts)

    async def destroy_later(**keywords):
        return destroy(**keywords)

    def see(prompts, completions, completion_ids, wanted, **columns):
        assert (prompts, completions, completion_ids, wanted) == given()
        return [2.0] * len(prompts)

    def given():
        prompts = [[{"role": "user", "content": "a"}] for _ in range(2)]
        return prompts, [[{"role": "assistant", "content": text}] for text in "xy"], [[1], [2]], ["u", "v"]

    *lists, wanted = given()
    RewardFunctions([destroy_later if is_async else destroy, see])(*lists, {"wanted": wanted})
    assert (*lists, wanted) == given()


def test_async_functions_run_together():
    """Each waits for the other: one after the other they would wait for ever."""
    barrier: dict[str, asyncio.Event] = {}

    async def first(completions, **kwargs):
        barrier.setdefault("first", asyncio.Event()).set()
        await asyncio.wait_for(barrier.setdefault("second", asyncio.Event()).wait(), 5)
        return [1.0] * len(completions)

    class Second:
        async def __call__(self, completions, **kwargs):
            barrier.setdefault("second", asyncio.Event()).set()
            await asyncio.wait_for(barrier.setdefault("first", asyncio.Event()).wait(), 5)
            return [None, 2.0, 2.0]

    scores = score([first, lengths, functools.partial(Second())], weights=[1.0, 10.0, 1.0])
    assert scores.rewards.tolist() == [21.0, 13.0, 43.0]


def test_async_functions_run_where_a_loop_runs_already():
    """As in a notebook; and what one keeps between calls stays bound to one loop."""
    loops = []

    async def remember(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return one(completions)

    functions = RewardFunctions([remember])

    async def notebook():
        return functions(PROMPTS, COMPLETIONS, IDS, {}).rewards.tolist()

    assert asyncio.run(notebook()) == [1.0] * 3
    assert functions(PROMPTS, COMPLETIONS, IDS, {}).rewards.tolist() == [1.0] * 3
    assert len(set(loops)) == 1


def test_the_loops_thread_ends_with_its_owner():
    async def quick(completions, **kwargs):
        return one(completions)

    functions = RewardFunctions([quick])
    functions(PROMPTS, COMPLETIONS, IDS, {})
    threads = [thread for thread in threading.enumerate() if thread.name == "rsft-rewards"]
    assert threads
    del functions
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_no_global_generator_moves():
    model = reward_parts.training_model(reward_parts.bert_classifier())
    functions = RewardFunctions([one, model], processing_classes=[None, reward_parts.word_tokenizer()])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    functions(PROMPTS, COMPLETIONS, IDS, {})
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


TEXTS = ["<think>\nx\n</think>\nsame", "a b a b a b", "<think>\nno end"]
TOKENS = [[1] * 90, [1, 2, 1, 2, 1, 2], list(range(101))]


def test_trl_functions_serve_unchanged():
    """What they give when called by hand is what they give here, conversational completions included."""
    rewards = pytest.importorskip("trl.rewards", reason="the extra `trl` is not installed")
    if "get_repetition_penalty_reward" not in dir(rewards):
        pytest.skip("this version of trl has no repetition penalty")
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    prompts = [[{"role": "user", "content": "q"}]] * 3
    functions = [
        rewards.think_format_reward,
        rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20),
        rewards.get_repetition_penalty_reward(ngram_size=2),
    ]
    scores = RewardFunctions(functions)(prompts, completions, TOKENS, {"solution": ["1", "2", "3"]})
    by_hand = [functions[0](completions), functions[1](TOKENS), functions[2](TOKENS)]
    assert [values.tolist() for values in scores.by_function.values()] == by_hand
    names = ["think_format_reward", "soft_overlong_punishment_reward", "repetition_penalty_reward"]
    assert list(scores.by_function) == names
    assert by_hand[0] == [1.0, 0.0, 0.0]
    assert by_hand[1] == [-0.5, 0.0, -1.0]  # (80 - 90) / 20; short; above 100


def test_trl_accuracy_logs_its_columns():
    pytest.importorskip("math_verify", reason="trl's accuracy rewards need math-verify")
    rewards = pytest.importorskip("trl.rewards", reason="the extra `trl` is not installed")
    completions = [[{"role": "assistant", "content": text}] for text in (r"\boxed{\frac{1}{3}}", r"\boxed{2}", "?")]
    columns = {"solution": [r"\frac{1}{3}", r"\frac{1}{2}", r"\frac{1}{2}"]}
    logged = {}
    by_hand = rewards.accuracy_reward(completions, columns["solution"], log_extra=logged.__setitem__)
    scores = RewardFunctions(rewards.accuracy_reward)([[]] * 3, completions, IDS, columns)
    assert (scores.rewards.tolist(), scores.extras) == (by_hand, logged)


TWO_PROMPTS, TWO_COMPLETIONS, TWO_IDS = ["p", "q"], ["a", "b"], [[5], [6]]


def good(completions, **kwargs):
    return [0.0] * len(completions)


def returning(value):
    def answer(**kwargs):
        return value

    return answer


def call(functions, columns=None):
    return RewardFunctions(functions)(TWO_PROMPTS, TWO_COMPLETIONS, TWO_IDS, columns or {})


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
        functions(TWO_PROMPTS, TWO_COMPLETIONS, TWO_IDS, {"gold": ["x", "y"]})


def test_columns_that_would_break_a_call_are_refused():
    def narrow(*, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, solution=None): ...

    RewardFunctions(narrow).check(["prompt", "solution"])
    with pytest.raises(ValueError, match=r"`narrow` does not take the columns \['source'\]"):
        RewardFunctions(narrow).check(["source"])
    with pytest.raises(ValueError, match=r"\['prompts'\] bear names of the reward contract"):
        RewardFunctions(good).check(["prompts"])


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"2 prompts, but \{'completions': 1\}"):
        RewardFunctions(good)(TWO_PROMPTS, ["a"], TWO_IDS, {})
    with pytest.raises(ValueError, match=r"2 prompts, but \{'solution': 3\}"):
        RewardFunctions(good)(TWO_PROMPTS, TWO_COMPLETIONS, TWO_IDS, {"solution": ["x"] * 3})

    def logs_too_little(completions, log_extra, **kwargs):
        log_extra("parsed", ["x"])
        return good(completions)

    with pytest.raises(ValueError, match="`logs_too_little` logged 1 values in the column `parsed` for 2"):
        call(logs_too_little)
