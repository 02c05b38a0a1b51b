"""A stand-in for vLLM that answers as its public interface is documented, by running a tiny model on the CPU.

Recorded from vLLM's repository (`vllm/sampling_params.py` at 00388f6, `vllm/outputs.py` at 003d3ee,
`vllm/v1/core/sched/utils.py` at 018d5dc), its API page `vllm.v1.sample.sampler` of 0.22.1, and the calls of TRL 1.16
(`trl/generation/vllm_generation.py`, for vLLM 0.22 to 0.31). Names, defaults, checks and the order of the processors
are vLLM's; nothing else is. In: prompts as token ids, and `SamplingParams`. Out: `RequestOutput`.
"""

import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf

# Keywords of `EngineArgs` that the engine or its tests pass, with vLLM's defaults.
_ENGINE_ARGS = {
    "tokenizer": None, "skip_tokenizer_init": False, "distributed_executor_backend": None, "load_format": "auto",
    "logprobs_mode": "raw_logprobs", "gpu_memory_utilization": 0.9, "enable_prefix_caching": None,
    "generation_config": "auto", "max_model_len": None, "dtype": "auto", "quantization": None, "seed": 0,
}  # fmt: skip


@dataclass
class SamplingParams:
    """A misspelt keyword is a TypeError, as in vLLM's struct."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self.stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        self.stop_token_ids = self.stop_token_ids or []
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0 or self.top_k < -1 or not 0.0 <= self.min_p <= 1.0:
            raise ValueError("top_p must be in (0, 1], top_k at least -1, min_p in [0, 1].")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")
        if self.temperature < 1e-5:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class _Model(torch.nn.Module):
    """What runs inside of a worker; `load_weights` takes the names of a checkpoint and returns its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        torch.manual_seed(1234)
        self.model = getattr(hf, config.architectures[0])(config).eval()

    def load_weights(self, weights: Any) -> set[str]:
        own, loaded = dict(self.model.named_parameters()), set()
        for name, values in weights:
            own[name].data.copy_(values)  # KeyError for a name that the model has not
            loaded.add(f"model.{name}")
        return loaded


class LLM:
    """Started with weights of its own; keeps what it knows of a prompt until `reset_prefix_cache`."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        if unknown := set(kwargs) - set(_ENGINE_ARGS):
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        self.args = {**_ENGINE_ARGS, **kwargs}
        self.config = hf.AutoConfig.from_pretrained(model)
        if self.args["load_format"] != "dummy":
            raise OSError("Cannot find any model weights")
        self.tokenizer = None
        if not self.args["skip_tokenizer_init"]:
            self.tokenizer = hf.AutoTokenizer.from_pretrained(self.args["tokenizer"] or model)
        torch.manual_seed(self.args["seed"])
        inside = _Model(self.config)
        self.llm_engine = SimpleNamespace()  # with several processes there is no `model_executor` to be reached
        if self.args["distributed_executor_backend"] == "external_launcher":
            self.launched = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")]
            runner = SimpleNamespace(model=inside)
            self.llm_engine.model_executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self._inside, self._prefixes, self._counter = inside.model, {}, 0
        self.requests: list[tuple[list[int], SamplingParams]] = []

    def reset_prefix_cache(self) -> bool:
        self._prefixes.clear()
        return True

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        if len(prompts) != len(sampling_params):
            raise ValueError("The lengths of prompts and params must be the same.")
        outputs = []
        for prompt, params in zip(prompts, sampling_params):
            ids = list(prompt["prompt_token_ids"])
            self.requests.append((ids, params))
            completions = [self._complete(ids, params, index) for index in range(params.n)]
            outputs.append(RequestOutput(str(self._counter), None, ids, completions))
            self._counter += 1
        torch.rand(3)  # it shares the generators of the process
        return outputs

    @torch.no_grad()
    def _complete(self, prompt: list[int], params: SamplingParams, index: int) -> CompletionOutput:
        generator = None if params.seed is None else torch.Generator().manual_seed(params.seed + index)
        tokens: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        while True:
            logits = self._logits(prompt, tokens)
            processed = self._processed(logits.clone(), prompt + tokens, params)
            mode = processed if self.args["logprobs_mode"] == "processed_logprobs" else logits
            if params.temperature < 1e-5:
                token = int(processed.argmax())
            else:
                token = int(torch.multinomial(processed.softmax(-1), 1, generator=generator))
            tokens.append(token)
            logprobs.append({token: Logprob(float(mode.log_softmax(-1)[token]))})
            reason, stop = self._end(prompt, tokens, params)
            if reason is not None:
                text = self.tokenizer.decode(tokens) if params.detokenize else ""
                values = None if params.logprobs is None else logprobs
                total = sum(step[token].logprob for step, token in zip(logprobs, tokens))
                return CompletionOutput(index, text, tokens, total, values, reason, stop)

    def _logits(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        if not tokens and self.args["enable_prefix_caching"] and tuple(prompt) in self._prefixes:
            return self._prefixes[tuple(prompt)]
        logits = self._inside(torch.tensor([prompt + tokens])).logits[0, -1].float()
        return logits if tokens else self._prefixes.setdefault(tuple(prompt), logits)

    def _processed(self, logits: torch.Tensor, seen: list[int], params: SamplingParams) -> torch.Tensor:
        said = torch.tensor(sorted(set(seen)))
        penalty = torch.where(logits[said] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits[said] = logits[said] * penalty
        if params.temperature < 1e-5:
            return logits
        logits = logits / params.temperature
        logits[logits < logits.max() + math.log(params.min_p or 1e-30)] = -torch.inf
        if 0 < params.top_k < len(logits):
            logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        logits[order[shares.cumsum(-1) - shares >= params.top_p]] = -torch.inf
        return logits

    def _end(self, prompt: list[int], tokens: list[int], params: SamplingParams) -> tuple[str | None, Any]:
        own_end = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        if not params.ignore_eos and tokens[-1] == own_end:
            return "stop", None
        if tokens[-1] in params.stop_token_ids:
            return "stop", tokens[-1]
        text = self.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens) if params.stop else ""
        for string in params.stop:
            if string in text:
                return "stop", string
        longest = self.args["max_model_len"] or self.config.max_position_embeddings
        if len(tokens) >= (params.max_tokens or longest) or len(prompt) + len(tokens) >= longest:
            return "length", None
        return None, None
