"""Checks on one GPU, in at most six minutes: what is exact on a CPU must be exact there, and speed is measured.

    make check-gpu                          # or: python benchmarks/gpu.py --json gpu.json

Needs the package and torch for the GPU; LoRA is left out where peft is not installed. Each check gives figures and
whether it passed; one that fails says why and the others go on. `--small` runs all of it in small, on a CPU too.

greedy        tokens of six architectures in fp32, from both engines, against `generate` of each prompt alone; where
              they differ, the two best logits must be nearly equal
sampled       the first token of many candidates in bf16 against the model's distribution, by a chi-square test
weighted      equal weights against plain Trainer: weights, after the same steps
generation    seconds and memory of `generate`, `generate_batch`, the engine without continuous batching, and the
              default one, on a config of half a billion parameters in bf16, each candidate at its prescribed length
lora          a round of the generative half with an adapter, as it is and merged
fsdp2         a round under FSDP2 with one process against one without
resume        a run resumed from a checkpoint in the middle against the whole one
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crash
import rollouts
import torch
import transformers as hf
import workloads
from measures import build_parser, seconds_of, write_json
from transformers.utils import logging

from rsft_hf import CandidateResampler, LossResampler, RejectionSamplingTrainer, Tempered, TopKPerPrompt
from rsft_hf.engines import GenerateEngine, GenerationRequest, InFlightEngine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.generative import load_candidates

SECONDS = 360
VOCABULARY = 64
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
NEARLY_EQUAL = 1e-3  # of two logits, in fp32 of a model with random weights
LEAST_P = 1e-3
SECONDS_OF_CONTENDER = 10  # after which the generation check takes no further run of a contender


def architectures(is_small: bool) -> dict[str, Callable[[], hf.PreTrainedModel]]:
    """Six models with random weights, whose distributions are far from uniform."""
    width, layers = (32, 2) if is_small else (256, 4)
    llama = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": width // 4, "max_position_embeddings": 512, "initializer_range": 0.2,
    }  # fmt: skip
    gpt2 = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    bart = {f"{part}_{name}": value for part in ("encoder", "decoder")
            for name, value in (("layers", layers), ("ffn_dim", 2 * width), ("attention_heads", 4))}  # fmt: skip
    bart |= {"d_model": width, "init_std": 0.2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    t5 = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_layers": layers, "num_heads": 4}
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SPECIAL, **llama)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SPECIAL, **llama)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SPECIAL, **llama, sliding_window=16)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SPECIAL, **gpt2)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SPECIAL, **t5, decoder_start_token_id=0)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SPECIAL, **bart)),
    }


def built(build: Callable[[], hf.PreTrainedModel], device: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return build().to(device, dtype).eval()


def random_prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def engine_tokens(engine: Any, model: Any, prompts: list[list[int]], config: Any, num_candidates: int = 1) -> Any:
    """The tokens of each candidate, by prompt and candidate."""
    seeds = [[1000 * prompt + index for index in range(num_candidates)] for prompt in range(len(prompts))]
    with torch.no_grad():
        found = list(engine(model, GenerationRequest(prompts, seeds, config)))
    return {(one.prompt, one.index): one.token_ids for one in found}


def gap_of_best_two(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Distance of the two largest logits for the token after these."""
    tokens = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = [model.generation_config.decoder_start_token_id, *answer]
            logits = model(input_ids=tokens, decoder_input_ids=torch.tensor([start], device=model.device)).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *answer]], device=model.device)).logits
    best = logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def check_greedy(device: str, is_small: bool) -> dict[str, Any]:
    """Tokens of both engines against `generate`, prompt by prompt."""
    found: dict[str, Any] = {}
    new = 8 if is_small else 48
    for name, build in architectures(is_small).items():
        model, prompts = built(build, device), random_prompts(4 if is_small else 32, 40)
        user = hf.GenerationConfig(max_new_tokens=new, do_sample=False)
        config = sampling_config(user, model, crash.tokenizer(), is_greedy=True)
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            with torch.no_grad():
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=copy.deepcopy(config)
                )
            row = output[0, (1 if model.config.is_encoder_decoder else len(prompt)) :].tolist()
            expected.append(row[: row.index(1) + 1] if 1 in row else row)
        for engine in (InFlightEngine(), GenerateEngine()):
            tokens = engine_tokens(engine, model, prompts, config)
            gaps = []
            for number, (prompt, answer) in enumerate(zip(prompts, expected, strict=True)):
                ours = tokens[number, 0]
                if ours != answer:
                    same = next(i for i in range(new) if ours[i : i + 1] != answer[i : i + 1])
                    gaps.append(gap_of_best_two(model, prompt, answer[:same]))
            found[f"{name}, {type(engine).__name__}"] = {"prompts": len(prompts), "differing": len(gaps), "gaps": gaps}
    worst = max((gap for one in found.values() for gap in one["gaps"]), default=0.0)
    return {"passed": worst < NEARLY_EQUAL, "differing": sum(one["differing"] for one in found.values()), "by": found}


def check_sampled(device: str, is_small: bool) -> dict[str, Any]:
    """Frequencies of first tokens against the model's own probabilities, in bf16."""
    count = 512 if is_small else 16_384
    model = built(architectures(is_small)["llama"], device, torch.bfloat16)
    prompt = random_prompts(1, 24)
    config = sampling_config(hf.GenerationConfig(max_new_tokens=2), model, crash.tokenizer())
    with torch.no_grad():
        logits = model(torch.tensor(prompt, device=device)).logits[0, -1].float().cpu()
    expected = logits.double().softmax(-1) * count
    found = {}
    for engine in (InFlightEngine(), GenerateEngine()):
        tokens = engine_tokens(engine, model, prompt, config, count)
        drawn = Counter(answer[0] for answer in tokens.values())
        observed = torch.tensor([float(drawn[token]) for token in range(VOCABULARY)], dtype=torch.float64)
        large = expected >= 5
        cells = [torch.cat((values[large], values[~large].sum()[None])) for values in (observed, expected)]
        kept = cells[1] > 0
        statistic = float(((cells[0] - cells[1])[kept] ** 2 / cells[1][kept]).sum())
        freedom = int(kept.sum()) - 1
        p = float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))
        found[type(engine).__name__] = {"candidates": count, "chi_square": statistic, "freedom": freedom, "p": p}
    return {"passed": min(one["p"] for one in found.values()) > LEAST_P, "by": found}


def check_weighted(device: str, is_small: bool) -> dict[str, Any]:
    """Largest difference of weights after training, of equal weights from plain Trainer, and of plain from itself."""

    def weights(trainer_class: Any, **others: Any) -> dict[str, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            args = crash.arguments(Path(folder), num_train_epochs=3, use_cpu=device == "cpu", save_strategy="no")
            trainer = trainer_class(crash.classifier(), args, train_dataset=crash.labelled_rows(), **others)
            trainer.train()
            return {name: value.cpu() for name, value in trainer.model.state_dict().items()}

    plain, again = weights(hf.Trainer), weights(hf.Trainer)
    noise = largest_difference(plain, again)
    found = {
        losses: largest_difference(
            plain, weights(RejectionSamplingTrainer, resampler=LossResampler(Tempered(0.0), losses=losses))
        )
        for losses in ("forward", "training")
    }
    return {"passed": max(found.values()) <= noise, "plain_again": noise, "differences": found}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def check_generation(device: str, is_small: bool) -> dict[str, Any]:
    """Medians of seconds, tokens a second, ratios to the default engine, and the peak of memory."""
    size = {"num_prompts": 4, "num_candidates": 2, "slots": 8, "mean": 6.0, "longest": 16} if is_small else {
        "num_prompts": 64, "num_candidates": 8, "slots": 256
    }  # fmt: skip
    model = workloads.build_model("llama" if is_small else "qwen_half_billion", device)
    workload = workloads.build_workload(workloads.Size(**size))
    found: dict[str, Any] = {}
    for name in ("in_flight", "generate_engine", "fixed", "generate_batch 64 forked"):
        try:
            contender = rollouts.build_rollout(name, model, workload)
            contender.generate(workloads.warm_up_of(workload))
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            runs = [seconds_of(lambda one=contender: one.generate(workload), device)]
            while not is_small and len(runs) < 3 and sum(one["wall"] for one, _ in runs) < SECONDS_OF_CONTENDER:
                runs.append(seconds_of(lambda one=contender: one.generate(workload), device))
        except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
            continue
        rollouts.check_lengths(name, runs[0][1], workload)
        seconds = statistics.median(one["wall"] for one, _ in runs)
        found[name] = {"seconds": seconds, "runs": len(runs), "tokens_per_second": workload.num_tokens / seconds}
        if device == "cuda":
            found[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        print(name, found[name], flush=True)
    ours = found["in_flight"]
    for one in found.values():
        if "seconds" in one and "seconds" in ours:
            one["ratio_to_in_flight"] = one["seconds"] / ours["seconds"]
    return {"passed": "seconds" in ours, "tokens": workload.num_tokens, "by": found}


def check_lora(device: str, is_small: bool) -> dict[str, Any]:
    """Loss, candidates and seconds of a round with an adapter, as it is and merged."""
    if importlib.util.find_spec("peft") is None:
        return {"passed": None, "skipped": "peft is not installed"}
    import peft

    words = rollouts.word_tokenizer()
    found = {}
    for is_merged in (False, True):
        model = workloads.build_model("llama" if is_small else "qwen_half_billion", device)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        made = CandidateResampler(
            lambda completions, **_: [float(len(set(text.split()))) for text in completions],
            TopKPerPrompt(1),
            num_candidates=4,
            generation_config=hf.GenerationConfig(do_sample=True, max_new_tokens=4 if is_small else 64),
            filters=(),
            merge_adapter=is_merged,
        )
        prompts = [{"prompt": " ".join(map(str, ids))} for ids in random_prompts(4 if is_small else 32, 24)]
        with tempfile.TemporaryDirectory() as folder:
            args = crash.arguments(
                Path(folder), num_train_epochs=1, use_cpu=device == "cpu", bf16=device == "cuda", save_strategy="no"
            )
            trainer = RejectionSamplingTrainer(
                peft.get_peft_model(model, config), args, train_dataset=prompts, processing_class=words, resampler=made
            )
            seconds, _ = seconds_of(trainer.train, device)
            history = trainer.state.log_history
            losses = [line["loss"] for line in history if "loss" in line]
            candidates = len(load_candidates(Path(folder) / "candidates"))
        is_finite = all(loss == loss and abs(loss) < 1e4 for loss in losses)
        found["merged" if is_merged else "as it is"] = {
            "losses": losses, "candidates": candidates, "seconds": seconds["wall"], "is_finite": is_finite,
        }  # fmt: skip
    return {
        "passed": all(one["is_finite"] and one["candidates"] == 4 * len(prompts) for one in found.values()),
        "by": found,
    }


def tiny_rounds(folder: Path, device: str, resume: str | None = None, **args: Any) -> dict[str, Any]:
    """Two rounds of a tiny generator: its candidates, losses and final weights."""
    made = CandidateResampler(
        crash.reward,
        TopKPerPrompt(1),
        num_candidates=4,
        generation_config=hf.GenerationConfig(do_sample=True, max_new_tokens=6),
        filters=(),
    )
    settings = {"num_train_epochs": 2, "use_cpu": device == "cpu", "learning_rate": 1e-3, **args}
    trainer = RejectionSamplingTrainer(
        crash.generator(), crash.arguments(folder, **settings), train_dataset=crash.prompts(),
        processing_class=crash.tokenizer(), resampler=made,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    rows = load_candidates(folder / "candidates").to_list()
    return {
        "candidates": [[row["prompt_id"], row["token_ids"], row["is_accepted"]] for row in rows],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "weights": {name: value.detach().cpu() for name, value in trainer.model.state_dict().items()},
    }


def check_fsdp2(device: str, is_small: bool) -> dict[str, Any]:
    """Candidates and losses of rounds under FSDP2 against those without it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sharded.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        done = subprocess.run(
            [*launch, __file__, "--child", str(target), "--device", device],
            capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            return {"passed": False, "failed": done.stderr[-1500:]}
        sharded = json.loads(target.read_text())
        whole = tiny_rounds(Path(folder) / "whole", device, save_strategy="no")
    differing = sum(a != b for a, b in zip(sharded["candidates"], whole["candidates"], strict=True))
    worst = max(abs(a - b) for a, b in zip(sharded["losses"], whole["losses"], strict=True))
    return {"passed": differing == 0 and worst < 1e-3, "candidates": len(whole["candidates"]), "differing": differing,
            "largest_difference_of_losses": worst}  # fmt: skip


def child_fsdp2(target: Path, device: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = tiny_rounds(
            Path(folder),
            device,
            save_strategy="no",
            fsdp="full_shard",
            fsdp_config={"version": 2, "reshard_after_forward": True},
        )
    target.write_text(json.dumps({name: found[name] for name in ("candidates", "losses")}))


def check_resume(device: str, is_small: bool) -> dict[str, Any]:
    """Candidates, losses and weights of a resumed run against the whole one."""
    with tempfile.TemporaryDirectory() as folder:
        whole = tiny_rounds(Path(folder) / "whole", device, save_total_limit=None)
        middle = sorted((Path(folder) / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-2]
        shutil.copytree(Path(folder) / "whole", Path(folder) / "cut")
        cut = tiny_rounds(Path(folder) / "cut", device, resume=str(Path(folder) / "cut" / middle.name))
    difference = largest_difference(whole["weights"], cut["weights"])
    is_same = whole["candidates"] == cut["candidates"] and whole["losses"] == cut["losses"]
    return {"passed": is_same and difference == 0.0, "from": middle.name, "largest_difference": difference}


CHECKS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "greedy": check_greedy,
    "sampled": check_sampled,
    "weighted": check_weighted,
    "generation": check_generation,
    "lora": check_lora,
    "fsdp2": check_fsdp2,
    "resume": check_resume,
}


def run_check(check: Callable[[], dict[str, Any]], left: float) -> dict[str, Any]:
    """A check's figures and seconds; an error is a figure too, so that the others run."""
    if left <= 0:
        return {"passed": None, "skipped": "no time is left"}
    began = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log
            found = check()
    except Exception as error:  # noqa: BLE001 - reported, and the check has failed
        found = {"passed": False, "failed": f"{type(error).__name__}: {error}"[-1500:]}
    return {**found, "check_seconds": time.perf_counter() - began}


def report(results: dict[str, Any], device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": hf.__version__, "checks": results}


def parse() -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=list(CHECKS), help="these checks alone")
    parser.add_argument("--small", action="store_true", help="all of it in small: tests that the script runs")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no check begins after these")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    if options.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.child:
        torch.use_deterministic_algorithms(options.device == "cuda", warn_only=True)
        child_fsdp2(options.child, options.device)
        return
    began, results = time.perf_counter(), {}
    for name in options.only:
        left = options.seconds - (time.perf_counter() - began)
        # Deterministic kernels are slower, and fill every new tensor: exactness needs them, speed must not have them.
        is_exact = options.device == "cuda" and name != "generation"
        torch.use_deterministic_algorithms(is_exact, warn_only=True)
        results[name] = run_check(functools.partial(CHECKS[name], options.device, options.small), left)
        if options.json != "-":
            words = {True: "passed", False: "FAILED", None: "left out"}
            print(f"{name:12} {words[results[name]['passed']]:9} {json.dumps(results[name])[:400]}", flush=True)
            if options.json:  # after each check, so that a killed run leaves what it has measured
                write_json(report(results, options.device), options.json)
    if not options.json or options.json == "-":
        write_json(report(results, options.device), options.json)
    sys.exit(any(one["passed"] is False for one in results.values()))


if __name__ == "__main__":
    main()
