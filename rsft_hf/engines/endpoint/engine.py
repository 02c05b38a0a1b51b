"""Engine that generates on an OpenAI-compatible completions server, and the validation of its arguments.

A request becomes many concurrent HTTP requests; sequences are yielded as replies arrive. The server holds its own copy
of the weights, which `sync_weights` updates. Missing choices and missing log probabilities are completed here; anything
else that the server cannot do is an error.
"""

import copy
import inspect
import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar, Literal

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from rsft_hf.engines.base import Engine, GeneratedSequence, GenerationRequest, check_request
from rsft_hf.engines.endpoint.client import Answers, RequestSender, jobs_of
from rsft_hf.engines.endpoint.protocol import (
    DIALECTS,
    Dialect,
    ReplyReader,
    check_settings,
    needed_settings,
    sampling_fields,
)
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload, WeightsHandOver, check_url
from rsft_hf.engines.generation_config import context_length, end_tokens
from rsft_hf.engines.log_probs import token_log_probabilities
from rsft_hf.openai_client import OpenAIClient, check_without_query, client_library, shown_url

logger = logging.get_logger(__name__)


@dataclass
class EndpointEngine(Engine):
    """Generates with a completions server: vLLM, SGLang, TGI, `transformers serve`.

    A server that honours `seed` gives the same candidates again, as far as its own arithmetic allows. Log probabilities
    come from the server where they are what is wanted, else from a second pass through the model here.

    Attributes:
        base_url: The server's address, up to `/v1`.
        model: Name of the model, or of the adapter, at the server.
        api_key: None for a server of one's own.
        weights: Brings the server's weights up to date before each round: `SaveAndReload`, or a callable that takes the
            model. None leaves the server with the weights that it has, those of a teacher.
        dialect: "vllm" for vLLM and SGLang, "openai" for others (TGI), "transformers" for `transformers serve`.
        logprobs_mode: What the server's log probabilities are of: "processed" if of the distribution that it draws from
            (vLLM's `--logprobs-mode processed_logprobs`; SGLang as long as nothing but a temperature is set), else
            "raw". Without temperature, truncation and penalties both are one.
        candidates_per_request: None asks for all candidates of a prompt at once; 1 gives each its own request and seed,
            for servers that draw all choices of a request from one seed (SGLang's deterministic mode).
        concurrency: Most requests under way.
        timeout_seconds: Seconds without a byte after which a try has failed.
        max_retries: How often a request is sent again after a timeout, 429, 5xx or, without `weights`, a lost
            connection, and a candidate asked for again that was aborted or is empty.
        backoff_seconds: Before the second try, doubled each time.
        options: More of every request, such as {"priority": 1}; None takes out a field that the server does not know.
        revision: Names the weights of a server without `weights`, such as a commit: candidates of a round are never
            mixed with those of another.

    Raises:
        ImportError: If the package `openai` is not installed.
        TypeError: If a value is of the wrong kind.
        ValueError: If a value is out of its range; when called, if a setting cannot be said to the server, the server
            refuses a request, or log probabilities are wanted that nobody knows.
        RuntimeError: When called, if candidates are missing after all retries, no weights were handed over, or the
            connection was lost after they were.
    """

    has_own_weights: ClassVar[bool] = True
    base_url: str = field(repr=False)
    model: str
    api_key: str | None = field(default=None, repr=False)
    weights: WeightsHandOver | None = None
    dialect: Dialect = "vllm"
    logprobs_mode: Literal["raw", "processed"] = "raw"
    candidates_per_request: int | None = None
    concurrency: int = 8
    timeout_seconds: float = 600.0
    max_retries: int = 3
    backoff_seconds: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    _version: str | None = field(default=None, init=False, repr=False)  # of the weights; a new name each time
    _said: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        check_url("base_url", self.base_url)
        check_without_query("base_url", self.base_url)
        check_choices(self.dialect, self.logprobs_mode)
        check_weights(self.weights)
        check_options(self.options)
        check_numbers(vars(self))
        adapter = self.weights.payload.get("lora_name") if isinstance(self.weights, SaveAndReload) else None
        if adapter is not None and adapter != self.model:
            raise ValueError(
                f"`weights` loads the adapter {adapter!r}, and `model`={self.model!r} is asked for candidates: they "
                "would come from other weights. Name the adapter in both."
            )
        client_library()

    @property
    def is_fixed(self) -> bool:
        """Whether the server keeps the weights that it has: those of a teacher."""
        return self.weights is None

    def facts(self) -> dict[str, Any]:
        """Returns what candidates depend on besides model, seeds and configuration, without the address."""
        facts = {
            "logprobs_mode": self.logprobs_mode,
            "options": json.loads(json.dumps(dict(self.options), default=str)),
        }
        own = {"model": self.model, "dialect": self.dialect, "revision": self.revision}
        return facts | (own if self.is_fixed else {})

    def check(self, model: Any, config: GenerationConfig, log_probs: Collection[str] = ()) -> None:
        """Raises ValueError if a setting cannot be said to the server, or log probabilities would be unknown."""
        check_settings(config, self.dialect)
        check_spared(self.options, config)
        if self.is_fixed:
            check_log_probs(config, self.dialect, self.logprobs_mode, log_probs)
        elif log_probs and self.logprobs_mode == "raw" and {"min_p", "top_p"} <= needed_settings(config):
            raise ValueError(
                f"`min_p`={config.min_p} and `top_p`={config.top_p} together: servers cut by `min_p` first and "
                "transformers last, so that log q, which is computed here, would be wrong. Unset one of them, or start "
                'the server with processed log probabilities and say logprobs_mode="processed".'
            )

    def sync_weights(self, model: Any, is_main_process: bool) -> None:
        """Brings the server's weights up to date; the main process does.

        Args:
            model: In evaluation mode, whole and unwrapped.
            is_main_process: Whether this process is the first of the run.
        """
        if self.weights is None:
            if is_main_process:
                self._warn(
                    f"No weights are handed over to {shown_url(self.base_url)}: all candidates come from the weights "
                    "that the server holds, whatever is learnt here. Pass `weights`, such as "
                    "SaveAndReload.sglang(...), or take this as it is where the server is meant to be a fixed teacher."
                )
            return
        self._version = None
        if is_main_process:
            self.weights(model)
        self._version = uuid.uuid4().hex

    def __call__(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        """Yields candidates as the server's replies come; what is impossible is raised before the first request.

        Of a server without `weights` log p is None where it does not say it: settings are in force.
        """
        check_request(request, context_length(model), model.config.is_encoder_decoder)
        self.check(model, request.generation_config, ("log_q",) if request.with_log_probs else ())
        if self.weights is not None and self._version is None:
            raise RuntimeError(
                "No weights were handed over to the server, or it did not take them. Call `sync_weights` before "
                "generating."
            )
        return self._generate(model, request)

    def _generate(self, model: Any, request: GenerationRequest) -> Iterator[GeneratedSequence]:
        settings = (self.timeout_seconds, self.max_retries, self.backoff_seconds)
        client = OpenAIClient(self.base_url, self.api_key, *settings, may_restart=self.is_fixed)
        ask = RequestSender(client, request, self._reader(model, request), self._fields(request), self.dialect)
        # Its threads are daemons: after a failure or an interrupt nothing waits for the replies under way.
        pool = ThreadPool(self.concurrency)
        try:
            for answers in pool.imap_unordered(ask, jobs_of(request, self.candidates_per_request)):
                yield from self._sequences(model, request, answers)
                if answers.failure is not None:
                    raise answers.failure
        finally:
            pool.terminate()
            client.close()

    def _sequences(self, model: Any, request: GenerationRequest, answers: Answers) -> Iterator[GeneratedSequence]:
        """Yields the candidates of a job, with their log probabilities where wanted."""
        found = [(answers.job.prompt, index, one) for index, one in answers.found.items()]
        log_q: dict[int, Any] = {}
        log_p: dict[int, Any] = {}
        if request.with_log_probs:
            log_q = {at: torch.tensor(one.log_probs) for at, (_, _, one) in enumerate(found) if one.log_probs}
            log_p = {} if needed_settings(request.generation_config) else dict(log_q)
            if self.is_fixed and len(log_q) < len(found):
                raise ValueError(missing_log_q("it gave none that fit its tokens"))
            for with_log_q in () if self.is_fixed else (False, True):
                rows = [at for at in range(len(found)) if at not in log_p and (at not in log_q) == with_log_q]
                prompts = [request.prompts[found[at][0]] for at in rows]
                tokens = [found[at][2].token_ids for at in rows]
                scores = token_log_probabilities(model, prompts, tokens, request.generation_config, with_log_q)
                log_p |= {at: own for at, (_, own) in zip(rows, scores)}
                log_q |= {at: own for at, (own, _) in zip(rows, scores) if own is not None}
        for at, (prompt, index, one) in enumerate(found):
            yield GeneratedSequence(prompt, index, one.token_ids, one.finish_reason, log_q.get(at), log_p.get(at))

    def _asks_log_probs(self, request: GenerationRequest) -> bool:
        """Whether to request log probabilities: raw ones are log q only without active settings."""
        is_plain = not needed_settings(request.generation_config)
        is_wanted = request.with_log_probs and self.dialect != "transformers"
        return is_wanted and (is_plain or self.logprobs_mode == "processed")

    def _reader(self, model: Any, request: GenerationRequest) -> ReplyReader:
        config, stops = request.generation_config, request.generation_config.stop_strings or ()
        # A copy: fast tokenizers change their padding in place, and the caller uses its own meanwhile.
        tokenizer = copy.deepcopy(request.tokenizer)
        if tokenizer is not None:
            tokenizer("", add_special_tokens=False)  # set up here, and only read by the threads
        # Embeddings are often padded beyond the tokenizer, and a token up there can be sampled like any other.
        size = max(0 if tokenizer is None else len(tokenizer), model.config.get_text_config().vocab_size)
        return ReplyReader(
            tokenizer,
            tuple(end_tokens(config)),
            (stops,) if isinstance(stops, str) else tuple(stops),
            size,
            self._asks_log_probs(request),
            self._warn,
        )

    def _fields(self, request: GenerationRequest) -> dict[str, Any]:
        """Fields of every request."""
        fields = {"model": self.model, **sampling_fields(request.generation_config, self.dialect)}
        if self._asks_log_probs(request):
            fields |= {"logprobs": 1}
            fields |= {"return_tokens_as_token_ids": True} if self.dialect == "vllm" else {}
        if self._version is not None and self.dialect == "vllm":
            # Servers keep what they computed of a prompt, some beyond a change of weights: a new name finds none.
            fields["cache_salt"] = self._version
        return fields | dict(self.options)

    def _warn(self, message: str) -> None:
        """Warns, once of each kind: of messages that begin alike, the first."""
        kind = message[:40]
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message)


# What a request says by itself, or what would change the shape of a reply.
_NEVER = {
    "model", "prompt", "n", "seed", "max_tokens", "temperature", "stop", "logprobs", "generation_config",
    "max_completion_tokens", "best_of", "echo", "stream", "suffix", "use_beam_search",
}  # fmt: skip

# The same, but a server that does not know the field can be spared it: by the setting that must then not be in force.
_SPARED: dict[str, str | None] = {
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens", "include_stop_str_in_output": "stop_strings", "stop_token_ids": None,
    "skip_special_tokens": None, "return_token_ids": None, "return_tokens_as_token_ids": None, "cache_salt": None,
}  # fmt: skip


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises if a count or a time of an engine, by the names of its arguments, is none or out of its range.

    Raises:
        TypeError: If a count is no integer, or a time no number.
        ValueError: If one is too small.
    """
    for name, least in (("concurrency", 1), ("candidates_per_request", 1), ("max_retries", 0)):
        value = values[name]
        if value is None and name == "candidates_per_request":
            continue
        if type(value) is not int:
            raise TypeError(f"`{name}`={value!r} must be an integer of at least {least}.")
        if value < least:
            raise ValueError(f"`{name}`={value} must be at least {least}.")
    for name in ("timeout_seconds", "backoff_seconds"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}`={value!r} must be a number of seconds.")
        if not value >= 0 or (value == 0 and name == "timeout_seconds"):
            raise ValueError(f"`{name}`={value} must be {'more than' if name == 'timeout_seconds' else 'at least'} 0.")


def check_choices(dialect: str, logprobs_mode: str) -> None:
    """Raises ValueError if a name is not one of those known."""
    if dialect not in DIALECTS or logprobs_mode not in ("raw", "processed"):
        raise ValueError(
            f"`dialect`={dialect!r} must be one of {', '.join(map(repr, DIALECTS))}, and "
            f"`logprobs_mode`={logprobs_mode!r} 'raw' or 'processed'."
        )


def check_weights(weights: Any) -> None:
    """Raises TypeError if what is to hand weights over cannot be called with a model."""
    is_unmade = inspect.ismethod(weights) and isinstance(weights.__self__, type)
    if weights is not None and (isinstance(weights, type) or is_unmade or not callable(weights)):
        raise TypeError(
            f"`weights`={weights!r} must be None, or what takes a model and brings it to the server. Write "
            "SaveAndReload.sglang(base_url, directory), with its arguments, or a function of yours."
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError if more of a request is asked for than is free to say."""
    for name, value in options.items():
        if name in _NEVER or (name in _SPARED and value is not None):
            raise ValueError(
                f"`options` has {name}={value!r}, which every request says by itself: the candidates would be others "
                "than those that are asked for and written down. Say it by `generation_config`, or by the arguments "
                "of EndpointEngine."
                + (" None takes it out, for a server that does not know it." if name in _SPARED else "")
            )


def check_spared(options: Mapping[str, Any], config: GenerationConfig) -> None:
    """Raises ValueError if an active setting lost its field in the requests."""
    active_settings = needed_settings(config) | ({"stop_strings"} if config.stop_strings else set())
    for name in options:
        setting = _SPARED.get(name)
        if setting in active_settings:
            raise ValueError(
                f"`options` takes {name} out of the requests, and `generation_config` has "
                f"{setting}={config.to_dict()[setting]!r}, which it says. Unset the one or the other."
            )


def check_log_probs(config: GenerationConfig, dialect: str, logprobs_mode: str, wanted: Collection[str]) -> None:
    """Raises ValueError if log probabilities are wanted of a server with weights of its own that it does not give.

    Its weights are not those of the model, so that the model here cannot say what the server does not.

    Args:
        config: Complete: see `generation_config.sampling_config`.
        dialect: One of `DIALECTS`.
        logprobs_mode: "raw" or "processed".
        wanted: Of "log_q" and "log_p".
    """
    settings = sorted(needed_settings(config))
    if not wanted or (not settings and dialect != "transformers"):
        return
    if dialect == "transformers" or logprobs_mode == "raw":
        raise ValueError(missing_log_q(f"{', '.join(settings)} in force" if settings else "its dialect has none"))
    if "log_p" in wanted:
        raise ValueError(
            f"log p, of the undistorted distribution of what generates, is wanted. The server says log q, with "
            f"{', '.join(settings)} in force, and its weights are not those of the model here. Name the model that log "
            "p is wanted of as `reference_model`, or sample plainly (temperature 1, no truncation), or pass `weights`."
        )


def missing_log_q(reason: str) -> str:
    """Returns why log probabilities are lacking, and what to do."""
    return (
        f"Log probabilities of the candidates are wanted, and the server's do not serve ({reason}). Its weights are "
        "not those of the model, so that the model cannot say them either. Sample plainly (temperature 1, no "
        "truncation), or have the server say them (vLLM: --logprobs-mode processed_logprobs, and here "
        'logprobs_mode="processed"), or pass `weights`; if the server holds the very weights of the model, '
        "weights=lambda model: None says so."
    )
