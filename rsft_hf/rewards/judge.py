"""LLM judge: a score per completion from a language model behind an OpenAI-compatible server.

A failed request is None, not a score. Replies are cached on disk, so that a resumed run repeats no request.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from rsft_hf.openai_client import OpenAIClient, RequestRefused, check_without_query, client_library, shown_url
from rsft_hf.rewards.templates import Completion, Prompt, fields_of, render

logger = logging.getLogger(__name__)

_BACKOFF_SECONDS = 0.5

_HOPELESS_STATUSES = (401, 403, 404)  # the key or the model is wrong, for every request

_FENCE = re.compile(r"^\s*```(?:json)?\s*|\s*```\s*$")

RUBRIC = (
    "Rate how well the response answers the prompt, from {low:g} (useless or wrong) to {high:g} (correct, complete and "
    'clear). Do not reward length. Answer with a JSON object: {{"score": <number>}}.'
)

TEMPLATE = "<prompt>\n{prompt}\n</prompt>\n<response>\n{completion}\n</response>"


@dataclass(frozen=True)
class JudgeReward:
    """The score that a language model gives each completion, asked for as JSON; None where there is none.

    Attributes:
        model: Name of the model at the server.
        base_url: The server's address, up to `/v1`; None is OpenAI's, or `OPENAI_BASE_URL`.
        api_key: None reads `OPENAI_API_KEY`; a server of one's own needs none.
        rubric: The system message; `{low}` and `{high}` are filled in, other braces are doubled.
        template: The user message, of {prompt}, {last_turn}, {completion} and columns of the prompts.
        low: Lowest score.
        high: Highest score.
        concurrency: Most requests under way at once.
        max_retries: How often a request is sent again after a connection error, a timeout, 429 or 5xx.
        timeout_seconds: Seconds without a byte after which a try has failed.
        cache_dir: Folder of the replies; None keeps none.
        options: More of the request, such as {"temperature": 0}.
        name: Names the rewards, and the metrics `<name>/failures` and `<name>/requests`: of a call, which scores a
            shard of candidates, on average.
        server: `base_url` as it may be shown, without a password.

    Raises:
        ImportError: If the package `openai` is not installed.
        ValueError: If `low` >= `high`, `concurrency` < 1, a negative number of retries or no time, or there is no key
            for OpenAI; when called, if the server does not know the key or the model.
    """

    model: str
    base_url: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    rubric: str = RUBRIC
    template: str = TEMPLATE
    low: float = 0.0
    high: float = 10.0
    concurrency: int = 8
    max_retries: int = 3
    timeout_seconds: float = 60.0
    cache_dir: str | Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "judge"
    server: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"`low`={self.low} must be less than `high`={self.high}, both finite.")
        if self.concurrency < 1 or self.max_retries < 0 or not self.timeout_seconds > 0:
            raise ValueError(
                f"`concurrency`={self.concurrency} must be at least 1, `max_retries`={self.max_retries} at least 0 and "
                f"`timeout_seconds`={self.timeout_seconds} more than 0."
            )
        if not (self.base_url or os.environ.get("OPENAI_BASE_URL") or self.api_key or os.environ.get("OPENAI_API_KEY")):
            raise ValueError("No `api_key` was given. Set OPENAI_API_KEY, or `base_url` to a server of your own.")
        check_without_query("base_url", self.base_url)
        fields_of(self.template)
        client_library("judge")
        object.__setattr__(self, "server", None if self.base_url is None else shown_url(self.base_url))

    @property
    def requires(self) -> frozenset[str]:
        """The columns that the template names."""
        return fields_of(self.template)

    async def __call__(
        self,
        *,
        prompts: list[Prompt],
        completions: list[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Returns the score of each completion, in [low, high]; equal requests are sent once.

        Raises:
            ValueError: If the server does not know the key (401, 403) or the model (404).
        """
        texts = render(self.template, prompts, completions, columns)
        keys = [None if text is None else self._request(text) for text in texts]
        requests = {key: request for pair in keys if pair for key, request in [pair]}
        scores = {key: score for key in requests if (score := self._cached(key)) is not None}
        missing = {key: request for key, request in requests.items() if key not in scores}
        reasons: list[str] = []
        scores |= await self._ask_all(missing, reasons)
        failures = len(missing) - sum(key in scores for key in missing)
        if failures:
            logger.warning("%s: %d of %d requests got no score, the last one: %s; these completions have no reward "
                           "from it.", self.name, failures, len(missing), reasons[-1])  # fmt: skip
        if log_metric is not None:
            log_metric(f"{self.name}/requests", len(missing))
            log_metric(f"{self.name}/failures", failures)
        return [None if pair is None else scores.get(pair[0]) for pair in keys]

    def _request(self, text: str) -> tuple[str, dict[str, Any]]:
        number = {"type": "number", "minimum": self.low, "maximum": self.high}
        schema = {
            "type": "object",
            "properties": {"score": number},
            "required": ["score"],
            "additionalProperties": False,
        }
        request = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": self.rubric.format(low=self.low, high=self.high)},
                {"role": "user", "content": text},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "judgement", "strict": True, "schema": schema},
            },
            **self.options,
        }
        # The whole request, the address too: another server's model of this name is another judge.
        address = self.base_url or os.environ.get("OPENAI_BASE_URL")
        text = json.dumps([str(address), request], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest(), request

    async def _ask_all(self, requests: dict[str, dict[str, Any]], reasons: list[str]) -> dict[str, float]:
        if not requests:
            return {}
        api_key = self.api_key or os.environ.get("OPENAI_API_KEY")
        client = OpenAIClient(
            self.base_url, api_key, self.timeout_seconds, self.max_retries, _BACKOFF_SECONDS, extra="judge"
        )
        # Threads of this pool are daemons: after an error or an interrupt nothing waits for the replies under way.
        with contextlib.closing(client), ThreadPool(min(self.concurrency, len(requests))) as pool:
            futures = [Future[float | None]() for _ in requests]
            for future, item in zip(futures, requests.items(), strict=True):
                pool.apply_async(self._ask, (client, *item, reasons), {}, future.set_result, future.set_exception)
            scores = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return {key: score for key, score in zip(requests, scores, strict=True) if score is not None}

    def _ask(self, client: OpenAIClient, key: str, request: dict[str, Any], reasons: list[str]) -> float | None:
        try:
            reply = client.post("/chat/completions", request, f"the judge {self.name!r}")
        except RequestRefused as error:
            if error.status in _HOPELESS_STATUSES:
                raise ValueError(
                    f"The judge at {client.base_url} refused `model`={self.model!r} or its `api_key`: {error}. No "
                    "request can succeed until they are right."
                ) from error
            return self._without_score(str(error), reasons)
        except RuntimeError as error:
            return self._without_score(str(error), reasons)
        text = _content(reply)
        score = self._parse(text)
        if score is None or text is None:
            return self._without_score(f"no score from {self.low:g} to {self.high:g} in {reply[:500]!r}", reasons)
        self._keep(key, text)
        return score

    def _without_score(self, reason: str, reasons: list[str]) -> float | None:
        logger.info("%s: %s", self.name, reason)
        reasons.append(reason)
        return None

    def _parse(self, text: str | None) -> float | None:
        try:
            value = json.loads(_FENCE.sub("", text or ""))["score"]  # where `response_format` is not heeded
        except (ValueError, KeyError, TypeError):
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and self.low <= value <= self.high else None

    def _path(self, key: str) -> Path | None:
        return None if self.cache_dir is None else Path(self.cache_dir) / key[:2] / f"{key}.json"

    def _cached(self, key: str) -> float | None:
        path = self._path(key)
        is_kept = path is not None and path.is_file()
        return self._parse(path.read_text(encoding="utf-8", errors="replace")) if path is not None and is_kept else None

    def _keep(self, key: str, text: str) -> None:
        if (path := self._path(key)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: other processes read and write here too.
        draft = path.with_name(f".{uuid.uuid4().hex}")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)


def _content(body: str) -> str | None:
    """Returns the text of a reply, None where there is none: a refusal, no choices, or something that is no JSON."""
    try:
        return json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
