"""Who asks a server for what: the requests that a round is split into, and each one seen through to its last candidate.

A request of the round enters; candidates leave, and with them the failure that kept others from coming.
"""

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rsft_hf.generative.engines.completions import Completions
from rsft_hf.generative.engines.dialects import Dialect, prompt_field
from rsft_hf.generative.engines.engine import GenerationRequest
from rsft_hf.generative.engines.replies import Answer, ReplyReader, UnusableChoice

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
