"""Cost of generating a round of the experiments, by engine: real models, real prompts, real lengths.

    RSFT_MODELS=... RSFT_DATA=... make bench-rounds       # or: make bench-rounds ARGS="--prompts 32 --json -"

`plain` is the usual loop: `model.generate` over batches of 64 sequences in the order of the data. `generate` and
`inflight` are engines of this package, which draw the same candidates (the script compares them); the candidates of
`plain` come from the same distribution and another random stream, so ratios are of seconds per token. Contenders
alternate within one process, on one thread. Without the two folders the hub names of the experiments are used. About
ten minutes.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from measures import build_parser, seconds_of, write_json
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.chat_data import CONTEXT, as_messages, load_dialogues
from experiments.translation import TranslationArguments
from experiments.translation_data import TranslationSource
from rsft_hf.engines import Engine, GenerateEngine, GenerationRequest, InFlightEngine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.engines.sampling import pad_prompts
from rsft_hf.generative.encoding import Encoder

NUM_CANDIDATES, BATCH = 8, 64
TASKS = ("translation", "chat")


def named_folder(variable: str, folder: str, hub_name: str) -> str:
    """Returns a folder inside the one that an environment variable names, or the hub's name if it is unset."""
    return str(Path(os.environ[variable]) / folder) if os.environ.get(variable) else hub_name


def open_task(task: str, num_prompts: int) -> tuple:
    """Returns model, tokenizer, prompts as token ids, and the experiment's generation configuration."""
    if task == "translation":
        name = named_folder("RSFT_MODELS", "multi30k-en-de", "Helsinki-NLP/opus-mt-en-de")
        data = named_folder("RSFT_DATA", "multi30k", "bentrevett/multi30k")
        options = TranslationArguments(dataset=data, model_name_or_path=name, max_train_samples=num_prompts)
        options.val_split, options.test_splits = options.train_split, []
        prompts = TranslationSource(options).task(seed=1).prompts["prompt"][:]
        model = AutoModelForSeq2SeqLM.from_pretrained(name)
        config = GenerationConfig(max_new_tokens=64, temperature=0.6)
    else:
        name = named_folder("RSFT_MODELS", "dailydialog-chat", "Qwen/Qwen2.5-0.5B-Instruct")
        data = named_folder("RSFT_DATA", "dailydialog_pp", "OpenRL/daily_dialog")
        rows = load_dialogues(data, "train").select(range(num_prompts))
        prompts = [as_messages(turns, 7) for turns in rows[CONTEXT]]
        model = AutoModelForCausalLM.from_pretrained(name)
        config = GenerationConfig(max_new_tokens=32, temperature=1.0)
    tokenizer = AutoTokenizer.from_pretrained(name)
    encoder = Encoder(tokenizer, bool(model.config.is_encoder_decoder))
    complete = sampling_config(config, model, tokenizer)
    return model.eval(), tokenizer, [encoder.prompt_ids(prompt) for prompt in prompts], complete


def plain_generate(model, request: GenerationRequest) -> list[list[int]]:
    """Returns the candidates of `model.generate`, cut after their first end token."""
    found, per_batch = [], BATCH // NUM_CANDIDATES
    config, is_left = request.generation_config, not model.config.is_encoder_decoder
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for start in range(0, len(request.prompts), per_batch):
        inputs = pad_prompts(request.prompts[start : start + per_batch], config.pad_token_id, "cpu", is_left)
        rows = model.generate(**inputs, generation_config=config, num_return_sequences=NUM_CANDIDATES)
        for row in rows[:, inputs["input_ids"].shape[1] if is_left else 1 :].tolist():
            stop = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
            found.append(row[: stop + 1])
    return found


def measure(task: str, arguments: argparse.Namespace) -> dict:
    """Returns the seconds and tokens of each contender on one task, and the ratios to `inflight`."""
    model, tokenizer, prompts, config = open_task(task, arguments.prompts)
    seeds = [[candidate_seed(1, 0, row, 0, index) for index in range(NUM_CANDIDATES)] for row in range(len(prompts))]
    request = GenerationRequest(prompts, seeds, config, tokenizer=tokenizer)
    engines = {"generate": GenerateEngine(), "inflight": InFlightEngine()}
    contenders = {name: lambda engine=engine: sequences(engine, model, request) for name, engine in engines.items()}
    contenders = {"plain": lambda: plain_generate(model, request), **contenders}
    seconds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in contenders}
    drawn = {}
    for _ in range(arguments.repeats):
        for name, run in contenders.items():
            torch.manual_seed(1)
            with torch.no_grad():
                spent, drawn[name] = seconds_of(run)
            seconds[name].append((spent["cpu"], spent["wall"], sum(map(len, drawn[name]))))
    if drawn["generate"] != drawn["inflight"]:
        different = sum(one != other for one, other in zip(drawn["generate"], drawn["inflight"], strict=True))
        print(f"{task}: {different} of {len(drawn['generate'])} candidates differ between engines", file=sys.stderr)
    figures = {name: figures_of(runs) for name, runs in seconds.items()}
    for figure in figures.values():
        figure["ratio"] = figure["cpu_per_1000_tokens"] / figures["inflight"]["cpu_per_1000_tokens"]
    return {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "contenders": figures}


def sequences(engine: Engine, model, request: GenerationRequest) -> list[list[int]]:
    """Returns the candidates of an engine in the order of prompts and candidates."""
    return [one.token_ids for one in sorted(engine(model, request), key=lambda one: (one.prompt, one.index))]


def figures_of(runs: list[tuple[float, float, int]]) -> dict[str, float]:
    cpu, wall, tokens = zip(*runs, strict=True)
    per_1000 = [1000 * one / count for one, count in zip(cpu, tokens, strict=True)]
    return {"cpu_s": statistics.median(cpu), "cpu_s_min": min(cpu), "cpu_s_max": max(cpu),
            "wall_s": statistics.median(wall), "tokens": statistics.median(tokens),
            "cpu_per_1000_tokens": statistics.median(per_1000)}  # fmt: skip


def report(results: dict) -> None:
    for task, result in results.items():
        print(f"\n{task}: {result['prompts']} prompts x {NUM_CANDIDATES}, {result['prompt_tokens']} prompt tokens")
        print(f"{'':10s} {'CPU s':>8s} {'min':>7s} {'max':>7s} {'wall s':>8s} {'tokens':>8s} {'x inflight/token':>17s}")
        for name, row in result["contenders"].items():
            seconds = " ".join(f"{row[key]:7.1f}" for key in ("cpu_s", "cpu_s_min", "cpu_s_max", "wall_s"))
            print(f"{name:10s} {seconds} "
                  f"{row['tokens']:8.0f} {row['ratio']:17.2f}")  # fmt: skip


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=128, help="number of prompts of each task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, help="one task only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {task: measure(task, arguments) for task in TASKS if arguments.task in (None, task)}
    if arguments.json != "-":
        report(results)
    write_json(results, arguments.json)


if __name__ == "__main__":
    main()
