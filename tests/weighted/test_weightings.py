"""Rules from scores to weights: values worked out by hand, invariances, and validation of arguments."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch

import rsft_hf.weighted
from rsft_hf import Chain, ClassBalanced, Clipped, DropTop, Floored, Proportional, Tempered
from rsft_hf.weighted import (
    Entropy,
    ErrorSet,
    ExampleStatistics,
    Learnability,
    LeastConfidence,
    LeaveOutSuspects,
    Margin,
    Softmax,
    Weighting,
)
from rsft_hf.weighted.weightings import as_weighting

LOSSES = torch.tensor([4.0, 1.0, 0.0, 9.0, 2.0])
STATISTICS = ExampleStatistics(
    entropies=torch.tensor([0.25, 0.0, 0.5, 1.0, 0.75]),
    margins=torch.tensor([0.75, 1.0, 0.0, 0.25, 0.5]),
    confidences=torch.tensor([0.875, 1.0, 0.5, 0.625, 0.75]),
    labels=torch.tensor([7, 7, 3, 7, 3]),
    rows=torch.tensor([1, 2, 4, 5, 6]),  # rows 0 and 3 of the data set have no label
    loss_history=torch.tensor([[5.0, 3.0, 1.0, 2.0, 3.0], [4.0, 1.0, 0.0, 9.0, 2.0]]),
    margin_history=torch.tensor([[-1.0, 1.0, 2.0, 0.0, -3.0], [1.0, 1.0, 2.0, -9.0, 1.0]]),
)
# Of the data set's seven rows; those of the five scored ones are 1, 2, 0, 4, 8.
REFERENCE = torch.tensor([math.nan, 1.0, 2.0, math.nan, 0.0, 4.0, 8.0])
DOUBLING = 1 / math.log(2)  # at this temperature e^(L / temperature) is 2^L

CANONICAL = {
    Proportional(): [4, 1, 0, 9, 2],
    Tempered(0.5): [2 / 3, 1 / 3, 0, 1, math.sqrt(2) / 3],  # square roots, over sqrt 9
    Softmax(DOUBLING): [16 / 535, 2 / 535, 1 / 535, 512 / 535, 4 / 535],  # 2^L: 16 + 2 + 1 + 512 + 4 = 535
    Clipped(0.75): [4, 1, 0, 4, 2],  # sorted 0 1 2 4 9: position floor(.75 * 4) = 3 is 4
    DropTop(0.4): [0, 1, 0, 0, 2],  # floor(.4 * 5) = 2 rows: 9 and 4
    Floored(0.2): [0.24, 0.09, 0.04, 0.49, 0.14],  # .8 L / 16 + .2 / 5 = L / 20 + .04
    ClassBalanced(): [4 / 14, 1 / 14, 0, 9 / 14, 1],  # class 7: 4 + 1 + 9 = 14; class 3: 0 + 2
    Entropy(): [0.25, 0, 0.5, 1, 0.75],
    Margin(): [0.25, 0, 1, 0.75, 0.5],  # 1 - margin
    LeastConfidence(): [0.125, 0, 0.5, 0.375, 0.25],  # 1 - confidence
    Learnability(REFERENCE): [3, 0, 0, 5, 0],  # 4 - 1, 1 - 2 < 0, 0 - 0, 9 - 4, 2 - 8 < 0
    # Medians 3 and 2, so the mean excesses are (2 + 2) / 2, (0 - 1) / 2, (-2 - 2) / 2, (-1 + 7) / 2 and 0.
    LeaveOutSuspects(0.4): [0, 1, 0, 0, 2],
    ErrorSet(5.0): [5, 1, 1, 1, 5],  # negative in the first measured epoch
    Chain(DropTop(0.2), Clipped(0.75), Tempered(2)): [1, 1 / 4, 0, 0, 1],  # 4 1 0 0 2, then 2 1 0 0 2, over 2, squared
}
READS_LOSSES = (Proportional(), Tempered(0.5), Softmax(), Clipped(0.75), Floored(0.2), Learnability(torch.zeros(7)))
OF_LOSSES_ONLY = tuple(rule for rule in CANONICAL if not rule.requires)


def weightings() -> set[type]:
    exported = {getattr(rsft_hf.weighted, name) for name in rsft_hf.weighted.__all__}
    weighted = {item for item in exported if isinstance(item, type) and item.__module__.startswith("rsft_hf.weighted")}
    return {item for item in weighted if hasattr(item, "requires")} - {Weighting}


def test_every_rule_has_a_row_in_the_canonical_table():
    assert len(CANONICAL) == 14
    assert {type(rule) for rule in CANONICAL} == weightings()
    assert len(OF_LOSSES_ONLY) == 7


@pytest.mark.parametrize(("rule", "expected"), CANONICAL.items(), ids=map(repr, CANONICAL))
def test_canonical_weights(rule, expected):
    weights = rule(LOSSES, STATISTICS)
    assert weights.shape == (5,)
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx(expected, abs=1e-12)
    assert bool((weights >= 0).all())
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.requires = frozenset()


@pytest.mark.parametrize("rule", CANONICAL, ids=repr)
def test_the_order_of_the_rows_does_not_matter(rule):
    order = torch.tensor([3, 0, 4, 2, 1])
    vectors = [name for name, value in vars(STATISTICS).items() if isinstance(value, torch.Tensor)]
    assert len(vectors) == len(dataclasses.fields(STATISTICS)) - 1  # `num_rows` is a number
    fields = {name: vars(STATISTICS)[name][..., order] for name in vectors}
    shuffled = rule(LOSSES[order], ExampleStatistics(**fields))
    assert shuffled.tolist() == pytest.approx(rule(LOSSES, STATISTICS)[order].tolist(), rel=1e-12)


@pytest.mark.parametrize("rule", CANONICAL, ids=repr)
def test_the_number_format_of_the_scores_does_not_matter_and_they_stay_as_they_are(rule):
    expected = rule(LOSSES, STATISTICS).tolist()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64):
        losses = LOSSES.to(dtype)
        assert rule(losses, STATISTICS).tolist() == expected
        assert torch.equal(losses, LOSSES.to(dtype))
    assert not rule(LOSSES.clone().requires_grad_(), STATISTICS).requires_grad


@pytest.mark.parametrize("rule", READS_LOSSES, ids=repr)
def test_a_higher_loss_is_never_drawn_less(rule):
    losses = torch.linspace(0, 5, 7)
    weights = rule(losses, ExampleStatistics(rows=torch.arange(7)))
    assert bool((weights.diff() >= 0).all())
    assert weights[-1] > weights[0]


@pytest.mark.parametrize("rule", [rule for rule in OF_LOSSES_ONLY if type(rule) is not Softmax], ids=repr)
def test_a_common_factor_of_the_losses_changes_no_draw(rule):
    shares = lambda weights: (weights / weights.sum()).tolist()  # noqa: E731
    expected = shares(rule(LOSSES))
    for factor in (1e-200, 0.5, 1e200):
        assert shares(rule(LOSSES.double() * factor)) == pytest.approx(expected, rel=1e-9)


def test_softmax_does_not_see_a_common_term_and_takes_scores_of_either_sign():
    expected = Softmax(DOUBLING)(LOSSES).tolist()
    for term in (-1e4, -5.0, 1e4):
        assert Softmax(DOUBLING)(LOSSES.double() + term).tolist() == pytest.approx(expected, rel=1e-9)
    assert Softmax(0.01)(torch.tensor([-1e6, 0.0, 1e6])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("rule", [rule for rule in CANONICAL if not rule.requires & {"entropies"}], ids=repr)
def test_all_zero_losses_give_finite_weights(rule):
    weights = rule(torch.zeros(5), STATISTICS)
    assert bool((weights.isfinite() & (weights >= 0)).all())


def test_all_zero_losses_by_hand():
    assert Proportional()(torch.zeros(2)).tolist() == [0, 0]
    assert Tempered(0.5)(torch.zeros(2)).tolist() == [0, 0]
    assert Tempered(0)(torch.zeros(2)).tolist() == [1, 1]
    assert Softmax()(torch.zeros(2)).tolist() == [0.5, 0.5]
    assert Floored(0.5)(torch.zeros(4)).tolist() == [0.25] * 4
    assert ClassBalanced()(torch.zeros(3), ExampleStatistics(labels=torch.tensor([0, 0, 1]))).tolist() == [0.5, 0.5, 1]


def test_the_ends_of_the_parameters():
    assert Tempered(0)(LOSSES).tolist() == [1] * 5
    assert Tempered(1)(LOSSES).tolist() == pytest.approx([4 / 9, 1 / 9, 0, 1, 2 / 9])
    assert Tempered(400)(torch.tensor([1e3, 2e3])).tolist() == pytest.approx([2.0**-400, 1])
    assert Clipped(1)(LOSSES).tolist() == LOSSES.tolist()
    assert Clipped(0)(LOSSES + 1).tolist() == [1] * 5
    assert DropTop(0)(LOSSES).tolist() == LOSSES.tolist()
    assert DropTop(0.99)(torch.tensor([1.0, 3.0, 2.0])).tolist() == [1, 0, 0]  # floor(2.97) = 2
    assert Floored(0)(LOSSES).tolist() == pytest.approx([4 / 16, 1 / 16, 0, 9 / 16, 2 / 16])
    assert Floored(1)(LOSSES).tolist() == [0.2] * 5


@pytest.mark.parametrize(
    ("fraction", "num_rows", "num_dropped"), [(0.25, 8, 2), (0.3, 7, 2), (0.29, 100, 29), (0.57, 100, 57)]
)
def test_drop_top_drops_the_floor_of_the_fraction(fraction, num_rows, num_dropped):
    # .29 * 100 is 29, though 0.29 * 100 is 28.999999999999996 in binary.
    weights = DropTop(fraction)(torch.arange(1.0, num_rows + 1))
    assert int((weights == 0).sum()) == num_dropped


def test_drop_top_keeps_rows_that_tie_with_a_kept_one():
    # floor(.5 * 4) = 2 rows: one of the three nines would go with 9 itself, so all three stay.
    assert DropTop(0.5)(torch.tensor([9.0, 9.0, 1.0, 9.0])).tolist() == [9, 9, 1, 9]
    assert DropTop(0.5)(torch.tensor([9.0, 9.0, 1.0, 2.0])).tolist() == [0, 0, 1, 2]
    assert DropTop(0.5)(torch.full((4,), 3.0)).tolist() == [3] * 4


def test_clipped_draws_no_row_more_than_the_one_at_the_quantile():
    losses = torch.arange(1.0, 102.0)  # 1 to 101: the 95 % quantile is 96
    assert Clipped(0.95)(losses).tolist() == losses.clamp(max=96).tolist()
    assert float(Clipped(0.29)(losses).max()) == 30  # position .29 * 100 = 29, counted from 0


def test_class_balanced_gives_every_class_the_same_total():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([5] * 90 + [-3] * 9 + [0])
    weights = ClassBalanced()(torch.rand(100, generator=generator), ExampleStatistics(labels=labels))
    assert [float(weights[labels == label].sum()) for label in (5, -3, 0)] == pytest.approx([1, 1, 1])


def test_chain_applies_its_rules_from_left_to_right():
    losses = torch.tensor([1.0, 3.0, 8.0])
    # The 8 goes, then .5 (1/4, 3/4, 0) + .5 / 3. The other way round: .5 (1/12, 3/12, 8/12) + .5 / 3, then the 8 goes.
    assert Chain(DropTop(0.34), Floored(0.5))(losses).tolist() == pytest.approx([7 / 24, 13 / 24, 4 / 24])
    assert Chain(Floored(0.5), DropTop(0.34))(losses).tolist() == pytest.approx([5 / 24, 7 / 24, 0])
    assert Chain(Proportional())(losses).tolist() == [1, 3, 8]
    assert Chain(Entropy(), ClassBalanced(), Learnability(REFERENCE)).requires == {"entropies", "labels", "rows"}


def test_learnability_reads_the_reference_of_the_same_rows():
    rule = Learnability([5.0, 1.0, 2.0])
    assert rule(torch.tensor([3.0, 6.0]), ExampleStatistics(rows=torch.tensor([2, 0]))).tolist() == [1, 1]
    assert "5.0" not in repr(rule)


THREE_ROWS = ExampleStatistics(labels=torch.tensor([0, 0, 1]), rows=torch.arange(3))
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
        NON_NEGATIVE[name](torch.tensor([1.0, loss, loss]), THREE_ROWS)


@pytest.mark.parametrize("name", ANY_FINITE)
@pytest.mark.parametrize("loss", NOT_FINITE)
def test_rules_for_scores_of_either_sign_refuse_only_what_is_not_finite(name, loss):
    with pytest.raises(ValueError, match=rf"{name} needs scores that are finite, got {loss} at row 2 \(1 such rows\)"):
        ANY_FINITE[name](torch.tensor([1.0, 2.0, loss]), THREE_ROWS)
    assert bool((ANY_FINITE[name](torch.tensor([-1.0, -2.0, 0.5]), THREE_ROWS) >= 0).all())


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


def power(losses: torch.Tensor, exponent: float = 2.0) -> torch.Tensor:
    return losses**exponent


FUNCTIONS = {
    "power": (power, [16, 1, 0, 81, 4], "power"),
    "lambda": (lambda losses: losses + 1, [5, 2, 1, 10, 3], f"<lambda> ({Path(__file__).name}, line"),
    "builtin": (torch.sqrt, [2, 1, 0, 3, math.sqrt(2)], "_VariableFunctionsClass.sqrt"),
    "partial": (functools.partial(power, exponent=1.0), [4, 1, 0, 9, 2], "partial(power, exponent=1.0)"),
    "method": (Proportional().__call__, [4, 1, 0, 9, 2], "Proportional.__call__"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_plain_function_is_a_rule_and_its_name_is_readable(name):
    function, expected, text = FUNCTIONS[name]
    rule = as_weighting(function, "`weighting`")
    assert rule.requires == frozenset()
    assert rule(LOSSES.double()).tolist() == pytest.approx(expected, abs=1e-12)
    assert repr(rule).startswith(text)
    assert " at 0x" not in repr(rule)
    assert Chain(DropTop(0.0), function)(LOSSES).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_rule_is_not_wrapped():
    for rule in CANONICAL:
        assert as_weighting(rule, "`weighting`") is rule


def keyword_only(losses: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
    return losses


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda losses, labels: losses, r"<lambda> \(test_weightings.py, line \d+\) must take the losses .*'labels'"),
        (keyword_only, r"keyword_only must take the losses as its only required argument .*'labels'"),
        (lambda: torch.ones(3), r"must take the losses .*too many positional arguments"),
        (functools.partial(Proportional), r"`weighting`, functools.partial.* does not say which statistics it reads"),
        (Proportional, r"`weighting` must be a rule such as Proportional\(\).*function from losses to weights.*<class"),
    ],
)
def test_what_is_no_function_of_the_losses_is_refused(function, message):
    with pytest.raises(TypeError, match=message):
        as_weighting(function, "`weighting`")


def test_scores_that_sum_to_less_than_one_are_scores_all_the_same():
    scores = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert Floored(0.5)(scores).tolist() == pytest.approx([0.5 * 0.25 + 0.25, 0.5 * 0.75 + 0.25])
    labels = ExampleStatistics(labels=torch.tensor([0, 0]))
    assert ClassBalanced()(scores, labels).tolist() == pytest.approx([0.25, 0.75])


def test_every_rule_of_a_chain_gets_the_statistics():
    statistics = ExampleStatistics(margins=torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert Chain(Tempered(1.0), Margin())(torch.ones(2), statistics).tolist() == [0.75, 0.25]


def test_reference_losses_of_another_data_set_are_refused_by_its_size():
    rule = Learnability([1.0, 1 / 3])
    assert rule.reference_losses.dtype == torch.float64
    statistics = ExampleStatistics(rows=torch.tensor([0, 1]), num_rows=3)
    with pytest.raises(ValueError, match="has 2 entries but the data set has 3"):
        rule(torch.ones(2), statistics)
    assert rule(torch.ones(2), ExampleStatistics(rows=torch.tensor([0, 1]), num_rows=2)).tolist() == [0.0, 1 - 1 / 3]
