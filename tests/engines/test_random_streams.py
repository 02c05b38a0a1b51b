"""The randomness of candidates: streams that depend on nothing but the candidate, and tokens drawn in proportion."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import generators as g
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.random_streams import candidate_seed, token_uniforms, verdict_uniforms
from rsft_hf.engines.sampling import inverse_cdf


def test_verdicts_draw_the_first_number_of_numpys_own_stream():
    """2**64 in the key names the stream; the seeds hold all 63 bits."""
    seeds = [0, 1, 2**32, 2**63 - 1, *(candidate_seed(1, 2, prompt, 0, 3) for prompt in range(200))]
    expected = [(np.random.Philox(key=2**64 + seed).random_raw(1)[0] >> np.uint64(11)) * 2.0**-53 for seed in seeds]
    assert verdict_uniforms(seeds).tolist() == expected
    assert verdict_uniforms([]).tolist() == []


def test_every_candidate_has_a_seed_of_its_own():
    # Digits that could run together: run 1 round 12 and run 11 round 2.
    names = list(itertools.product((0, 1, 11), (0, 1, 2, 12), (0, 1, 11, 111), (0, 1), (0, 1, 10)))
    seeds = [candidate_seed(*name) for name in names]
    assert len(names) == 3 * 4 * 4 * 2 * 3
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_version():
    # Half of the first 8 bytes of the digest: a stored round must go on with the candidates it began with.
    digest = hashlib.blake2b(b"7/1/2/0/3", digest_size=8).digest()
    assert candidate_seed(7, 1, 2, 0, 3) == int.from_bytes(digest, "big") // 2


def test_a_stream_depends_on_no_batch_and_no_length():
    seeds = [candidate_seed(0, 0, 0, 0, index) for index in range(6)]
    whole = token_uniforms(seeds, 50)
    assert whole.shape == (6, 50)
    assert whole.dtype == torch.float64
    assert torch.equal(token_uniforms(seeds, 7), whole[:, :7])
    assert torch.equal(token_uniforms(seeds[::-1][:2], 50), whole[[5, 4]])
    assert torch.equal(verdict_uniforms(seeds)[[3]], verdict_uniforms([seeds[3]]))


def test_uniforms_are_uniform_within_and_between_streams():
    seeds = [candidate_seed(0, 0, prompt, 0, index) for prompt in range(50) for index in range(8)]
    uniforms = token_uniforms(seeds, 30).numpy()
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    for numbers in (uniforms.ravel(), uniforms[:, 0], verdict_uniforms(seeds).numpy()):
        assert stats.kstest(numbers, "uniform").pvalue > 0.01
    # Neighbouring candidates, and the verdict on one and its first token, know nothing of each other.
    pairs = [(uniforms[:-1, 0], uniforms[1:, 0]), (verdict_uniforms(seeds).numpy(), uniforms[:, 0])]
    for first, second in pairs:
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(seeds) - 1)


def test_drawing_leaves_the_global_generators_alone():
    model, before = g.tiny_model("gpt2"), torch.get_rng_state()
    g.generated(model, g.complete(model), g.prompt_ids(2), 3)
    verdict_uniforms([1, 2])
    assert torch.equal(torch.get_rng_state(), before)


LAST = 1 - 2**-53  # the largest uniform
EDGES = [
    # probabilities, uniform, token
    ([0.25, 0.25, 0.5], 0.0, 0),
    ([0.25, 0.25, 0.5], 0.2499, 0),
    ([0.25, 0.25, 0.5], 0.25, 1),  # token 0 owns [0, 0.25)
    ([0.25, 0.25, 0.5], 0.5, 2),
    ([0.25, 0.25, 0.5], LAST, 2),
    ([0.0, 0.0, 1.0], 0.0, 2),  # what cannot be drawn is never drawn, at either end
    ([0.5, 0.5, 0.0], LAST, 1),
    ([0.5, 0.0, 0.5], 0.5, 2),
    ([1.0], LAST, 0),
]


@pytest.mark.parametrize(("probabilities", "uniform", "token"), EDGES)
def test_a_uniform_picks_the_token_whose_interval_it_is_in(probabilities, uniform, token):
    unnormalised = torch.tensor([probabilities]) * 3.0
    assert inverse_cdf(unnormalised, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_a_large_vocabulary_never_runs_over_its_end():
    # A sum of 200,000 float32 probabilities is not 1; the last token has none.
    even = torch.full((2, 200_000), 1 / 199_999)
    even[:, -1] = 0.0
    assert inverse_cdf(even, torch.tensor([LAST, 0.0], dtype=torch.float64)).tolist() == [199_998, 0]
    # A rare token behind 100,000 others keeps its place: it owns [1 - 2e-8, 1), less than a float32 can tell from 1.
    rare = torch.full((1, 100_001), (1 - 2e-8) / 100_000)
    rare[0, -1] = 2e-8
    assert inverse_cdf(rare, torch.tensor([1 - 1e-8], dtype=torch.float64)).tolist() == [100_000]


# A Llama that knows five tokens; answers of at most three.
NUM_TOKENS, LONGEST = 5, 3
PROMPT = [3, 4, 2]


def probabilities_by_hand(logits: list[float], temperature: float, top_p: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in logits]
    weights = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    is_kept = [False] * len(weights)
    mass = 0.0
    for token in order:
        is_kept[token], mass = mass < top_p, mass + weights[token]
    total = sum(weight for weight, kept in zip(weights, is_kept) if kept)
    return [weight / total if kept else 0.0 for weight, kept in zip(weights, is_kept)]


def answers(model, temperature: float, top_p: float) -> dict[tuple[int, ...], float]:
    """The probability of every answer, from one pass per beginning."""
    found, open_beginnings = {}, {(): 1.0}
    for _ in range(LONGEST):
        beginnings, open_beginnings = open_beginnings, {}
        for beginning, mass in beginnings.items():
            with torch.no_grad():
                logits = model(torch.tensor([PROMPT + list(beginning)])).logits[0, -1].tolist()
            for token, probability in enumerate(probabilities_by_hand(logits, temperature, top_p)):
                is_done = token == g.EOS or len(beginning) == LONGEST - 1
                (found if is_done else open_beginnings)[(*beginning, token)] = mass * probability
    return {answer: probability for answer, probability in found.items() if probability > 0}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_answers_are_drawn_in_proportion_to_the_processed_distribution(temperature, top_p):
    model = g.tiny_model("llama", vocab_size=NUM_TOKENS, initializer_range=0.3, seed=0).eval()
    expected = answers(model, temperature, top_p)
    assert sum(expected.values()) == pytest.approx(1)
    assert (len(expected) < 1 + 4 + 4 * 4 * 5) == (top_p < 1)  # the truncation leaves answers out
    config = g.complete(model, max_new_tokens=LONGEST, temperature=temperature, top_p=top_p)
    drawn = g.generated(model, config, [PROMPT], 4000, GenerateEngine(4000))
    counts = dict.fromkeys(expected, 0)
    for one in drawn:
        counts[tuple(one.token_ids)] += 1  # a KeyError is an answer that cannot be drawn
    common = [answer for answer, probability in expected.items() if probability * 4000 >= 5]
    observed, wanted = [counts[answer] for answer in common], [expected[answer] * 4000 for answer in common]
    assert len(common) >= 10
    observed, wanted = [*observed, 4000 - sum(observed)], [*wanted, 4000 - sum(wanted)]
    cells = [place for place, number in enumerate(wanted) if number > 1e-6]
    assert stats.chisquare([observed[at] for at in cells], [wanted[at] for at in cells]).pvalue > 0.01
