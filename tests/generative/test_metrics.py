"""The numbers that describe a round, worked out by hand, and what they say where there is nothing to say."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import generators
import generators as g
from generative_runs import logged, resampler, stored, trained, trainer
from rsft_hf.acceptance import CandidateBatch, Threshold, TopKPerPrompt
from rsft_hf.generative.candidates import Candidate, CandidateStore
from rsft_hf.generative.metrics import (
    candidate_metrics,
    correlation,
    distinct_n,
    frac_reward_zero_std,
    pass_at_k,
    round_metrics,
    weighted_means,
)
from rsft_hf.generative.selection import COLUMNS, RoundTable

NAN = math.nan


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 2), (5, 5, 5), (6, 3, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, c, k):
    subsets = list(itertools.combinations(range(n), k))
    expected = sum(min(subset) < c for subset in subsets) / len(subsets)  # the first c are the correct ones
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_k_refuses_what_was_not_drawn():
    assert pass_at_k(200, 100, 100) == 1.0  # C(200, 100) is 9e58, and C(100, 100) is 1
    with pytest.raises(ValueError, match="`k`=6 must lie between 1 and `num_samples`=5"):
        pass_at_k(5, 2, 6)
    with pytest.raises(ValueError, match="`num_correct`=6"):
        pass_at_k(5, 6, 2)


def test_distinct_n_counts_all_sequences_together():
    texts = ["the cat sat".split(), "the cat ran".split(), ["the"]]
    assert distinct_n(texts, 1) == 4 / 7  # the cat sat ran, of 3 + 3 + 1
    assert distinct_n(texts, 2) == 3 / 4  # the-cat cat-sat cat-ran, of 2 + 2
    assert math.isnan(distinct_n(texts, 4))
    assert distinct_n([[7, 7, 7, 7, 7]], 2) == 1 / 4
    with pytest.raises(ValueError, match="`n`=0"):
        distinct_n(texts, 0)


def test_correlation_by_hand_and_with_gaps():
    # Means 2 and 3; products (-1)(-1) + 0(-2) + 1(3) = 4; squares 2 and 14.
    assert correlation([1, 2, 3], [2, 1, 6]) == pytest.approx(4 / math.sqrt(28))
    assert correlation([1, None, 2, 3, NAN, 5], [2, 9, 1, 6, 4, None]) == pytest.approx(4 / math.sqrt(28))
    assert correlation([1e200, 2e200, 3e200], [-3e-200, -6e-200, -9e-200]) == pytest.approx(-1)
    assert math.isnan(correlation([0.1, 0.1, 0.1], [1, 2, 3]))
    assert math.isnan(correlation([1, None], [1, 2]))
    assert math.isnan(correlation([], []))
    with pytest.raises(ValueError, match="shorter"):
        correlation([1, 2], [1])


def test_prompts_without_contrast_are_counted_of_those_with_candidates():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [0.1, NAN, NAN], [NAN, NAN, NAN]])
    assert frac_reward_zero_std(CandidateBatch(rewards)) == 2 / 3
    valid = torch.ones(4, 3, dtype=torch.bool).index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(False))
    assert frac_reward_zero_std(CandidateBatch(rewards, valid=valid)) == 1.0
    assert math.isnan(frac_reward_zero_std(CandidateBatch(torch.full((1, 2), NAN))))


def test_a_round_is_described_by_hand():
    # Four prompts of up to three candidates. Prompt 1 has two, prompt 2 one filtered out, prompt 3 one unjudged.
    rewards = torch.tensor([[1.0, 0.0, 1.0], [2.0, 2.0, NAN], [0.0, 5.0, 0.0], [3.0, NAN, 1.0]])
    is_generated = torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True] * 3])
    valid = is_generated & torch.tensor([[True] * 3, [True] * 3, [True, False, True], [True] * 3])
    lengths = torch.tensor([[2, 4, 6], [8, 8, 0], [4, 9, 2], [5, 7, 2]])
    accepted = torch.tensor([[True, False, True], [True, True, False], [False] * 3, [True, False, False]])
    by_function = {"exact": torch.tensor([1.0, 3.0, NAN]), "judge": torch.tensor([NAN, NAN]), "one": torch.ones(1)}
    batch = CandidateBatch(rewards, lengths=lengths, valid=valid)
    metrics = candidate_metrics(batch, accepted, by_function, is_generated)
    pairs = [(2, 1), (4, 0), (6, 1), (8, 2), (8, 2), (4, 0), (9, 5), (2, 0), (5, 3), (2, 1)]  # length, reward
    expected = {
        "round/acceptance_rate": 5 / 11,
        "candidates/unjudged": 1 / 10,
        "round/prompts_without_accepted": 1 / 4,
        "round/prompts_all_accepted": 1 / 4,  # prompt 1
        "round/frac_reward_zero_std": 2 / 4,  # prompts 1 and 2: 2 2, and 0 0 once 5 is filtered out
        "candidates/reward": (2 + 4 + 5 + 4) / 10,
        "accepted/reward": (1 + 1 + 2 + 2 + 3) / 5,
        "rewards/exact/mean": 2.0,
        "rewards/exact/std": math.sqrt(2),  # of the sample: ((1 - 2)^2 + (3 - 2)^2) / 1
        "rewards/judge/mean": NAN,
        "rewards/judge/std": NAN,
        "rewards/one/mean": 1.0,
        "rewards/one/std": NAN,
        "candidates/length": (12 + 16 + 15 + 14) / 11,
        "accepted/length": (2 + 6 + 8 + 8 + 5) / 5,
        "candidates/length_reward_correlation": correlation(*zip(*pairs)),
    }
    assert metrics == pytest.approx(expected, nan_ok=True)
    assert all(type(value) is float for value in metrics.values())


def test_a_round_without_anything_says_nan_and_raises_nothing():
    batch = CandidateBatch(torch.full((2, 2), NAN), valid=torch.zeros(2, 2, dtype=torch.bool))
    nothing = TopKPerPrompt(1)(batch, torch.Generator().manual_seed(0))
    metrics = candidate_metrics(batch, nothing)
    assert metrics["round/acceptance_rate"] == metrics["round/prompts_all_accepted"] == 0
    assert metrics["round/prompts_without_accepted"] == 1
    empty = {name for name, value in metrics.items() if math.isnan(value)}
    assert empty == {"candidates/unjudged", "round/frac_reward_zero_std", "candidates/reward", "accepted/reward"}
    assert "candidates/length" not in metrics


def test_a_reference_answer_that_nobody_judged_is_counted_and_not_averaged():
    batch = CandidateBatch(torch.tensor([[1.0, 3.0], [0.0, NAN]]))
    metrics = candidate_metrics(batch, torch.tensor([[False, True], [False, True]]))
    assert (metrics["round/acceptance_rate"], metrics["accepted/reward"]) == (2 / 4, 3.0)
    assert metrics["round/prompts_without_accepted"] == metrics["round/prompts_all_accepted"] == 0


def test_masks_that_contradict_the_batch_are_refused():
    batch = CandidateBatch(torch.tensor([[1.0, NAN]]), valid=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match=r"`accepted` accepts a cell .*\[0, 1\] \(1 such\)"):
        candidate_metrics(batch, torch.tensor([[True, True]]), is_generated=batch.valid)
    with pytest.raises(ValueError, match=r"`accepted` must be bool of shape \(1, 2\)"):
        candidate_metrics(batch, torch.tensor([True]))
    with pytest.raises(ValueError, match="`is_generated` leaves out a candidate"):
        candidate_metrics(batch, torch.tensor([[False, False]]), is_generated=torch.tensor([[False, True]]))


def noise(completions: list, **_) -> list[float]:
    return torch.rand(len(completions)).tolist()  # no two are equal, and nothing else is known of them


def test_fallbacks_beside_accepted_ones_are_counted_apart(tmp_path: Path) -> None:
    made = resampler(noise, Threshold(0.8), on_nothing_accepted="best", num_draws=2)
    ours = trained(tmp_path, made, train_dataset=generators.prompts(20))
    rows = stored(tmp_path)
    with_accepted = {row["prompt_id"] for row in rows if row["reward"] > 0.8}
    assert 0 < len(with_accepted) < 20
    assert logged(ours, "round/acceptance_rate") == [sum(row["reward"] > 0.8 for row in rows) / 80]
    assert logged(ours, "round/prompts_without_accepted") == [(20 - len(with_accepted)) / 20]
    assert logged(ours, "candidates/fallback") == [(20 - len(with_accepted)) / 80]


def test_pass_at_k_is_of_the_first_attempt_alone(tmp_path: Path) -> None:
    """Attempts 1 to 3 were made for the second prompt only, as it was not solved: they say nothing of one sampling."""
    store = CandidateStore(tmp_path, ["judge"], is_conversational=False)
    for attempt, rewards in enumerate([{0: (1.0, 0.0), 1: (0.0, 0.0)}, {1: (0.0, 0.0)}, {1: (0.0, 0.0)}, {1: (1, 1)}]):
        candidates = [
            Candidate(prompt, "a", [6, 1], "a", "stop", attempt, index, index, reward=float(reward))
            for prompt, both in rewards.items()
            for index, reward in enumerate(both)
        ]
        store.write(store.path(attempt, 0), candidates, "scored")
    table = RoundTable.of(store.columns(COLUMNS))
    verdicts = ["accepted" if reward else "rejected" for reward in table.columns["reward"]]
    figures = round_metrics(store, table, verdicts, Threshold(0.5))
    # pass@1 = (1/2 + 0/2) / 2 and pass@2 = (1 + 0) / 2; with all attempts (1/2 + 2/8) / 2.
    assert {name: value for name, value in figures.items() if "pass@" in name} == {
        "round/pass@1": 0.25,
        "round/pass@2": 0.5,
    }


def test_a_log_by_epoch_has_the_loss_and_the_figures_of_the_round(tmp_path: Path) -> None:
    args = {"logging_strategy": "epoch", "num_train_epochs": 2}
    ours = trainer(tmp_path, args=args)
    ours.train()
    lines = [line for line in ours.state.log_history if "loss" in line]
    assert [line["epoch"] for line in lines] == [1.0, 2.0]
    assert all("candidates/reward" in line and "round/acceptance_rate" in line for line in lines)
    for key in ("candidates/reward", "round/trained_tokens", "train_loss"):
        assert len(logged(ours, key)) == (1 if key == "train_loss" else 2)


def test_length_bias_and_collapse_are_logged(tmp_path):
    """The figures by hand: test_metrics.py."""

    def length(completion_ids, **_):
        return [3.0 * len(ids) for ids in completion_ids]

    held_out = []

    def watched(completions, **_):
        held_out.extend(completions)
        return [0.25] * len(completions)

    source = g.resampler(length, eval_reward_funcs=watched)
    run = g.trainer(tmp_path, source, eval_dataset=g.prompts(3, first=50))
    run.train()
    logged = {name: value for line in run.state.log_history for name, value in line.items()}
    assert logged["candidates/length_reward_correlation"] == pytest.approx(1)
    assert {f"{kind}/distinct_{n}" for kind in ("candidates", "accepted") for n in (1, 2)} <= set(logged)
    assert not held_out  # it selected nothing
    figures = run.evaluate()
    assert figures["eval_rewards/watched/mean"] == 0.25
    assert len(held_out) == 3


def test_what_functions_log_is_weighted_by_the_candidates_of_a_shard(tmp_path: Path) -> None:
    store = CandidateStore(tmp_path, (), False)
    for shard, (size, share) in enumerate(((3, 0.0), (1, 1.0))):
        candidates = [Candidate(shard, "a", [1], "x", "stop", index=index) for index in range(size)]
        store.write(store.path(0, shard), candidates, "scored", {"share": share, f"only/{shard}": 2.0})
    assert weighted_means(store.logged(), [3, 1]) == {"share": 0.25, "only/0": 2.0, "only/1": 2.0}
