"""The law of drawn labels: what is proposed follows q, what is accepted of a row follows p, at the rate 1 / M."""

import pytest
import torch

from rsft_hf.predictive.acceptance import (
    acceptance_log_probabilities,
    decide,
    expected_calibration_error,
    is_confident,
    propose_labels,
)

NUM = 60_000
Q = torch.tensor([0.5, 0.3, 0.2])
P = torch.tensor([0.2, 0.2, 0.6])


def shares(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.bincount(labels, minlength=num_classes) / len(labels)


def repeated(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.log().expand(NUM, -1)


def test_proposals_follow_q() -> None:
    labels = propose_labels(repeated(Q), torch.Generator().manual_seed(0))
    assert torch.allclose(shares(labels, 3), Q, atol=4 * 0.5 / NUM**0.5)


@pytest.mark.parametrize("factor", [1.0, 1e-9])
def test_accepted_labels_follow_p_whatever_its_factor(factor: float) -> None:
    log_p = repeated(P) + torch.tensor(factor).log()
    decisions = decide(repeated(Q), log_p, torch.arange(NUM), torch.Generator().manual_seed(1))
    accepted = decisions.labels[decisions.is_accepted]
    assert torch.allclose(shares(accepted, 3), P, atol=4 * 0.5 / len(accepted) ** 0.5)
    envelope = float((P / Q).max())  # 3
    assert len(accepted) / NUM == pytest.approx(1 / envelope, abs=4 * 0.5 / NUM**0.5)
    assert decisions.probabilities.max() == pytest.approx(1.0)


def test_the_same_distribution_accepts_everything() -> None:
    decisions = decide(repeated(Q), repeated(Q), torch.arange(NUM), torch.Generator().manual_seed(1))
    assert decisions.is_accepted.all()


def test_units_of_a_decision_are_accepted_together_by_the_product_of_their_ratios() -> None:
    """Two tokens a row: the accepted pairs follow p(y1) p(y2), at the rate 1 / M ** 2."""
    decision_of = torch.arange(NUM) // 2
    decisions = decide(repeated(Q), repeated(P), decision_of, torch.Generator().manual_seed(2))
    pairs = decisions.is_accepted.reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert float(pairs[:, 0].double().mean()) == pytest.approx(1 / 9, abs=4 * 0.32 / (NUM / 2) ** 0.5)
    labels = decisions.labels.reshape(-1, 2)[pairs[:, 0]]
    joint = shares(labels[:, 0] * 3 + labels[:, 1], 9).reshape(3, 3)
    assert torch.allclose(joint, P[:, None] * P[None], atol=4 * 0.5 / len(labels) ** 0.5)


def test_a_label_that_is_never_proposed_needs_no_envelope() -> None:
    log_q, log_p = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.4, 0.2, 0.4]]).log()
    found = acceptance_log_probabilities(log_q.expand(2, -1), log_p.expand(2, -1), torch.tensor([0, 1])).exp()
    assert found.tolist() == pytest.approx([1.0, 0.5])


def test_no_rows_are_no_decisions() -> None:
    empty = torch.empty(0, 3)
    decisions = decide(empty, empty, torch.empty(0, dtype=torch.int64), torch.Generator())
    assert len(decisions.labels) == len(decisions.is_accepted) == 0


def test_confidence_limits() -> None:
    confidences, classes = torch.tensor([0.95, 0.5, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 1, 1])
    assert is_confident(confidences, classes, 0.7, None).tolist() == [True, False, True, True, False]
    # Of two the least confident one, of three too: int(0.5 * 3).
    assert is_confident(confidences, classes, None, 0.5).tolist() == [True, False, True, True, False]
    assert is_confident(confidences, classes, 0.75, 0.5).tolist() == [True, False, True, False, False]
    assert is_confident(confidences, classes, torch.tensor([0.5, 0.8]), None).tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_calibration_error() -> None:
    confidences = torch.tensor([0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False])
    # Bins of two rows each: |0.95 - 1| and |0.55 - 0.5|.
    assert expected_calibration_error(confidences, right) == pytest.approx(0.05, abs=1e-6)
    assert expected_calibration_error(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 1.0
    assert expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0
