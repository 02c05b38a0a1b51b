"""Reward function contract: name, required columns and kind of a function, validated without calling it."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

RewardFunction = Callable[..., Any]

# What every function is called with, besides the columns.
CONTRACT = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

# Columns of the prompts that no function is given: it has them as `prompts`, `completions` and `completion_ids`.
WITHHELD = ("prompt", "completion", "completion_ids")


@runtime_checkable
class Scorer(Protocol):
    """A ready-made reward function: write your own as a frozen dataclass with these three members.

    Attributes:
        name: Names its rewards in logs, tables and errors.
        requires: Columns that the prompts must have.
    """

    @property
    def name(self) -> str:
        """Names its rewards in logs, tables and errors."""
        ...

    @property
    def requires(self) -> frozenset[str]:
        """Columns that the prompts must have."""
        ...

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        """Returns one reward per completion, None where it cannot judge."""
        ...


@runtime_checkable
class _Named(Protocol):
    __name__: str


def is_scorer(function: Any) -> TypeGuard[Scorer]:
    """Returns whether a reward function declares a name that is text and a set of required columns.

    An object that answers to any attribute, such as a mock, has other values there.
    """
    is_named = isinstance(function, Scorer) and isinstance(function.name, str)
    return is_named and isinstance(function.requires, (set, frozenset))


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Returns one name per function; the second of two equal ones gets `_2`, the third `_3`."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for function in functions:
        name = function_name(function)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}_{seen[name]}"
        while unique in names:
            seen[name] += 1
            unique = f"{name}_{seen[name]}"
        names.append(unique)
    return names


def function_name(function: RewardFunction) -> str:
    """Returns the name of a function, of the function inside a `partial`, or of the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    if is_scorer(function):
        return function.name
    name = function.__name__ if isinstance(function, _Named) else type(function).__name__
    return name if isinstance(name, str) else type(function).__name__


def is_async(function: RewardFunction) -> bool:
    """Returns whether a call gives a coroutine, for functions, partials of them and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def check_callable(function: RewardFunction, position: int) -> None:
    """Raises unless `function` can be called with the keywords of the contract.

    Raises:
        TypeError: If it is no callable, is a class, has parameters without a name, or lacks one of the keywords that
            every reward function gets.
    """
    if isinstance(function, type):
        raise TypeError(
            f"`reward_funcs[{position}]` is the class {function.__name__}, not a reward function. Pass an instance, "
            f"{function.__name__}(...)."
        )
    if not callable(function):
        raise TypeError(
            f"`reward_funcs[{position}]` is a {type(function).__name__}. Pass a function (prompts, completions, "
            "**columns) -> list of floats, a sequence-classification model, or the path of one."
        )
    name = function_name(function)
    parameters = _parameters(function)
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        raise TypeError(f"Reward function `{name}` takes {unnamed} by position; it is called with keywords only.")
    if missing := _refused_keywords(parameters, CONTRACT):
        raise TypeError(
            f"Reward function `{name}` does not take {missing}, which every reward function is called with. End its "
            "parameters with `**kwargs`."
        )


def check_columns(function: RewardFunction, name: str, columns: Collection[str]) -> None:
    """Raises unless `columns` are what a function needs, and nothing it would refuse.

    Args:
        function: One that `check_callable` let pass.
        name: Its name in the error.
        columns: Names of the columns that the prompts have.

    Raises:
        ValueError: If a column it needs is absent, or it takes no further keyword and one would be passed.
    """
    given = [column for column in columns if column not in WITHHELD]
    if missing := sorted(required_columns(function) - set(given)):
        raise ValueError(
            f"Reward function `{name}` needs the column `{missing[0]}`, which the prompts do not have: their columns "
            f"are {sorted(given)}. Add it to the data set, rename one (`dataset.rename_column`), or name the one to "
            "read when the reward is built."
        )
    if refused := _refused_keywords(_parameters(function), given):
        raise ValueError(
            f"Reward function `{name}` does not take the columns {refused} and would fail on them. End its parameters "
            "with `**kwargs`, or drop them with `dataset.remove_columns`."
        )


def required_columns(function: RewardFunction) -> frozenset[str]:
    """Returns the columns a function cannot do without: `requires`, or its parameters that have no default.

    Example:
        >>> def accuracy(completions, solution, strict=False, **kwargs): ...
        >>> sorted(required_columns(accuracy))
        ['solution']
    """
    if is_scorer(function):
        return frozenset(function.requires)
    named = [p for p in _parameters(function) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return frozenset(p.name for p in named if p.default is p.empty and p.name not in CONTRACT)


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # a function written in C may not say
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _refused_keywords(parameters: list[inspect.Parameter], keywords: Collection[str]) -> list[str]:
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return []
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [keyword for keyword in keywords if keyword not in taken]
