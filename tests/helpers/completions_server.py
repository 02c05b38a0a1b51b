"""A completions server for the tests: a tiny real model behind HTTP, which honours n, seed and logprobs, or misbehaves.

In: requests as EndpointEngine sends them, in the dialect of vLLM or of `transformers serve`. Out: what such servers
return, and a record of what was asked, of how many requests were under way, and of the weights that were loaded.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import transformers as hf

import generators as g
from rsft_hf.engines.base import GenerationRequest
from rsft_hf.engines.generate import GenerateEngine

NAME = "tiny"
TRANSFORMERS_FIELDS = {
    "model", "prompt", "n", "seed", "max_tokens", "temperature", "top_p", "stop", "logprobs", "generation_config",
}  # fmt: skip
# Requests that fail while `mishaps` holds their names, one each, and what they are answered with.
STATUSES = {"500": 500, "503": 503, "429": 429, "400": 400, "401": 401, "404": 404, "422": 422}
BODIES = {
    "no json": "<html>busy</html>",
    "cut off": '{"choices": [{"te',
    "no choices": "{}",
    "empty choices": '{"choices": []}',
    "a list": "[1]",
    "choice of text": '{"choices": ["a"]}',
    "nothing said": '{"choices": [{"finish_reason": "stop"}]}',
}


class CompletionsServer(ThreadingHTTPServer):
    """Serves `model`; `manners` are persistent habits, `mishaps` befall the next requests, first come first served."""

    def __init__(self, model: Any = None, dialect: str = "vllm", logprobs_mode: str = "raw") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = {NAME: (model or g.tiny_model()).eval()}
        self.dialect, self.logprobs_mode = dialect, logprobs_mode
        self.manners: set[str] = set()
        self.mishaps: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.updates: list[tuple[str, dict[str, Any]]] = []
        self.retry_after = "0"
        self.busy = self.most_busy = 0
        self.together: threading.Barrier | None = None
        self.lock, self.at_work, self.released = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None: ...  # the client went away

    def choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of a reply, as the manners have it."""
        count = 1 if {"ignores n"} & self.manners or self.dialect == "transformers" else body.get("n", 1)
        count = max(1, count - 1) if "one choice fewer" in self.manners else count
        step = 0 if "one seed" in self.manners else 1
        seeds = [body["seed"] + step * index for index in range(count)]
        ids = body["prompt"] if isinstance(body["prompt"], list) else g.tokenizer()(body["prompt"])["input_ids"]
        request = GenerationRequest([ids], [seeds], self._config(body), True, g.tokenizer())
        with self.at_work, torch.no_grad():
            found = sorted(GenerateEngine()(self.models[body["model"]], request), key=lambda one: one.index)
        return [self._choice(one, body) for one in found]

    def _config(self, body: dict[str, Any]) -> hf.GenerationConfig:
        model = self.models[body["model"]]
        if self.dialect == "transformers":
            given = hf.GenerationConfig(**json.loads(body["generation_config"]))
            given.max_new_tokens = body["max_tokens"]
            return given
        settings = {"top_k": max(0, body.get("top_k", -1)), "top_p": body["top_p"], "min_p": body.get("min_p") or None,
                    "temperature": body["temperature"]}  # fmt: skip
        is_greedy = body["temperature"] == 0
        return g.complete(
            model,
            is_greedy=is_greedy,
            max_new_tokens=body["max_tokens"],
            repetition_penalty=body.get("repetition_penalty", 1.0),
            min_new_tokens=body.get("min_tokens") or None,
            stop_strings=body.get("stop"),
            eos_token_id=sorted({g.EOS, *([] if "knows one end" in self.manners else body.get("stop_token_ids", []))}),
            **({} if is_greedy else settings),
        )

    def _choice(self, one: Any, body: dict[str, Any]) -> dict[str, Any]:
        ids = list(one.token_ids)
        log_probs = (one.log_q if self.logprobs_mode == "processed" else one.log_p).tolist()
        text = g.tokenizer().decode(ids, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": one.index, "text": text, "finish_reason": one.finish_reason}
        if "logprobs" in body and "no log probs" not in self.manners and self.dialect != "transformers":
            choice["logprobs"] = {"token_logprobs": log_probs, "tokens": [f"token_id:{token}" for token in ids]}
        has_ids = not {"text only", "names tokens"} & self.manners and self.dialect == "vllm"
        if has_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if "text only" in self.manners and "logprobs" in choice:
            choice["logprobs"]["tokens"] = text.split()
        self._spoil(choice)
        return choice

    def _spoil(self, choice: dict[str, Any]) -> None:
        ids, numbers = choice.get("token_ids"), choice.get("logprobs", {}).get("token_logprobs")
        changes: dict[str, Any] = {
            "other ids": lambda: ids.__setitem__(0, 1000),
            "words for ids": lambda: ids.__setitem__(0, "a"),
            "too many ids": lambda: ids.extend([g.A] * 50),
            "strips the end": lambda: ids.pop() if ids[-1] == g.EOS else None,
            "other words": lambda: choice.__setitem__("text", "Zwölf Boxkämpfer"),
            "short log probs": lambda: numbers.pop(),
            "positive log probs": lambda: numbers.__setitem__(0, 1.0),
            "log probs that are no number": lambda: numbers.__setitem__(0, float("nan")),
            "least log probs": lambda: numbers.__setitem__(0, -9999.0),
            "aborts": lambda: choice.__setitem__("finish_reason", "abort"),
            "no reason": lambda: choice.__setitem__("finish_reason", None),
        }
        for manner in self.manners & changes.keys():
            changes[manner]()

    def load(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """What an update of weights comes to: the checkpoint is really loaded."""
        self.updates.append((path, body))
        if "refuses weights" in self.manners:
            return 200, {"success": False, "message": "no such parameter"}
        if path == "/update_weights_from_disk":
            self.models[NAME] = hf.AutoModelForCausalLM.from_pretrained(body["model_path"]).eval()
            return 200, {"success": True, "message": "done"}
        if path == "/v1/unload_lora_adapter":
            return (200, "done") if self.models.pop(body["lora_name"], None) is not None else (404, {"error": "none"})
        if body["lora_name"] in self.models:
            return 400, {"error": "already loaded"}
        from peft import PeftModel

        self.models[body["lora_name"]] = PeftModel.from_pretrained(g.tiny_model(), body["lora_path"]).eval()
        return 200, "Success: LoRA adapter added."


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            code, content = server.load(self.path, body)
            return self.send(code, content if isinstance(content, str) else json.dumps(content))
        with server.lock:
            server.bodies.append(body)
            mishap = server.mishaps.pop(0) if server.mishaps else ""
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        if server.together is not None:
            server.together.wait(5)
        return self.answer(body, mishap)

    def answer(self, body: dict[str, Any], mishap: str) -> None:
        if mishap == "hang":
            self.server.released.wait(5)
        if mishap == "drop":
            return self.send(200, '{"choices": [', num_bytes=1000)
        if mishap in STATUSES:
            return self.send(STATUSES[mishap], json.dumps({"error": {"message": f"no: {mishap}"}}))
        if mishap in BODIES:
            return self.send(200, BODIES[mishap])
        unknown = body.keys() - TRANSFORMERS_FIELDS if self.server.dialect == "transformers" else set()
        is_text = isinstance(body["prompt"], str)
        if unknown or is_text == (self.server.dialect == "vllm"):
            return self.send(422, json.dumps({"detail": f"Unexpected fields in the request: {sorted(unknown)}"}))
        if body["model"] not in self.server.models:
            return self.send(404, json.dumps({"error": {"message": f"The model {body['model']} does not exist."}}))
        choices = self.server.choices(body)
        if mishap == "abort":
            choices[-1]["finish_reason"] = "abort"
        return self.send(200, json.dumps({"object": "text_completion", "choices": choices}))

    def send(self, code: int, content: str, num_bytes: int | None = None) -> None:
        with self.server.lock:  # before the client hears of it, and asks for more
            self.server.busy -= self.path == "/v1/completions"
        self.send_response(code)
        self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(num_bytes or len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args: Any) -> None: ...
