"""From rewards to verdicts, on columns written by hand."""

import math
from pathlib import Path

import pytest
import torch

import generators
import generators as g
from generative_runs import resampler, stored, trained
from rsft_hf import DensityRatio, TopKOverall
from rsft_hf.acceptance import RSO, RandomLike, Sequence, Threshold, TopKPerPrompt
from rsft_hf.engines.random_streams import candidate_seed, verdict_uniforms
from rsft_hf.generative.candidates import VERDICTS, Candidate
from rsft_hf.generative.filters import Deduplicate, RejectTruncated
from rsft_hf.generative.resampler import CandidateResampler
from rsft_hf.generative.selection import (
    ACCEPTED,
    COLUMNS,
    RoundTable,
    SelectionRules,
    filter_candidates,
    judge,
    prompts_below_minimum,
    score_candidates,
    set_verdicts,
)
from rsft_hf.rewards.functions import RewardFunctions


def table(*rows: dict) -> RoundTable:
    """A round of candidates that differ from a plain one of prompt 0 in what is written here."""
    plain = {
        "prompt_id": 0, "attempt": 0, "reward": 0.0, "log_q": None, "log_p": None, "num_tokens": 3, "verdict": None,
        "duplicate_key": None, "finish_reason": "stop",
    }  # fmt: skip
    whole = [{**plain, "candidate": number, "seed": number, **row} for number, row in enumerate(rows)]
    return RoundTable.of({name: [row[name] for row in whole] for name in COLUMNS})


def rules(acceptance=None, minimum: int = 1, takes_best: bool = False, seed: int = 0) -> SelectionRules:
    return SelectionRules(acceptance or Threshold(minimum=0.5), minimum, takes_best, seed, 0)


def test_every_verdict_has_its_reason() -> None:
    round_ = table(
        {"reward": 0.9, "duplicate_key": "a"},
        {"reward": 0.1, "duplicate_key": "b"},
        {"reward": 9.0, "verdict": "filtered"},
        {"reward": 0.9, "duplicate_key": "a"},
        {"reward": None, "duplicate_key": "a"},
        {"prompt_id": 1, "reward": 0.2},
        {"prompt_id": 1, "reward": 0.3},
    )
    verdicts = judge(round_, rules(takes_best=True))
    expected = ["accepted", "rejected", "filtered", "duplicate", "unjudged", "rejected", "fallback"]
    assert verdicts == expected
    assert set(verdicts) == set(VERDICTS)


def test_what_is_filtered_a_duplicate_or_unjudged_is_in_no_maximum() -> None:
    """Best of n of the rest: a filtered 9 and an unjudged candidate leave the 0.2 the best one."""
    round_ = table({"reward": 9.0, "verdict": "filtered"}, {"reward": None}, {"reward": 0.1}, {"reward": 0.2})
    assert judge(round_, rules(TopKPerPrompt(1))) == ["filtered", "unjudged", "rejected", "accepted"]


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_of_equal_candidates_is_kept_wherever_it_stands(best: int) -> None:
    rewards = [0.6, 0.6, 0.6]
    rewards[best] = 0.8
    verdicts = judge(table(*({"reward": reward, "duplicate_key": "same"} for reward in rewards)), rules())
    assert [number for number, verdict in enumerate(verdicts) if verdict == "accepted"] == [best]
    assert verdicts.count("duplicate") == 2


def test_duplicates_are_told_per_prompt_and_across_attempts() -> None:
    round_ = table(
        {"reward": 0.7, "duplicate_key": "a"},
        {"reward": 0.7, "duplicate_key": "a", "prompt_id": 1},
        {"reward": 0.7, "duplicate_key": "a", "attempt": 1},
        {"reward": 0.7, "duplicate_key": None},
        {"reward": 0.7, "duplicate_key": None},
    )
    assert judge(round_, rules()) == ["accepted", "accepted", "duplicate", "accepted", "accepted"]


def test_what_an_earlier_round_accepted_is_a_duplicate_of_its_prompt_alone() -> None:
    round_ = table({"reward": 0.7, "duplicate_key": "a"}, {"reward": 0.7, "duplicate_key": "a", "prompt_id": 1})
    assert judge(round_, rules(), {(0, "a")}) == ["duplicate", "accepted"]


def test_a_filtered_or_unjudged_candidate_hides_no_equal_one() -> None:
    round_ = table(
        {"reward": 0.9, "duplicate_key": "a", "verdict": "filtered"},
        {"reward": None, "duplicate_key": "a"},
        {"reward": 0.6, "duplicate_key": "a"},
    )
    assert judge(round_, rules()) == ["filtered", "unjudged", "accepted"]


def test_the_fallback_fills_up_to_the_minimum_with_the_best_rejected() -> None:
    """Prompt 0 has one of two accepted and lacks one, prompt 1 lacks two, prompt 2 has but one candidate to give."""
    round_ = table(
        {"reward": 0.9}, {"reward": 0.1}, {"reward": 0.3},
        {"prompt_id": 1, "reward": 0.3}, {"prompt_id": 1, "reward": 0.1}, {"prompt_id": 1, "reward": 0.2},
        {"prompt_id": 2, "reward": 0.0}, {"prompt_id": 2, "reward": None},
    )  # fmt: skip
    verdicts = judge(round_, rules(minimum=2, takes_best=True))
    fallback = [number for number, verdict in enumerate(verdicts) if verdict == "fallback"]
    assert fallback == [2, 3, 5, 6]
    assert prompts_below_minimum(range(4), round_, verdicts, 2) == [2, 3]  # nothing was generated for prompt 3


def test_ties_of_the_fallback_are_broken_by_chance_and_not_by_place() -> None:
    """Of four equal candidates each is taken in a quarter of 800 prompts: 200, standard deviation 12.2."""
    rows = [{"prompt_id": prompt, "reward": 0.1, "seed": 4 * prompt + at} for prompt in range(800) for at in range(4)]
    verdicts = judge(table(*rows), rules(takes_best=True))
    counts = [sum(verdicts[at::4][prompt] == "fallback" for prompt in range(800)) for at in range(4)]
    assert sum(counts) == 800
    assert all(abs(count - 200) < 4 * 12.2 for count in counts)


def test_prompts_in_need_are_those_below_the_minimum() -> None:
    round_ = table({"prompt_id": 3}, {"prompt_id": 3}, {"prompt_id": 1}, {"prompt_id": 2})
    verdicts = ["accepted", "fallback", "accepted", "rejected"]
    assert all(name in VERDICTS for name in ACCEPTED)
    assert prompts_below_minimum(range(4), round_, verdicts, 1) == [0, 2]
    assert prompts_below_minimum(range(4), round_, verdicts, 2) == [0, 1, 2]


def test_nothing_is_accepted_where_nothing_is_open() -> None:
    round_ = table({"reward": None}, {"reward": 1.0, "verdict": "filtered"})
    assert judge(round_, rules(TopKPerPrompt(1), takes_best=True)) == ["unjudged", "filtered"]


def test_a_candidate_keeps_its_uniform_when_more_are_judged() -> None:
    first = table({"seed": 11}, {"seed": 22}, {"prompt_id": 1, "seed": 33})
    more = table(
        {"seed": 11}, {"seed": 22}, {"prompt_id": 1, "seed": 33}, {"attempt": 1, "seed": 44, "candidate": 0}
    )  # fmt: skip
    expected = verdict_uniforms([11, 22, 33])
    assert torch.equal(first.gathered(first.batch([True] * 3).uniforms), expected)
    assert torch.equal(more.gathered(more.batch([True] * 4).uniforms)[:3], expected)


def test_a_larger_envelope_never_accepts_what_a_smaller_one_rejected() -> None:
    """u < w / M with the candidate's own u: another attempt raises M, and the accepted shrink to a subset."""
    rows = [{"prompt_id": 0, "seed": seed, "log_q": -1.0, "log_p": -1.0 - 0.1 * (seed % 7)} for seed in range(60)]
    rule = DensityRatio()
    before = judge(table(*rows), rules(rule))
    after = judge(table(*rows, {"attempt": 1, "seed": 99, "log_q": -2.0, "log_p": -1.0}), rules(rule))
    kept = {number for number, verdict in enumerate(before) if verdict == "accepted"}
    again = {number for number, verdict in enumerate(after[:60]) if verdict == "accepted"}
    assert again < kept
    # By hand: M = exp(1) after the second attempt, w = exp(-0.1 (seed mod 7)).
    uniforms = verdict_uniforms(list(range(60))).tolist()
    assert again == {seed for seed in range(60) if uniforms[seed] < math.exp(-0.1 * (seed % 7) - 1.0)}


def test_the_order_of_the_shards_changes_no_verdict() -> None:
    rows = [
        {"prompt_id": prompt, "candidate": at, "reward": 1.0, "seed": 10 * prompt + at}
        for prompt in range(6)
        for at in range(4)
    ]
    for rule in (TopKPerPrompt(1), TopKOverall(3)):
        forwards = judge(table(*rows), rules(rule))
        backwards = judge(table(*rows[::-1]), rules(rule))[::-1]
        assert forwards == backwards
    assert judge(table(*rows), rules(TopKPerPrompt(1), seed=1)) != judge(table(*rows), rules(TopKPerPrompt(1)))


def test_references_are_no_candidates() -> None:
    round_ = table({"reward": 0.7}, {"finish_reason": "reference", "attempt": -1, "candidate": -1}, {"reward": 0.1})
    assert judge(round_, rules()) == ["accepted", "rejected"]
    assert round_.batch([True, True]).rewards.shape == (1, 2)


def test_prompts_of_unequal_counts_are_padded() -> None:
    round_ = table({"reward": 1.0}, {"reward": 2.0}, {"prompt_id": 5, "reward": 3.0})
    batch = round_.batch([True] * 3)
    assert batch.rewards.nan_to_num(-1).tolist() == [[1.0, 2.0], [3.0, -1.0]]
    assert batch.is_candidate.tolist() == [[True, True], [True, False]]


def noise(completions: list, **_) -> list[float]:
    return torch.rand(len(completions)).tolist()  # no two are equal, and nothing else is known of them


@pytest.mark.parametrize("is_control", [False, True], ids=["rule", "control"])
def test_the_fallback_of_a_random_control_is_random_and_that_of_a_rule_the_best(tmp_path: Path, is_control) -> None:
    rule = RandomLike(Threshold(5.0)) if is_control else Threshold(5.0)
    made = resampler(noise, rule, on_nothing_accepted="best", num_draws=2)
    ours = trained(tmp_path, made, train_dataset=generators.prompts(40))
    rows, num_best, places = stored(tmp_path), 0, set()
    for prompt in range(40):
        own = [row for row in rows if row["prompt_id"] == prompt]
        (chosen,) = (row for row in own if row["is_accepted"])
        assert chosen["verdict"] == "fallback"
        num_best += chosen["reward"] == max(row["reward"] for row in own)
        places.add(chosen["candidate"])
    # 40 prompts of 4: 10 are the best by chance, with a standard deviation of (40 * 1/4 * 3/4)^0.5 = 2.7.
    assert 2 <= num_best <= 18 if is_control else num_best == 40
    assert places == {0, 1, 2, 3}  # not the first of each prompt either
    (figures,) = (line for line in ours.state.log_history if "candidates/fallback" in line)
    assert (figures["round/acceptance_rate"], figures["round/prompts_without_accepted"]) == (0.0, 1.0)
    assert figures["candidates/fallback"] == 0.25  # one of four
    assert "accepted/reward" not in figures
    assert figures["round/accepted_rows"] == 40


A, B, C = g.A, g.A + 1, g.A + 2


def test_a_truncated_candidate_is_in_no_maximum():
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [100.0 if text == "cut" else 1.0 for text in completions]

    candidates = [Candidate(0, "a", [A], "whole", "stop"), Candidate(0, "a", [B], "cut", "length", index=1)]
    # With r_max = 100 the other would be accepted with probability exp(-99 / 0.1).
    source = CandidateResampler(reward, RSO(beta=0.1, k=1), num_candidates=2)
    judged = source.accept(source.score(candidates))
    assert [one.verdict for one in judged] == ["accepted", "filtered"]
    assert seen == ["whole"]
    assert judged[1].rule == repr(RejectTruncated())


def test_a_judge_that_fails_is_none_and_accepts_nothing(tmp_path):
    """A judge behind a server: test_judge.py."""

    def judge(completions, **_):
        return [None if number % 2 else -5.0 for number in range(len(completions))]

    source = g.resampler(judge, Threshold(minimum=-9.0), on_nothing_accepted="skip")
    run = g.trainer(tmp_path, source)
    run.train()
    assert [one.verdict for one in g.stored(run)] == ["accepted", "unjudged"] * 4
    assert [one.reward for one in g.stored(run)] == [-5.0, None] * 4
    assert source.metrics()["candidates/reward"] == -5.0  # neither -1 nor 0 is in the mean
    assert source.metrics()["candidates/unjudged"] == 0.5


def test_a_batch_has_double_precision_and_knows_its_gaps() -> None:
    third = 1 / 3  # a float of 24 bits holds another number
    round_ = table(
        {"reward": third, "log_q": -third, "log_p": -third, "num_tokens": 7},
        {"prompt_id": 1, "log_q": -2.0, "log_p": -3.0},
        {"reward": 2.0},
    )
    batch = round_.batch([True, True, False])
    assert batch.rewards.tolist()[0] == [third, 2.0]
    assert batch.rewards.dtype == batch.log_q.dtype == batch.log_p.dtype == batch.uniforms.dtype == torch.float64
    assert (batch.log_q.tolist(), batch.log_p.tolist()) == ([[-third, 0.0], [-2.0, 0.0]], [[-third, 0.0], [-3.0, 0.0]])
    assert batch.lengths.tolist() == [[7, 3], [3, 0]]
    assert batch.valid.tolist() == [[True, False], [True, False]]
    assert math.isnan(batch.rewards[1, 1])
    plain = table({}, {}).batch([True, True])
    assert plain.log_q is plain.log_p is None


def test_log_probabilities_that_are_not_known_of_every_candidate_are_not_known() -> None:
    """As 0 they would be those of a sure candidate."""
    of_q = table({"reward": 1.0, "log_q": -1.0}, {"reward": 1.0, "log_q": -50.0})
    assert of_q.batch([True, True]).log_q.tolist() == [[-1.0, -50.0]]
    assert of_q.batch([True, True]).log_p is None
    with pytest.raises(ValueError, match="log"):
        judge(of_q, SelectionRules(DensityRatio(), 1, False, 0, 0))
    assert table({"log_q": -1.0}, {}).batch([True, True]).log_q is None
    assert table({"log_q": -1.0}, {}).batch([True, False]).log_q.tolist() == [[-1.0, 0.0]]


def test_the_generator_of_a_rule_is_that_of_its_run_and_round() -> None:
    seen = []

    class Recording(TopKPerPrompt):
        def __call__(self, batch, generator):
            seen.append(generator.initial_seed())
            return super().__call__(batch, generator)

    for seed, number in ((0, 0), (0, 1), (1, 0)):
        judge(table({"reward": 1.0}), SelectionRules(Recording(1), 1, False, seed, number))
    assert seen == [candidate_seed(seed, number, -1, 0, 0) % 2**62 for seed, number in ((0, 0), (0, 1), (1, 0))]


def test_verdicts_are_written_with_their_reasons() -> None:
    candidates = [Candidate(0, "a", [1], "a", "stop", rule="mine") for _ in range(3)]
    set_verdicts(candidates, ["accepted", "filtered", "fallback"], {"accepted": "rule", "fallback": "best"})
    found = [(one.verdict, one.is_accepted, one.rule) for one in candidates]
    assert found == [("accepted", True, "rule"), ("filtered", False, "mine"), ("fallback", True, "best")]


@pytest.mark.parametrize("num_verdicts", [1, 3])
def test_verdicts_of_another_round_are_never_taken(num_verdicts: int) -> None:
    round_, verdicts = table({"reward": 1.0}, {"reward": 1.0}), ["rejected"] * num_verdicts
    with pytest.raises(ValueError, match="zip"):
        set_verdicts([Candidate(0, "a", [1], "a", "stop")] * 2, verdicts, {})
    with pytest.raises(ValueError, match="zip"):
        prompts_below_minimum([0], round_, verdicts, 1)


def test_what_a_filter_refuses_is_said_and_the_others_get_their_key() -> None:
    candidates = [
        Candidate(0, "a", [1], text, reason) for text, reason in (("B c", "stop"), ("b c", "length"), ("b c", "stop"))
    ]
    filter_candidates(candidates, [RejectTruncated()], Deduplicate("normalised"))
    assert [one.verdict for one in candidates] == [None, "filtered", None]
    assert (candidates[1].rule, candidates[1].is_accepted) == ("RejectTruncated()", False)
    assert candidates[1].duplicate_key is None
    assert candidates[0].duplicate_key == candidates[2].duplicate_key
    assert len(candidates[0].duplicate_key) == 32
    filter_candidates(candidates[:1], [], Deduplicate(key=lambda text: None))
    assert candidates[0].duplicate_key is None


def test_functions_get_the_state_and_nothing_where_all_is_filtered() -> None:
    seen = []

    def state_of(completions: list, trainer_state, **_) -> list[float]:
        seen.append(trainer_state)
        return [1.0] * len(completions)

    functions = RewardFunctions(state_of)
    kept, filtered = (Candidate(0, "a", [1], "b", "stop", verdict=verdict) for verdict in (None, "filtered"))
    score_candidates([kept, filtered], functions, "state")
    assert seen == ["state"]
    assert (kept.rewards, filtered.rewards) == ({"state_of": 1.0}, {})
    scores = score_candidates([filtered], functions, "state")
    assert seen == ["state"]
    assert (scores.rewards.tolist(), scores.rewards.dtype, scores.by_function) == ([], torch.float64, {})


def test_a_control_inside_a_sequence_is_a_control() -> None:
    """Its fallback is chosen by chance, not by reward: the worst-rewarded candidate is taken as often as any other."""
    chosen = set()
    for seed in range(30):
        round_ = table(*({"reward": float(number), "seed": 100 * seed + number} for number in range(4)))
        control = Sequence(Threshold(minimum=9.0), RandomLike(Threshold(minimum=9.0)))
        verdicts = judge(round_, SelectionRules(control, 1, True, seed, 0))
        chosen.add(verdicts.index("fallback"))
    assert chosen == {0, 1, 2, 3}
