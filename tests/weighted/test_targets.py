"""Target weights of the rows, metrics of the draws, and importance correction."""

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from rsft_hf import ClassBalanced, Clipped, Proportional, rejection_sample
from rsft_hf.weighted import Entropy, ExampleStatistics, Learnability, Softmax
from rsft_hf.weighted.targets import correction_factors, draw_metrics, target_weights

NAN = math.nan
LOSSES = torch.tensor([2.0, NAN, 1.0, 0.0, NAN, 5.0], dtype=torch.float64)
LOGGER = "rsft_hf.weighted.targets"


@dataclass(frozen=True)
class Returns:
    """Rule that returns the given weights."""

    weights: Any
    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: torch.Tensor, statistics: ExampleStatistics | None = None) -> Any:
        return self.weights


def test_rows_without_a_loss_get_weight_zero():
    assert target_weights(Proportional(), LOSSES, {}, None).tolist() == [2, 0, 1, 0, 0, 5]
    # e^L over rows 0, 2, 3, 5 alone: a weight for the rows without a loss would change every share.
    total = sum(math.exp(loss) for loss in (2, 1, 0, 5))
    expected = [math.exp(2) / total, 0, math.exp(1) / total, 1 / total, 0, math.exp(5) / total]
    assert target_weights(Softmax(), LOSSES, {}, None).tolist() == pytest.approx(expected)


def test_statistics_reach_the_rule_for_the_rows_that_have_a_loss():
    entropies = torch.tensor([0.5, 9.0, 0.25, 0.0, 9.0, 1.0], dtype=torch.float64)
    weights = target_weights(Entropy(), LOSSES, {"entropies": entropies}, None)
    assert weights.tolist() == [0.5, 0, 0.25, 0, 0, 1]
    labels = torch.tensor([4, 4, 8, 4, 8, 8])
    # Class 4 has rows 0 and 3: 2/2 and 0. Class 8 has rows 2 and 5: 1/6 and 5/6.
    weights = target_weights(ClassBalanced(), LOSSES, {}, labels)
    assert weights.tolist() == pytest.approx([1, 0, 1 / 6, 0, 0, 5 / 6])
    reference = torch.tensor([0.5, NAN, 3.0, 0.0, NAN, 1.0])
    weights = target_weights(Learnability(reference), LOSSES, {}, None)
    assert weights.tolist() == [1.5, 0, 0, 0, 0, 4]


def test_all_zero_weights_become_uniform_over_the_rows_with_a_loss(caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        weights = target_weights(Proportional(), LOSSES * 0, {}, None)
    assert weights.tolist() == [1, 0, 1, 1, 0, 1]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "Proportional() gives all 4 rows weight 0" in record.getMessage()
    assert "drawing uniformly" in record.getMessage()


def test_the_log_does_not_call_losses_zero_that_are_not(caplog):
    # Half of the losses are 0, so the cap at the median is 0 and takes the weight of the row with loss 5 too.
    with caplog.at_level(logging.INFO, logger=LOGGER):
        target_weights(Clipped(0.5), torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64), {}, None)
    (record,) = caplog.records
    assert "drawing uniformly" in record.getMessage()
    assert "every loss is 0" not in record.getMessage()


def test_positive_weights_are_not_logged(caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        target_weights(Proportional(), LOSSES, {}, None)
    assert not caplog.records


def test_a_data_set_without_any_loss_is_refused():
    with pytest.raises(ValueError, match=r"No row of the training set has a loss"):
        target_weights(Proportional(), torch.full((3,), NAN, dtype=torch.float64), {}, None)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(6), r"returned weights of shape \(6,\) for 4 losses. .* shape \(4,\)"),
        (torch.ones(4, 1), r"returned weights of shape \(4, 1\) for 4 losses"),
        (torch.tensor(1.0), r"returned weights of shape \(\) for 4 losses"),
        # The scored rows are 0, 2, 3 and 5 of the data set.
        (torch.tensor([1.0, 1.0, -2.0, -1.0]), r"gave row 3 the weight -2\.0. Weights must be finite and >= 0"),
        (torch.tensor([1.0, NAN, 1.0, 1.0]), r"gave row 2 the weight nan"),
        (torch.tensor([1.0, 1.0, 1.0, math.inf]), r"gave row 5 the weight inf"),
    ],
)
def test_what_a_rule_must_not_return(weights, message):
    with pytest.raises(ValueError, match=message):
        target_weights(Returns(weights), LOSSES, {}, None)


@pytest.mark.parametrize("value", [None, "heavy"])
def test_a_rule_that_returns_no_numbers_is_named(value):
    with pytest.raises(
        TypeError, match=rf"Returns\(weights={value!r}\) must return one weight per loss, got {value!r}"
    ):
        target_weights(Returns(value), LOSSES, {}, None)


def test_a_list_or_integers_are_weights_too():
    assert target_weights(Returns([1, 2, 0, 1]), LOSSES, {}, None).tolist() == [1, 0, 2, 0, 0, 1]


def test_a_wrong_loss_is_named_with_its_row_in_the_data_set():
    losses = LOSSES.clone()
    losses[5] = -0.5  # the fourth of the rows with a loss
    with pytest.raises(ValueError, match=r"-0\.5 .*\b5\b"):
        target_weights(Proportional(), losses, {}, None)


def test_draw_metrics_by_hand():
    indices = torch.tensor([2, 2, 0, 2])
    assert draw_metrics(torch.tensor([1.0, 1.0, 2.0]), indices) == {
        "envelope_M": 1.5,  # 3 * 2/4
        "acceptance_rate": pytest.approx(2 / 3),
        "effective_sample_size": pytest.approx(16 / 6),  # 4^2 / (1 + 1 + 4)
        "unique_fraction": 0.5,  # rows 0 and 2 of 4 draws
        "max_repeats": 3,
        "top_1_percent_share": 0.5,  # one row: 2/4
    }
    # 250 rows: floor(2.5) = 2 of them, 30 + 20 of 50 + 248.
    weights = torch.ones(250).index_copy_(0, torch.tensor([7, 9]), torch.tensor([30.0, 20.0]))
    assert draw_metrics(weights, indices)["top_1_percent_share"] == pytest.approx(50 / 298)


def test_corrected_gradients_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, dtype=torch.float64, generator=generator) ** 3
    gradients = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    p = weights / weights.sum()
    factors = correction_factors(weights, 1.0).double()
    torch.testing.assert_close((p * factors) @ gradients, gradients.mean(0), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(p @ gradients, gradients.mean(0), rtol=0.1)
    # And by draws: the mean over 200,000 of them, within four standard errors. The variance is that of the law, not of
    # the draws: rows of p = 6e-6 come about once, with a factor of 3,000.
    rows = rejection_sample(weights, 200_000, generator)
    drawn = factors[rows, None] * gradients[rows]
    variances = (p * factors**2) @ gradients**2 - gradients.mean(0) ** 2
    assert bool(((drawn.mean(0) - gradients.mean(0)).abs() < 4 * (variances / 200_000).sqrt()).all())


def test_correction_factors_by_hand():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])  # two rows can be drawn, p = 1/4 and 3/4: 1 / (2 p) = 2 and 2/3
    assert correction_factors(weights, 1.0).tolist() == pytest.approx([0, 2, 2 / 3, 0])
    assert correction_factors(weights, 0.5).tolist() == pytest.approx([0, 2**0.5, (2 / 3) ** 0.5, 0])
    assert correction_factors(weights, 0.0).tolist() == [0, 1, 1, 0]
    assert correction_factors(torch.full((5,), 7.0), 1.0).tolist() == [1] * 5
    assert correction_factors(weights, 1.0).dtype == torch.float32
