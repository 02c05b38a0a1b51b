"""Presets: each rule by the paper's own description, on rewards made by hand, and its options in a small run."""

from pathlib import Path

import pytest
import torch

import generators
import runs
from generative_runs import logged, stored, trained
from rsft_hf import RejectionSamplingTrainer, presets
from rsft_hf.generative import Candidate
from rsft_hf.predictive import load_pseudo_labels
from rsft_hf.weighted import ErrorSet

PRESETS = ("raft", "llama2", "rest_em", "star", "rft", "rso", "jtt", "self_training")


def reward(completions: list, value: list, **columns) -> list[float]:
    return [float(one) for one in value]


def accepted(resampler, rewards: list[list[float]], texts: list[list[str]] | None = None) -> list[list[int]]:
    """Places of the accepted candidates of each prompt, whose rewards are given."""
    candidates = [
        Candidate(prompt, f"p{prompt}", [1], texts[prompt][index] if texts else f"t{index}", "stop", index=index,
                  row={"value": value})
        for prompt, row in enumerate(rewards) for index, value in enumerate(row)
    ]  # fmt: skip
    judged = resampler.accept(resampler.score(candidates))
    chosen = [
        [one.index for one in judged if one.prompt_id == prompt and one.is_accepted] for prompt in range(len(rewards))
    ]
    assert all((one.verdict == "accepted") == one.is_accepted for one in judged)
    return chosen


def test_all_presets_are_here() -> None:
    found = [name for name, value in vars(presets).items() if getattr(value, "__module__", "") == presets.__name__]
    assert found == list(PRESETS)


def test_raft_takes_the_best_of_each_prompt() -> None:
    assert accepted(presets.raft(reward), [[1.0, 3.0, 2.0], [-5.0, -6.0, -7.0]]) == [[1], [0]]


def test_rest_em_takes_what_is_right_up_to_ten_and_begins_at_the_base() -> None:
    made = presets.rest_em(reward)
    chosen = accepted(made, [[1.0] * 14 + [0.0] * 18, [0.0] * 29 + [1.0] * 3])
    assert len(chosen[0]) == 10
    assert set(chosen[0]) <= set(range(14))
    assert chosen[1] == [29, 30, 31]
    assert (made.config.round_start, made.config.num_candidates) == ("base", 32)
    assert len(accepted(presets.rest_em(reward, max_per_prompt=2), [[1.0] * 5])[0]) == 2


def test_star_keeps_the_one_answer_if_it_is_right() -> None:
    made = presets.star(reward)
    assert accepted(made, [[1.0], [0.0]]) == [[0], []]
    assert (made.config.round_start, made.config.num_candidates) == ("base", 1)


def test_rft_keeps_right_answers_with_other_equations() -> None:
    texts = [["so 1+2=3", "1 + 2 = 3 it is", "2+1=3", "1+1=3", "three"]]
    made = presets.rft(reward, num_train_epochs=3)
    chosen = accepted(made, [[1.0, 1.0, 1.0, 0.0, 1.0]], texts)[0]
    assert len(chosen) == 3
    assert {2, 4} < set(chosen)
    assert (made.config.num_candidates, made.config.every_n_epochs) == (100, 3)


def test_rso_draws_k_by_their_rewards() -> None:
    """With k = 1 and many candidates of two rewards, a class is drawn by its number times exp(r / beta)."""
    beta, rewards = 0.5, [0.0] * 40 + [0.5] * 24
    made = presets.rso(reward, beta=beta, k=1)
    high = sum(chosen[0] >= 40 for chosen in accepted(made, [rewards] * 400)) / 400
    odds = 24 * torch.e / 40
    assert high == pytest.approx(odds / (1 + odds), abs=0.08)
    made = presets.rso(reward)
    assert [len(one) for one in accepted(made, [rewards])] == [8]
    assert (made.config.num_candidates, made.config.acceptance.beta) == (64, 0.5)


def test_llama2_trains_on_the_best_of_all_rounds(tmp_path: Path) -> None:
    options = {"num_candidates": 4, "generation_config": generators.sampling(), "filters": (), "num_draws": 27}
    made = presets.llama2(generators.share_of_wanted, num_rounds=3, **options)
    trained(tmp_path, made, args={"num_train_epochs": 3})
    assert logged_rows(tmp_path) == [9, 9, 9]
    best = [row["text"] for number in range(3) for row in stored(tmp_path, number) if row["is_accepted"]]
    pool = [made.pool[row] for row in range(len(made.pool))]
    assert len(pool) == 27
    tokenizer = generators.tokenizer()
    answers = [tokenizer.decode([one for one in row["labels"] if one >= 0], skip_special_tokens=True) for row in pool]
    assert sorted(answers) == sorted(best)


def logged_rows(folder: Path) -> list[int]:
    return [sum(row["is_accepted"] for row in stored(folder, number)) for number in range(3)]


def test_jtt_upweights_what_is_wrong_after_warm_up(tmp_path: Path) -> None:
    made = presets.jtt(upweight=6.0)
    ours = runs.trained(RejectionSamplingTrainer, tmp_path, resampler=made, args={"num_train_epochs": 3})
    table = made.table().to_pandas()
    measured = table[table["epoch"] >= 1]  # the first epoch is uniform
    first = measured[measured["epoch"] == 1].set_index("row")["margin"]
    assert 0 < (first < 0).sum() < len(first)
    expected = (1.0 + 5.0 * (first < 0)) / (1.0 + 5.0 * (first < 0)).sum()
    for epoch in (1, 2):
        weights = measured[measured["epoch"] == epoch].set_index("row")["weight"]
        assert weights.to_dict() == pytest.approx(expected.to_dict())
    assert made.weighting == ErrorSet(6.0)
    assert len(logged(ours, "resampling/acceptance_rate")) == 3


def test_self_training_takes_the_most_probable_class_of_confident_rows(tmp_path: Path) -> None:
    pool = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in runs.rows(60)[26:]]
    runs.trained(RejectionSamplingTrainer, tmp_path, resampler=presets.self_training(pool, 0.6, reference_column=None))
    proposed = load_pseudo_labels(tmp_path, only_accepted=False).to_pandas()
    assert 0 < proposed["is_accepted"].mean() < 1
    assert (proposed["is_accepted"] == (proposed["confidence"] >= 0.6)).all()
    assert (proposed["probability"] == 1).all()


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_can_still_be_given(name: str) -> None:
    made = getattr(presets, name)
    needed = {"llama2": {"num_rounds": 2}, "rft": {"num_train_epochs": 2}}.get(name, {})
    if name == "jtt":
        assert made(losses="training").losses == "training"
        return
    if name == "self_training":
        assert made(runs.rows(), pseudo_fraction=0.8).pseudo_fraction == 0.8
        return
    resampler = made(reward, **needed, num_candidates=3, round_start="last", replay_rounds=5)
    config = resampler.config
    assert (config.num_candidates, config.round_start, config.replay_rounds) == (3, "last", 5)
    assert "arXiv:" in made.__doc__
