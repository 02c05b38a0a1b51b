"""Exports of stored candidates: as a data set, and in the formats of TRL's SFT, DPO and KTO trainers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

_COLUMNS = ["prompt_id", "prompt", "text", "reward", "is_accepted", "verdict", "finish_reason"]


def load_candidates(directory: Path | str) -> datasets.Dataset:
    """Returns every candidate of a round or of all rounds, with rewards and verdicts, memory-mapped.

    Args:
        directory: `<output_dir>/candidates`, or one round of it.

    Raises:
        FileNotFoundError: If there are no candidates.
    """
    return datasets.load_dataset("parquet", data_files=[str(path) for path in _shards(directory)], split="train")


def export_sft(directory: Path | str, as_messages: bool = False) -> datasets.Dataset:
    """Returns the accepted candidates for TRL's SFTTrainer: `prompt` and `completion`, or `messages`.

    Args:
        directory: As in `load_candidates`.
        as_messages: Whether to join prompt and answer to one conversation; prompts that are text become a user's turn.

    Raises:
        FileNotFoundError: If there are no candidates.
        ValueError: If none was accepted.
    """
    rows = []
    for row in _rows(directory):
        if not row["is_accepted"]:
            continue
        if as_messages:
            rows.append({"messages": [*_as_messages(row["prompt"]), {"role": "assistant", "content": row["text"]}]})
        else:
            rows.append({"prompt": row["prompt"], "completion": _completion(row)})
    return _dataset(rows, directory, "accepted")


def export_dpo(directory: Path | str, min_margin: float = 0.0) -> datasets.Dataset:
    """Returns one preference pair per prompt for TRL's DPOTrainer: `prompt`, `chosen`, `rejected`.

    The pair is the best-rewarded and the worst-rewarded of the prompt's judged candidates, and is left out where their
    texts are equal or their rewards lie no more than `min_margin` apart. Also `chosen_reward` and `rejected_reward`.

    Args:
        directory: As in `load_candidates`.
        min_margin: Difference of rewards that a pair must exceed, at least 0.

    Raises:
        FileNotFoundError: If there are no candidates.
        ValueError: If no prompt gives a pair, or `min_margin` is negative.
    """
    if min_margin < 0:
        raise ValueError(f"`min_margin`={min_margin} must be at least 0.")
    extremes: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in _rows(directory):
        if row["reward"] is not None:
            pair = extremes.setdefault((row["round"], row["prompt_id"]), [row, row])
            pair[0] = row if row["reward"] > pair[0]["reward"] else pair[0]
            pair[1] = row if row["reward"] < pair[1]["reward"] else pair[1]
    rows = [
        {
            "prompt": best["prompt"],
            "chosen": _completion(best),
            "rejected": _completion(worst),
            "chosen_reward": best["reward"],
            "rejected_reward": worst["reward"],
        }
        for best, worst in extremes.values()
        if best["reward"] - worst["reward"] > min_margin and best["text"] != worst["text"]
    ]
    return _dataset(rows, directory, f"rewarded more than {min_margin} apart")


def export_kto(directory: Path | str) -> datasets.Dataset:
    """Returns accepted and rejected candidates for TRL's KTOTrainer: `prompt`, `completion`, `label`.

    Candidates that were filtered out, duplicates, and those that nobody could judge, are left out.

    Args:
        directory: As in `load_candidates`.

    Raises:
        FileNotFoundError: If there are no candidates.
        ValueError: If none was judged.
    """
    rows = [
        {"prompt": row["prompt"], "completion": _completion(row), "label": row["is_accepted"]}
        for row in _rows(directory)
        if row["verdict"] in ("accepted", "fallback", "rejected")
    ]
    return _dataset(rows, directory, "judged")


def _shards(directory: Path | str) -> list[Path]:
    folder = Path(directory)
    rounds = sorted(folder.glob("round-*")) or [folder]
    shards = [path for each in rounds for path in sorted(each.glob("*.parquet"))]
    if not shards:
        raise FileNotFoundError(
            f"{folder} holds no candidates. Give <output_dir>/candidates, or a folder such as round-000 in it."
        )
    return shards


def _rows(directory: Path | str) -> Iterator[dict[str, Any]]:
    """Rows of all shards, one shard in memory at a time."""
    for path in _shards(directory):
        for row in pq.read_table(path, columns=_COLUMNS).to_pylist():
            yield {**row, "round": path.parent.name}


def _completion(row: dict[str, Any]) -> Any:
    return row["text"] if isinstance(row["prompt"], str) else [{"role": "assistant", "content": row["text"]}]


def _as_messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _dataset(rows: list[dict[str, Any]], directory: Path | str, what: str) -> datasets.Dataset:
    if not rows:
        raise ValueError(f"{directory} holds no candidates that were {what}. See `verdict` in load_candidates(...).")
    return datasets.Dataset.from_list(rows)
