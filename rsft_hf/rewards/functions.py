"""`RewardFunctions`: calls reward functions by the contract of TRL's GRPO (trl.rewards), and combines their rewards.

Functions written for TRL work unchanged: they are called with keywords only, return one float or None per completion,
and may be `async def` or a reward model. Returned values are validated one by one, then summed by weight. `async`
functions run on an event loop in a daemon thread: a notebook already runs one in the main thread, and a client that a
function keeps between calls belongs to one loop, which must stay open.
"""

import asyncio
import inspect
import math
import numbers
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from rsft_hf.isolation import copied_containers
from rsft_hf.rewards.contract import (
    CONTRACT,
    WITHHELD,
    RewardFunction,
    check_callable,
    check_columns,
    is_async,
    unique_names,
)
from rsft_hf.rewards.model_rewards import RewardModel, load_reward_model, load_tokenizer, model_name
from rsft_hf.rewards.templates import Completion, Prompt


@dataclass(frozen=True)
class Scores:
    """Rewards of C completions.

    Attributes:
        rewards: Shape (C,), float64: the weighted sum over the functions that answered; NaN where none did.
        by_function: For each function's name its own rewards, shape (C,), float64, before the weight; NaN for None.
        extras: Columns that functions logged with `log_extra`, C entries each.
        metrics: Mean of the values that functions logged under each name with `log_metric`.
    """

    rewards: torch.Tensor
    by_function: dict[str, torch.Tensor]
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Log:
    """Columns and metrics that one function logged during one call."""

    extras: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))


class RewardFunctions:
    """Calls reward functions and combines what they say: all are checked before any is called.

    Args:
        functions: One or several: a function, a callable object, a sequence-classification model with one label, or
            the path of one.
        weights: One factor per function; None is 1 for each.
        processing_classes: One tokenizer per function, None for those that are no model; None reads the tokenizer
            saved beside a model.

    Raises:
        TypeError: If a function cannot be called as the contract says.
        ValueError: If there is no function, `weights` or `processing_classes` has another length, a weight is not
            finite, or a model has another number of labels than one.

    Example:
        >>> def length(completions, **kwargs):
        ...     return [float(len(text)) for text in completions]
        >>> RewardFunctions([length], weights=[0.5])(["a", "b"], ["xx", "xxxx"], [[1], [2]], {}).rewards.tolist()
        [1.0, 2.0]
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
    ) -> None:
        given = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        if not given:
            raise ValueError("`reward_funcs` is empty. Pass at least one reward function.")
        tokenizers = _one_for_each(processing_classes, given)
        self.weights = checked_weights(weights, len(given))
        for position, function in enumerate(given):
            if not isinstance(function, (str, nn.Module)):
                check_callable(function, position)
        self.functions: list[RewardFunction] = [
            _as_reward_model(function, tokenizer) if isinstance(function, (str, nn.Module)) else function
            for function, tokenizer in zip(given, tokenizers, strict=True)
        ]
        self.names: list[str] = unique_names(self.functions)
        self.digests: list[str] | None = None  # of what they compute, before any was called
        self._loop = BackgroundLoop()

    def check(self, columns: Collection[str]) -> None:
        """Raises unless the prompts have the columns that the functions need.

        Args:
            columns: Names of the columns of the prompt data set.

        Raises:
            ValueError: If one is absent, is refused by a function, or has a name that the contract uses itself.
        """
        if taken := sorted(set(columns) & set(CONTRACT) - set(WITHHELD)):
            raise ValueError(f"The columns {taken} bear names of the reward contract. Rename them.")
        for function, name in zip(self.functions, self.names, strict=True):
            check_columns(function, name, columns)

    def to(self, device: torch.device | str) -> None:
        """Moves reward models that are still on the CPU to `device`; one that was placed elsewhere stays there."""
        for function in self.functions:
            if isinstance(function, RewardModel) and all(p.device.type == "cpu" for p in function.model.parameters()):
                function.model.to(device)

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Completion],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
        trainer_state: Any = None,
    ) -> Scores:
        """Returns the rewards of C completions.

        Args:
            prompts: C prompts, all strings or all lists of messages; a prompt stands once per completion.
            completions: C completions, of the prompts' kind.
            completion_ids: C lists of token ids.
            columns: The prompts' other columns, C entries each.
            trainer_state: The trainer's `TrainerState`, for rewards that change during training.

        Raises:
            ValueError: If the lists differ in length, or a function returns another number of rewards, NaN or an
                infinity.
            TypeError: If a function returns something else than numbers and None.
            RuntimeError: If a function raises; its error is the cause.
        """
        columns = {name: values for name, values in columns.items() if name not in WITHHELD}
        self.check(columns)
        lengths: dict[str, list[Any]] = {"completions": completions, "completion_ids": completion_ids, **columns}
        if odd := {name: len(values) for name, values in lengths.items() if len(values) != len(prompts)}:
            raise ValueError(f"There are {len(prompts)} prompts, but {odd}: each list needs one entry per completion.")
        logs = [_Log() for _ in self.functions]
        if not prompts:
            answers = [torch.zeros(0, dtype=torch.float64) for _ in self.functions]
        else:
            common = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
            answers = self._call_all({**common, "trainer_state": trainer_state}, logs)
        by_function = dict(zip(self.names, answers, strict=True))
        extras, metrics = _merge(dict(zip(self.names, logs, strict=True)), len(prompts))
        return Scores(weighted_sum(torch.stack(answers), self.weights), by_function, extras, metrics)

    def _call_all(self, keywords: dict[str, Any], logs: list[_Log]) -> list[torch.Tensor]:
        num_completions = len(keywords["prompts"])
        calls = list(zip(self.functions, self.names, logs, strict=True))
        outputs = {
            name: _call(function, name, log, keywords) for function, name, log in calls if not is_async(function)
        }

        async def together() -> list[Any]:
            return await asyncio.gather(*(_call_async(*call, keywords) for call in calls if is_async(call[0])))

        if names := [name for function, name, _ in calls if is_async(function)]:
            outputs |= zip(names, self._loop.run(together()), strict=True)
        return [checked_rewards(outputs[name], name, num_completions) for name in self.names]


def _own(keywords: dict[str, Any]) -> dict[str, Any]:
    """Copies of the lists, and of the messages and tokens in them: what a function changes is trained on otherwise."""
    own = {name: list(values) if isinstance(values, list) else values for name, values in keywords.items()}
    for name in ("prompts", "completions", "completion_ids"):
        own[name] = copied_containers(own[name])
    return own


def _call(function: RewardFunction, name: str, log: _Log, keywords: dict[str, Any]) -> Any:
    try:
        return function(**_own(keywords), log_extra=log.log_extra, log_metric=log.log_metric)
    except Exception as error:
        raise RuntimeError(f"Reward function `{name}` raised {type(error).__name__}: {error}") from error


async def _call_async(function: RewardFunction, name: str, log: _Log, keywords: dict[str, Any]) -> Any:
    try:
        return await function(**_own(keywords), log_extra=log.log_extra, log_metric=log.log_metric)
    except Exception as error:
        raise RuntimeError(f"Reward function `{name}` raised {type(error).__name__}: {error}") from error


def _one_for_each(processing_classes: Any, functions: list[Any]) -> list[Any]:
    if processing_classes is None:
        return [None] * len(functions)
    given = list(processing_classes) if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    if len(given) != len(functions):
        raise ValueError(
            f"`reward_processing_classes` has {len(given)} entries for {len(functions)} reward functions. Give one for "
            "each, None for those that are no model."
        )
    for position, (tokenizer, function) in enumerate(zip(given, functions, strict=True)):
        if tokenizer is not None and not isinstance(function, (str, nn.Module)):
            raise ValueError(
                f"`reward_processing_classes[{position}]` belongs to a {type(function).__name__}, which is no model. "
                "Put None there."
            )
    return given


def _as_reward_model(function: str | nn.Module, tokenizer: Any) -> RewardModel:
    model = load_reward_model(function) if isinstance(function, str) else function
    name = model_name(model)
    return RewardModel(model, tokenizer or load_tokenizer(model, name), name=name)


def _merge(logs: dict[str, _Log], num_completions: int) -> tuple[dict[str, list[Any]], dict[str, float]]:
    extras: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = defaultdict(list)
    for name, log in logs.items():
        for column, values in log.extras.items():
            if len(values) != num_completions:
                raise ValueError(
                    f"Reward function `{name}` logged {len(values)} values in the column `{column}` for "
                    f"{num_completions} completions. Call `log_extra` once, with one value per completion."
                )
            # Two functions may log a column of one name, as TRL's accuracy rewards do: neither is lost.
            extras[column if column not in extras else f"{name}/{column}"] = values
        for metric, numbers_logged in log.metrics.items():
            metrics[metric].extend(numbers_logged)
    return extras, {metric: sum(values) / len(values) for metric, values in metrics.items()}


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


Result = TypeVar("Result")


class BackgroundLoop:
    """Runs coroutines one after another on one loop; started at the first use, stopped when nothing holds it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Returns the coroutine's result, or raises its error. An interrupt from the keyboard cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=(self._loop,), name="rsft-rewards", daemon=True).start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()
