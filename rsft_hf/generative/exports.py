"""Exports of stored candidates: as a data set, and in the formats of TRL's SFT, DPO and KTO trainers.

Shards are read one by one and kept as Arrow tables. The columns `tools` (as JSON) and `chat_template_kwargs` follow a
prompt that was rendered with them; a prompt that ended with the beginning of the answer gives it to the answer.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from rsft_hf.generative.candidates import round_number, template_input, to_row
from rsft_hf.generative.prompts import message_text

_BATCH_SIZE = 4096
_COLUMNS = ["prompt_id", "prompt", "text", "reward", "is_accepted", "verdict", "template_input"]


class NoRowsError(ValueError):
    """No candidate is of the kind that was asked for."""


def load_candidates(directory: Path | str) -> datasets.Dataset:
    """Returns every candidate of a round or of all rounds, with rewards and verdicts, memory-mapped.

    Args:
        directory: `<output_dir>`, its folder `candidates`, or one round of it.

    Raises:
        FileNotFoundError: If there are no candidates.
    """
    return datasets.load_dataset("parquet", data_files=[str(path) for path in _shards(directory)], split="train")


def export_sft(candidates: Any, as_messages: bool = False) -> datasets.Dataset:
    """Returns the accepted candidates for TRL's SFTTrainer: `prompt` and `completion`, or `messages`.

    Args:
        candidates: Folder as in `load_candidates`, a data set of its columns, or a list of candidates.
        as_messages: Whether to join prompt and answer to one conversation; prompts that are text become a user's turn.

    Raises:
        FileNotFoundError: If there are no candidates.
        ValueError: If none was accepted.
    """

    def exported(row: dict[str, Any]) -> dict[str, Any] | None:
        if not row["is_accepted"]:
            return None
        prompt, columns, (completion,) = _parts(row)
        if not as_messages:
            return {"prompt": prompt, "completion": completion, **columns}
        if isinstance(prompt, str):
            completion = row["text"]
            prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        return {"messages": prompt + completion, **columns}

    return _dataset(exported, _shard_rows(candidates), candidates, "accepted")


def export_dpo(candidates: Any, min_margin: float = 0.0) -> datasets.Dataset:
    """Returns one preference pair per prompt and round for TRL's DPOTrainer: `prompt`, `chosen`, `rejected`.

    The pair is the best-rewarded and the worst-rewarded of the prompt's judged candidates, accepted or not, and is left
    out where their texts are equal or their rewards lie no more than `min_margin` apart. Also `chosen_reward` and
    `rejected_reward`.

    Args:
        candidates: As in `export_sft`; a data set or a list, which do not tell the round, gives one pair per prompt.
        min_margin: Difference of rewards that a pair must exceed, at least 0.

    Raises:
        FileNotFoundError: If there are no candidates.
        ValueError: If no prompt gives a pair, or `min_margin` is negative.
    """
    if min_margin < 0:
        raise ValueError(f"`min_margin`={min_margin} must be at least 0.")
    extremes: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for rows in _shard_rows(candidates):
        for row in rows:
            if row["reward"] is not None:
                pair = extremes.setdefault((row["round"], row["prompt_id"]), [row, row])
                pair[0] = row if row["reward"] > pair[0]["reward"] else pair[0]
                pair[1] = row if row["reward"] < pair[1]["reward"] else pair[1]

    def exported(pair: list[dict[str, Any]]) -> dict[str, Any] | None:
        best, worst = pair
        if best["reward"] - worst["reward"] <= min_margin or best["text"] == worst["text"]:
            return None
        prompt, columns, (chosen, rejected) = _parts(best, worst)
        rewards = {"chosen_reward": best["reward"], "rejected_reward": worst["reward"]}
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rewards, **columns}

    return _dataset(exported, [extremes.values()], candidates, f"rewarded more than {min_margin} apart")


def export_kto(candidates: Any) -> datasets.Dataset:
    """Returns accepted and rejected candidates for TRL's KTOTrainer: `prompt`, `completion`, `label`.

    Candidates that were filtered out, duplicates, and those that nobody could judge, are left out.

    Args:
        candidates: As in `export_sft`.

    Raises:
        FileNotFoundError: If there are no candidates.
        ValueError: If none was judged.
    """

    def exported(row: dict[str, Any]) -> dict[str, Any] | None:
        if row["verdict"] not in ("accepted", "fallback", "rejected"):
            return None
        prompt, columns, (completion,) = _parts(row)
        return {"prompt": prompt, "completion": completion, "label": row["is_accepted"], **columns}

    return _dataset(exported, _shard_rows(candidates), candidates, "judged")


def round_folders(directory: Path | str) -> list[Path]:
    """Returns the folders of the rounds in a folder as in `load_candidates`, in order.

    Raises:
        FileNotFoundError: If there are no candidates.
    """
    folder = Path(directory)
    folder = folder / "candidates" if (folder / "candidates").is_dir() else folder
    rounds = [
        each
        for each in sorted(folder.glob("round-*"), key=lambda one: (round_number(one), one.name)) or [folder]
        if any(each.glob("*.parquet"))
    ]
    if not rounds:
        raise FileNotFoundError(
            f"{folder} holds no candidates. Give <output_dir>, or a folder such as <output_dir>/candidates/round-000."
        )
    return rounds


def _shards(directory: Path | str) -> list[Path]:
    return [path for each in round_folders(directory) for path in sorted(each.glob("*.parquet"))]


def _shard_rows(candidates: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows of each shard."""
    if isinstance(candidates, datasets.Dataset):
        if missing := [name for name in _COLUMNS if name not in candidates.column_names]:
            raise ValueError(f"The data set lacks the columns {missing} of load_candidates(...).")
        names = [*_COLUMNS, *({"separator"} & set(candidates.column_names))]
        columns = candidates.with_format(None).select_columns(names)
        for batch in columns.iter(_BATCH_SIZE):
            yield [{**dict(zip(batch, row, strict=True)), "round": ""} for row in zip(*batch.values(), strict=True)]
        return
    if not isinstance(candidates, (str, Path)):
        yield [{"template_input": None, **to_row(one, ()), "round": ""} for one in candidates]
        return
    for path in _shards(candidates):
        names = [*_COLUMNS, *({"separator"} & set(pq.read_schema(path).names))]
        yield [{**row, "round": path.parent.name} for row in pq.read_table(path, columns=names).to_pylist()]


def _parts(*rows: dict[str, Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    """The prompt of some rows, its columns for the chat template, and their answers in the form of the prompt."""
    prompt, columns = template_input(rows[0])
    if isinstance(prompt, str):
        return prompt, columns, [(row.get("separator") or "") + row["text"] for row in rows]
    settings = dict(columns.pop("chat_template_kwargs", None) or {})
    settings.pop("continue_final_message", None)  # what was begun is part of the answer below
    columns |= {"chat_template_kwargs": settings} if settings else {}
    if isinstance(columns.get("tools"), list):
        columns["tools"] = json.dumps(columns["tools"])
    messages = [dict(message) for message in prompt]
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = message_text(message["content"])
    begun = message_text(messages.pop()["content"]) if messages[-1]["role"] == "assistant" else ""
    return messages, columns, [[{"role": "assistant", "content": begun + row["text"]}] for row in rows]


def _dataset(
    exported: Callable[[Any], dict[str, Any] | None], shards: Iterable[Iterable[Any]], candidates: Any, what: str
) -> datasets.Dataset:
    tables = []
    for rows in shards:
        if kept := [one for one in map(exported, rows) if one is not None]:
            names = dict.fromkeys(name for one in kept for name in one)  # `from_pylist` takes those of the first
            tables.append(pa.Table.from_pylist([{name: one.get(name) for name in names} for one in kept]))
    is_folder = isinstance(candidates, (str, Path))
    if not tables:
        raise NoRowsError(
            f"{candidates if is_folder else type(candidates).__name__} holds no candidates that were {what}. See their "
            "`verdict`, in load_candidates(...)."
        )
    table = pa.concat_tables(tables, promote_options="permissive")
    return datasets.Dataset(
        table, fingerprint=_fingerprint(candidates, f"{what} {table.schema}") if is_folder else None
    )


def _fingerprint(directory: Path | str, what: str) -> str:
    """What `datasets` names its caches by; its own way of making one copies the whole table several times."""
    digest = hashlib.blake2b(what.encode(), digest_size=8)
    for path in _shards(directory):
        facts = path.stat()
        digest.update(f"{path.resolve()} {facts.st_mtime_ns} {facts.st_size}".encode())
    return digest.hexdigest()
