"""Sampling answers to 480 prompts: `rsft-hf generate` against `swift sample` of ms-swift, whole commands in turn.

    pip install ms-swift  # in an environment of its own
    python benchmarks/swift_sample.py --swift PATH/TO/bin/swift

The model is the small Llama of recipes/data, in a folder whose name lets swift find a chat template. Both draw eight
answers of at most 24 tokens at temperature 1, in fp32 on one thread of a CPU; start and loading are part of the time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data" / "dialogues"


def seconds(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def commands(swift: str, work: Path, number: int) -> dict[str, list[str]]:
    """The commands of a repetition, each with a folder of its own."""
    model, numbers = str(work / "Qwen2.5-0.5B-Instruct"), ("--num_return_sequences", "8", "--n_best_to_keep", "1")
    theirs = [swift, "sample", "--model", model, "--sampler_engine", "transformers",
              "--dataset", str(work / "rows.jsonl"),
              *numbers, "--max_new_tokens", "24", "--temperature", "1.0", "--num_sampling_batch_size", "32",
              "--output_dir", str(work / f"theirs-{number}"), "--output_file", "samples.jsonl"]  # fmt: skip
    ours = [sys.executable, "-m", "rsft_hf", "generate", str(work / f"ours-{number}"), "--model_name_or_path", model,
            "--train_file", str(work / "prompts.jsonl"), "--num_candidates", "8",
            "--generation_config", "{do_sample: true, top_k: 0, max_new_tokens: 24}"]  # fmt: skip
    return {"swift sample": theirs, "rsft-hf generate": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", required=True, help="the program `swift` of an environment with ms-swift")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    shutil.copytree(DATA / "chat_model", work / "Qwen2.5-0.5B-Instruct")
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, kept in {"rows": lambda row: {"messages": row["prompt"] + row["chosen"]},
                       "prompts": lambda row: {"prompt": row["prompt"]}}.items():  # fmt: skip
        (work / f"{name}.jsonl").write_text("\n".join(json.dumps(kept(row)) for row in rows) + "\n", encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[float]] = {"swift sample": [], "rsft-hf generate": []}
    for number in range(options.repetitions):
        for name, command in commands(options.swift, work, number).items():
            found[name].append(seconds(command, environment))
    best = statistics.median(found["rsft-hf generate"])
    print(f"{len(rows)} prompts x 8 candidates, median seconds of {options.repetitions} (min-max), ratio")
    for name, values in found.items():
        median = statistics.median(values)
        print(f"{name:18}{median:8.1f} ({min(values):.1f}-{max(values):.1f}){median / best:8.1f}")


if __name__ == "__main__":
    main()
