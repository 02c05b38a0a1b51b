"""Rounds of candidates as a report shows them: numbers of all candidates, and texts of as many as fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rsft_hf.generative.candidates import REFERENCES
from rsft_hf.generative.prompts import message_text

_NUMBERS = ("prompt_id", "reward", "is_accepted", "num_tokens")
_TEXTS = ("prompt_id", "prompt", "text", "reward", "verdict", "rule", "num_tokens")
_MAX_CHARACTERS = 20_000  # of a prompt or completion that is shown


@dataclass(frozen=True)
class RoundSummary:
    """Numbers of all candidates of a round, in the order of the store.

    Attributes:
        name: Name of its folder.
        prompt_ids: Shape (C,), int64.
        rewards: Shape (C,), float64, NaN for a candidate without one.
        is_accepted: Shape (C,), bool.
        lengths: Tokens of each candidate, shape (C,), int64; 0 where none are stored.
    """

    name: str
    prompt_ids: np.ndarray
    rewards: np.ndarray
    is_accepted: np.ndarray
    lengths: np.ndarray


def summarize_round(folder: Path) -> RoundSummary:
    """Returns the numbers of a round."""
    table = pa.concat_tables(pq.read_table(path, columns=list(_NUMBERS)) for path in _shards(folder))
    prompt_ids, rewards, is_accepted, lengths = (
        pc.fill_null(table.column(name), value).to_numpy()
        for name, value in zip(_NUMBERS, (-1, float("nan"), False, 0), strict=True)
    )
    return RoundSummary(folder.name, prompt_ids, rewards, is_accepted.astype(bool), lengths)


def _shards(folder: Path) -> list[Path]:
    """The files of a round's candidates, without references that nobody generated."""
    return [path for path in sorted(folder.glob("*.parquet")) if path.name != REFERENCES]


def browsed_candidates(folders: Sequence[Path], max_candidates: int) -> dict[str, Any]:
    """Returns the candidates that the report's browser shows: every k-th prompt of each round, with all candidates.

    Args:
        folders: Of the rounds.
        max_candidates: Largest number of candidates, of all rounds together, but at least one prompt of each.

    Returns:
        `prompts` (texts) and, of equal lengths, `round`, `prompt` (place among the prompts), `text`, `reward`,
        `verdict`, `rule`, `tokens`; `total`, the number of candidates before any was left out.
    """
    places: dict[tuple[str, int], int] = {}
    shown: dict[str, Any] = {name: [] for name in ("round", "prompt", "text", "reward", "verdict", "rule", "tokens")}
    prompts: list[str] = []
    total = 0
    for folder in folders:
        paths = _shards(folder)
        num_candidates = sum(pq.read_metadata(path).num_rows for path in paths)
        total += num_candidates
        stride = max(1, -(-num_candidates * len(folders) // max_candidates))
        for path in paths:
            table = pq.read_table(path, columns=list(_TEXTS))
            is_shown = pa.array(table.column("prompt_id").to_numpy() % stride == 0)
            for row in table.filter(is_shown).to_pylist():
                text = _shown(row["prompt"])
                key = text, row["prompt_id"]
                if key not in places:
                    places[key] = len(prompts)
                    prompts.append(text)
                values = (folder.name, places[key], _cut(row["text"]), row["reward"], row["verdict"], row["rule"])
                for name, value in zip(shown, (*values, row["num_tokens"]), strict=True):
                    shown[name].append(value)
    return {"prompts": prompts, "total": total, **shown}


def _shown(prompt: Any) -> str:
    if isinstance(prompt, str):
        return _cut(prompt)
    return _cut("\n\n".join(f"{one['role']}: {message_text(one['content'])}" for one in prompt))


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} … ({len(text):,} characters)"
