"""Options of `generate` and `train`: from a YAML file and the command line, with the keywords of the resamplers.

Help comes from the docstrings, which are read from the source: nothing heavy is imported for it.
"""

import ast
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rsft_hf.cli.construct import construct, imported, is_place, members, nearest, reward

_PACKAGE = Path(__file__).parents[1]
_CLASSES = {"CandidateResampler": "generative/resampler.py", "LossResampler": "weighted/resampler.py"}
LISTS = ("reward_funcs", "reward_weights", "filters", "eval_reward_funcs")
_NOT_TEXT = ("reward_processing_classes",)

DATA = {
    "model_name_or_path": "name or folder of the model",
    "dtype": "number format of the weights (default: float32)",
    "dataset_name": "hub name of a data set",
    "dataset_config": "configuration of it",
    "train_split": "split to train on (default: train)",
    "validation_split": "held-out split; none by default",
    "train_file": "JSONL, JSON, CSV or Parquet file, instead of `dataset_name`",
    "validation_file": "file of held-out rows",
    "max_train_samples": "rows to train on, chosen at random; all by default",
}
TRAINING = {
    "resampler": "CandidateResampler (the default with `reward_funcs`) or LossResampler (otherwise)",
    "lora_r": "rank of a LoRA adapter; 0 trains all weights (default: 0)",
}
GENERATION = (
    "num_candidates", "generation_config", "engine", "prompt_column", "chat_template_kwargs", "max_prompt_length",
    "on_long_prompt",
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def value_of(text: str) -> Any:
    """Returns a value as YAML reads it.

    Example:
        >>> value_of("1e-4"), value_of("{top_k: 0}"), value_of("ChrfReward()")
        (0.0001, {'top_k': 0}, 'ChrfReward()')
    """
    return yaml.load(text, _Loader)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the options of a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or no mapping of names to values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    try:
        found = value_of(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no options by name, such as `num_candidates: 8`.")
    return found


@functools.cache
def described(class_name: str) -> dict[str, str]:
    """Returns what the docstring of a resampler says of each argument that text can give.

    Example:
        >>> described("LossResampler")["warmup_epochs"][:6]
        'Number'
    """
    tree = ast.parse((_PACKAGE / _CLASSES[class_name]).read_text(encoding="utf-8"))
    node = next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == class_name)
    text = inspect.cleandoc(ast.get_docstring(node) or "").split("Args:\n")[1].split("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words) for name, words in found if name not in _NOT_TEXT}


def given_pairs(words: Sequence[str]) -> dict[str, Any]:
    """Returns options that no parser knows, by name; one without a value is true.

    Raises:
        ValueError: If a word belongs to no option.

    Example:
        >>> given_pairs(["--learning_rate", "1e-4", "--bf16", "--report_to=none"])
        {'learning_rate': 0.0001, 'bf16': True, 'report_to': 'none'}
    """
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values = found[name] = [value] if equals else []
        elif values is None:
            raise ValueError(f"{word!r} belongs to no option.")
        else:
            values.append(word)
    return {name: joined(one) if one else True for name, one in found.items()}


def joined(words: Sequence[str]) -> Any:
    """Returns the value of an option: that of one word, or a list of several."""
    values = [value_of(word) for word in words]
    return values[0] if len(values) == 1 else values


def split_options(given: Mapping[str, Any], training_arguments: Iterable[str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Returns the name of the resampler, and the options in groups "data", "resampler" and "args".

    Raises:
        ValueError: If an option is unknown, or one of the other resampler.
    """
    known = {name: described(name) for name in _CLASSES}
    default = "CandidateResampler" if {"reward_funcs", "candidates"} & given.keys() else "LossResampler"
    chosen = given.get("resampler", default)
    if chosen not in known:
        raise ValueError(f"`resampler`={chosen!r} is none of {', '.join(known)}.")
    (other,) = known.keys() - {chosen}
    arguments = set(training_arguments)
    groups: dict[str, dict[str, Any]] = {"data": {}, "resampler": {}, "args": {}}
    for name, value in given.items():
        if name in DATA or name in TRAINING:
            groups["data"][name] = value
        elif name in known[chosen]:
            groups["resampler"][name] = value
        elif name in known[other]:
            raise ValueError(f"`{name}` is an option of {other}, and this run has a {chosen}.")
        elif name in arguments:
            groups["args"][name] = value
        else:
            names = {*DATA, *TRAINING, *known[chosen], *known[other], *arguments}
            raise ValueError(f"`{name}` is no option.{nearest(name, names)}")
    return chosen, groups


def resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keywords of a resampler, with objects in the place of the text that names them.

    Raises:
        TypeError: If a class does not take the arguments that are named.
        ValueError: If text names nothing.
    """
    return {name: _resolved(name, value) for name, value in options.items()}


def _resolved(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in ("reward_funcs", "eval_reward_funcs"):
        return [reward(one) if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
    if name in ("generation_config", "eval_generation_config"):
        from transformers import GenerationConfig

        if not isinstance(value, Mapping):
            raise ValueError(f"`{name}`={value!r} is no mapping, such as {{max_new_tokens: 64, temperature: 0.8}}.")
        known = GenerationConfig().to_dict()  # which keeps other names without a word
        if unknown := next((one for one in value if one not in known), None):
            raise ValueError(f"`{unknown}` is no setting of `{name}`.{nearest(unknown, known)}")
        return GenerationConfig(**value)
    if name == "filters":
        return [_object(one, "generative", "filter") for one in (value if isinstance(value, list) else [value])]
    if name == "engine" and "(" not in str(value):
        return value
    kinds = {
        "acceptance": ("acceptance", "acceptance rule"),
        "weighting": ("weighted", "weighting"),
        "dedup": ("generative", "deduplication"),
        "engine": ("engines", "engine"),
    }
    if name in kinds:
        return _object(value, *kinds[name])
    return imported(value) if name == "per_example_loss" else value


def _object(value: Any, package: str, what: str) -> Any:
    text = str(value)
    return imported(text) if is_place(text) else construct(text, members(package), what)
