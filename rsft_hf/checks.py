"""Validation of argument values, with one wording of the errors."""

from typing import Any

import numpy as np


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None, remedy: str = "") -> None:
    """Raises unless an argument is an integer in [minimum, maximum]; a boolean is none.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Its value.
        minimum: Smallest allowed value.
        maximum: Largest allowed value; None for no limit.
        remedy: Sentence appended to the message.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.

    Example:
        >>> check_integer("num_draws", 3, minimum=1)
        >>> check_integer("num_draws", 0, minimum=1)
        Traceback (most recent call last):
        ...
        ValueError: `num_draws`=0 must be an integer of at least 1.
    """
    allowed = f"of at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
    message = f"`{name}`={value!r} must be an integer {allowed}." + (f" {remedy}" if remedy else "")
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(message)
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(message)


def check_interval(name: str, value: float, interval: str, remedy: str = "") -> None:
    """Raises ValueError unless an argument lies in an interval; NaN lies in none.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Its value.
        interval: The interval as written in mathematics, such as "[0, 1)" or "(0, inf]".
        remedy: Sentence appended to the message.

    Example:
        >>> check_interval("ema_decay", 0.5, "[0, 1)")
        >>> check_interval("ema_decay", 1, "[0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: `ema_decay`=1 must lie in [0, 1).
    """
    low, high = map(float, interval[1:-1].split(","))
    is_above = value >= low if interval[0] == "[" else value > low
    is_below = value <= high if interval[-1] == "]" else value < high
    if not (is_above and is_below):
        raise ValueError(f"`{name}`={value} must lie in {interval}." + (f" {remedy}" if remedy else ""))


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless an argument lies in [0, 1]."""
    check_interval(name, value, "[0, 1]")
