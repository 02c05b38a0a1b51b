"""The law of rejection sampling: accepted indices follow p for all weights and both algorithms; values worked by hand.

Frequencies are compared with theory by chi-square from fixed seeds, on the upper tail only: no row is accepted twice
within a pass, so counts scatter less than a multinomial's. How much less is tested against the binomial.
"""

import math

import pytest
import torch
from scipy import stats

from rsft_hf import (
    accept_once,
    acceptance_probabilities,
    effective_sample_size,
    envelope_constant,
    rejection_sample,
)
from rsft_hf.rejection import (
    _accept_whole_passes,
    _sample_by_permutations,
    _sample_from_counts,
    _sample_inverse_cdf,
    effective_sample_size_from_logs,
    sample_parts,
)

NUM_ROWS, NUM_DRAWS = 1_000, 2_000_000
KINDS = ("skewed", "one_hot_like", "lognormal", "half_zero", "equal")
ROUTES = (_sample_by_permutations, _sample_from_counts)
SIX = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1, 0.05], dtype=torch.float64)  # M = 6 / 2.95; both sides of one half


W = torch.tensor([1.0, 1.0, 2.0])
Q = torch.tensor([1.0, 2.0, 1.0])
FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(kind: str) -> torch.Tensor:
    uniforms = torch.rand(NUM_ROWS, dtype=torch.float64, generator=seeded(1))
    if kind == "skewed":
        return uniforms**2
    if kind == "one_hot_like":  # one row holds 1 / (1 + 999e-5) = 99 % of the weight
        return torch.full((NUM_ROWS,), 1e-5, dtype=torch.float64).index_fill_(0, torch.tensor([700]), 1.0)
    if kind == "lognormal":
        return (2 * torch.randn(NUM_ROWS, dtype=torch.float64, generator=seeded(2))).exp()
    if kind == "half_zero":
        return uniforms * (torch.arange(NUM_ROWS) % 2)
    return torch.full((NUM_ROWS,), 0.1, dtype=torch.float64)


def p_value(indices: torch.Tensor, weights: torch.Tensor) -> float:
    """How likely counts at least as far from the weights are under the law; 0 if a row of weight 0 was drawn."""
    counts = torch.bincount(indices, minlength=len(weights)).double()
    expected = weights / weights.sum() * len(indices)
    if bool(counts[weights == 0].any()):
        return 0.0
    is_rare = expected < 5  # pooled: the chi-square law needs a handful of draws in each cell
    pool = lambda cells: torch.cat([cells[~is_rare], cells[is_rare].sum().reshape(1)])  # noqa: E731
    counts, expected = pool(counts), pool(expected)
    is_cell = expected > 0
    return float(stats.chisquare(counts[is_cell].numpy(), expected[is_cell].numpy()).pvalue)


def binomial_z(counts: torch.Tensor, num_trials: int, probabilities: torch.Tensor) -> torch.Tensor:
    """Counts in standard errors from Binomial(num_trials, p), for the rows whose count is random at all."""
    is_random = (probabilities > 0) & (probabilities < 1)
    counts, p = counts[is_random].double(), probabilities[is_random]
    return (counts - num_trials * p) / (num_trials * p * (1 - p)).sqrt()


def test_the_kinds_take_both_routes():
    # Below M = 4 the passes are looped over: equal M = 1, u^2 has M = 3; u on every other row has M = 4, a bare edge.
    envelopes = {kind: envelope_constant(weights_of(kind)) for kind in KINDS}
    assert len(envelopes) == 5
    assert all(envelopes[kind] < 3.5 for kind in ("equal", "skewed"))
    assert all(envelopes[kind] > 30 for kind in ("one_hot_like", "lognormal"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_million_draws_follow_the_weights(kind):
    weights = weights_of(kind)
    indices = rejection_sample(weights, NUM_DRAWS, seeded())
    assert indices.shape == (NUM_DRAWS,)
    assert indices.dtype == torch.int64
    assert p_value(indices, weights) > 0.001


@pytest.mark.parametrize("reverse", [lambda w: w.max() / w, lambda w: 1 - w / w.max()], ids=["max_over_w", "one_minus"])
@pytest.mark.parametrize("kind", ["skewed", "one_hot_like", "lognormal"])
def test_a_reversed_formula_fails_the_same_test(kind, reverse):
    weights = weights_of(kind)
    assert p_value(rejection_sample(reverse(weights), 200_000, seeded()), weights) < 1e-9


def test_a_single_pass_accepts_mean_over_max():
    weights = 0.2 + torch.rand(200_000, dtype=torch.float64, generator=seeded(4))
    accepted = accept_once(weights, seeded())
    a = weights / weights.max()
    standard_error = float((a * (1 - a)).sum()) ** 0.5 / len(a)
    assert accepted.dtype == torch.bool
    assert abs(float(accepted.double().mean()) - float(weights.mean() / weights.max())) < 4 * standard_error


def test_a_single_pass_compares_numbers_of_double_precision():
    """A float has 24 bits, and would accept a row of probability 1e-9 sixty times too often."""
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    uniforms = torch.rand(4, dtype=torch.float64, generator=seeded(3))
    assert accept_once(weights, seeded(3)).tolist() == (uniforms < weights / 4).tolist()
    for seed in range(200):
        assert not accept_once(weights, seeded(seed))[2]


def test_a_single_pass_accepts_below_the_probability_and_not_at_it():
    uniforms = torch.rand(51, dtype=torch.float64, generator=seeded(3))
    weights = torch.cat([uniforms[:50], torch.ones(1, dtype=torch.float64)])  # max w = 1: the probabilities themselves
    assert accept_once(weights, seeded(3)).tolist() == [False] * 50 + [True]
    assert accept_once(torch.cat([weights[:50] * (1 + 1e-12), weights[50:]]), seeded(3)).all()


def test_passes_of_accept_once_accept_each_row_a_binomial_number_of_times():
    generator = seeded()
    counts = sum(accept_once(2.5 * SIX, generator).long() for _ in range(5_000))
    assert int(counts[0]) == 5_000  # w_i = max w is always accepted
    assert float(binomial_z(counts, 5_000, SIX).abs().max()) < 4


def test_rows_drawn_from_the_proposal_and_accepted_once_follow_p():
    q = torch.tensor([5.0, 1.0, 2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    rows = torch.multinomial(q, 300_000, replacement=True, generator=seeded(5))
    accepted = rows[accept_once(SIX[rows], seeded(6), q[rows])]
    assert p_value(rows, SIX) < 1e-9
    assert p_value(accepted, SIX) > 0.001
    # M = max p/q, p = SIX / 2.95, q = q / 10.5: row 1 has .9 / 1 against 1 / 5 of row 0, so M = (.9/2.95) / (1/10.5)
    assert abs(len(accepted) / len(rows) - 2.95 / 10.5 / 0.9) < 0.004  # four standard errors: 4 sqrt(.31 * .69 / 3e5)


def test_both_routes_give_short_sequences_with_equal_frequency():
    places = torch.tensor([36, 6, 1])
    counts = []
    for route, generator in zip(ROUTES, (seeded(7), seeded(8)), strict=True):
        sequences = torch.stack([route(SIX, 3, generator) for _ in range(20_000)])
        counts.append(torch.bincount((sequences * places).sum(1), minlength=6**3))
    table = torch.stack(counts)
    is_common = table.sum(0) >= 10
    table = torch.cat([table[:, is_common], table[:, ~is_common].sum(1, keepdim=True)], dim=1)
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 60
    assert stats.chi2_contingency(table.numpy()).pvalue > 0.001


@pytest.mark.parametrize("route", ROUTES)
def test_the_first_acceptance_of_two_rows_is_that_of_a_permutation(route):
    # p = (1, 1/2). Order (0, 1): row 0 is accepted. Order (1, 0): row 1 with probability 1/2, else row 0. P(0) = 3/4.
    p, generator = torch.tensor([1.0, 0.5], dtype=torch.float64), seeded(9)
    num_first = sum(int(route(p, 1, generator)) == 0 for _ in range(4_000))
    assert abs(num_first / 4_000 - 0.75) < 4 * (0.75 * 0.25 / 4_000) ** 0.5


@pytest.mark.parametrize("num_passes", [1, 5])
def test_whole_passes_accept_each_row_a_binomial_number_of_times(num_passes):
    generator, num_repetitions = seeded(10), 3_000
    counts = torch.stack(
        [torch.bincount(_accept_whole_passes(SIX, num_passes, generator), minlength=6) for _ in range(num_repetitions)]
    ).double()
    assert int(counts.max()) <= num_passes, "a row twice within one pass"
    assert float(binomial_z(counts.sum(0), num_passes * num_repetitions, SIX).abs().max()) < 4
    variances, expected = counts.var(dim=0), num_passes * SIX * (1 - SIX)
    # Var of a sample variance: (mu4 - sigma^4) / R, and mu4 = 3 sigma^4 + sigma^2 (1 - 6 p (1 - p)) for a binomial.
    errors = ((2 * expected**2 + expected * (1 - 6 * SIX * (1 - SIX))) / num_repetitions).sqrt()
    assert bool(((variances - expected).abs() <= 4 * errors).all()), (variances, expected)


def test_permutations_are_compared_with_uniforms_of_double_precision():
    p, generator = torch.rand(1_000, dtype=torch.float64, generator=seeded(1)) / 2, seeded(3)
    p[0] = 1.0
    order = torch.randperm(1_000, generator=generator)
    uniforms = torch.rand(1_000, dtype=torch.float64, generator=generator)
    expected = order[uniforms < p[order]]
    assert torch.equal(_sample_by_permutations(p, len(expected), seeded(3)), expected)


@pytest.mark.parametrize("route", ROUTES)
def test_a_row_comes_at_most_once_per_pass_and_scatters_like_a_binomial(route):
    generator, residuals = seeded(11), []
    for _ in range(200):
        indices = route(SIX, 600, generator)
        counts = torch.nn.functional.one_hot(indices, 6).cumsum(0)
        # Row 0 is accepted once in every pass: up to its m-th appearance, in pass m, no row has come more than m times.
        assert bool((counts <= counts[:, :1] + 1).all())
        residuals.append(counts[-1] - counts[-1, 0] * SIX)  # T passes, T about 600 / 2.95 = 203
    variances, expected = torch.stack(residuals).var(dim=0)[1:], 600 / 2.95 * (SIX * (1 - SIX))[1:]
    assert bool(((variances / expected - 1).abs() < 4 * (2 / 200) ** 0.5).all()), (variances, expected)


@pytest.mark.parametrize("rest", [0.5, 0.001], ids=["looped", "heavy_tail"])
def test_draws_come_in_passes_whatever_the_route(rest):
    # Three of a hundred rows are accepted in every pass, so none of them is ever two ahead of another. M is 100 / 51.5
    # or 100 / 3.1.
    weights = torch.full((100,), rest, dtype=torch.float64).index_fill_(0, torch.tensor([20, 40, 99]), 1.0)
    indices = rejection_sample(7 * weights, 3_000, seeded(15))
    counts = torch.stack([(indices == row).cumsum(0) for row in (20, 40, 99)])
    assert int((counts.max(0).values - counts.min(0).values).max()) == 1
    assert int(counts[0, -1]) > 40  # 3,000 draws are 58 passes or more


def test_equal_weights_are_one_permutation_of_the_same_generator():
    expected = torch.randperm(NUM_ROWS, generator=seeded(12))
    for scale in (1.0, 0.1, 1e-30):
        assert torch.equal(rejection_sample(torch.full((NUM_ROWS,), scale), NUM_ROWS, seeded(12)), expected)
    assert torch.equal(rejection_sample(torch.ones(NUM_ROWS), 10, seeded(12)), expected[:10])
    three_passes = rejection_sample(torch.ones(NUM_ROWS), 3 * NUM_ROWS, seeded(12)).reshape(3, NUM_ROWS)
    assert torch.equal(three_passes.sort(dim=1).values, torch.arange(NUM_ROWS).expand(3, -1))


def test_points_of_the_inverse_distribution_are_sorted_uniforms_of_double_precision():
    num_rows = 100_000  # so many that sums of single precision fall into other rows
    spacings = torch.empty(num_rows + 1, dtype=torch.float64).exponential_(generator=seeded(5))
    uniforms = spacings.cumsum(0)[:-1] / spacings.sum()
    found = _sample_inverse_cdf(torch.ones(num_rows, dtype=torch.float64), num_rows, seeded(5))
    assert torch.equal(found, (num_rows * uniforms).long())


@pytest.mark.parametrize("top", [2.0, 2.0**24], ids=["looped", "heavy_tail"])
def test_more_rows_than_single_precision_can_count(top):
    num_rows = 2**24 + 1
    weights = torch.ones(num_rows)  # float32
    weights[-1] = top
    indices = rejection_sample(weights, 64, seeded())
    num_last, others = int((indices == num_rows - 1).sum()), indices[indices != num_rows - 1]
    assert int(indices.min()) >= 0
    assert len(others.unique()) == len(others)
    assert int(others.max()) > num_rows // 2
    if top == 2.0:
        assert num_last <= 1
    else:  # half of the weight on the last row: 32 of 64, the others Poisson, so within 4 sqrt(64) / 2 = 16
        assert 16 <= num_last <= 48


def test_the_same_seed_draws_the_same_and_the_global_generator_stands_still():
    before = torch.get_rng_state()
    for weights in (SIX, weights_of("lognormal")):
        first, second, other = (rejection_sample(weights, 500, seeded(s)) for s in (13, 13, 14))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        assert torch.equal(accept_once(weights, seeded(13)), accept_once(weights, seeded(13)))
    parts = [(torch.arange(6), SIX, 40), (torch.arange(6, 9), torch.ones(3), 10)]
    first, second, other = (sample_parts(parts, seeded(s)) for s in (13, 13, 14))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert int((first < 6).sum()) == 40
    assert torch.equal(torch.get_rng_state(), before)


# p = (1/4, 1/4, 1/2). Against q = 1/3: p/q = (3/4, 3/4, 3/2). Against q = (1/4, 1/2, 1/4): p/q = (1, 1/2, 2).
@pytest.mark.parametrize(
    ("weights", "proposal", "envelope", "probabilities"),
    [
        (W, None, 1.5, [0.5, 0.5, 1.0]),
        (W, Q, 2.0, [0.5, 0.25, 1.0]),
        (W, torch.ones(3), 1.5, [0.5, 0.5, 1.0]),
        (W, W, 1.0, [1.0, 1.0, 1.0]),  # q = p: every proposal is accepted
        (torch.ones(4), None, 1.0, [1.0] * 4),
        (torch.tensor([0.0, 0.0, 0.0, 5.0]), None, 4.0, [0.0, 0.0, 0.0, 1.0]),
        (torch.tensor([7.0]), None, 1.0, [1.0]),
    ],
)
def test_envelope_and_acceptance_by_hand(weights, proposal, envelope, probabilities):
    assert envelope_constant(weights, proposal) == pytest.approx(envelope, abs=1e-15)
    accepted = acceptance_probabilities(weights, proposal)
    assert accepted.dtype == torch.float64
    assert accepted.tolist() == probabilities
    # The acceptance rate sum q_i p_i / (M q_i) is 1/M.
    q = torch.ones(len(weights)) if proposal is None else proposal
    assert float((q / q.sum() * accepted).sum()) == pytest.approx(1 / envelope, abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ([1, 1, 2], 16 / 6),  # 4^2 / (1 + 1 + 4)
        ([3, 3, 3, 3], 4.0),
        ([0, 0, 5], 1.0),
        ([1, 2, 3, 4], 100 / 30),  # 10^2 / (1 + 4 + 9 + 16)
    ],
)
def test_effective_sample_size_by_hand(weights, rows):
    assert effective_sample_size(torch.tensor(weights)) == pytest.approx(rows, rel=1e-12)


def test_the_sample_size_of_log_weights_is_that_of_the_weights():
    weights = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shift in (0.0, 900.0, -900.0):  # e^900 overflows
        assert effective_sample_size_from_logs(weights.log() + shift) == pytest.approx(effective_sample_size(weights))
    assert effective_sample_size_from_logs(torch.tensor([[0.0, -math.inf], [0.0, 0.0]])) == pytest.approx(3)
    assert effective_sample_size_from_logs(torch.full((3,), -math.inf)) == 0.0
    logs = -torch.rand(1_000, generator=seeded())
    exact = effective_sample_size(logs.double().exp())
    assert effective_sample_size_from_logs(logs) == pytest.approx(exact, rel=1e-12)  # sums of double precision
    with pytest.raises(ValueError, match="holds NaN"):
        effective_sample_size_from_logs(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"holds NaN or \+inf"):
        effective_sample_size_from_logs(torch.tensor([0.0, math.inf]))
    logs = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    assert effective_sample_size_from_logs(logs) == pytest.approx(3)


# Four times 8e307 is no finite float64, though every entry is; 1e-320 is subnormal.
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40, 1e-300, 1e300, 8e307, 1e-320])
def test_a_common_factor_changes_nothing(scale):
    weights = W.double()
    scaled = weights * scale
    assert envelope_constant(scaled) == pytest.approx(1.5)
    assert effective_sample_size(scaled) == pytest.approx(16 / 6)
    assert acceptance_probabilities(scaled).tolist() == [0.5, 0.5, 1.0]
    assert acceptance_probabilities(scaled, Q).tolist() == [0.5, 0.25, 1.0]
    assert torch.equal(rejection_sample(scaled, 60, seeded()), rejection_sample(weights, 60, seeded()))


@pytest.mark.parametrize("scale", [1e-300, 1e300, 8e307, 1e-320])
def test_a_common_factor_of_the_proposal_changes_nothing(scale):
    weights = W.double()
    assert envelope_constant(weights, Q.double() * scale) == pytest.approx(2.0)
    assert acceptance_probabilities(weights, Q.double() * scale).tolist() == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_number_format_gives_the_same(dtype):
    assert len(FORMATS) == 7
    weights, proposal = W.to(dtype), Q.to(dtype)
    assert envelope_constant(weights, proposal) == 2.0
    assert acceptance_probabilities(weights).dtype == torch.float64
    assert acceptance_probabilities(weights).tolist() == [0.5, 0.5, 1.0]
    assert effective_sample_size(weights) == pytest.approx(16 / 6)
    assert torch.equal(rejection_sample(weights, 20, seeded()), rejection_sample(W, 20, seeded()))
    assert torch.equal(accept_once(weights, seeded()), accept_once(W, seeded()))
    assert weights.dtype == dtype


def test_half_precision_sums_do_not_overflow():
    # 40,000 rows of weight 4 sum to 160,000, above the largest float16, 65,504.
    weights = torch.full((40_000,), 4.0, dtype=torch.float16)
    assert envelope_constant(weights) == 1.0
    assert effective_sample_size(weights) == 40_000


def test_weights_with_a_gradient_are_left_alone():
    weights = W.clone().requires_grad_()
    assert not acceptance_probabilities(weights).requires_grad
    assert torch.equal(rejection_sample(weights, 5, seeded()), rejection_sample(W, 5, seeded()))
    assert torch.equal(weights.detach(), W)


USES = {
    "envelope_constant": lambda weights, proposal: envelope_constant(weights, proposal),
    "acceptance_probabilities": lambda weights, proposal: acceptance_probabilities(weights, proposal),
    "accept_once": lambda weights, proposal: accept_once(weights, seeded(), proposal),
    "rejection_sample": lambda weights, proposal: rejection_sample(weights, 3, seeded()),
    "effective_sample_size": lambda weights, proposal: effective_sample_size(weights),
}
WRONG_WEIGHTS = [
    ([], r"`weights` must have shape \(N,\) with N >= 1, got \(0,\)"),
    ([[1.0, 2.0]], r"`weights` must have shape \(N,\) with N >= 1, got \(1, 2\)"),
    (3.0, r"`weights` must have shape \(N,\) with N >= 1, got \(\)"),
    ([1.0, -0.5, -2.0], r"`weights` is -0\.5 at index 1 \(2 such entries\)"),
    ([1.0, 2.0, float("nan")], r"`weights` is nan at index 2 \(1 such entries\)"),
    ([float("inf"), 1.0], r"`weights` is inf at index 0 \(1 such entries\)"),
    ([float("-inf"), 1.0], r"`weights` is -inf at index 0"),
    ([0.0, 0.0], r"`weights` are all zero"),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("weights", "message"), WRONG_WEIGHTS)
def test_wrong_weights_are_named(use, weights, message):
    with pytest.raises(ValueError, match=message):
        USES[use](torch.tensor(weights), None)


@pytest.mark.parametrize("use", ["envelope_constant", "acceptance_probabilities", "accept_once"])
@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        ([1.0, 0.0, 1.0], r"`proposal` is 0 at index 1, a row that could never be proposed"),
        ([1.0, 2.0], r"`proposal` has 2 entries for 3 weights"),
        ([1.0] * 4, r"`proposal` has 4 entries for 3 weights"),
        ([], r"`proposal` must have shape \(N,\)"),
        ([[1.0, 1.0, 1.0]], r"`proposal` must have shape \(N,\) with N >= 1, got \(1, 3\)"),
        ([1.0, 1.0, -1.0], r"`proposal` is -1\.0 at index 2"),
        ([float("nan"), 1.0, 1.0], r"`proposal` is nan at index 0"),
        ([1.0, float("inf"), 1.0], r"`proposal` is inf at index 1"),
    ],
)
def test_wrong_proposals_are_named(use, proposal, message):
    with pytest.raises(ValueError, match=message):
        USES[use](W, torch.tensor(proposal))


def test_a_ratio_beyond_the_range_of_numbers_is_named():
    double = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731 - said twice
    with pytest.raises(ValueError, match="overflows: a row is proposed far too rarely for its weight"):
        envelope_constant(double(1.0, 1.0), double(1e-310, 1.0))
    assert envelope_constant(double(1e-310, 1.0), double(1e-310, 1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("num_draws", "error", "message"),
    [
        (0, ValueError, r"`num_draws`=0 must be an integer between 1 and 2147483648"),
        (-3, ValueError, r"`num_draws`=-3 must be an integer between 1 and 2147483648"),
        (2**31 + 1, ValueError, r"`num_draws`=2147483649 must be an integer between 1 and 2147483648"),
        (3.0, TypeError, r"`num_draws`=3\.0 must be an integer between"),
        (True, TypeError, r"`num_draws`=True must be an integer between"),
        (None, TypeError, r"`num_draws`=None must be an integer between"),
        ("3", TypeError, r"`num_draws`='3' must be an integer between"),
    ],
)
def test_wrong_numbers_of_draws_are_named(num_draws, error, message):
    with pytest.raises(error, match=message):
        rejection_sample(W, num_draws, seeded())


def test_rows_of_a_pass_come_in_random_order():
    """Also where they are many: half of the neighbours rise, and none of the order of the data set is left."""
    weights = torch.full((40_000,), 0.4, dtype=torch.float64)
    weights[0] = 1.0
    rows = _accept_whole_passes(weights, 1, seeded(2))
    rising = float((rows.diff() > 0).double().mean())
    assert len(rows) > 15_000
    assert abs(rising - 0.5) < 4 * 0.5 / len(rows) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([rows.double(), torch.arange(len(rows)).double()]))[0, 1])) < 0.03


def test_few_draws_of_few_certain_rows() -> None:
    """No row has a probability between 0 and one half."""
    for weights in ([1.0, 1.0, 0.0], [1.0] + [0.0] * 30):
        rows = rejection_sample(torch.tensor(weights), 1000, torch.Generator().manual_seed(0))
        assert set(rows.tolist()) == {row for row, weight in enumerate(weights) if weight}
