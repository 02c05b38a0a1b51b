"""Recipes run in this process, on a few rows of their built-in data or on data sets of a test."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = RECIPES / "data"
NAMES = (
    "chatbot", "image_classification", "imdb_sentiment", "math_reasoning", "question_answering", "reward_model",
    "self_training", "simultaneous_translation", "summarization", "token_classification", "topic_classification",
    "translation", "voice_assistant",
)  # fmt: skip
JSON_LINES = ("dialogues", "commands", "facts", "sums", "meetings")


def load(name: str) -> ModuleType:
    """The recipe, loaded from its file as a copy of it would be."""
    spec = importlib.util.spec_from_file_location(f"copied_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, output_dir: Path, **options: Any) -> dict[str, dict[str, float]]:
    options = {"output_dir": output_dir, "use_cpu": True, "disable_tqdm": True, **options}
    return load(name).main([word for key, value in options.items() for word in (f"--{key}", str(value))])


def head(source: Path, target: Path, num_rows: int) -> str:
    """The path of a copy with the first rows of a CSV or JSONL file."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[: num_rows + source.name.endswith(".csv")]), encoding="utf-8")
    return str(target)


def files(tmp_path: Path, name: str, num_rows: int = 48) -> dict[str, str]:
    """`train_file` and `validation_file` with a few rows of a built-in data set."""
    suffix = "jsonl" if name in JSON_LINES else "csv"
    splits = {"train_file": "train", "validation_file": "test"}
    return {
        option: head(DATA / name / f"{split}.{suffix}", tmp_path / f"{split}.{suffix}", num_rows)
        for option, split in splits.items()
    }


def data_set(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """A folder with a Parquet file per split, which `load_dataset` reads by its path as others by their hub name."""
    folder.mkdir()
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder
