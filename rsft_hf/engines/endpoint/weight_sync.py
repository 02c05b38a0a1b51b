"""Weight sync to an inference server: save a checkpoint to a shared folder, then request that the server loads it.

Afterwards the server generates from the current weights, or an error says why not.
"""

import json
import os
import shutil
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rsft_hf.engines.model_access import is_peft_model
from rsft_hf.openai_client import shown_url

WeightsHandOver = Callable[[Any], None]

_PLACE = "{path}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, load nothing, and take the key with it: it is an error."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def names_no_error(answer: str) -> bool:
    """Returns whether a reply neither is a page of HTML nor names an error; plain words and nothing at all do not.

    Example:
        >>> [names_no_error(text) for text in ("Success: added.", '{"detail": "Not Found"}', "<html>busy</html>")]
        [True, False, False]
    """
    try:
        content = json.loads(answer)
    except ValueError:
        return not answer.lstrip().startswith("<")
    if not isinstance(content, dict):
        return True
    is_named = any(content.get(name) for name in ("error", "errors", "detail")) or content.get("status") == "error"
    return not is_named and content.get("success", True) is not False


def says_success(answer: str) -> bool:
    """Returns whether a reply is JSON that says success: true, as SGLang's does.

    Example:
        >>> [says_success(text) for text in ('{"success": true}', "{}", "Success")]
        [True, False, False]
    """
    try:
        content = json.loads(answer)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("success") is True


@dataclass(frozen=True)
class SaveAndReload:
    """Saves the model, then asks the server to load it. The folder before is removed once the server has the new one.

    Folders are named `weights-<token>-<number>`, by a token of this object's own: it removes no others, and a process
    that was killed leaves its last one.

    Attributes:
        directory: Holds one folder at a time, that of the last weights; the server must see it under the same path.
        url: Where the request to load is sent.
        payload: Its JSON; "{path}" stands for the folder saved.
        saves: "model" for whole weights, "adapter" for those of a PEFT adapter.
        unload_url: Where a request to drop the weights of before goes first; "not found" is no fault.
        unload_payload: Its JSON.
        api_key: Sent as a bearer token.
        timeout_seconds: Most that the server may take to load.
        succeeds: Says of a reply that came with 200 whether the weights were taken over. By default a page of HTML and
            an object that names an error do not say so.

    Raises:
        ValueError: If no value of `payload` holds "{path}", or an address is none; when called, if what was saved is
            not what `saves` says, or several adapters are active.
        RuntimeError: When called, if the server does not load the weights.
    """

    directory: str | Path
    url: str = field(repr=False)
    payload: Mapping[str, Any]
    saves: Literal["model", "adapter"] = "model"
    unload_url: str | None = field(default=None, repr=False)
    unload_payload: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 600.0
    succeeds: Callable[[str], bool] = names_no_error
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:12], init=False, repr=False, compare=False)
    _made: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("url", "unload_url"):
            if vars(self)[name] is not None:
                check_url(name, vars(self)[name])
        if _PLACE not in json.dumps(dict(self.payload)):
            raise ValueError(f"`payload`={dict(self.payload)} nowhere names the folder to load. Put {_PLACE!r} there.")

    @classmethod
    def sglang(cls, base_url: str, directory: str | Path, **settings: Any) -> "SaveAndReload":
        """Whole weights for SGLang.

        Args:
            base_url: As that of the engine, with or without `/v1`.
            directory: See the class.
            **settings: More of the class.
        """
        root = base_url.rstrip("/").removesuffix("/v1")
        settings = {"succeeds": says_success} | settings
        return cls(directory, f"{root}/update_weights_from_disk", {"model_path": _PLACE}, **settings)

    @classmethod
    def vllm_lora(cls, base_url: str, directory: str | Path, name: str, **settings: Any) -> "SaveAndReload":
        """A LoRA adapter for vLLM, started with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.

        Args:
            base_url: As that of the engine.
            directory: See the class.
            name: Of the adapter at the server: the engine's `model`.
            **settings: More of the class.
        """
        root = base_url.rstrip("/").removesuffix("/v1")
        # Dropped and loaded anew: one that was loaded in place is read from disk again at every step by some versions.
        return cls(
            directory,
            f"{root}/v1/load_lora_adapter",
            {"lora_name": name, "lora_path": _PLACE},
            saves="adapter",
            unload_url=f"{root}/v1/unload_lora_adapter",
            unload_payload={"lora_name": name},
            **settings,
        )

    def __call__(self, model: Any) -> None:
        """Brings the server's weights up to date."""
        folder = self._save(model)
        if self.unload_url is not None:
            self._post(self.unload_url, self.unload_payload, is_missing_fine=True)
        self._post(self.url, _filled(dict(self.payload), str(folder)))
        for other in self._made[:-1]:
            shutil.rmtree(other, ignore_errors=True)
        del self._made[:-1]

    def _save(self, model: Any) -> Path:
        """Returns the folder of the weights, which appears under its name once it is whole."""
        number = int(self._made[-1].name.rpartition("-")[2]) + 1 if self._made else 0
        folder = Path(self.directory).resolve() / f"weights-{self._token}-{number}"
        draft = folder.with_name(f".{folder.name}.incomplete")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            os.replace(self._saved(model, draft), folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._made.append(folder)
        return folder

    def _saved(self, model: Any, draft: Path) -> Path:
        """Returns the folder, in the draft, that holds what the server is to load."""
        adapter = _active_adapter(model) if self.saves == "adapter" else None
        if adapter is None:
            model.save_pretrained(draft)
        else:
            model.save_pretrained(draft, selected_adapters=[adapter])
        wanted = "config.json" if self.saves == "model" else "adapter_config.json"
        places = [draft] if adapter is None else [draft, draft / adapter]  # peft has no folder for "default"
        for place in places:
            if (place / wanted).is_file():
                return place
        raise ValueError(
            f"`saves`={self.saves!r} expects {wanted} among what {type(model).__name__}.save_pretrained writes, "
            f"and found {sorted(path.name for path in draft.iterdir())}. A model with an adapter is handed over by "
            "SaveAndReload.vllm_lora, one without by SaveAndReload.sglang."
        )

    def _post(self, url: str, payload: Mapping[str, Any], is_missing_fine: bool = False) -> None:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, json.dumps(dict(payload)).encode(), headers, method="POST")
        try:
            with _OPENER.open(request, timeout=self.timeout_seconds) as reply:
                answer = reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            if is_missing_fine and error.code == 404:
                return
            answer = error.read().decode(errors="replace")
            raise RuntimeError(self._refusal(url, f"{error.code}: {answer[:500]}")) from error
        except OSError as error:  # refused, dropped, or out of time
            raise RuntimeError(self._refusal(url, str(error))) from error
        succeeds = self.succeeds if url == self.url else names_no_error
        if not succeeds(answer):
            raise RuntimeError(self._refusal(url, answer[:500] or "nothing"))

    def _without_key(self, text: str) -> str:
        return text.replace(self.api_key, "***") if self.api_key else text

    def _refusal(self, url: str, found: str) -> str:
        return (
            f"The server did not take over the weights: {shown_url(url)} answered "
            f"{self._without_key(found)}. Nothing is generated from old weights. "
            f"Check that it runs, sees {Path(self.directory).resolve()}, and was started so that weights can change."
        )


def _filled(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, path) for item in value]
    return value.replace(_PLACE, path) if isinstance(value, str) else value


def _active_adapter(model: Any) -> str | None:
    """Returns the name of the adapter that the model runs with, None if it has none."""
    if not is_peft_model(model):
        return None
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The model runs with the adapters {model.active_adapters} at once, and a server loads one. Make one of "
            "them active, by model.set_adapter(name)."
        )
    return str(model.active_adapters[0])


def check_url(name: str, url: Any) -> None:
    """Raises if an address cannot be asked for anything.

    Raises:
        TypeError: If it is no text.
        ValueError: If it lacks http:// or https://, or a host.
    """
    if not isinstance(url, str):
        raise TypeError(f"`{name}`={url!r} must be text such as 'http://localhost:8000/v1'.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"`{name}`={url.rpartition('@')[2]!r} is no address of a server. Write it as 'http://localhost:8000/v1'."
        )
