"""The law's numbers worked out by hand, their independence of scale and number format, and what is refused."""

import pytest
import torch

from rsft_hf import (
    accept_once,
    acceptance_probabilities,
    effective_sample_size,
    envelope_constant,
    rejection_sample,
)

W = torch.tensor([1.0, 1.0, 2.0])
Q = torch.tensor([1.0, 2.0, 1.0])
FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# Four times 8e307 is no finite float64, though every entry is; 1e-320 is subnormal.
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40, 1e-300, 1e300, 8e307, 1e-320])
def test_a_common_factor_changes_nothing(scale):
    weights = W.double()
    scaled = weights * scale
    assert envelope_constant(scaled) == pytest.approx(1.5)
    assert effective_sample_size(scaled) == pytest.approx(16 / 6)
    assert acceptance_probabilities(scaled).tolist() == [0.5, 0.5, 1.0]
    assert acceptance_probabilities(scaled, Q).tolist() == [0.5, 0.25, 1.0]
    for proposal in (None, Q):
        expected = rejection_sample(weights, 60, seeded(), proposal)
        assert torch.equal(rejection_sample(scaled, 60, seeded(), proposal), expected)


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
    "rejection_sample": lambda weights, proposal: rejection_sample(weights, 3, seeded(), proposal),
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


@pytest.mark.parametrize("use", [name for name in USES if name != "effective_sample_size"])
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


@pytest.mark.parametrize(
    ("num_draws", "error", "message"),
    [
        (0, ValueError, r"`num_draws`=0 must lie between 1 and 2\*\*31"),
        (-3, ValueError, r"`num_draws`=-3 must lie between 1 and 2\*\*31"),
        (2**31 + 1, ValueError, r"`num_draws`=2147483649 must lie between 1 and 2\*\*31"),
        (3.0, TypeError, r"`num_draws` must be an integer number of rows, got 3\.0"),
        (True, TypeError, r"`num_draws` must be an integer number of rows, got True"),
        (None, TypeError, r"`num_draws` must be an integer number of rows, got None"),
        ("3", TypeError, r"`num_draws` must be an integer number of rows, got '3'"),
    ],
)
def test_wrong_numbers_of_draws_are_named(num_draws, error, message):
    with pytest.raises(error, match=message):
        rejection_sample(W, num_draws, seeded())
