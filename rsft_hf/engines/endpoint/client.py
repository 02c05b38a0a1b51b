"""HTTP requests of a generation request to a completions server.

`jobs_of` splits a generation request into HTTP requests; `RequestSender` sends one of them, from several threads, until
all of its candidates have come back or failed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsft_hf.engines.base import GenerationRequest
from rsft_hf.engines.endpoint.protocol import Answer, Dialect, ReplyReader, UnusableChoice, prompt_field
from rsft_hf.openai_client import OpenAIClient, RequestRefused

_REMEDIES = {
    401: "Set `api_key`.",
    403: "Set `api_key`.",
    404: "Check `model`, which must be the name at the server, and `base_url`, which ends in /v1 for most servers.",
    422: 'It does not know all that was asked: see `dialect`, "openai" or "transformers".',
}


def ask_choices(client: OpenAIClient, body: Mapping[str, Any], prompt: int) -> list[Any]:
    """Returns the choices of a completions reply, at least one.

    Args:
        client: Connection to the server.
        body: JSON of the request.
        prompt: Position of the prompt, for errors.

    Raises:
        ValueError: If the server refuses the request (4xx).
        RuntimeError: If there is no reply after all tries, or one that is no completion.
    """
    reply = None
    for attempt in range(client.max_retries + 1):
        if attempt:
            client.pause(attempt - 1)
        try:
            text = client.post("/completions", body, f"prompt {prompt}")
        except RequestRefused as error:
            raise ValueError(
                f"{error}. {_REMEDIES.get(error.status, 'The request is at fault, not the moment.')}"
            ) from error
        try:
            reply = json.loads(text)
            break
        except (ValueError, RecursionError):
            if not text.lstrip().startswith("{"):  # one that does was cut off on its way
                break
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise RuntimeError(
            f"The server at {client.base_url}/completions answered prompt {prompt} with something that is no "
            f"completion: {text[:200]!r}. Check that `base_url` names a completions server, up to /v1."
        )
    return choices


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
    """Result of a job: candidates by their index, and the failure if some are missing."""

    job: Job
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
class RequestSender:
    """Sees jobs through, from several threads.

    Attributes:
        client: Connection to the server.
        request: What the jobs are parts of.
        reader: Of the choices.
        fields: What is the same in every body; None takes a field out.
        dialect: Of the prompts.
    """

    client: OpenAIClient
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
            return Answers(job, found, error)
        return Answers(job, found)

    def _one(self, job: Job, index: int, problem: str) -> Answer:
        """Asks for a single candidate, by its own seed."""
        for attempt in range(self.client.max_retries + 1):
            if attempt:
                self.client.pause(attempt - 1)
            try:
                return self.reader(self._ask(job, (index,))[0], job.limit)
            except UnusableChoice as error:
                problem = str(error)
        raise RuntimeError(
            f"The server at {self.client.base_url} gave no usable candidate {index} of prompt {job.prompt}, asked for "
            f"alone {self.client.max_retries + 1} times; the last one: {problem}. See its log, or raise `max_retries`."
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
        return ask_choices(self.client, body, job.prompt)[: len(indices)]

    def _look_for_copies(self, answers: list[Answer]) -> None:
        """Warns if all candidates of a request are the same, though each is a draw of its own."""
        is_one = len({tuple(one.token_ids) for one in answers}) == 1 < len(answers)
        if is_one and self.request.generation_config.do_sample and len(answers[0].token_ids) >= _MANY_TOKENS:
            self.reader.warn(
                "All candidates of a request came back equal: the server seems to draw them from one seed. Set "
                "candidates_per_request=1, so that each is asked for by its own."
            )
