"""Numbers out of what reward functions return: checked one by one, then added up by weight.

A list from a function enters, a tensor or an error that names the function leaves.
"""

import inspect
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def checked_weights(weights: Sequence[float] | None, num_functions: int) -> torch.Tensor:
    """Returns one weight per function, shape (num_functions,), float64; None is 1 for each.

    Raises:
        ValueError: If there are more or fewer, or one is NaN or infinite.
    """
    if weights is None:
        return torch.ones(num_functions, dtype=torch.float64)
    values = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if len(values) != num_functions:
        raise ValueError(
            f"`reward_weights` has {len(values)} entries for {num_functions} reward functions. Give one for each."
        )
    if not values.isfinite().all():
        raise ValueError(f"`reward_weights`={values.tolist()} must be finite.")
    return values


def weighted_sum(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns sum_f w_f r_f over the functions that answered, NaN where none did, shape (C,).

    Args:
        rewards: Shape (functions, C), float64, NaN for no answer.
        weights: Shape (functions,), float64.

    Example:
        >>> nan = float("nan")
        >>> weighted_sum(torch.tensor([[1.0, nan, nan], [2.0, 2.0, nan]]), torch.tensor([1.0, 0.5])).tolist()
        [2.0, 1.0, nan]
    """
    total = (rewards * weights.unsqueeze(1)).nansum(0)
    return torch.where(rewards.isnan().all(0), math.nan, total)


def checked_rewards(output: Any, name: str, num_completions: int) -> torch.Tensor:
    """Returns what a reward function returned as a tensor, shape (num_completions,), float64, NaN for None.

    Raises:
        TypeError: If `output` is no list, or an entry is neither a number nor None.
        ValueError: If it has another length, or an entry is NaN or infinite.

    Example:
        >>> checked_rewards([1, None], "accuracy", 2).tolist()
        [1.0, nan]
    """
    if inspect.iscoroutine(output):
        output.close()
        raise TypeError(f"Reward function `{name}` returned a coroutine. Declare it with `async def`.")
    if isinstance(output, str) or not isinstance(output, (Sequence, np.ndarray, torch.Tensor)):
        raise TypeError(
            f"Reward function `{name}` returned a {type(output).__name__}. Return a list with one float or None per "
            "completion."
        )
    if len(output) != num_completions:
        raise ValueError(
            f"Reward function `{name}` returned {len(output)} rewards for {num_completions} completions. Return "
            "exactly one per completion, None where it cannot judge."
        )
    return torch.tensor([_checked_reward(v, name, i) for i, v in enumerate(output)], dtype=torch.float64)


def _checked_reward(value: Any, name: str, index: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (numbers.Real, np.bool_)):
        raise TypeError(
            f"Reward function `{name}` returned {value!r} for completion {index}. A reward is a float, or None."
        )
    if not math.isfinite(value):
        raise ValueError(
            f"Reward function `{name}` returned {float(value)} for completion {index}. Return a finite number, or None "
            "where it cannot judge."
        )
    return float(value)
