"""The criterion read and scaled, on numbers worked by hand."""

import pytest
import torch
import torch.nn.functional as F

from rsft_hf.weighted.losses import CriterionCapture


def test_importance_correction_makes_the_gradient_unbiased() -> None:
    """Rows that count alike: the mean of c_i L_i: worked by hand on two rows with c = (2, 2/3)."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    single = F.cross_entropy(logits, labels, reduction="none")  # (ln(1 + 1/e), ln(1 + e)) = (.3133, 1.3133)
    with CriterionCapture(2, torch.tensor([2.0, 2.0 / 3.0])):
        loss = F.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx((2 * 0.3132617 + 2 / 3 * 1.3132617) / 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.autograd.grad((single * torch.tensor([2.0, 2.0 / 3.0])).mean(), logits)[0]
    torch.testing.assert_close(gradient, expected)


def test_a_question_that_is_ignored_has_no_margin_and_no_harm() -> None:
    """Question-answering heads ignore the index one beyond the last position."""
    logits, labels = torch.randn(3, 8), torch.tensor([1, 8, 2])
    with CriterionCapture(3) as capture:
        loss = F.cross_entropy(logits, labels, weight=torch.ones(8), ignore_index=8)
    assert torch.equal(loss, F.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    assert capture.calls[0].normalisers.tolist() == [1, 0, 1]


def test_corrected_means_weigh_their_denominator_too() -> None:
    """Two rows of class weights 1 and 9 with factors 2 and 2/3: sum c w l / sum c w = (2 l0 + 6 l1) / 8."""
    logits, labels, weight = torch.tensor([[1.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 1]), torch.tensor([1.0, 9.0])
    single = F.cross_entropy(logits, labels, reduction="none")
    with CriterionCapture(2, torch.tensor([2.0, 2.0 / 3.0])):
        loss = F.cross_entropy(logits, labels, weight=weight)
    assert loss.item() == pytest.approx(((2 * single[0] + 6 * single[1]) / 8).item())
