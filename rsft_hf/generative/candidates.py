"""Candidates, the prompts they belong to, and the store that keeps a round of them on disk.

    <output_dir>/candidates/round-000/manifest.json
                                      attempt-00-shard-00000.parquet      some prompts with all their candidates

A shard is written atomically, and again when its candidates have been scored and judged; every version has the same
columns.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsft_hf.generative.prompts import TEMPLATE_COLUMNS, Prompt, message_text

STAGES = ("generated", "scored", "judged")

VERDICTS = ("accepted", "rejected", "filtered", "duplicate", "unjudged", "fallback")

ACCEPTED = ("accepted", "fallback")

MANIFEST, REFERENCES = "manifest.json", "references.parquet"

_STAGE_KEY = b"rsft_hf.stage"
_LOGGED_KEY = b"rsft_hf.logged"


@dataclass
class Candidate:
    """One generated answer to one prompt, and all that becomes of it.

    Attributes:
        prompt_id: Row of the prompt in its data set.
        prompt: Text, or messages with `role` and `content`.
        token_ids: The tokens sampled, an end-of-sequence token included where there is one; no prompt, no padding.
        text: The tokens as text, without special tokens.
        separator: What stands between a prompt of text and `text`, where the tokenizer leaves it out of the latter: a
            space, or nothing.
        finish_reason: "stop" (an end token or stop string), "length" (cut off), or "reference" (not generated).
        attempt: Attempt of the round, from 0; -1 for a reference.
        index: Candidate within the attempt, from 0; -1 for a reference.
        seed: Key of the candidate's own random stream.
        log_q: Log probability of all tokens under the processed distribution they were sampled from, nats.
        log_p: The same under the target of `DensityRatio` before rewards: the raw model, or the reference model.
        rewards: What each reward function gave; None where it could not judge.
        reward: Their weighted sum; None where none could judge, or the candidate was filtered out.
        is_accepted: Whether it is trained on; None before it is judged.
        verdict: "accepted", "rejected", "filtered", "duplicate", "unjudged" or "fallback".
        rule: The filter or rule that gave the verdict.
        duplicate_key: Equal for candidates that count as the same; None where nothing is deduplicated.
        extras: What reward functions said of it by `log_extra`.
        row: The other columns of the prompt's row, at hand while filters and rewards run; those of the chat template
            are stored.
        template_columns: `tools` and `chat_template_kwargs` as the chat template got them, where a run adds to the row.
    """

    prompt_id: int
    prompt: Prompt
    token_ids: list[int]
    text: str
    finish_reason: str
    attempt: int = 0
    index: int = 0
    seed: int = 0
    log_q: float | None = None
    log_p: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    is_accepted: bool | None = None
    verdict: str | None = None
    rule: str | None = None
    duplicate_key: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)
    template_columns: Mapping[str, Any] = field(default_factory=dict, repr=False)
    separator: str = ""

    @property
    def num_tokens(self) -> int:
        """Length of the answer in tokens, the end token included."""
        return len(self.token_ids)

    @property
    def completion(self) -> Prompt:
        """The answer in the form of the prompt: text, or one assistant message, with what it was to continue."""
        if isinstance(self.prompt, str):
            return self.text
        begun = self.prompt[-1] if self.prompt[-1].get("role") == "assistant" else {}
        return [{"role": "assistant", "content": message_text(begun.get("content")) + self.text}]


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

_PLAIN_COLUMNS = {
    "prompt_id": pa.int64(),
    "attempt": pa.int32(),
    "candidate": pa.int32(),
    "text": pa.string(),
    "separator": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "num_tokens": pa.int32(),
    "finish_reason": pa.string(),
    "log_q": pa.float64(),
    "log_p": pa.float64(),
    "reward": pa.float64(),
    "is_accepted": pa.bool_(),
    "verdict": pa.string(),
    "rule": pa.string(),
    "duplicate_key": pa.string(),
    "extras": pa.string(),
    "seed": pa.int64(),
    "template_input": pa.string(),  # JSON, where the prompt's role and text are not all that the chat template gets
}


class CandidateStore:
    """A round of candidates on disk, shard by shard.

    Args:
        directory: Folder of the round, such as `<output_dir>/candidates/round-000`.
        reward_names: Names of the reward functions, one column `rewards/<name>` each.
        is_conversational: Whether prompts are lists of messages.
    """

    def __init__(self, directory: Path, reward_names: Sequence[str], is_conversational: bool) -> None:
        self.directory, self.reward_names = Path(directory), tuple(reward_names)
        self.is_conversational = is_conversational
        columns = {"prompt": _MESSAGES if is_conversational else pa.string(), **_PLAIN_COLUMNS}
        columns |= {f"rewards/{name}": pa.float64() for name in self.reward_names}
        self._schema = pa.schema(list(columns.items()))

    def path(self, attempt: int, number: int) -> Path:
        """Returns the file of a shard, whether it exists or not."""
        return self.directory / f"attempt-{attempt:02d}-shard-{number:05d}.parquet"

    def stage(self, path: Path) -> str | None:
        """Returns the stage of a shard, one of `STAGES`; None without a shard."""
        if not path.is_file():
            return None
        return (pq.read_schema(path).metadata or {}).get(_STAGE_KEY, b"").decode() or None

    def write(
        self, path: Path, candidates: Iterable[Candidate], stage: str, logged: Mapping[str, float] | None = None
    ) -> None:
        """Writes a shard, in one move: readers see the old file or the new one.

        Args:
            path: As `path` gives it.
            candidates: Of the shard.
            stage: One of `STAGES`.
            logged: Means of what reward functions logged of the shard; None keeps those that it has.
        """
        rows = [to_row(candidate, self.reward_names) for candidate in candidates]
        kept = json.dumps(self._logged(path) if logged is None else dict(logged))
        schema = self._schema.with_metadata({_STAGE_KEY: stage.encode(), _LOGGED_KEY: kept.encode()})
        self._write_table(path, pa.Table.from_pylist(rows, schema=schema))

    def write_verdicts(
        self, path: Path, verdicts: Sequence[str], rules: Mapping[str, str], source: Path | None = None
    ) -> None:
        """Writes the verdicts of a shard in one move; nothing else of it is decoded.

        Args:
            path: Of the shard, which holds no references.
            verdicts: One per candidate.
            rules: Rule to name for each verdict; the others keep the candidate's own, such as its filter.
            source: Shard of another store to start from; None is the shard itself.
        """
        source = path if source is None else source
        table = pq.read_table(source)
        kept = table.column("rule").to_pylist()
        columns = {
            "verdict": list(verdicts),
            "is_accepted": [verdict in ACCEPTED for verdict in verdicts],
            "rule": [rules.get(verdict, rule) for verdict, rule in zip(verdicts, kept, strict=True)],
        }
        for name, values in columns.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
        metadata = {_STAGE_KEY: b"judged", _LOGGED_KEY: json.dumps(self._logged(source)).encode()}
        self._write_table(path, table.replace_schema_metadata(metadata))

    def _write_table(self, path: Path, table: pa.Table) -> None:
        with _replaced(path) as draft:
            pq.write_table(table, draft, compression="zstd")

    def read(self, path: Path) -> list[Candidate]:
        """Returns the candidates of a shard, in the order written."""
        return [_from_row(row, self.reward_names) for row in pq.read_table(path).to_pylist()]

    def read_generated(
        self, path: Path, row_of: Callable[[Candidate], tuple[Prompt, dict[str, Any]]]
    ) -> list[Candidate]:
        """Returns the candidates of a shard as generated: without scores.

        Args:
            path: Of the shard.
            row_of: Returns the prompt of a candidate and the other columns of its row.
        """
        candidates = self.read(path)
        for candidate in candidates:
            candidate.rewards, candidate.extras, candidate.reward = {}, {}, None
            candidate.verdict = candidate.rule = candidate.is_accepted = candidate.duplicate_key = None
            candidate.prompt, candidate.row = row_of(candidate)
        return candidates

    def is_unjudged(self, path: Path) -> bool:
        """Returns whether nobody answered for any candidate of a shard, or no reward that logs `<name>/failures`.

        A judge was out, perhaps; other rewards may have no answer for the rows of a task.
        """
        logged = self._logged(path)
        failing = [f"rewards/{name}" for name in self.reward_names if logged.get(f"{name}/failures")]
        columns = pq.read_table(path, columns=["verdict", "reward", *failing]).to_pydict()
        kept = [row for row, verdict in enumerate(columns["verdict"]) if verdict != "filtered"]
        return bool(kept) and any(all(columns[name][row] is None for row in kept) for name in ("reward", *failing))

    def logged(self) -> list[dict[str, float]]:
        """Returns what reward functions logged of each shard, in the order of the shards."""
        return [self._logged(path) for path in self.shards()]

    def _logged(self, path: Path) -> dict[str, float]:
        metadata = (pq.read_schema(path).metadata or {}) if path.is_file() else {}
        return json.loads(metadata.get(_LOGGED_KEY, b"{}"))

    def shards(self) -> list[Path]:
        """Returns the files of all shards, in order of attempt and prompt."""
        return sorted(self.directory.glob("*.parquet"))

    def digest(self) -> str:
        """Returns a digest of the files of all shards."""
        digest = hashlib.blake2b(digest_size=8)
        for path in self.shards():
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
        return digest.hexdigest()

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Returns some columns of the whole round, in the order of the shards, without reading the others."""
        collected: dict[str, list[Any]] = {name: [] for name in names}
        for path in self.shards():
            for name, column in pq.read_table(path, columns=list(names)).to_pydict().items():
                collected[name] += column
        return collected

    def accepted(self) -> Iterator[Candidate]:
        """Yields the accepted candidates of the round, reading one shard at a time.

        Raises:
            RuntimeError: If the round is not there.
        """
        self.require("wanted", "replay_rounds=0")
        for path in self.shards():
            table = pq.read_table(path, filters=[("is_accepted", "==", True)])
            for row in table.to_pylist():
                yield _from_row(row, self.reward_names)

    def require(self, use: str, alternative: str) -> None:
        """Raises RuntimeError if the round is not there.

        Args:
            use: What its accepted candidates are, for the message.
            alternative: The option that does without them.
        """
        if not self.manifest():
            raise RuntimeError(
                f"{self.directory} is gone, whose accepted candidates are {use}. Put it back, or set {alternative}."
            )

    def manifest(self) -> dict[str, Any]:
        """Returns the manifest of the round; empty if there is none."""
        path = self.directory / MANIFEST
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write_manifest(self, values: Mapping[str, Any]) -> None:
        """Replaces the manifest in one move."""
        with _replaced(self.directory / MANIFEST) as draft:
            draft.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then takes the place of `path` in one move; after an error `path` is as it was."""
    draft = path.with_name(f".{path.name}.incomplete")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)  # a full disk needs the room
        raise OSError(
            error.errno,
            f"{error.strerror or error}. What was written before is kept: make room or allow writing, and run again",
            str(path),
        ) from error


_NOT_ATTRIBUTES = ("candidate", "extras", "template_input")


def to_row(candidate: Candidate, reward_names: Sequence[str]) -> dict[str, Any]:
    """Returns a candidate as a row of the store."""
    row = {name: getattr(candidate, name) for name in _PLAIN_COLUMNS if name not in _NOT_ATTRIBUTES}
    row |= {"candidate": candidate.index, "prompt": _role_and_text(candidate.prompt)}
    row["extras"] = json.dumps(candidate.extras, default=str) if candidate.extras else None
    given = {**candidate.row, **candidate.template_columns}
    columns = {name: given[name] for name in TEMPLATE_COLUMNS if given.get(name)}
    if isinstance(candidate.prompt, list) and (columns or row["prompt"] != candidate.prompt):
        row["template_input"] = json.dumps({"prompt": candidate.prompt, **columns}, default=str)
    return row | {f"rewards/{name}": candidate.rewards.get(name) for name in reward_names}


def round_number(folder: Path) -> int:
    """Returns the number of a round's folder, "round-012"; -1 for a folder of another name."""
    number = folder.name.removeprefix("round-")
    return int(number) if number.isdecimal() else -1


def prompt_key(prompt: Prompt) -> str:
    """Returns what tells a prompt from others: its text, or the roles and texts of its messages."""
    return prompt if isinstance(prompt, str) else json.dumps(_role_and_text(prompt))


def _role_and_text(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    return [{"role": message["role"], "content": message_text(message.get("content"))} for message in prompt]


def _from_row(row: Mapping[str, Any], reward_names: Sequence[str]) -> Candidate:
    kept = {name: row[name] for name in _PLAIN_COLUMNS if name not in (*_NOT_ATTRIBUTES, "num_tokens", "separator")}
    prompt, columns = template_input(row)
    return Candidate(
        **kept,
        prompt=prompt,
        index=row["candidate"],
        extras=json.loads(row["extras"]) if row["extras"] else {},
        rewards={name: row.get(f"rewards/{name}") for name in reward_names},
        row=columns,
        template_columns=columns,
        separator=row.get("separator") or "",
    )


def template_input(row: Mapping[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """Returns the prompt of a stored row as the data set had it, and its columns for the chat template."""
    if row.get("template_input") is None:
        return row["prompt"], {}
    columns = json.loads(row["template_input"])
    return columns.pop("prompt"), columns
