"""Rules, rewards and other objects from text: a call with literal arguments, or the place of a function."""

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def reward(text: str) -> Any:
    """Returns a reward function or model from the command line.

    Args:
        text: "file.py:name" or "module:name", a call of a class of `rsft_hf.rewards` with literals, or the name or
            folder of a reward model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such name, or a call is none of a ready-made reward.

    Example:
        >>> reward("math:sqrt")(9.0)
        3.0
    """
    if is_place(text):
        return imported(text)
    if "(" in text:
        return construct(text, members("rewards"), "reward")
    return text


def is_place(text: str) -> bool:
    """Returns whether text is of the form "file.py:name" or "module:name".

    Example:
        >>> is_place("rewards.py:is_right"), is_place("ChrfReward()"), is_place("org/model")
        (True, False, False)
    """
    _, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier()


def imported(text: str) -> Any:
    """Returns what "file.py:name" or "module:name" names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such name.
    """
    place, _, name = text.rpartition(":")
    names = vars(_module(place))
    if name not in names:
        raise ValueError(f"{text!r} names nothing.{nearest(name, names)}")
    return names[name]


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the source text of its functions is looked up by the module's name
    spec.loader.exec_module(module)
    return module


def members(package: str) -> dict[str, Any]:
    """Returns the public names of a package of `rsft_hf`, such as "acceptance"."""
    module = importlib.import_module(f"rsft_hf.{package}")
    return {name: vars(module)[name] for name in module.__all__}


def construct(text: str, classes: Mapping[str, Any], what: str) -> Any:
    """Returns an object from a call such as "TopKPerPrompt(k=2)", whose arguments are literals or such calls.

    Nothing else is evaluated.

    Args:
        text: The call; a name alone is a call without arguments.
        classes: Classes by name.
        what: What they are, for the message.

    Raises:
        TypeError: If a class does not take such arguments.
        ValueError: If the text is no such call, or names no class.

    Example:
        >>> construct("Fraction(1, Fraction(2))", {"Fraction": __import__("fractions").Fraction}, "number")
        Fraction(1, 2)
    """
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Name):
            tree = ast.Call(tree, [], [])
        if not isinstance(tree, ast.Call):
            raise ValueError("not a call")
        function, arguments, keywords = _parsed(tree)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is no {what} with literal arguments, such as {min(classes)}(...).") from error
    return _made((function, arguments, keywords), classes, what)


class _Call(tuple[str, list[Any], dict[str, Any]]):
    """A class by name, its arguments and its keywords."""


def _parsed(node: ast.expr) -> Any:
    """Literals as they are, and calls as `_Call`."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name):
            raise ValueError("not a name")
        keywords = {str(keyword.arg): _parsed(keyword.value) for keyword in node.keywords}
        return _Call((node.func.id, [_parsed(value) for value in node.args], keywords))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_parsed(element) for element in node.elts]
    return ast.literal_eval(node)


def _made(value: Any, classes: Mapping[str, Any], what: str) -> Any:
    if isinstance(value, list):
        return [_made(element, classes, what) for element in value]
    if not isinstance(value, tuple):
        return value
    name, arguments, keywords = value
    if name not in classes:
        raise ValueError(f"{name!r} is no {what}.{nearest(name, classes)}")
    given = {keyword: _made(one, classes, what) for keyword, one in keywords.items()}
    return classes[name](*_made(arguments, classes, what), **given)


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the name that resembles one most, as a sentence; empty without any.

    Example:
        >>> nearest("TopKPerPromt", ["TopKPerPrompt", "RSO"])
        ' Did you mean TopKPerPrompt?'
    """
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {found[0]}?" if found else ""
