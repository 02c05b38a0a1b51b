"""Command line of the experiments: options, presets, YAML files, weightings and metrics by name.

Input: the command line and an optional YAML file. Output: filled dataclasses, rules, metrics. Wrong input raises
`ExperimentError`, which an experiment shows without a traceback.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import yaml
from transformers import HfArgumentParser

import rsft_hf

METRICS_FOLDER = Path(__file__).resolve().parent.parent / "metrics"

# name -> the rule and the meaning of the number after the colon, None where the rule takes none
WEIGHTINGS: dict[str, tuple[Callable[..., rsft_hf.weighted.Weighting], str | None]] = {
    "proportional": (rsft_hf.Proportional, None),
    "tempered": (rsft_hf.Tempered, "alpha"),
    "softmax": (rsft_hf.weighted.Softmax, "temperature"),
    "clipped": (rsft_hf.Clipped, "quantile"),
    "drop_top": (rsft_hf.DropTop, "fraction"),
    "floored": (rsft_hf.Floored, "fraction"),
    "class_balanced": (rsft_hf.ClassBalanced, None),
    "entropy": (rsft_hf.weighted.Entropy, None),
    "margin": (rsft_hf.weighted.Margin, None),
    "least_confidence": (rsft_hf.weighted.LeastConfidence, None),
}


class ExperimentError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""


@dataclass(frozen=True)
class Preset:
    """Other defaults for the case that option `name` has the value `value`; what the user says still wins."""

    name: str
    value: str
    defaults: dict[str, Any]


def option(default: Any, help_text: str) -> Any:
    """Returns a dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": help_text})


class ExperimentParser(HfArgumentParser):
    """An `HfArgumentParser` whose errors are one line instead of the usage of a hundred options."""

    def error(self, message: str) -> None:
        raise ExperimentError(f"{message}. See --help.")


def parse_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str], presets: Sequence[Preset] = (), description: str | None = None
) -> tuple[Any, ...]:
    """Returns one filled instance per dataclass.

    The later wins: defaults of the dataclasses, presets in order, the YAML file after `--config`, the command line.

    Args:
        dataclass_types: Dataclasses whose fields become options.
        argv: The command line without the program's name.
        presets: Defaults that hang on the value of another option.
        description: First paragraph of `--help`.

    Raises:
        ExperimentError: If an option is unknown or its value impossible, or the YAML file is.
    """
    parser = ExperimentParser(dataclass_types, allow_abbrev=False, description=description)
    parser.add_argument("--config", default=None, help="YAML file of options; what the command line says wins.")
    config_path = vars(parser.parse_known_args(list(argv))[0])["config"]
    known = {action.dest for action in parser._actions} - {"help", "config"}
    tokens = ([] if config_path is None else _config_tokens(Path(config_path), known)) + list(argv)
    for preset in presets:
        if vars(parser.parse_known_args(tokens)[0])[preset.name] == preset.value:
            parser.set_defaults(**preset.defaults)
    try:
        *filled, _, unknown = parser.parse_args_into_dataclasses(
            tokens, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # what a dataclass refuses of its own options
        raise ExperimentError(str(error)) from error
    if unknown:
        raise ExperimentError(f"Unknown option {unknown[0]!r}{_suggestion(unknown[0].lstrip('-'), known)}. See --help.")
    return tuple(filled)


def _config_tokens(path: Path, known: set[str]) -> list[str]:
    """The options of a YAML file as the words one would have typed, so that one parser checks both."""
    if not path.is_file():
        raise ExperimentError(
            f"`--config` {path} is no file. Give the path of a YAML file with one `option: value` a line."
        )
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ExperimentError(f"`--config` {path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ExperimentError(
            f"`--config` {path} holds a {type(options).__name__}; it must hold one `option: value` a line."
        )
    tokens: list[str] = []
    for name, value in options.items():
        if name not in known:
            raise ExperimentError(
                f"`--config` {path} has the unknown key {name!r}{_suggestion(str(name), known)}. Valid keys: "
                f"{', '.join(sorted(known))}."
            )
        if isinstance(value, list):
            tokens += [f"--{name}", *(str(item) for item in value)]
        elif value is not None:  # null leaves the default
            text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
            tokens.append(f"--{name}={text}")
    return tokens


def _suggestion(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_arms_and_seeds(arms: Sequence[str], seeds: Sequence[int], known: Sequence[str]) -> None:
    """Raises ExperimentError if an arm is unknown, or if there is no arm or seed, or one twice."""
    unknown = [arm for arm in arms if arm not in known]
    if unknown:
        raise ExperimentError(f"`--arms` {' '.join(unknown)}: unknown. Use one or more of {', '.join(known)}.")
    for name, values in (("arms", arms), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ExperimentError(f"`--{name}` {values} must name at least one, and each once.")


def weighting_from_name(name: str) -> rsft_hf.weighted.Weighting:
    """Returns the rule that a name stands for; `:` gives its parameter, `+` chains rules from left to right.

    Args:
        name: Such as "proportional", "tempered:0.5" or "drop_top:0.05+floored:0.2".

    Raises:
        ExperimentError: If a name is unknown, a parameter is missing, needless, no number, or out of its range.

    Example:
        >>> weighting_from_name("drop_top:0.05+floored:0.2")
        Chain(DropTop(fraction=0.05), Floored(fraction=0.2))
    """
    rules = [_one_weighting(part.strip()) for part in name.split("+")]
    return rules[0] if len(rules) == 1 else rsft_hf.Chain(*rules)


def _one_weighting(part: str) -> rsft_hf.weighted.Weighting:
    name, colon, value = part.partition(":")
    if name not in WEIGHTINGS:
        raise ExperimentError(
            f"`--weighting` {part!r} is unknown{_suggestion(name, set(WEIGHTINGS))}. Use one of "
            f"{', '.join(WEIGHTINGS)}, joined by '+' to chain them."
        )
    rule, parameter = WEIGHTINGS[name]
    if parameter is None:
        if colon:
            raise ExperimentError(f"`--weighting` {part!r}: {name} takes no parameter. Write {name!r}.")
        return rule()
    try:
        return rule(float(value))
    except ValueError as error:
        raise ExperimentError(
            f"`--weighting` {part!r}: {name} needs its {parameter}, such as '{name}:0.5' ({error})."
        ) from error


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Returns the metric of that name under `experiments/metrics`, which needs no hub.

    Raises:
        ExperimentError: If there is no such metric.
    """
    path = METRICS_FOLDER / name / f"{name}.py"
    if not path.is_file():
        names = sorted(folder.name for folder in METRICS_FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())
        raise ExperimentError(f"No metric {name!r} under {METRICS_FOLDER}. There are: {', '.join(names)}.")
    return evaluate.load(str(path), keep_in_memory=True)
