"""Import of completions that were generated elsewhere: files of vLLM, OpenAI's batches, other libraries, or own tables.

rows -> prompt, answers and other columns of each -> prompts numbered -> store of one round, and its prompts
"""

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rsft_hf.checks import check_integer
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative.candidates import Candidate, CandidateStore
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.prompts import Prompt, message_text
from rsft_hf.generative.row_files import read_rows

logger = logging.get_logger(__name__)

PROMPTS = "prompts/prompts.parquet"
SCORE = "score"  # name of the scores that the data bring

_SHARD_SIZE = 4096  # candidates
_PROMPT_NAMES = ("prompt", "messages", "question", "instruction", "input", "problem", "query")
_ANSWER_NAMES = (
    "completions", "completion", "responses", "response", "outputs", "output", "choices", "candidates", "generations",
    "samples", "model_completion", "generated_text",
)  # fmt: skip
_TEXT_NAMES = ("text", "content", "completion", "response", "output", "generated_text")
_LOG_Q_NAMES = ("log_q", "cumulative_logprob")
_SCORE_NAMES = ("score", "reward")
_ENTRIES = (*_LOG_Q_NAMES, *_SCORE_NAMES, "finish_reason", "token_ids", "logprobs")  # of an answer, beside its text
_ANSWER_COLUMNS = {name: name for name in _ENTRIES} | {
    "reward": "score", "scores": "score", "rewards": "score", "finish_reasons": "finish_reason",
}  # fmt: skip
_ENDED = (None, "", "stop", "eos", "eos_token", "stop_sequence", "end_turn")
_CUT_OFF = ("length", "max_tokens")


@dataclass(frozen=True)
class Answer:
    """One completion of a prompt, as the data have it.

    Attributes:
        text: Text of the completion.
        token_ids: Its tokens where they are known.
        finish_reason: "stop" or "length"; what the data say where it is neither.
        log_q: Log probability of all its tokens under the distribution it was sampled from, nats, where it is known.
        score: Score that the data bring, NaN for one that they lack; None without any.
    """

    text: str
    token_ids: Sequence[int] = ()
    finish_reason: str = "stop"
    log_q: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class RowFormat:
    """Names of the columns, found from the first row where they are not given.

    Attributes:
        prompt: Column of the prompt, text or messages; "messages" may end with the answer.
        answers: Column of one answer or a list of them; None if the messages end with it.
        score: Column of the scores; None looks for "score" and "reward".
    """

    prompt: str
    answers: str | None
    score: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any], prompt: str | None, answers: str | None, score: str | None) -> "RowFormat":
        """Returns the format of a row.

        Raises:
            ValueError: If a column is absent, or several could hold the prompt or the answers.
        """
        for name, column in (("prompt", prompt), ("completions", answers), ("score", score)):
            if column is not None and column not in row and not (name == "score" and _is_nested(row)):
                raise ValueError(f"`{name}`={column!r} is no column of the data, which have {list(row)}.")
        prompt = prompt or _only(row, _PROMPT_NAMES, "prompt")
        if prompt is None:
            raise ValueError(f"No column of {list(row)} holds the prompts. Name it by `prompt`.")
        answers = answers or _only([name for name in row if name != prompt], _ANSWER_NAMES, "completions")
        if answers is None and not _ends_with_answer(row[prompt]):
            raise ValueError(f"No column of {list(row)} holds the completions. Name it by `completions`.")
        return cls(prompt, answers, score)

    def read(self, row: Mapping[str, Any]) -> tuple[Prompt, list[Answer], dict[str, Any]]:
        """Returns prompt, answers, and the other columns of a row."""
        columns, prompt = dict(row), row[self.prompt]
        columns.pop(self.prompt)
        found = columns.pop(self.answers) if self.answers is not None else None
        if _ends_with_answer(prompt):
            if self.answers is None:
                found = prompt[-1]["content"]
            if self.answers is None or self.prompt == "messages":  # elsewhere it is the beginning of the answer
                prompt = prompt[:-1]
        is_list = isinstance(found, (list, tuple)) and not _is_message_list(found)
        given = [_as_facts(one) for one in (found or () if is_list else [found])]
        facts = self._beside(columns, len(given), is_list)
        return prompt, [_answer({**more, **one}, self.score) for more, one in zip(facts, given, strict=True)], columns

    def _beside(self, columns: dict[str, Any], num_answers: int, is_list: bool) -> list[dict[str, Any]]:
        """What the other columns say of each answer, by one value or a list of as many; they lose these columns."""
        facts: dict[str, Sequence[Any]] = {}
        names = dict.fromkeys((*([self.score] if self.score else []), *_ANSWER_COLUMNS))
        for name in sorted(names, key=lambda name: columns.get(name) is None):  # a column of nulls after the others
            is_score = name == self.score or _ANSWER_COLUMNS[name] == "score"
            entry = (self.score or "score") if is_score else _ANSWER_COLUMNS[name]
            if name not in columns or entry in facts:
                continue
            values = columns[name]
            is_each = isinstance(values, (list, tuple))
            if entry == "token_ids":
                is_each = is_each and any(isinstance(one, (list, tuple)) for one in values)
            each = values if is_each else [values] * num_answers
            may_be_scores = is_each or name in _ENTRIES  # one value named "scores" is a column of the prompt
            if is_score and name != self.score and (not may_be_scores or any(map(_is_nested_value, each))):
                continue
            if len(each) != num_answers and (name == self.score or (is_list and name not in _ENTRIES)):
                raise ValueError(f"it has {num_answers} completions and {len(each)} {name}")
            if len(each) == num_answers and (is_each or num_answers == 1 or not is_list):
                facts[entry] = each
                columns.pop(name)
        return [dict(zip(facts, values, strict=True)) for values in zip(*facts.values(), strict=True)] or [
            {} for _ in range(num_answers)
        ]


def _is_nested_value(value: Any) -> bool:
    return isinstance(value, (list, tuple, Mapping))


def _as_facts(found: Any) -> dict[str, Any]:
    """An answer as a mapping; text, or a list of one message or mapping, are taken as such."""
    if isinstance(found, (list, tuple)) and len(found) == 1:
        found = found[0]
    if _is_message_list(found):
        raise ValueError(f"A completion has {len(found)} messages. Give the one that the model is to learn to write.")
    return dict(found) if isinstance(found, Mapping) else {"text": found}


def _only(row: Iterable[str], names: Sequence[str], argument: str) -> str | None:
    found = [name for name in names if name in row]
    # messages beside a column of the same role are the conversation that this column was made from
    if argument == "prompt" and found[:1] == ["prompt"]:
        return "prompt"
    if len(found) > 1:
        raise ValueError(f"The columns {found} could each hold the {argument}. Name it by `{argument}`.")
    return found[0] if found else None


def _is_nested(row: Mapping[str, Any]) -> bool:
    return any(isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping) for value in row.values())


def _is_message_list(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(one, Mapping) and "role" in one for one in value)
    )


def _ends_with_answer(prompt: Any) -> bool:
    return _is_message_list(prompt) and prompt[-1]["role"] == "assistant"


def _text_of(found: Mapping[str, Any]) -> str | None:
    text = next((found[name] for name in _TEXT_NAMES if isinstance(found.get(name), str)), None)
    if text is None and isinstance(found.get("content"), list):
        return message_text(found["content"])
    nested = next((found[name] for name in ("message", "text") if isinstance(found.get(name), (Mapping, list))), None)
    return _text_of(_as_facts(nested)) if text is None and nested is not None else text


def _answer(found: Mapping[str, Any], score: str | None) -> Answer:
    """An answer from a mapping: of vLLM, of OpenAI, of LMFlow, a message, or a text alone."""
    text, reason = _text_of(found), found.get("finish_reason")
    message = found.get("message")
    is_refusal = isinstance(message, Mapping) and message.get("content") is None  # or a call of a tool
    if text is None and (is_refusal or reason not in (*_ENDED, *_CUT_OFF)):
        text, reason = "", "no text" if reason in (*_ENDED, *_CUT_OFF) else reason
    if text is None:
        raise ValueError(
            f"A completion is {found['text']!r}. Give text, or a mapping with `text`."
            if "text" in found
            else f"A completion has none of {list(_TEXT_NAMES)} with a text: {dict(found)!r}."
        )
    log_q = next((found[name] for name in _LOG_Q_NAMES if found.get(name) is not None), None)
    logprobs = found.get("logprobs")
    if log_q is None and isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
        log_q = sum(token["logprob"] for token in logprobs["content"])
    names = (score,) if score else _SCORE_NAMES
    given = next((found[name] for name in names if found.get(name) is not None), None)
    given = math.nan if given == "" else given  # CSV has no null
    if given is not None and math.isinf(float(given)):
        raise ValueError(f"its score is {given}. Give a finite number, or null for one that is not known")
    return Answer(
        text=text,
        token_ids=[int(token) for token in found.get("token_ids") or ()],
        finish_reason="stop" if reason in _ENDED else "length" if reason in _CUT_OFF else str(reason),
        log_q=None if log_q is None else float(log_q),
        score=None if given is None else float(given),
    )


def import_candidates(
    data: Any,
    directory: Path | str,
    *,
    prompt: str | None = None,
    completions: str | None = None,
    score: str | None = None,
    requests: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_candidates: int | None = None,
) -> Path:
    """Returns the folder of a round with completions that were generated elsewhere, for `score_again` and the exports.

    A row holds one completion or a list of them; rows of equal prompts belong together. Read are one's own tables,
    outputs of vLLM, OpenAI's batches and the sample files of open-instruct, ms-swift and LMFlow, row by row.

    Args:
        data: As in `read_rows`.
        directory: Folder to write, absent or empty.
        prompt: Column of the prompts, text or messages, which may end with the answer; found by its usual names.
        completions: Column of one completion or of a list: texts, or mappings with `text` and perhaps `token_ids`,
            `finish_reason`, `cumulative_logprob`, `score`; found by its usual names.
        score: Column or entry of a completion with its score, or column of a list of them.
        requests: As in `read_rows`.
        tokenizer: Encodes completions that come without tokens, for filters and rules that read lengths.
        max_candidates: Completions kept of a prompt, the first ones; all by default.

    Raises:
        FileExistsError: If the directory is not empty.
        FileNotFoundError: If there is no such file.
        ValueError: If the columns cannot be told, a row has another form than the first, or there is none.

    Example:
        >>> import tempfile
        >>> rows = [{"prompt": "2 + 2 =", "completions": ["5", "4"], "answer": "4"}]
        >>> stored_prompts(import_candidates(rows, tempfile.mkdtemp()))[0]
        {'prompt': '2 + 2 =', 'answer': '4'}
    """
    if max_candidates is not None:
        check_integer("max_candidates", max_candidates, minimum=1)
    folder = Path(directory)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Give a folder that does not exist yet.")
    rows = iter(read_rows(data, requests))
    if (first := next(rows, None)) is None:
        raise ValueError("There is no row to import.")
    importer = _Importer(folder, RowFormat.of(first, prompt, completions, score), tokenizer, max_candidates)
    source = str(data) if isinstance(data, (str, Path)) else type(data).__name__
    importer.run(itertools.chain([first], rows), source)
    return folder


def stored_prompts(directory: Path | str) -> datasets.Dataset | None:
    """Returns the prompts of an imported round with their other columns, by prompt id; None if it was not imported."""
    path = Path(directory) / PROMPTS
    return datasets.load_dataset("parquet", data_files=str(path), split="train") if path.is_file() else None


@dataclass
class _Importer:
    """Numbers prompts, and writes candidates shard by shard."""

    folder: Path
    row_format: RowFormat
    tokenizer: PreTrainedTokenizerBase | None
    max_candidates: int | None
    prompt_ids: dict[str, int] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    differing: set[str] = field(default_factory=set)
    pending: list[Candidate] = field(default_factory=list)
    store: CandidateStore | None = None
    num_shards: int = 0
    num_rows: int = 0

    def run(self, rows: Iterable[Mapping[str, Any]], source: str) -> None:
        """Imports all rows; after an error nothing is left, since half of the data would pass for all of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for row in tqdm(rows, desc="Importing", unit=" rows", disable=None):
                self.add(row)
            self.finish(source)
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the completions of a row."""
        try:
            prompt, answers, columns = self.row_format.read(row)
            texts = [answer.text for answer in answers]
            json.dumps([prompt, texts, columns], ensure_ascii=False, default=str).encode()  # a lone surrogate
        except (KeyError, ValueError, TypeError) as error:
            reason = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"Row {self.num_rows} cannot be imported: {reason}") from error
        self.num_rows += 1
        has_scores = any(answer.score is not None for answer in answers)
        if self.store is None:
            names = (SCORE,) if has_scores else ()
            self.store = CandidateStore(self.folder, names, is_conversational=not isinstance(prompt, str))
        if isinstance(prompt, str) == self.store.is_conversational or not prompt:
            raise ValueError(f"Row {self.num_rows - 1} has the prompt {prompt!r}; give text or messages in every row.")
        if has_scores and not self.store.reward_names:
            raise ValueError(f"Row {self.num_rows - 1} has a score, and the first row has none. Give all or none.")
        prompt_id = self._prompt_id(prompt, columns)
        for answer in answers:
            self._add_answer(prompt_id, prompt, columns, answer)

    def _prompt_id(self, prompt: Prompt, columns: Mapping[str, Any]) -> int:
        key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        if key not in self.prompt_ids:
            self.prompt_ids[key] = len(self.prompts)
            self.prompts.append({"prompt": prompt, **columns})
        stored = self.prompts[self.prompt_ids[key]]
        self.differing |= {name for name, value in columns.items() if value != stored.get(name)}
        return self.prompt_ids[key]

    def _add_answer(self, prompt_id: int, prompt: Prompt, columns: dict[str, Any], answer: Answer) -> None:
        index = self.counts[prompt_id]
        reason = answer.finish_reason
        if reason not in ("stop", "length"):
            self.left_out[f"ended by {reason!r}"] += 1
        elif self.max_candidates is not None and index >= self.max_candidates:
            self.left_out["beyond `max_candidates`"] += 1
        else:
            self.counts[prompt_id] += 1
            token_ids, tokenizer = list(answer.token_ids), self.tokenizer
            if not token_ids and tokenizer is not None:
                token_ids = imported_token_ids(Encoder(tokenizer, False), prompt, columns, answer.text, reason)
            seed = candidate_seed(0, 0, prompt_id, 0, index)
            candidate = Candidate(prompt_id, prompt, token_ids, answer.text, reason, 0, index, seed, answer.log_q)
            candidate.row = columns
            if self.store is not None and self.store.reward_names:
                score = None if answer.score is None or math.isnan(answer.score) else answer.score
                candidate.reward, candidate.rewards = score, {SCORE: score}
            self.pending.append(candidate)
            if len(self.pending) >= _SHARD_SIZE:
                self._write()

    def _write(self) -> None:
        if self.store is not None and self.pending:
            stage = "scored" if self.store.reward_names else "generated"
            self.store.write(self.store.path(0, self.num_shards), self.pending, stage, logged={})
            self.num_shards += 1
            self.pending.clear()

    def finish(self, source: str) -> None:
        """Writes what is left, the prompts and the manifest."""
        self._write()
        if self.store is None or not self.num_shards:
            raise ValueError(f"None of {self.num_rows} rows has a completion to import ({dict(self.left_out)}).")
        (self.folder / PROMPTS).parent.mkdir()
        self._prompt_dataset().to_parquet(str(self.folder / PROMPTS))
        facts = {"imported_from": source, "prompts": len(self.prompts), "candidates": sum(self.counts.values())}
        self.store.write_manifest({**facts, "reward_names": list(self.store.reward_names)})
        for reason, count in self.left_out.items():
            logger.warning(f"{count} completions {reason} were left out.")
        if self.differing:
            logger.warning(
                f"The columns {sorted(self.differing)} differ between rows of one prompt: each prompt keeps those of "
                "its first row, which rewards will read."
            )

    def _prompt_dataset(self) -> datasets.Dataset:
        names = dict.fromkeys(name for row in self.prompts for name in row)
        columns = {name: [row.get(name) for row in self.prompts] for name in names}
        try:
            return datasets.Dataset.from_dict(columns)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"A column of the prompts has values of several types: {error}.") from error


def imported_token_ids(
    encoder: Encoder, prompt: Prompt, columns: Mapping[str, Any], text: str, finish_reason: str
) -> list[int]:
    """Returns the tokens of a completion that is known as text, without an end token if it was cut off."""
    ids = encoder.completion_ids(prompt, text, columns)
    is_cut_off = finish_reason == "length" and ids and ids[-1] in (encoder.tokenizer.eos_token_id, *encoder.end_tokens)
    return ids[:-1] if is_cut_off else ids
