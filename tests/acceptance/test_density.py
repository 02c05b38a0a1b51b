"""Acceptance rules that follow a target density: `DensityRatio` follows p, `RSO` follows q exp(r / beta).

Frequencies on a toy model of sequences are compared with closed forms by chi-square from fixed seeds, and a wrong
formula must fail the same check. `RSO` is compared with the published algorithm, too.
"""

import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rsft_hf.acceptance import RSO, CandidateBatch, DensityRatio, RandomPerPrompt, TopKPerPrompt
from toy_sequences import (
    BETA,
    LOG_P,
    LOG_Q,
    REWARDS,
    STRINGS,
    batch_of,
    log_probabilities,
    normalised,
    on_support,
    p_value,
    sample,
    seeded,
)


def test_the_toy_model_is_what_it_says():
    assert len(STRINGS) == 15
    assert float(LOG_P.exp().sum()) == pytest.approx(1)
    assert float(LOG_Q.exp().sum()) == pytest.approx(1)
    assert float(LOG_P[STRINGS.index("a")].exp()) == pytest.approx(0.55 * 0.25)
    # x^(1/.7): start .4257 .2701 .0139, E falls; after a .0665 .4820 .1380, a falls; after b .3715 .0271 .2896, b falls
    reachable = [string for string, log_q in zip(STRINGS, LOG_Q.tolist()) if log_q > -math.inf]
    assert reachable == ["a", "b", "ab", "ba", "aba", "bab"]
    expected = 0.4257 / (0.4257 + 0.2701) * 0.1380 / (0.4820 + 0.1380)
    assert float(LOG_Q[STRINGS.index("a")].exp()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize("beta", [None, BETA])
def test_the_density_ratio_gives_the_target_on_the_support_of_q(beta, per_prompt):
    log_target = LOG_P if beta is None else LOG_P + REWARDS / beta
    strings = sample(40, 5_000)
    accepted = DensityRatio(beta=beta, per_prompt=per_prompt)(batch_of(strings), seeded())
    assert p_value(strings[accepted], on_support(log_target)) > 0.001
    assert p_value(strings.reshape(-1), on_support(log_target)) < 1e-9
    # The rate is sum q w / M = sum of the target on the support / M.
    is_reachable = LOG_Q > -math.inf
    rate = float((log_target[is_reachable].logsumexp(0) - (log_target - LOG_Q)[is_reachable].max()).exp())
    assert abs(float(accepted.double().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / strings.numel())


@pytest.mark.parametrize("mutant", ["reversed", "raw_log_q", "no_reward"])
def test_a_wrong_density_ratio_fails_the_same_check(mutant):
    log_q, log_p, beta = {
        "reversed": (LOG_P, LOG_Q, None),
        "raw_log_q": (LOG_P, LOG_P, None),  # log q taken before temperature and top-p
        "no_reward": (LOG_Q, LOG_P, None),
    }[mutant]
    target = on_support(LOG_P + REWARDS / BETA if mutant == "no_reward" else LOG_P)
    strings = sample(40, 5_000)
    accepted = DensityRatio(beta=beta)(batch_of(strings, log_q, log_p), seeded())
    assert p_value(strings[accepted], target) < 1e-9


def test_pure_top_p_at_temperature_one_has_the_envelope_one():
    log_q = log_probabilities(top_p=0.9)
    strings = sample(40, 5_000, log_q)
    accepted = DensityRatio(log_envelope=0.0)(batch_of(strings, log_q), seeded())
    assert p_value(strings[accepted], on_support(LOG_P, log_q)) > 0.001
    rate = float(LOG_P[log_q > -math.inf].exp().sum())  # M = 1: the rate is the share of p that q can make
    assert 0.5 < rate < 0.95
    assert abs(float(accepted.double().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / strings.numel())


def test_a_known_envelope_that_is_none_is_refused_with_its_numbers():
    strings = sample(4, 50)
    largest = float((LOG_P - LOG_Q)[strings].max())
    with pytest.raises(ValueError, match=f"`log_envelope`=0.0 is no envelope.*reaches {largest:.6g}"):
        DensityRatio(log_envelope=0.0)(batch_of(strings), seeded())
    assert bool(DensityRatio(log_envelope=largest - 9e-7)(batch_of(strings), seeded()).any())
    with pytest.raises(ValueError, match="is no envelope"):
        DensityRatio(log_envelope=largest - 2e-6)(batch_of(strings), seeded())
    # Rounding grows with the tokens summed: 1e-5 of a nat for each.
    longer = dataclasses.replace(batch_of(strings), lengths=torch.full((4, 50), 100))
    assert bool(DensityRatio(log_envelope=largest - 9e-4)(longer, seeded()).any())


def test_a_quantile_accepts_with_the_smaller_of_one_and_w_over_m():
    strings = sample(40, 5_000)
    batch, log_weights = batch_of(strings), LOG_P - LOG_Q
    log_envelope = log_weights[strings].reshape(-1).sort().values[strings.numel() // 2]  # the upper half reaches it
    law = normalised(LOG_Q + (log_weights - log_envelope).nan_to_num(-math.inf, posinf=-math.inf).clamp(max=0))
    accepted = DensityRatio(quantile=0.5)(batch, seeded())
    assert p_value(strings[accepted], law) > 0.001
    assert p_value(strings[accepted], on_support(LOG_P)) < 1e-9
    assert int(accepted.sum()) > int(DensityRatio()(batch, seeded()).sum())


@pytest.mark.parametrize("per_prompt", [False, True])
def test_judging_again_gives_the_verdicts_of_the_last_envelope(per_prompt):
    generator, rule = seeded(3), DensityRatio(per_prompt=per_prompt)
    log_q, log_p = -5 * torch.rand(2, 30, 8, dtype=torch.float64, generator=generator)
    uniforms = torch.rand(30, 8, dtype=torch.float64, generator=generator)
    batch = lambda *cells: CandidateBatch(  # noqa: E731
        torch.zeros(30, 8)[cells], log_q=log_q[cells], log_p=log_p[cells], uniforms=uniforms[cells]
    )
    final = rule(batch(...), seeded(4))
    every, half = slice(None), slice(0, 4)
    before = rule(batch(every, half), seeded(5))
    assert bool((before & ~final[:, half]).any()), "the envelope has grown, and takes some back"
    assert not bool((final[:, half] & ~before).any())
    if not per_prompt:
        log_envelope = float((log_p - log_q).max())
        known = DensityRatio(log_envelope=log_envelope)
        assert torch.equal(known(batch(every, half), seeded(6)), final[:, half])
    order = torch.randperm(8, generator=generator)
    assert torch.equal(rule(batch(every, order), seeded(7)), final[:, order])


def test_an_envelope_per_prompt_does_not_feel_the_other_prompts():
    # Ratios 1 and 1/2 in the first prompt, 8 and 4 in the second; u = 0.4 of all.
    log_p = torch.tensor([[1.0, 0.5], [8.0, 4.0]]).log()
    fours = torch.full((2, 2), 0.4)
    batch = CandidateBatch(torch.zeros(2, 2), log_q=torch.zeros(2, 2), log_p=log_p, uniforms=fours)
    assert DensityRatio()(batch, seeded()).tolist() == [[False, False], [True, True]]  # w / 8: 1/8 1/16, 1 1/2
    assert bool(DensityRatio(per_prompt=True)(batch, seeded()).all())  # 1 1/2, 1 1/2


def test_a_poor_proposal_is_said(caplog):
    log_q = torch.zeros(5, 8, dtype=torch.float64)
    log_p = log_q.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(20.0, dtype=torch.float64))
    batch = CandidateBatch(torch.zeros(5, 8), log_q=log_q, log_p=log_p)
    with caplog.at_level(logging.WARNING):
        DensityRatio()(batch, seeded())
    assert "density ratios of 40 candidates are worth 1.0 equally weighted" in caplog.text
    assert DensityRatio().effective_sample_size(batch) == pytest.approx(1, abs=1e-5)
    assert DensityRatio(per_prompt=True).effective_sample_size(batch) == pytest.approx(1 + 4 * 8)  # four even prompts
    caplog.clear()
    DensityRatio()(dataclasses.replace(batch, log_p=log_q), seeded())
    assert not caplog.text


TILTED = normalised(LOG_Q + REWARDS / BETA)  # pi_r ~ q exp(r / beta)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("is_sorted", [False, True], ids=["drawn", "sorted_by_reward"])
def test_rso_gives_q_times_the_exponential_of_the_reward(k, is_sorted):
    strings = sample(10_000, 64)
    if is_sorted:  # the early stop must not see the order
        strings = strings.gather(1, REWARDS[strings].argsort(dim=1))
    accepted = RSO(BETA, k)(batch_of(strings), seeded())
    assert bool((accepted.sum(1) == k).all())
    assert p_value(strings[accepted], TILTED) > 0.001


def first_of_a_pass(strings: torch.Tensor) -> torch.Tensor:
    """What the first pass accepts first, in the order given: without a shuffle."""
    rewards = REWARDS[strings]
    uniforms = torch.rand(strings.shape, dtype=torch.float64, generator=seeded(2))
    passed = uniforms < ((rewards - rewards.amax(1, keepdim=True)) / BETA).exp()
    return strings.gather(1, passed.to(torch.uint8).argmax(1, keepdim=True)).reshape(-1)


def test_wrong_versions_of_rso_fail_the_same_check():
    strings = sample(10_000, 64)
    batch = batch_of(strings)
    assert p_value(first_of_a_pass(strings), TILTED) > 0.001
    unshuffled = first_of_a_pass(strings.gather(1, REWARDS[strings].argsort(dim=1)))
    reverse = RSO(BETA)(dataclasses.replace(batch, rewards=-batch.rewards), seeded())
    # Told apart by text, each string counts once however often it was drawn.
    repeats = (strings[:, :, None] == strings[:, None, :]).tril(diagonal=-1).any(dim=2)
    keyed_by_text = RSO(BETA)(dataclasses.replace(batch, valid=~repeats), seeded())
    wrong = {"unshuffled": unshuffled, "reverse": strings[reverse], "keyed_by_text": strings[keyed_by_text]}
    for name, found in wrong.items():
        assert len(found) == 10_000
        assert p_value(found, TILTED) < 1e-9, name


def test_two_candidates_are_too_few_and_lean_towards_q():
    """The law with n = 2: the first is accepted with a = exp((r - r_max) / beta), or else the second is the largest."""
    strings = sample(20_000, 2)
    accepted = RSO(BETA)(batch_of(strings), seeded())
    found = strings[accepted]
    q, law = LOG_Q.exp(), torch.zeros(15, dtype=torch.float64)
    for first, second in itertools.product(range(15), repeat=2):
        passes = min(1.0, math.exp(float(REWARDS[first] - REWARDS[second]) / BETA))
        law[first] += q[first] * q[second] * passes
        law[second] += q[first] * q[second] * (1 - passes)
    assert p_value(found, law) > 0.001
    assert p_value(found, TILTED) < 1e-9
    distance = lambda other: float((other - TILTED).abs().sum())  # noqa: E731
    assert distance(law) < distance(q)
    assert float((law - q).abs().sum()) < distance(q)


def rso_by_the_book(rewards: list[float], beta: float, k: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Algorithm 1 of Liu et al., one candidate at a time, shuffled and keyed by index: the slow oracle."""
    left, accepted = list(generator.permutation(len(rewards))), []
    while left and len(accepted) < k:
        largest, taken = max(rewards[i] for i in left), []
        for i in left:
            if generator.random() < math.exp((rewards[i] - largest) / beta):
                accepted.append(i)
                taken.append(i)
                if len(accepted) == k:
                    break
        left = [i for i in left if i not in taken]
    return tuple(sorted(accepted))


@pytest.mark.parametrize(("beta", "k"), [(0.5, 2), (2.0, 3)])
def test_rso_accepts_the_same_sets_as_the_book(beta, k):
    rewards, num_rounds, generator = [1.0, 0.2, 0.9, 0.0, 0.2], 8_000, np.random.default_rng(0)
    accepted = RSO(beta, k)(CandidateBatch(torch.tensor([rewards] * num_rounds)), seeded())
    powers = 2 ** torch.arange(5)
    ours = torch.bincount((accepted * powers).sum(1), minlength=32).numpy()
    theirs = [sum(2**i for i in rso_by_the_book(rewards, beta, k, generator)) for _ in range(num_rounds)]
    table = np.stack([ours, np.bincount(theirs, minlength=32)])
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] == 10  # C(5, 2) = C(5, 3)
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_the_temperature_of_rso_goes_from_top_k_to_uniform():
    rewards = torch.rand(6_000, 4, dtype=torch.float64, generator=seeded(8))
    batch = CandidateBatch(rewards)
    assert torch.equal(RSO(1e-12, 2)(batch, seeded()), TopKPerPrompt(2)(batch, seeded(1)))
    for rule in (RSO(1e6, 2), RSO(math.inf, 2), RandomPerPrompt(2)):
        ranks = rewards.argsort(1).argsort(1)
        pairs = (rule(batch, seeded()) * 2**ranks).sum(1)  # two of four by the rank of their reward: 6 pairs
        counts = torch.bincount(pairs, minlength=16)
        assert int((counts > 0).sum()) == 6
        assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 0.001


def test_without_numbers_of_their_own_candidates_are_tested_by_the_generator():
    """A batch by hand has no uniforms: the generator gives them, and the global one stands still."""
    batch = CandidateBatch(
        torch.zeros(50, 8), log_q=torch.zeros(50, 8), log_p=torch.linspace(-3, 0, 400).reshape(50, 8)
    )
    rule = DensityRatio()
    torch.manual_seed(1)
    first, before = rule(batch, seeded(3)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(rule(batch, seeded(3)), first)
    assert not torch.equal(rule(batch, seeded(4)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_candidate_above_the_envelope_is_named():
    log_p = torch.tensor([[0.0, 1.0], [5.0, 7.0]], dtype=torch.float64)
    batch = CandidateBatch(torch.zeros(2, 2), log_q=torch.zeros(2, 2), log_p=log_p)
    with pytest.raises(ValueError, match="the first at prompt 1, candidate 0"):
        DensityRatio(log_envelope=2.0)(batch, seeded())
