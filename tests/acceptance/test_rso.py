"""What `RSO` accepts follows q exp(r / beta) as candidates grow many, and the published algorithm at any number.

Frequencies on a toy model of sequences are held against closed forms by chi-square from fixed seeds, and a reversed,
unshuffled or text-keyed version must fail the same check.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rsft_hf.acceptance import RSO, CandidateBatch, RandomPerPrompt, TopKPerPrompt
from toy_sequences import BETA, LOG_Q, REWARDS, batch_of, normalised, p_value, sample, seeded

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
