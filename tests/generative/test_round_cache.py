"""What of a round on disk a later run may use: an edited reward, prompt or option is noticed, a restart is not."""

import functools
import importlib.util
import linecache
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import generators
from generative_runs import (
    NUM_PROMPTS,
    SHARDS,
    CountingEngine,
    Killed,
    resampler,
    shards,
    stored,
    trained,
)
from rsft_hf import Threshold, TopKPerPrompt, load_candidates
from rsft_hf.generative.candidates import Candidate, CandidateStore
from rsft_hf.generative.filters import Deduplicate
from rsft_hf.generative.round_cache import (
    RoundPlan,
    open_round,
    plan_round,
    rule_digest,
    scoring_digests,
    set_rounds_aside,
    shard_work,
    source_digest,
)
from rsft_hf.rewards import LengthWindow
from rsft_hf.rewards.functions import RewardFunctions

# A user's file: a set in the code, and a function inside the function.
REWARD = """
def judge(completions, **_):
    seen.extend(completions)
    return [float(sum(word in {"a", "b", "c", "d", "e", "f"} for word in text.split())) for text in completions]
"""


def reward(source: str = REWARD, seen: list | None = None) -> Callable[..., list[float]]:
    """The function as a Python process has it that reads this file: a new object, named `judge` whatever it does."""
    names: dict[str, Any] = {"seen": [] if seen is None else seen}
    path = f"reward-{hash(source)}.py"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)  # as if it had been read
    exec(compile(source, path, "exec"), names)
    return names["judge"]


def edited(old: str, new: str) -> str:
    assert REWARD.count(old) >= 1
    return REWARD.replace(old, new)


def values(source: str, rows: list[dict]) -> list[float]:
    return reward(source)([row["text"] for row in rows])


def answers(rows: list[dict]) -> list[tuple]:
    return [(row["prompt_id"], row["attempt"], row["candidate"], tuple(row["token_ids"])) for row in rows]


@pytest.mark.parametrize("kill", [None, 3], ids=["finished", "killed"])
def test_an_edited_reward_scores_the_answers_anew_and_generates_none_again(tmp_path: Path, caplog, kill) -> None:
    first, again = CountingEngine(kill), CountingEngine()
    if kill is None:
        trained(tmp_path, resampler(reward(), engine=first))
    else:
        with pytest.raises(Killed):
            trained(tmp_path, resampler(reward(), engine=first))
    before = stored(tmp_path)
    assert len(before) == 4 * (NUM_PROMPTS if kill is None else 2 * kill)
    source, seen = edited("float(sum", "-float(sum"), []
    trained(tmp_path, resampler(reward(source, seen), engine=again))
    after = stored(tmp_path)
    assert len(again.calls) == (0 if kill is None else SHARDS - kill)
    assert answers(after)[: len(before)] == answers(before)
    assert [row["rewards/judge"] for row in after] == [row["reward"] for row in after] == values(source, after)
    assert any(row["reward"] < 0 for row in after[: len(before)])  # or both give the same
    assert seen == [row["text"] for row in after]
    for prompt in range(NUM_PROMPTS):
        own = [row for row in after if row["prompt_id"] == prompt]
        assert [row["reward"] for row in own if row["is_accepted"]] == [max(row["reward"] for row in own)]
    assert "it differs in scoring" in caplog.text
    aside = load_candidates(tmp_path / "candidates" / "replaced" / "round-000-0").to_list()
    assert aside == before
    assert [row["reward"] for row in aside] == values(REWARD, aside)


def test_a_second_edit_is_put_aside_under_another_name(tmp_path: Path) -> None:
    for factor in ("float", "-float", "2 * float"):
        trained(tmp_path, resampler(reward(edited("float", factor)), engine=CountingEngine()))
    for number, factor in enumerate(("float", "-float")):
        aside = load_candidates(tmp_path / "candidates" / "replaced" / f"round-000-{number}").to_list()
        assert [row["reward"] for row in aside] == values(edited("float", factor), aside)


def test_later_attempts_of_an_edited_reward_are_made_anew(tmp_path: Path) -> None:
    """Who is sampled again hangs on what was accepted: nothing before the edit, everything after it."""
    options = {"acceptance": Threshold(9.0), "max_attempts": 2, "on_nothing_accepted": "best"}
    trained(tmp_path, resampler(reward(), **options))
    assert len(shards(tmp_path)) == 2 * SHARDS
    engine = CountingEngine()
    trained(tmp_path, resampler(reward(edited("float(sum", "9.5 + float(sum")), engine=engine, **options))
    assert (len(engine.calls), len(shards(tmp_path))) == (0, SHARDS)


def test_the_same_code_defined_anew_has_nothing_done_again(tmp_path: Path, caplog) -> None:
    trained(tmp_path, resampler(reward()))
    before, seen, engine = stored(tmp_path), [], CountingEngine(0)  # would be killed at once
    trained(tmp_path, resampler(reward(seen=seen), engine=engine))
    assert (engine.calls, seen) == ([], [])
    assert stored(tmp_path) == before
    assert "candidates of another run" not in caplog.text
    assert not (tmp_path / "candidates" / "replaced").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [("float(sum", "-float(sum"), ("sum(", "max("), ('"f"', '"g"'), ("split()", "lower()"), ("in {", "not in {")],
    ids=["operation", "name", "set", "method", "inner"],
)
def test_every_edit_changes_the_digest(old: str, new: str) -> None:
    assert source_digest(reward(edited(old, new))) != source_digest(reward()) == source_digest(reward())


def test_the_digest_is_the_same_in_another_process(tmp_path: Path) -> None:
    """The order of a set of strings is not: it hangs on PYTHONHASHSEED."""
    words = [str(number) for number in range(100)]
    (tmp_path / "reward.py").write_text(f"WORDS = {words}\n{REWARD}")
    script = (
        f"import runpy; names = runpy.run_path({str(tmp_path / 'reward.py')!r})\n"
        "from rsft_hf.generative.round_cache import source_digest\n"
        "print(source_digest(names['judge']), list(frozenset(names['WORDS'])))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert run.returncode == 0, run.stderr
    digest, order = run.stdout.strip().split(" ", 1)
    assert digest == source_digest(reward())
    assert order != str(list(frozenset(words)))  # or this test shows nothing


def test_a_digest_covers_defaults_enclosed_constants_and_bound_arguments() -> None:
    def made(limit: float, words: tuple[str, ...] = ("a",)) -> Callable[..., list[float]]:
        return lambda completions, words=words, **_: [limit * (text in words) for text in completions]

    digests = [source_digest(made(1.0)), source_digest(made(2.0)), source_digest(made(1.0, ("b",)))]
    digests += [source_digest(functools.partial(made(1.0), scale=scale)) for scale in (1, 2)]
    assert len(set(digests)) == 5
    assert source_digest(made(1.0)) == digests[0]


def test_a_digest_of_an_object_covers_its_fields_and_its_class(tmp_path: Path) -> None:
    digests = []
    for value in (1.0, 2.0):
        name = f"judge_of_{value:.0f}"
        path = tmp_path / f"{name}.py"
        path.write_text(
            "class Judge:\n    def __repr__(self):\n        return 'judge'\n"
            f"    def __call__(self, completions, **_):\n        return [{value}] * len(completions)\n"
        )
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        digests.append(source_digest(module.Judge()))
        del sys.modules[name]
    assert digests[0] != digests[1]
    assert source_digest(LengthWindow(1, 5)) != source_digest(LengthWindow(1, 6))


def test_a_digest_of_an_object_covers_its_constants_and_its_models() -> None:
    class Brevity:
        def __init__(self, target: Any) -> None:
            self.target = target

        def __call__(self, completions, **_):
            return [-abs(len(text) - self.target) for text in completions]

    def model(value: float) -> torch.nn.Module:
        linear = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(linear.weight, value)
        torch.nn.init.zeros_(linear.bias)
        return linear

    made = [2, 7, model(1.0), model(2.0), lambda text: 1, lambda text: 2]
    assert len({source_digest(Brevity(target)) for target in made}) == 6
    assert source_digest(Brevity(model(1.0))) == source_digest(Brevity(model(1.0)))


def test_objects_that_change_as_they_score_keep_their_digest() -> None:
    class Counting:
        calls = 0

        def __call__(self, completions, **_):
            self.calls += 1
            return [1.0] * len(completions)

    functions = RewardFunctions(Counting())
    before = list(scoring_digests(functions))
    functions(["a"], ["b"], [[1]], {})
    assert scoring_digests(functions) == before == scoring_digests(RewardFunctions(Counting()))


def test_rules_with_functions_have_the_digest_of_these() -> None:
    rules = [lambda one: "a" not in one.text, lambda one: "d" not in one.text]
    rules += [Deduplicate(key=lambda text: text[:1]), Deduplicate(key=lambda text: text[:2])]
    assert len({rule_digest(rule) for rule in rules}) == 4
    assert rule_digest(TopKPerPrompt(1)) == "TopKPerPrompt()"


def test_rounds_are_ordered_by_number(tmp_path: Path) -> None:
    store = lambda number: CandidateStore(tmp_path / "candidates" / f"round-{number:03d}", (), False)  # noqa: E731
    for number in (998, 999, 1000, 1001):
        store(number).directory.mkdir(parents=True)
        store(number).write(store(number).path(0, 0), [Candidate(0, "a", [1], str(number), "stop")], "generated")
    assert load_candidates(tmp_path)["text"][:] == ["998", "999", "1000", "1001"]
    set_rounds_aside(store(1000), "of another run")
    assert load_candidates(tmp_path)["text"][:] == ["998", "999"]
    assert len(list((tmp_path / "candidates" / "replaced").iterdir())) == 2


def test_later_attempts_go_where_scores_of_the_first_are_to_come(tmp_path: Path) -> None:
    """Which prompts need them is decided by these."""
    store, plan = CandidateStore(tmp_path / "round-000", ("judge",), False), RoundPlan({"seed": 1}, (), generates=True)
    store.directory.mkdir()
    for attempt, score in ((0, None), (1, 1.0)):
        one = Candidate(0, "a", [1], "x", "stop", attempt, rewards={"judge": score}, reward=score)
        store.write(store.path(attempt, 0), [one], "scored")
    open_round(store, plan, None)
    assert store.shards() == [store.path(0, 0)]
    store.write(store.path(0, 0), [Candidate(0, "a", [1], "x", "stop", rewards={"judge": 0.0}, reward=0.0)], "scored")
    store.write(
        store.path(1, 0), [Candidate(0, "a", [1], "x", "stop", 1, rewards={"judge": 1.0}, reward=1.0)], "scored"
    )
    open_round(store, plan, None)
    assert store.shards() == [store.path(0, 0), store.path(1, 0)]


def test_a_function_without_a_source_text_is_named(caplog) -> None:
    names: dict[str, Any] = {}
    exec("def judge(completions, **_): return [0.0] * len(completions)", names)
    source_digest(names["judge"])
    assert "source text of function 'judge' is not available" in caplog.text


@pytest.mark.parametrize(
    ("changed", "max_attempts", "num_stored", "keeps", "generates"),
    [
        (None, 1, 2, False, True),  # nothing stored
        ((), 1, 2, True, False),
        ((), 1, 1, True, True),  # a shard is missing
        ((), 2, 2, True, True),  # a second attempt may follow
        (("acceptance", "scoring"), 1, 2, True, False),
        (("seed",), 1, 2, False, True),
        (("seed", "acceptance"), 1, 2, False, True),
    ],
)
def test_a_plan_says_what_is_left(tmp_path, changed, max_attempts, num_stored, keeps, generates) -> None:
    facts = {"seed": 1, "acceptance": "TopK", "scoring": ["a"]}
    store = CandidateStore(tmp_path, ["judge"], is_conversational=False)
    for number in range(num_stored):
        store.write(store.path(0, number), [Candidate(number, "a", [6], "a", "stop")], "generated")
    if changed is not None:
        store.write_manifest({"facts": facts | dict.fromkeys(changed, "other")})
    plan = plan_round(store, facts, num_shards=2, max_attempts=max_attempts)
    assert plan.changed is None if changed is None else set(plan.changed) == set(changed)
    assert (plan.keeps_completions, plan.generates) == (keeps, generates)


def test_the_work_on_a_shard_is_what_its_stage_leaves(tmp_path) -> None:
    store = CandidateStore(tmp_path, ["judge"], is_conversational=False)
    path, candidate = store.path(0, 0), Candidate(0, "a", [6], "a", "stop")
    assert shard_work(store, path) == "generate"
    store.write(path, [candidate], "generated")
    assert shard_work(store, path) == "score"
    store.write(path, [candidate], "scored")  # no function answered
    assert shard_work(store, path) == "score"
    candidate.reward, candidate.rewards = 1.0, {"judge": 1.0}
    store.write(path, [candidate], "scored")
    assert shard_work(store, path) == "nothing"


@pytest.mark.parametrize("num_answered", [0, 2 * 8], ids=["from_the_start", "after_two_shards"])
def test_what_no_judge_answered_for_is_scored_again_without_generating(tmp_path: Path, num_answered: int) -> None:
    is_out, seen = [True], []

    def judge(completions: list, **_) -> list[float | None]:
        seen.extend(completions)
        return [None if is_out[0] and len(seen) > num_answered else float(len(text)) for text in completions]

    if num_answered:
        trained(tmp_path, resampler(judge))  # what was not judged is left out
    else:
        with pytest.raises(RuntimeError, match="36 that no reward function could judge"):
            trained(tmp_path, resampler(judge))
    rewards = [row["reward"] for row in stored(tmp_path)]
    assert [reward is None for reward in rewards] == [number >= num_answered for number in range(36)]
    is_out[0], engine = False, CountingEngine(0)
    seen.clear()
    ours = trained(tmp_path, resampler(judge, engine=engine))
    rows = stored(tmp_path)
    assert engine.calls == []
    assert seen == [row["text"] for row in rows[num_answered:]]
    assert [row["reward"] for row in rows] == [float(len(row["text"])) for row in rows]
    assert len(ours.resampler.pool.accepted) == NUM_PROMPTS
    assert not (tmp_path / "candidates" / "replaced").exists()


@pytest.mark.parametrize(
    ("rewards", "verdicts", "expected"),
    [
        ((None, None), (None, None), True),
        ((None, None), ("filtered", None), True),
        ((None, 0.0), (None, None), False),
        ((None, None), ("filtered", "filtered"), False),
    ],
)
def test_a_shard_is_unjudged_where_no_candidate_was_answered_for(tmp_path, rewards, verdicts, expected) -> None:
    store = CandidateStore(tmp_path, ["judge"], is_conversational=False)
    candidates = [
        Candidate(0, "a", [6], "a", "stop", index=index, reward=reward, verdict=verdict, rewards={"judge": reward})
        for index, (reward, verdict) in enumerate(zip(rewards, verdicts))
    ]
    store.write(store.path(0, 0), candidates, "scored")
    assert store.is_unjudged(store.path(0, 0)) is expected


def test_a_judge_that_was_out_beside_another_reward_is_asked_again(tmp_path: Path) -> None:
    is_out = [True]

    def judge(completions, log_metric, **columns):
        seen.append(len(completions))
        log_metric("judge/failures", len(completions) * is_out[0])
        return [None if is_out[0] else float(len(text)) for text in completions]

    def another_task(completions, **columns):
        return [None] * len(completions)

    seen, calls = [], []
    for is_out[0], expected in ((True, {None}), (False, None), (False, None)):
        trained(tmp_path, resampler([judge, generators.share_of_wanted, another_task]))
        found = set(load_candidates(tmp_path)["rewards/judge"])
        assert found == expected if expected else None not in found
        calls.append(len(seen))
    assert calls == [calls[0], 2 * calls[0], 2 * calls[0]]  # an answer that is rightly missing is not asked for again


@pytest.mark.parametrize("column", [None, "prompt", "wanted", "reference"])
def test_one_changed_row_of_forty_begins_the_round_anew(tmp_path: Path, caplog, column: str | None) -> None:
    """Row 1 is in no sample of sixteen rows spread over forty: 0, 2, 5, 7, ..."""
    rows = generators.prompts(40).to_list()
    with pytest.raises(Killed):
        trained(tmp_path, resampler(engine=CountingEngine(2)), train_dataset=datasets.Dataset.from_list(rows))
    before = stored(tmp_path)
    if column is not None:
        assert rows[1][column] != "j j"
        rows[1][column] = "j j"
    engine, made = CountingEngine(), {"num_draws": 2, "acceptance": TopKPerPrompt(1)}
    trained(tmp_path, resampler(engine=engine, **made), train_dataset=datasets.Dataset.from_list(rows))
    assert len(shards(tmp_path)) == 4
    aside = tmp_path / "candidates" / "replaced" / "round-000-0"
    if column is None:
        assert len(engine.calls) == 2
        assert not aside.exists()
    else:
        assert len(engine.calls) == 4
        assert "round-000 differs in prompts)" in caplog.text
        assert load_candidates(aside).to_list() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"supervised": 3}, "Cannot resume: supervised rows was 2 when the checkpoint was saved, and is 3"),
        ({"every_n_epochs": 2}, "Cannot resume: every_n_epochs was 1 when the checkpoint was saved, and is 2"),
        ({}, None),
    ],
)
def test_a_checkpoint_is_not_resumed_with_other_rows_or_rounds(tmp_path: Path, changed: dict, message) -> None:
    """Row numbers in the checkpoint would name other rows, and epochs other rounds."""

    def made(supervised: int = 2, every_n_epochs: int = 1, engine: Any = "auto") -> Any:
        rows = [{"prompt": "a b", "completion": "c"}] * supervised
        return resampler(
            supervised_dataset=rows, supervised_fraction=0.5, every_n_epochs=every_n_epochs, engine=engine, num_draws=4
        )

    args = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
    trained(tmp_path, made(), args=args)
    engine, checkpoint = CountingEngine(0), str(tmp_path / "checkpoint-3")  # in the middle of the second epoch
    if message is None:
        trained(tmp_path, made(engine=engine), resume=checkpoint, args=args)
    else:
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, made(engine=engine, **changed), resume=checkpoint, args=args)
    assert engine.calls == []
