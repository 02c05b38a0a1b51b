"""Checks of argument values, with one wording of their errors."""

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


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless an argument lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}`={value} must lie in [0, 1].")
