"""What the rules refuse: each by its message, with the row or the parameter and the value found."""

import math

import pytest
import torch

from rsft_hf import Chain, ClassBalanced, Clipped, DropTop, Floored, Proportional, Tempered
from rsft_hf.weighted import Entropy, ExampleStatistics, Learnability, LeastConfidence, Margin, Softmax

STATISTICS = ExampleStatistics(labels=torch.tensor([0, 0, 1]), rows=torch.arange(3))
NON_NEGATIVE = {
    "Proportional": Proportional(),
    "Tempered": Tempered(0.5),
    "Clipped": Clipped(0.5),
    "DropTop": DropTop(0.5),
    "Floored": Floored(0.5),
    "ClassBalanced": ClassBalanced(),
}
ANY_FINITE = {"Softmax": Softmax(), "Learnability": Learnability(torch.zeros(3))}
OF_PREDICTIONS = {"Entropy": Entropy(), "Margin": Margin(), "LeastConfidence": LeastConfidence()}
STATISTIC_OF = {"Entropy": "entropies", "Margin": "margins", "LeastConfidence": "confidences"}
NOT_FINITE = [math.nan, math.inf, -math.inf]


def test_every_rule_but_chain_is_in_one_of_the_tables():
    assert len(NON_NEGATIVE | ANY_FINITE | OF_PREDICTIONS) == 11


@pytest.mark.parametrize("name", NON_NEGATIVE)
@pytest.mark.parametrize("loss", [*NOT_FINITE, -0.5])
def test_a_negative_or_non_finite_loss_is_named_with_its_row(name, loss):
    message = rf"{name} needs scores that are finite and >= 0, got {loss} at row 1 \(2 such rows\)"
    with pytest.raises(ValueError, match=message):
        NON_NEGATIVE[name](torch.tensor([1.0, loss, loss]), STATISTICS)


@pytest.mark.parametrize("name", ANY_FINITE)
@pytest.mark.parametrize("loss", NOT_FINITE)
def test_rules_for_scores_of_either_sign_refuse_only_what_is_not_finite(name, loss):
    with pytest.raises(ValueError, match=rf"{name} needs scores that are finite, got {loss} at row 2 \(1 such rows\)"):
        ANY_FINITE[name](torch.tensor([1.0, 2.0, loss]), STATISTICS)
    assert bool((ANY_FINITE[name](torch.tensor([-1.0, -2.0, 0.5]), STATISTICS) >= 0).all())


@pytest.mark.parametrize("rule", [*NON_NEGATIVE.values(), *ANY_FINITE.values()], ids=repr)
@pytest.mark.parametrize(("scores", "shape"), [(torch.empty(0), r"\(0,\)"), (torch.ones(1, 3), r"\(1, 3\)")])
def test_scores_of_another_shape_are_refused(rule, scores, shape):
    with pytest.raises(ValueError, match=rf"takes scores of shape \(N,\) with N >= 1, got {shape}"):
        # As many statistics as scores, so that the scores' own shape is at fault.
        rule(scores, ExampleStatistics(labels=torch.zeros(scores.numel()), rows=torch.arange(scores.numel())))


@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_a_wrong_statistic_is_named_with_its_row(name):
    for value in (math.nan, -0.25):
        statistics = ExampleStatistics(**{STATISTIC_OF[name]: torch.tensor([0.5, 0.5, value])})
        with pytest.raises(ValueError, match=rf"{name} needs scores that are finite and >= 0, got {value} at index 2"):
            OF_PREDICTIONS[name](torch.ones(3), statistics)


@pytest.mark.parametrize(
    ("rule", "statistic"),
    [
        (Entropy(), "entropies"),
        (Margin(), "margins"),
        (LeastConfidence(), "confidences"),
        (ClassBalanced(), "labels"),
        (Learnability(torch.zeros(2)), "rows"),
        (Chain(Proportional(), ClassBalanced()), "labels"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("statistics", [None, ExampleStatistics()])
def test_a_missing_statistic_is_named(rule, statistic, statistics):
    assert rule.requires == {statistic}
    with pytest.raises(ValueError, match=rf"needs the statistic `{statistic}`, which was not measured"):
        rule(torch.ones(2), statistics)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: Tempered(-0.1), r"`alpha`=-0\.1 must lie in \[0, inf\)"),
        (lambda: Tempered(math.inf), r"`alpha`=inf must lie in \[0, inf\)"),
        (lambda: Tempered(math.nan), r"`alpha`=nan must lie in \[0, inf\)"),
        (lambda: Softmax(0), r"`temperature`=0 must lie in \(0, inf\)"),
        (lambda: Softmax(-1), r"`temperature`=-1 must lie in \(0, inf\)"),
        (lambda: Softmax(math.inf), r"`temperature`=inf must lie in \(0, inf\)"),
        (lambda: Clipped(1.01), r"`quantile`=1\.01 must lie in \[0, 1\]"),
        (lambda: Clipped(-0.01), r"`quantile`=-0\.01 must lie in \[0, 1\]"),
        (lambda: DropTop(1), r"`fraction`=1 must lie in \[0, 1\)"),
        (lambda: DropTop(-0.5), r"`fraction`=-0\.5 must lie in \[0, 1\)"),
        (lambda: Floored(1.5), r"`fraction`=1\.5 must lie in \[0, 1\]"),
        (lambda: Floored(math.nan), r"`fraction`=nan must lie in \[0, 1\]"),
        (lambda: Chain(), r"Chain\(\) needs at least one rule"),
    ],
)
def test_parameters_out_of_range_are_refused_at_construction(rule, message):
    with pytest.raises(ValueError, match=message):
        rule()


@pytest.mark.parametrize("rules", [([Proportional()],), (Proportional,), (DropTop(0.1), "Floored")])
def test_chain_refuses_what_is_no_rule_at_construction(rules):
    with pytest.raises(TypeError, match="rule"):
        Chain(*rules)


def test_the_smallest_temperatures_still_give_the_largest_score_all_weight():
    assert Softmax(1e-310)(torch.tensor([1.0, 2.0])).tolist() == [0, 1]


def test_learnability_refuses_a_reference_that_is_not_of_the_same_rows():
    with pytest.raises(ValueError, match=r"`reference_losses` must have shape \(N,\), got \(1, 2\)"):
        Learnability([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"`reference_losses` has 3 entries but the data set has a row 3"):
        Learnability(torch.zeros(3))(torch.ones(2), ExampleStatistics(rows=torch.tensor([0, 3])))
    # Row 4 of the data set, which is the second of the rows that can be scored.
    with pytest.raises(ValueError, match=r"Learnability \(loss - reference loss\).* nan .*\b4\b"):
        Learnability([0.0, 0.0, 0.0, 0.0, math.nan])(torch.ones(2), ExampleStatistics(rows=torch.tensor([2, 4])))
