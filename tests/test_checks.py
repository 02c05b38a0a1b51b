"""Validation of integers and intervals: bounds, kinds, and the wording of the errors."""

import math

import numpy as np
import pytest

from rsft_hf.checks import check_fraction, check_integer, check_interval


@pytest.mark.parametrize("value", [2, 5, np.int64(3)])
def test_integers_within_the_bounds_pass(value):
    check_integer("k", value, minimum=2, maximum=5)


@pytest.mark.parametrize(
    ("value", "error"),
    [(1, ValueError), (6, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError), ("3", TypeError)],
)
def test_other_values_are_refused_with_name_value_bounds_and_remedy(value, error):
    with pytest.raises(error, match=rf"`k`={value!r} must be an integer between 2 and 5\. Give fewer\."):
        check_integer("k", value, minimum=2, maximum=5, remedy="Give fewer.")


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 0.5, 1), (-1e-9, 1.1, math.nan)),
        ("[0, 1)", (0, 0.999), (1, math.nan)),
        ("(0, inf]", (1e-300, math.inf), (0, -1, math.nan)),
        ("(0, inf)", (1e-300, 1e300), (0, math.inf, math.nan)),
    ],
)
def test_intervals_include_the_ends_with_square_brackets(interval, inside, outside):
    for value in inside:
        check_interval("share", value, interval)
    for value in outside:
        with pytest.raises(ValueError, match=r"`share`=\S+ must lie in [\[(]0, (1|inf)[\])]\. Change it\.") as caught:
            check_interval("share", value, interval, "Change it.")
        assert f"`share`={value} must lie in {interval}" in str(caught.value)


def test_a_fraction_lies_between_zero_and_one():
    check_fraction("share", 1)
    with pytest.raises(ValueError, match=r"`share`=2 must lie in \[0, 1\]"):
        check_fraction("share", 2)
