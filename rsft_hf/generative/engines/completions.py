"""Requests to a completions server: sent, sent again after a passing fault, and given up with a reason.

The body of a request enters, the list of its choices leaves. What they mean is not known here.
"""

import email.utils
import importlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

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
