"""Rows of files: JSONL, JSON, CSV and Parquet, outputs of vLLM, and OpenAI's batches with their requests."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow.parquet as pq
from transformers.utils import logging

logger = logging.get_logger(__name__)

_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; Python's own limit of 131,072 is below long contexts


def read_rows(data: Any, requests: Any = None) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a file, a data set, a list, or the outputs of vLLM.

    Args:
        data: Path of a JSONL, JSON, CSV or Parquet file, or an iterable of mappings or of vLLM's `RequestOutput`.
        requests: The file or rows of requests that an OpenAI batch answers, by `custom_id`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object, the file is of another kind, or an answer has no request.
    """
    rows = _file_rows(Path(data)) if isinstance(data, (str, Path)) else (_as_mapping(row) for row in data)
    if requests is None:
        for row in rows:
            if "custom_id" in row and "response" in row:
                raise ValueError(
                    "The rows are answers of an OpenAI batch. Give the file of its requests by `requests`."
                )
            yield row
        return
    asked_by = _asked(requests)
    num_failed = 0
    for row in rows:
        if (name := row.get("custom_id")) not in asked_by:
            raise ValueError(f"The answer {name!r} has no request in `requests`.")
        asked, body = asked_by[name], (row.get("response") or {}).get("body") or {}
        if row.get("error") or not body.get("choices"):
            num_failed += 1
            continue
        yield {"prompt": asked.get("messages", asked.get("prompt")), "choices": body["choices"]}
    if num_failed:
        logger.warning(f"{num_failed} requests of the batch failed and have no completions.")


def _asked(requests: Any) -> dict[str, Mapping[str, Any]]:
    """The bodies of an OpenAI batch's requests by `custom_id`."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(read_rows(requests)):
        name, body = row.get("custom_id"), row.get("body")
        if not isinstance(name, str) or not isinstance(body, Mapping):
            raise ValueError(f"Row {number} of `requests` is no request of a batch, with `custom_id` and `body`.")
        if found.setdefault(name, body) != body:
            raise ValueError(f"Two requests of other content are named {name!r}. Import each batch with its own file.")
        if isinstance(body.get("prompt"), list):
            raise ValueError(f"The request {name!r} asks for several prompts at once. Give requests of one prompt.")
    return found


@runtime_checkable
class _RequestOutput(Protocol):
    """The part of vLLM's `RequestOutput` that is read."""

    prompt: str
    outputs: Sequence[Any]


def _as_mapping(row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, _RequestOutput):
        names = ("text", "token_ids", "finish_reason", "cumulative_logprob")
        return {"prompt": row.prompt, "outputs": [{name: getattr(one, name) for name in names} for one in row.outputs]}
    raise ValueError(f"A row is {type(row).__name__}. Give mappings, or the outputs of vLLM.")


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file. Give a JSONL, JSON, CSV or Parquet file.")
    try:
        yield from _parsed_rows(path)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}. Save it as {path.suffix}, in UTF-8.") from error


def _parsed_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    elif path.suffix == ".csv":
        csv.field_size_limit(_LONGEST_FIELD)
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            for row in reader:
                if None in row:
                    raise ValueError(f"Line {reader.line_num} of {path} has more fields than the first line has names.")
                yield row
    elif path.suffix in (".jsonl", ".ndjson"):
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parsed(line, f"Line {number} of {path}")
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = content.get("instances") if isinstance(content, dict) else content  # LMFlow's data have a type
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} holds neither a list of rows, each an object, nor `instances` of them.")
        yield from rows
    else:
        raise ValueError(f"{path} is none of .jsonl, .json, .csv, .parquet.")


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object but {type(row).__name__}.")
    return row
