"""How weights reach a server that generates: saved to a folder that both see, then loaded by a request to the server.

A model enters; afterwards the server generates from its weights, or an error says why not.
"""

import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

WeightsHandOver = Callable[[Any], None]

_PLACE = "{path}"


@dataclass(frozen=True)
class SaveAndReload:
    """Saves the model, then asks the server to load it. The folder before is removed once the server has the new one.

    Attributes:
        directory: Holds one folder `round-<number>` at a time; the server must see it under the same path.
        url: Where the request to load is sent.
        payload: Its JSON; "{path}" stands for the folder saved.
        saves: "model" for whole weights, "adapter" for those of a PEFT adapter.
        unload_url: Where a request to drop the weights of before goes first; "not found" is no fault.
        unload_payload: Its JSON.
        api_key: Sent as a bearer token.
        timeout_seconds: Most that the server may take to load.

    Raises:
        ValueError: If no value of `payload` holds "{path}"; when called, if what was saved is not what `saves` says.
        RuntimeError: When called, if the server does not load the weights.
    """

    directory: str | Path
    url: str
    payload: Mapping[str, Any]
    saves: Literal["model", "adapter"] = "model"
    unload_url: str | None = None
    unload_payload: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
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
        for other in self._folders():
            if other != folder:
                shutil.rmtree(other)

    def _save(self, model: Any) -> Path:
        """Returns the folder of the weights, which appears under its name once it is whole."""
        parent = Path(self.directory).resolve()
        numbers = [int(folder.name.removeprefix("round-")) for folder in self._folders()]
        folder, draft = parent / f"round-{max(numbers, default=-1) + 1}", parent / ".incomplete"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        model.save_pretrained(draft)
        wanted = "config.json" if self.saves == "model" else "adapter_config.json"
        if not (draft / wanted).is_file():
            written = sorted(path.name for path in draft.iterdir())
            shutil.rmtree(draft)
            raise ValueError(
                f"`saves`={self.saves!r} expects {wanted} among what {type(model).__name__}.save_pretrained writes, "
                f"and found {written}. A model with an adapter is handed over by "
                "SaveAndReload.vllm_lora, one without by SaveAndReload.sglang."
            )
        os.replace(draft, folder)
        return folder

    def _folders(self) -> list[Path]:
        found = Path(self.directory).resolve().glob("round-*")
        return [folder for folder in found if folder.name.removeprefix("round-").isdigit()]

    def _post(self, url: str, payload: Mapping[str, Any], is_missing_fine: bool = False) -> None:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, json.dumps(dict(payload)).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as reply:
                answer = reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            if is_missing_fine and error.code == 404:
                return
            answer = error.read().decode(errors="replace")
            raise RuntimeError(self._refusal(url, f"{error.code}: {answer[:500]}")) from error
        except OSError as error:  # refused, dropped, or out of time
            raise RuntimeError(self._refusal(url, str(error))) from error
        if _is_failure(answer):
            raise RuntimeError(self._refusal(url, answer[:500]))

    def _refusal(self, url: str, found: str) -> str:
        return (
            f"The server did not take over the weights: {url} answered {found}. Nothing is generated from old weights. "
            f"Check that it runs, sees {Path(self.directory).resolve()}, and was started so that weights can change."
        )


def _filled(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, path) for item in value]
    return value.replace(_PLACE, path) if isinstance(value, str) else value


def _is_failure(answer: str) -> bool:
    """Whether a reply that came with 200 says that it failed."""
    try:
        content = json.loads(answer)
    except ValueError:
        return False  # plain words of success, such as vLLM's
    return isinstance(content, dict) and content.get("success") is False
