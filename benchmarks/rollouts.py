"""Rollouts of `generation.py`: every contender generates a workload, each candidate at its prescribed length.

A rollout takes a workload and returns the number of tokens of each candidate. Lengths are forced by

- a logits processor for `generate`: it forbids the end token until a row's last step and allows nothing else there, one
  column of the scores per step, so that the loop sees rows end as it does with a real model;
- the `max_new_tokens` of each request for `generate_batch`, `limits` for an engine, both with no end token;
- a subclass of the model for TRL, since a trainer hands nothing through to `generate`.

TRL's rollout is `_generate_and_score_completions` of GRPO and RLOO, on a CPU. A trainer is built once, untimed, with a
reward that costs nothing, no reference model, and prompts as text of one word per token. Timed is all that it does
between a batch of prompts and the batch that it trains on, which for RLOO includes its own log probabilities.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from workloads import END, PAD, VOCAB_SIZE, Workload

from rsft_hf.engines import Engine, GenerateEngine, GenerationRequest, InFlightEngine

Lengths = list[list[int]]
CERTAIN = 1e9  # leaves every other token probability 0, and unlike infinity it passes through a softmax
PAGE = 64  # tokens of a page of `generate_batch`; its default of 256 is no faster here, and needs room for all pages
BATCH_TOKENS = 1024
SECONDS_OF_REQUESTS = 600  # after which continuous batching counts as stuck
TRL_REQUESTS = 32  # concurrent requests of TRL's continuous batching: the best setting of `generate_batch` here


class ForcedEnds(LogitsProcessor):
    """Logits processor that ends every row at its prescribed length.

    Args:
        lengths: Number of tokens of each row, the end token included, shape (rows,), int64.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        scores[:, END] = torch.where(self.lengths <= self.step, CERTAIN, -torch.inf)  # `generate` passes a copy
        return scores


class ChildLimits(int):
    """Token limit of a forked request; its deep copies are the limits of the children, in descending order.

    A forked request is a deep copy of its parent, so this is the only way for its limit to differ from the parent's.
    The parent takes the largest limit, so that it is still running when its children are forked.
    """

    def __new__(cls, limits: Iterable[int]) -> "ChildLimits":
        descending = sorted(limits, reverse=True)
        limit = super().__new__(cls, descending[0])
        limit.of_children = iter(descending[1:])
        return limit

    def __deepcopy__(self, memo: dict) -> int:
        return next(self.of_children)


@dataclass(frozen=True)
class Rollout:
    """A contender, ready to run.

    Attributes:
        model: Model that it calls; TRL's trainers have a copy of their own.
        generate: Function that generates a workload and returns the number of tokens of each candidate.
    """

    model: Any
    generate: Callable[[Workload], Lengths]


def kind_of(name: str) -> str:
    """Returns the first word of a contender's name; the rest is its setting."""
    return name.partition(" ")[0]


def count_to_end(tokens: torch.Tensor) -> list[int]:
    """Returns the number of tokens of each row up to its first end token, included."""
    is_end = tokens == END
    return (tokens.shape[1] - (is_end.cumsum(1) - is_end.long()).bool().sum(1)).tolist()


def sampling(workload: Workload, **settings: Any) -> GenerationConfig:
    """Returns a configuration of plain sampling: temperature 1, no truncation."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_beams": 1, "pad_token_id": PAD}
    return GenerationConfig(**plain, max_new_tokens=workload.size.longest, **settings)


def forced_generate(model: Any, inputs: dict, config: GenerationConfig, lengths: list[int], **keywords: Any) -> Any:
    """Calls `model.generate` with rows that end at `lengths`."""
    processors = LogitsProcessorList([ForcedEnds(torch.tensor(lengths, device=model.device))])
    return model.generate(**inputs, generation_config=config, logits_processor=processors, **keywords)


def pad(prompts: list[list[int]], model: Any) -> dict[str, torch.Tensor]:
    """Pads prompts: on the left for a decoder-only model, on the right for an encoder."""
    is_left, width = not model.config.is_encoder_decoder, max(map(len, prompts))
    rows = [[PAD] * (width - len(ids)) * is_left + ids + [PAD] * (width - len(ids)) * (1 - is_left) for ids in prompts]
    input_ids = torch.tensor(rows, device=model.device)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}  # no token of a workload is PAD


def in_batches(model: Any, workload: Workload, order: list[int], prompts_per_batch: int) -> Lengths:
    """Generates with `model.generate`, `prompts_per_batch` prompts with all of their candidates per call."""
    num_candidates = workload.size.num_candidates
    counted: dict[int, list[int]] = {}
    for start in range(0, len(order), prompts_per_batch):
        batch = order[start : start + prompts_per_batch]
        inputs = pad([workload.prompts[prompt] for prompt in batch], model)
        config = sampling(workload, num_return_sequences=num_candidates, eos_token_id=END)
        lengths = [length for prompt in batch for length in workload.lengths[prompt]]
        output = forced_generate(model, inputs, config, lengths)
        first = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        counts = count_to_end(output[:, first:])
        counted |= {prompt: counts[at * num_candidates :][:num_candidates] for at, prompt in enumerate(batch)}
    return [counted[prompt] for prompt in range(len(workload.prompts))]


def in_order(workload: Workload) -> list[int]:
    return list(range(len(workload.prompts)))


def mean_lengths(workload: Workload) -> list[float]:
    """Returns the mean length of each prompt's candidates, as a perfect prediction of it."""
    return [sum(row) / len(row) for row in workload.lengths]


def by_length(workload: Workload) -> list[int]:
    return sorted(in_order(workload), key=mean_lengths(workload).__getitem__)


def continuous_settings(num_requests: int, num_children: int = 1) -> dict[str, int]:
    """Returns settings of `generate_batch`, whose defaults take more than half of the memory.

    The cache has room for all children of the requests: a child that does not fit would be read again, with its
    parent's limit.
    """
    # Newer versions of transformers call a block a page.
    page = next(name for name in ("page_size", "block_size") if name in ContinuousBatchingConfig.__dataclass_fields__)
    return {"num_blocks": 4 * num_requests * num_children, page: PAGE, "max_batch_tokens": BATCH_TOKENS,
            "max_requests_per_batch": num_requests}  # fmt: skip


def run_requests(model: Any, prompts: list, limits: list, config: GenerationConfig, settings: Any) -> dict[str, Any]:
    """Runs continuous batching with a token limit per request; returns the outputs by request id.

    Raises:
        RuntimeError: If a request failed.
    """
    results: dict[str, Any] = {}
    deadline = time.monotonic() + SECONDS_OF_REQUESTS
    num_requests = len(prompts) * (config.num_return_sequences or 1)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=settings, timeout=5
    ) as manager:
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
            manager.add_request(ids, request_id=str(number), max_new_tokens=limit, eos_token_id=-1)
        while len(results) < num_requests:
            output = manager.get_result(timeout=1)
            if output is None and (not manager.is_running() or time.monotonic() > deadline):
                raise RuntimeError(f"`generate_batch` stopped after {len(results)} of {num_requests} requests.")
            if output is not None and output.error is not None:
                raise RuntimeError(f"`generate_batch` failed at request {output.request_id}: {output.error}")
            if output is not None and output.is_finished():
                results[output.request_id] = output
    return results


def in_requests(model: Any, workload: Workload, num_requests: int, is_forked: bool) -> Lengths:
    """Generates with continuous batching: one forked request per prompt, or one request per candidate."""
    num_candidates = workload.size.num_candidates
    settings = ContinuousBatchingConfig(**continuous_settings(num_requests, num_candidates if is_forked else 1))
    if is_forked:
        limits = [ChildLimits(row) for row in workload.lengths]
        config = sampling(workload, num_return_sequences=num_candidates, eos_token_id=-1)
        outputs = run_requests(model, workload.prompts, limits, config, settings)
    else:
        pairs = [(ids, limit) for ids, row in zip(workload.prompts, workload.lengths, strict=True) for limit in row]
        prompts, limits = zip(*pairs, strict=True)
        outputs = run_requests(model, list(prompts), list(limits), sampling(workload, eos_token_id=-1), settings)
    counted: Lengths = [[] for _ in workload.prompts]
    for name, output in outputs.items():
        number = int(name.partition("__child#")[0])
        counted[number if is_forked else number // num_candidates].append(len(output.generated_tokens))
    return counted


@torch.no_grad()
def with_engine(engine: Engine, model: Any, workload: Workload, **options: Any) -> Lengths:
    """Generates with one of the package's engines."""
    config = copy.deepcopy(model.generation_config)
    config.update(**sampling(workload, num_return_sequences=1).to_diff_dict())
    config.update(top_k=0, top_p=1.0, num_beams=1)
    width = workload.size.num_candidates
    seeds = [[prompt * width + index for index in range(width)] for prompt in range(len(workload.prompts))]
    request = GenerationRequest(workload.prompts, seeds, config, limits=workload.lengths, **options)
    counted = [[0] * width for _ in workload.prompts]
    for sequence in engine(model, request):
        counted[sequence.prompt][sequence.index] = len(sequence.token_ids)
    return counted


def build_rollout(name: str, model: Any, workload: Workload) -> Rollout:
    """Builds a contender; building is not timed.

    Args:
        name: Kind and setting, such as "generate_batch 32 forked" or "in_flight log_probs".
        model: Model that generates.
        workload: Workload whose size sets the number of candidates, and of slots.

    Raises:
        ValueError: If `name` is unknown.
    """
    size = workload.size
    kind, setting = kind_of(name), name.partition(" ")[2]
    if kind.startswith("trl"):
        return build_trl_rollout(kind, model, workload)
    if kind == "generate_batch":
        num_requests, _, form = setting.partition(" ")
        return Rollout(model, lambda work: in_requests(model, work, int(num_requests), is_forked=form == "forked"))
    if kind in ("naive", "fixed", "sorted"):
        width = 1 if kind == "naive" else max(1, size.slots // size.num_candidates)
        order = by_length if kind == "sorted" else in_order
        return Rollout(model, lambda work: in_batches(model, work, order(work), width))
    if kind not in ("in_flight", "generate_engine"):
        raise ValueError(f"Unknown contender {name!r}.")
    # One engine for all runs, as in training: it checks a model once.
    engine = InFlightEngine(max_sequences=size.slots) if kind == "in_flight" else GenerateEngine(size.slots)
    if setting == "longest_first":
        return Rollout(model, lambda work: with_engine(engine, model, work, expected_lengths=mean_lengths(work)))
    return Rollout(model, lambda work: with_engine(engine, model, work, with_log_probs=setting == "log_probs"))


def check_lengths(name: str, counted: Lengths, workload: Workload) -> None:
    """Checks that a contender generated every candidate at its prescribed length.

    The children of a forked request are not numbered, so the candidates of a prompt are compared sorted.

    Raises:
        RuntimeError: At the first prompt that differs.
    """
    for prompt, (found, meant) in enumerate(zip(counted, workload.lengths, strict=True)):
        if sorted(found) != sorted(meant):
            raise RuntimeError(f"{name} gave prompt {prompt} answers of {found} tokens instead of {meant}.")


class SteeredLlama(hf.LlamaForCausalLM):
    """Llama whose rows end at the lengths in `row_lengths`, which are set before each call."""

    row_lengths: list[int]

    def generate(self, *args: Any, **keywords: Any) -> Any:
        inputs = {name: keywords.pop(name) for name in ("input_ids", "attention_mask")}
        return forced_generate(super(), inputs, keywords.pop("generation_config"), self.row_lengths, **keywords)

    def generate_batch(self, inputs: list, generation_config: Any, continuous_batching_config: Any, **_: Any) -> dict:
        outputs = run_requests(self, inputs, self.row_lengths, generation_config, continuous_batching_config)
        return {name: outputs[name] for name in map(str, range(len(inputs)))}


def word_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Returns a tokenizer whose token 17 is the word "17"."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token=str(PAD)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(END))


def no_reward(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def build_trl_trainer(name: str, model: Any, workload: Workload) -> Any:
    """Builds one of TRL's trainers on a copy of `model`."""
    import trl  # an optional dependency, and slow to import

    classes = (trl.RLOOTrainer, trl.RLOOConfig) if name == "trl_rloo" else (trl.GRPOTrainer, trl.GRPOConfig)
    trainer_class, config_class = classes
    settings = {}
    size = workload.size
    if name == "trl_continuous":
        settings["use_transformers_continuous_batching"] = True
        settings["transformers_continuous_batching_config"] = continuous_settings(TRL_REQUESTS)
    steered = SteeredLlama(model.config)
    steered.load_state_dict(model.state_dict())
    steered.generation_config = model.generation_config
    arguments = config_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size.slots,
        num_generations=size.num_candidates,
        max_completion_length=size.longest,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    rows = Dataset.from_list([{"prompt": as_text(ids)} for ids in workload.prompts])
    parts = {"reward_funcs": no_reward, "train_dataset": rows, "processing_class": word_tokenizer()}
    return trainer_class(model=steered, args=arguments, **parts)


def as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def build_trl_rollout(name: str, model: Any, workload: Workload) -> Rollout:
    """Builds one of TRL's trainers as a contender; a call of it gets as many prompts as fill the slots.

    Continuous batching gets all prompts in one call, its best setting.
    """
    trainer = build_trl_trainer(name, model, workload)
    trainer.model.train()
    num_candidates = workload.size.num_candidates
    width = max(1, workload.size.slots // num_candidates)

    def generate(work: Workload) -> Lengths:
        step = len(work.prompts) if name == "trl_continuous" else width
        counted: Lengths = []
        for start in range(0, len(work.prompts), step):
            prompts, lengths = work.prompts[start : start + step], work.lengths[start : start + step]
            trainer.model.row_lengths = [length for row in lengths for length in row]
            rows = [{"prompt": as_text(ids)} for ids in prompts for _ in range(num_candidates)]
            batch = trainer._generate_and_score_completions(rows)
            counts = batch["completion_mask"].sum(1).tolist()
            counted += [counts[at : at + num_candidates] for at in range(0, len(counts), num_candidates)]
        return counted

    return Rollout(trainer.model, generate)
