"""HTTP client for OpenAI-compatible completions servers: requests, retries, and concurrency.

`Completions` sends one request and retries transient failures; `Asker` and `Workers` split a generation request into
HTTP requests and run them concurrently, each until all of its candidates have come back or failed.
"""

import email.utils
import importlib
import json
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rsft_hf.engines.base import GenerationRequest
from rsft_hf.engines.endpoint.protocol import Answer, Dialect, ReplyReader, UnusableChoice, prompt_field

_PASSING = (408, 409, 425, 429)  # besides 5xx

_LONGEST_PAUSE_SECONDS = 60.0

_REMEDIES = {
    401: "Set `api_key`.",
    403: "Set `api_key`.",
    404: "Check `model`, which must be the name at the server, and `base_url`, which ends in /v1 for most servers.",
    422: 'It does not know all that was asked: see `dialect`, "openai" or "transformers".',
}


class Completions:
    """A connection to a server, safe to share between threads.

    Args:
        base_url: Up to `/v1`.
        api_key: None for a server that wants none.
        timeout_seconds: For each try.
        max_retries: How often a request is sent again.
        backoff_seconds: Before it is sent again, doubled each time; a server's `Retry-After` counts instead.
        may_restart: Whether a request may be sent again after a lost connection: whoever answers then may be a new
            process, without the weights that were handed to the one before.

    Raises:
        ImportError: If the package `openai` is not installed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout_seconds: float,
        max_retries: int,
        backoff_seconds: float,
        may_restart: bool = True,
    ) -> None:
        self.url = f"{base_url.rstrip('/')}/completions"
        self.max_retries, self.backoff_seconds, self.may_restart = max_retries, backoff_seconds, may_restart
        openai = client_library()
        # Servers close idle connections, which must not be taken for a restart: then each request has its own.
        limits = {} if may_restart else {"http_client": openai.DefaultHttpxClient(headers={"Connection": "close"})}
        # Its own retries are off: they hide what happened, and draw from the global generator.
        self._client = openai.OpenAI(
            api_key=api_key or "none", base_url=base_url, timeout=timeout_seconds, max_retries=0, **limits
        )
        self._is_closing = threading.Event()

    def ask(self, body: Mapping[str, Any], prompt: int) -> list[Any]:
        """Returns the choices of a reply, at least one.

        Args:
            body: The request.
            prompt: Names the prompt in errors.

        Raises:
            ValueError: If the server refuses the request (4xx).
            RuntimeError: If it cannot be reached, fails, or answers something else, after all retries; after a lost
                connection at once, unless it may restart.
        """
        openai = client_library()
        failure = ""
        for attempt in range(self.max_retries + 1):
            try:
                fields = {name: value for name, value in body.items() if name not in ("model", "prompt")}
                reply = self._client.completions.with_raw_response.create(
                    model=body["model"], prompt=body["prompt"], extra_body=fields
                )
                return self._choices(reply.text, prompt)
            except openai.APIStatusError as error:
                status, said = error.status_code, error.response.text[:500]
                if status < 500 and status not in _PASSING:
                    raise ValueError(
                        f"The server at {self.url} refused the request of prompt {prompt} with {status}: "
                        f"{said}. {_REMEDIES.get(status, 'The request is at fault, not the moment.')}"
                    ) from error
                failure, wanted = f"{status}: {said}", _retry_after(error.response.headers)
            except openai.APITimeoutError as error:
                failure, wanted = f"{type(error).__name__}: {error}", None
            except openai.APIConnectionError as error:
                if not self.may_restart:
                    raise RuntimeError(
                        f"The connection to the server at {self.url} was lost ({error.__cause__ or error}). It may "
                        "have restarted, and would answer with other weights than those it was handed. See its log and "
                        "run again: what was generated is kept, and the weights are handed over anew."
                    ) from error
                failure, wanted = f"{type(error).__name__}: {error} {error.__cause__ or ''}".strip(), None
            if attempt < self.max_retries:
                self.pause(attempt, wanted)
        raise RuntimeError(
            f"The server at {self.url} gave no answer to prompt {prompt} in {self.max_retries + 1} tries; the last "
            f"failed with {failure}. Check that it runs, or raise `timeout_seconds` or `max_retries`."
        )

    def pause(self, attempt: int, wanted: float | None = None) -> None:
        """Waits before another try; ends at once when the connection is closed.

        Args:
            attempt: Tries that came to nothing before, from 0.
            wanted: Seconds that the server asked for.

        Raises:
            RuntimeError: If the connection is closed.
        """
        seconds = self.backoff_seconds * 2**attempt if wanted is None else wanted
        if self._is_closing.wait(min(seconds, _LONGEST_PAUSE_SECONDS)):
            raise RuntimeError("Not tried again: the generation was given up.")

    def give_up(self) -> None:
        """Ends the retries; replies that are under way may still come."""
        self._is_closing.set()

    def close(self) -> None:
        """Ends the retries and the connection."""
        self.give_up()
        self._client.close()

    def _choices(self, text: str, prompt: int) -> list[Any]:
        try:
            choices = json.loads(text)["choices"]
        except (ValueError, KeyError, TypeError):
            choices = None
        if not isinstance(choices, list) or not choices:
            raise RuntimeError(
                f"The server at {self.url} answered prompt {prompt} with something that is no completion: "
                f"{text[:200]!r}. Check that `base_url` names a completions server, up to /v1."
            )
        return choices


def client_library() -> Any:
    """Returns the package `openai`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ImportError(
            "EndpointEngine needs the client of OpenAI's API: `pip install rsft-hf[endpoint]`."
        ) from error


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a server asks to wait: it names a number, or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


_SEEDS = 2**30  # servers count on from a seed, and not all take one above 2**31 - 1

_MANY_TOKENS = 8  # candidates of so many tokens are not equal by chance


@dataclass(frozen=True)
class Job:
    """Candidates of one prompt that are asked for together.

    Attributes:
        prompt: Position of the prompt.
        indices: Of the candidates.
        limit: Most tokens of each.
    """

    prompt: int
    indices: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Answers:
    """What came of a job: candidates by their index, and the reason why some are missing."""

    found: dict[int, Answer]
    failure: RuntimeError | ValueError | None = None


def jobs_of(request: GenerationRequest, candidates_per_request: int | None) -> list[Job]:
    """Returns the jobs of a request, the prompts of the longest expected answers first.

    Args:
        request: Candidates of one prompt that have the same limit go together.
        candidates_per_request: Most candidates of a job; None sets no limit.
    """
    order = list(range(len(request.prompts)))
    if request.expected_lengths is not None:
        expected = request.expected_lengths
        order.sort(key=lambda prompt: -expected[prompt])
    jobs = []
    for prompt in order:
        alike: dict[int, list[int]] = {}
        for index in range(request.num_candidates):
            alike.setdefault(request.limit(prompt, index), []).append(index)
        for limit, indices in alike.items():
            width = candidates_per_request or len(indices)
            jobs += [Job(prompt, tuple(indices[at : at + width]), limit) for at in range(0, len(indices), width)]
    return jobs


@dataclass(frozen=True)
class Asker:
    """Sees jobs through, from several threads.

    Attributes:
        server: Where they go.
        request: What the jobs are parts of.
        reader: Of the choices.
        fields: What is the same in every body; None takes a field out.
        dialect: Of the prompts.
    """

    server: Completions
    request: GenerationRequest
    reader: ReplyReader
    fields: Mapping[str, Any]
    dialect: Dialect

    def __call__(self, job: Job) -> Answers:
        """Returns the candidates of a job: all of them, or those that came before a failure, and the failure."""
        found: dict[int, Answer] = {}
        try:
            choices = self._ask(job, job.indices)
            problem = f"{len(choices)} of {len(job.indices)} choices"
            for index, choice in zip(job.indices, choices):
                try:
                    found[index] = self.reader(choice, job.limit)
                except UnusableChoice as error:
                    problem = str(error)
            self._look_for_copies(list(found.values()))
            for index in job.indices:
                if index not in found:  # some servers ignore `n`: the rest comes one at a time
                    found[index] = self._one(job, index, problem)
        except (RuntimeError, ValueError) as error:
            return Answers(found, error)
        return Answers(found)

    def _one(self, job: Job, index: int, problem: str) -> Answer:
        """Asks for a single candidate, by its own seed."""
        for attempt in range(self.server.max_retries + 1):
            if attempt:
                self.server.pause(attempt - 1)
            try:
                return self.reader(self._ask(job, (index,))[0], job.limit)
            except UnusableChoice as error:
                problem = str(error)
        raise RuntimeError(
            f"The server at {self.server.url} gave no usable candidate {index} of prompt {job.prompt}, asked for alone "
            f"{self.server.max_retries + 1} times; what came last: {problem}. See its log, or raise `max_retries`."
        )

    def _ask(self, job: Job, indices: tuple[int, ...]) -> list[Any]:
        """The server's choices, no more than were asked for."""
        request, ids = self.request, self.request.prompts[job.prompt]
        body = {
            "prompt": prompt_field(job.prompt, ids, self.reader.tokenizer, self.dialect),
            "n": len(indices),
            "seed": request.seeds[job.prompt][indices[0]] % _SEEDS,
            "max_tokens": job.limit,
            **self.fields,
        }
        body = {name: value for name, value in body.items() if value is not None}
        return self.server.ask(body, job.prompt)[: len(indices)]

    def _look_for_copies(self, answers: list[Answer]) -> None:
        """Warns if all candidates of a request are the same, though each is a draw of its own."""
        is_one = len({tuple(one.token_ids) for one in answers}) == 1 < len(answers)
        if is_one and self.request.generation_config.do_sample and len(answers[0].token_ids) >= _MANY_TOKENS:
            self.reader.warn(
                "All candidates of a request came back equal: the server seems to draw them from one seed. Set "
                "candidates_per_request=1, so that each is asked for by its own."
            )


class Workers:
    """Threads that see jobs through, first come first served.

    They are daemons, unlike those of a pool: whoever gives up, or is interrupted, waits for no reply under way.

    Args:
        asker: What a job is given to.
        count: Most jobs at a time.
    """

    def __init__(self, asker: Asker, count: int) -> None:
        self._asker, self._count = asker, count
        self._waiting: queue.SimpleQueue[tuple[Future[Answers], Job] | None] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, job: Job) -> Future[Answers]:
        """Returns what the job will come to."""
        future: Future[Answers] = Future()
        self._waiting.put((future, job))
        return future

    def stop(self) -> None:
        """Lets each thread end after the job that it is at."""
        for _ in range(self._count):
            self._waiting.put(None)

    def _work(self) -> None:
        for future, job in iter(self._waiting.get, None):
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._asker(job))
                except BaseException as error:  # noqa: BLE001 - to whoever asks for the result, as from a pool
                    future.set_exception(error)
