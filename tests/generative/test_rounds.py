"""Attempts of a round, and what becomes of prompts for which nothing was accepted."""

from pathlib import Path

import pytest

import generative_runs
import generators
from generative_runs import NUM_PROMPTS, CountingEngine, resampler, round_dir, stored, trained
from rsft_hf import Deduplicate, Threshold, TopKPerPrompt
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative import RejectTruncated
from rsft_hf.generative.selection import ACCEPTED

PROMPTS = generators.prompts(NUM_PROMPTS)["prompt"]
HALF_OF_THEM = Threshold(minimum=0.2)  # what the untrained model reaches for some prompts in every attempt


def zero(completions: list, **_) -> list[float]:
    return [0.0] * len(completions)


def counts(rows: list[dict]) -> list[int]:
    """Candidates generated for each prompt."""
    return [sum(row["prompt_id"] == prompt and row["attempt"] >= 0 for row in rows) for prompt in range(NUM_PROMPTS)]


def accepted_prompts(rows: list[dict], last_attempt: int = 99) -> set[int]:
    return {row["prompt_id"] for row in rows if row["verdict"] in ACCEPTED and row["attempt"] <= last_attempt}


def test_a_round_generates_scores_and_accepts_for_every_prompt(tmp_path: Path) -> None:
    engine = CountingEngine()
    trained(tmp_path, resampler(acceptance=TopKPerPrompt(2), engine=engine))
    rows = stored(tmp_path)
    assert engine.prompts() == PROMPTS
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == [
        (prompt, candidate) for prompt in range(NUM_PROMPTS) for candidate in range(4)
    ]
    for prompt in range(NUM_PROMPTS):
        rewards = {verdict: [] for verdict in ("accepted", "rejected")}
        for row in rows[4 * prompt : 4 * prompt + 4]:
            rewards[row["verdict"]].append(row["reward"])
        assert len(rewards["accepted"]) == 2
        assert min(rewards["accepted"]) >= max(rewards["rejected"])
    assert [row["seed"] for row in rows] == [
        candidate_seed(42, 0, prompt, 0, candidate) for prompt in range(NUM_PROMPTS) for candidate in range(4)
    ]


def test_only_prompts_in_need_are_sampled_again_with_fresh_streams(tmp_path: Path) -> None:
    engine = CountingEngine()
    trained(tmp_path, resampler(acceptance=HALF_OF_THEM, max_attempts=3, on_nothing_accepted="skip", engine=engine))
    rows = stored(tmp_path)
    expected, unfilled = list(PROMPTS), set(range(NUM_PROMPTS))
    for attempt in (0, 1):
        unfilled -= accepted_prompts(rows, attempt)
        assert 0 < len(unfilled) < NUM_PROMPTS  # or this test shows nothing
        expected += [PROMPTS[prompt] for prompt in sorted(unfilled)]
    assert engine.prompts() == expected
    assert len(set(engine.seeds)) == len(engine.seeds) == len(rows)
    assert {row["attempt"] for row in rows} == {0, 1, 2}


def test_a_prompt_is_in_need_until_it_has_its_minimum(tmp_path: Path) -> None:
    """Half of 4 candidates x 2 attempts: a prompt with three accepted after the first attempt is sampled no more."""

    def easy_or_not(completions: list, wanted: list, **_) -> list[float]:
        shares = generators.share_of_wanted(completions, wanted)
        return [1.0 if letter == "a" else share for letter, share in zip(wanted, shares, strict=True)]

    options = {"max_attempts": 2, "min_accepted_per_prompt": 3, "on_nothing_accepted": "skip"}
    trained(tmp_path, resampler(easy_or_not, HALF_OF_THEM, **options))
    rows = stored(tmp_path)
    for prompt, count in enumerate(counts(rows)):
        first = [row for row in rows if row["prompt_id"] == prompt and row["attempt"] == 0]
        assert count == (4 if sum(row["reward"] > 0.2 for row in first) >= 3 else 8)
    assert set(counts(rows)) == {4, 8}


def test_attempts_end_when_no_prompt_is_in_need(tmp_path: Path) -> None:
    engine = CountingEngine()
    trained(tmp_path, resampler(max_attempts=5, engine=engine))
    assert engine.prompts() == PROMPTS


def test_raise_explains_with_counts_range_remedies_and_keeps_the_candidates(tmp_path: Path) -> None:
    made = resampler(acceptance=Threshold(minimum=0.9), filters=(RejectTruncated(),))
    with pytest.raises(RuntimeError) as raised:
        trained(tmp_path, made)
    rows, message = stored(tmp_path), str(raised.value)
    filtered = sum(row["finish_reason"] == "length" for row in rows)
    rewards = [row["reward"] for row in rows if row["verdict"] == "rejected"]
    assert len(rows) == 4 * NUM_PROMPTS
    assert (
        f"No candidate was accepted in round-000: of 36, {36 - filtered} rejected by Threshold(minimum=0.9)" in message
    )
    assert f"(rewards {min(rewards):.4g} to {max(rewards):.4g})" in message
    assert f"{filtered} filtered out ({filtered} by RejectTruncated())" in message
    for remedy in ("`num_candidates`", "`max_attempts`", "`max_new_tokens`", 'on_nothing_accepted="best"'):
        assert remedy in message
    assert str(round_dir(tmp_path)) in message


def test_raise_names_those_that_nobody_could_judge(tmp_path: Path) -> None:
    def silent(completions, **_):
        return [None] * len(completions)

    with pytest.raises(RuntimeError, match=r"of 36, 36 that no reward function could judge \(all returned None\)"):
        trained(tmp_path, resampler(silent))
    assert {row["verdict"] for row in stored(tmp_path)} == {"unjudged"}


def test_raise_is_of_the_whole_round_not_of_a_prompt(tmp_path: Path) -> None:
    ours = trained(tmp_path, resampler(acceptance=HALF_OF_THEM))
    accepted = [row for row in stored(tmp_path) if row["is_accepted"]]
    assert 0 < len({row["prompt_id"] for row in accepted}) < NUM_PROMPTS
    assert generative_runs.logged(ours, "round/accepted_rows") == [len(accepted)]


def test_skip_leaves_prompts_out_and_keeps_the_length_of_the_epoch(tmp_path: Path) -> None:
    made = resampler(acceptance=HALF_OF_THEM, on_nothing_accepted="skip")
    ours = trained(tmp_path, made)
    assert len(made.pool) == sum(row["is_accepted"] for row in stored(tmp_path))
    assert ours.state.global_step == 5  # 9 draws in batches of two
    drawn = ours._progress.indices.tolist()
    assert len(drawn) == NUM_PROMPTS
    assert set(drawn) == set(range(len(made.pool)))


def test_skip_with_nothing_at_all_raises_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No candidate was accepted in round-000: of 36, 36 rejected"):
        trained(tmp_path, resampler(zero, Threshold(minimum=0.5), on_nothing_accepted="skip"))


def test_best_takes_the_best_rejected_after_the_last_attempt_only(tmp_path: Path) -> None:
    trained(tmp_path, resampler(acceptance=HALF_OF_THEM, max_attempts=2, on_nothing_accepted="best"))
    rows = stored(tmp_path)
    assert accepted_prompts(rows) == set(range(NUM_PROMPTS))
    fallback = [row for row in rows if row["verdict"] == "fallback"]
    assert fallback
    for chosen in fallback:
        of_prompt = [row for row in rows if row["prompt_id"] == chosen["prompt_id"]]
        assert len(of_prompt) == 8  # both attempts came first
        assert [row["verdict"] for row in of_prompt].count("rejected") == 7
        assert chosen["reward"] == max(row["reward"] for row in of_prompt)
        assert chosen["rule"] == 'on_nothing_accepted="best"'


def test_reference_is_marked_in_the_store_and_trained_on(tmp_path: Path) -> None:
    made = resampler(acceptance=HALF_OF_THEM, on_nothing_accepted="reference")
    ours = trained(tmp_path, made)
    rows = stored(tmp_path)
    references = [row for row in rows if row["finish_reason"] == "reference"]
    generated = accepted_prompts([row for row in rows if row["attempt"] >= 0])
    assert {row["prompt_id"] for row in references} == set(range(NUM_PROMPTS)) - generated
    assert references
    for row in references:
        assert (row["attempt"], row["candidate"], row["verdict"], row["reward"]) == (-1, -1, "fallback", None)
        assert row["text"] == generators.prompts(NUM_PROMPTS)[row["prompt_id"]]["reference"]
    letters = [generators.A + generators.LETTERS.index(row["text"]) for row in references]
    answers = [[token for token in row["labels"] if token != -100] for row in made.pool.accepted]
    for letter in letters:
        assert [letter, generators.EOS] in answers  # the end is learnt too
    assert ours.state.global_step == 5


def test_a_round_of_references_alone_is_no_empty_round(tmp_path: Path) -> None:
    made = resampler(zero, Threshold(minimum=0.5), on_nothing_accepted="reference")
    trained(tmp_path, made)
    assert len(made.pool) == NUM_PROMPTS


@pytest.mark.parametrize("name", generators.NAMES)
def test_labels_are_the_sampled_tokens_and_the_prompt_is_masked(tmp_path: Path, name: str) -> None:
    made = resampler()
    trained(tmp_path, made, model=generators.tiny_model(name), processing_class=generators.tokenizer_for(name))
    accepted = [row for row in stored(tmp_path) if row["is_accepted"]]
    for row, training in zip(accepted, made.pool.accepted, strict=True):
        prompt = generators.tokenizer_for(name)(row["prompt"])["input_ids"]
        if name in generators.ENCODER_DECODER:
            assert (training["input_ids"], training["labels"]) == (prompt, row["token_ids"])
        else:
            assert training["input_ids"] == prompt + row["token_ids"]
            assert training["labels"] == [-100] * len(prompt) + row["token_ids"]


def test_duplicates_of_a_round_are_accepted_once(tmp_path: Path) -> None:
    def ones(completions, **_):
        return [1.0] * len(completions)

    trained(tmp_path, resampler(ones, Threshold(minimum=0.5), dedup=Deduplicate(key=lambda text: text[:1])))
    rows = stored(tmp_path)
    for prompt in range(NUM_PROMPTS):
        texts = [row["text"][:1] for row in rows if row["prompt_id"] == prompt]
        accepted = [row["text"][:1] for row in rows if row["prompt_id"] == prompt and row["is_accepted"]]
        assert sorted(accepted) == sorted(set(texts))
    assert sum(row["verdict"] == "duplicate" for row in rows) > 0
