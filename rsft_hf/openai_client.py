"""Client of OpenAI-compatible servers, with one retry policy for the endpoint engine and the judge."""

import email.utils
import importlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

_SHORTEST_KEY = 8  # a shorter one may be a word of any reply

_RETRIED_STATUSES = (408, 409, 425, 429)  # besides 5xx

_LONGEST_PAUSE_SECONDS = 60.0

_ARGUMENTS = ("model", "prompt", "messages")  # the client's own; all other fields of a request are sent as they are


class RequestRefused(ValueError):
    """Error for a request that the server refuses (4xx), and would refuse again.

    Attributes:
        status: HTTP status, 400 to 499.

    Example:
        >>> RequestRefused("no such model", 404).status
        404
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def shown_url(url: str) -> str:
    """Returns an address as it may be logged and stored: without user, password, query and final slash.

    Example:
        >>> shown_url("https://me:secret@example.org/v1/?key=secret")
        'https://example.org/v1'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def check_without_query(name: str, url: str | None) -> None:
    """Raises ValueError if an address has a query, which would stand in the middle of each request's, and in logs."""
    if url is not None and urlsplit(url).query:
        raise ValueError(
            f"`{name}`={shown_url(url)!r} is followed by a query. Give the address up to /v1, and a key as `api_key`."
        )


class OpenAIClient:
    """Connection to a server, safe to share between threads.

    Timeouts, lost connections and the statuses 408, 409, 425, 429 and 5xx are tried again after a pause, which doubles
    each time, and is no shorter than a server's `Retry-After`.

    Args:
        base_url: Address up to `/v1`, perhaps with user and password; None is OpenAI's, or that of `OPENAI_BASE_URL`.
        api_key: Key; None for a server that wants none.
        timeout_seconds: Seconds without a byte after which a try has failed.
        max_retries: Number of further tries.
        backoff_seconds: Pause before the second try.
        may_restart: Whether to try again after a lost connection: the process that answers then may be a new one,
            without the weights that were copied to the one before.
        extra: Extra of this package that installs the client, for the error message.

    Raises:
        ImportError: If the package `openai` is not installed.
        ValueError: If the address has a query.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key: str | None,
        timeout_seconds: float,
        max_retries: int,
        backoff_seconds: float,
        may_restart: bool = True,
        extra: str = "endpoint",
    ) -> None:
        self.max_retries, self.backoff_seconds, self.may_restart = max_retries, backoff_seconds, may_restart
        openai = client_library(extra)
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        check_without_query("base_url", base_url)
        parts = urlsplit(base_url or "")
        # Servers close idle connections, which must not be taken for a restart: then each request has its own.
        options: dict[str, Any] = {} if may_restart else {"headers": {"Connection": "close"}}
        if parts.username is not None:  # apart from the address, which is logged with every request
            options["auth"] = (unquote(parts.username), unquote(parts.password or ""))
            base_url = shown_url(base_url or "")
        # The library's own retries are off: they hide what happened, and draw from the global random generator.
        self._client = openai.OpenAI(
            api_key=api_key or "none",
            base_url=base_url,
            timeout=timeout_seconds,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(**options) if options else None,
        )
        self._is_closing = threading.Event()

    @property
    def base_url(self) -> str:
        """Address of the server for messages: without a final slash, a password, or a query."""
        return shown_url(str(self._client.base_url))

    def post(self, path: str, body: Mapping[str, Any], subject: str) -> str:
        """Returns the text of the reply to a request.

        Args:
            path: Resource: "/completions" or "/chat/completions".
            body: JSON of the request.
            subject: Noun for the request in error messages, such as "prompt 3".

        Raises:
            RequestRefused: If the server refuses the request (4xx).
            RuntimeError: If there is no reply after all tries; after a lost connection at once, unless the server may
                restart.
        """
        openai, failure, url = client_library(), "", self.base_url + path
        resource = self._client.chat.completions if path == "/chat/completions" else self._client.completions
        arguments = {name: body[name] for name in _ARGUMENTS if name in body}
        fields = {name: value for name, value in body.items() if name not in arguments}
        for attempt in range(self.max_retries + 1):
            seconds = None
            try:
                reply: str = resource.with_raw_response.create(**arguments, extra_body=fields).text
                return reply
            except openai.APIStatusError as error:
                status, said = error.status_code, self._without_key(error.response.text)[:500]
                if status < 500 and status not in _RETRIED_STATUSES:
                    raise RequestRefused(
                        f"The server at {url} refused the request of {subject} with {status}: {said}", status
                    ) from None  # its own message repeats the key, too
                failure, seconds = f"{status}: {said}", _retry_after(error.response.headers)
            except openai.APITimeoutError as error:
                failure = f"{type(error).__name__}: {error}"
            except openai.APIConnectionError as error:
                if not self.may_restart:
                    raise RuntimeError(
                        f"The connection to the server at {url} was lost ({error.__cause__ or error}). It may have "
                        "restarted, and would answer with other weights than those copied to it. See its log and run "
                        "again: what was generated is kept, and the weights are copied again."
                    ) from error
                failure = f"{type(error).__name__}: {error} {error.__cause__ or ''}".strip()
            if attempt < self.max_retries:
                self.pause(attempt, seconds)
        raise RuntimeError(
            f"The server at {url} gave no answer to {subject} in {self.max_retries + 1} tries; the last failed with "
            f"{failure}. Check that it runs, or raise `timeout_seconds` or `max_retries`."
        )

    def _without_key(self, text: str) -> str:
        """A reply, in which some servers repeat the key that they refuse."""
        key = self._client.api_key
        return text if len(key) < _SHORTEST_KEY else text.replace(key, "***")

    def pause(self, attempt: int, seconds: float | None = None) -> None:
        """Waits before another try; ends at once when the client is closed.

        Args:
            attempt: Number of failed tries before the last one, from 0.
            seconds: Pause that the server asked for; 0 is no wish to be asked again at once.

        Raises:
            RuntimeError: If the client is closed.
        """
        seconds = max(self.backoff_seconds * 2**attempt, seconds or 0.0)
        if self._is_closing.wait(min(seconds, _LONGEST_PAUSE_SECONDS)):
            raise RuntimeError("Not tried again: the client has been closed.")

    def close(self) -> None:
        """Ends retries and connections; replies under way may still come."""
        self._is_closing.set()
        self._client.close()


def client_library(extra: str = "endpoint") -> Any:
    """Returns the package `openai`.

    Args:
        extra: Extra of this package that installs it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ImportError(f"The client of OpenAI's API is missing: `pip install rsft-hf[{extra}]`.") from error


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait: OpenAI gives milliseconds, others seconds or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers.get(name, "")) * unit)
        except ValueError:
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
