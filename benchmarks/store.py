"""Seconds and memory of what is done to the candidates of a large round: judging, describing, exporting, encoding,
of the report with 50,000 of them, and of importing as many completions from a JSONL file, scoring and accepting them.

    make bench-store                        # or: make bench-store ARGS="--num_candidates 100000 --json -"

A round of 8 candidates a prompt, of 100 tokens on average, is written to disk as a run writes it; then each stage runs
in a process of its own, as the main process of a run would, and its peak of memory is that process's, less what the
imports take. Texts are made up: words of random letters.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers as hf
from measures import build_parser, peak_mib, run_child, seconds_of, write_json
from tokenizers import Tokenizer, models, pre_tokenizers

from rsft_hf import TopKPerPrompt
from rsft_hf.generative import (
    accept_again,
    export_dpo,
    export_kto,
    export_sft,
    import_candidates,
    load_candidates,
    score_again,
)
from rsft_hf.generative.candidates import Candidate, CandidateStore
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.metrics import round_metrics
from rsft_hf.generative.selection import COLUMNS, RoundTable, SelectionRules, judge
from rsft_hf.generative.training_rows import CandidatePool, encode_candidates
from rsft_hf.report import write_report

NUM_PER_PROMPT, PROMPTS_PER_SHARD, MEAN_LENGTH = 8, 64, 100
SEED = 3
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
torch.set_num_threads(1)


def opened(folder: Path) -> CandidateStore:
    return CandidateStore(folder / "candidates" / "round-000", ["reward"], is_conversational=False)


def write_round(folder: Path, num_candidates: int) -> None:
    """Writes a scored round, shard by shard."""
    store, draws, words = opened(folder), random.Random(SEED), np.random.default_rng(SEED)
    store.directory.mkdir(parents=True)
    pool = ["".join(draws.choices("abcdefghij", k=5)) for _ in range(1000)]
    num_prompts = -(-num_candidates // NUM_PER_PROMPT)
    for number, start in enumerate(range(0, num_prompts, PROMPTS_PER_SHARD)):
        shard = []
        for prompt in range(start, min(start + PROMPTS_PER_SHARD, num_prompts)):
            text = " ".join(pool[i] for i in words.integers(0, 1000, 30))
            for index in range(NUM_PER_PROMPT):
                ids = words.integers(0, 1000, draws.randint(MEAN_LENGTH // 2, 3 * MEAN_LENGTH // 2)).tolist()
                answer = Candidate(prompt, text, ids, " ".join(pool[i] for i in ids), "stop", index=index)
                answer.seed, answer.reward = draws.getrandbits(62), draws.random()
                answer.rewards, answer.duplicate_key = {"reward": answer.reward}, str(ids[:3])
                shard.append(answer)
        store.write(store.path(0, number), shard, "scored")
    store.write_manifest({"reward_names": ["reward"]})


def judged(folder: Path) -> None:
    store = opened(folder)
    table = RoundTable.of(store.columns(COLUMNS))
    verdicts = judge(table, SelectionRules(TopKPerPrompt(2), 1, False, SEED, 0))
    start = 0
    for path in store.shards():
        size = pq.read_metadata(path).num_rows
        store.write_verdicts(path, verdicts[start : start + size], {})
        start += size
    round_metrics(store, table, verdicts, TopKPerPrompt(2))


def encoded(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = Encoder(hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), is_encoder_decoder=False)
    pool = CandidatePool()
    pool.replace(encode_candidates(opened(folder).accepted(), encoder))
    pool.state()


def write_file(folder: Path) -> None:
    """Writes the completions as JSONL, one a line, as an engine elsewhere would."""
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for path in opened(folder).shards():
            for row in pq.read_table(path, columns=["prompt_id", "prompt", "text"]).to_pylist():
                prompt = f"{row['prompt_id']} {row['prompt']}"
                file.write(json.dumps({"prompt": prompt, "completion": row["text"], "answer": "a"}) + "\n")


def shown(folder: Path) -> None:
    """Opens the report in a headless Chromium, until its browser of candidates has drawn them."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    page = f"file://{(folder / 'report.html').resolve()}#candidates"
    found = subprocess.run([*command, page], capture_output=True, check=True).stdout
    if not re.search(rb"of [\d,]+ candidates", found):
        raise RuntimeError("The page shows no candidates.")


def length_of(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


STAGES: dict[str, Callable[[Path], Any]] = {
    "judge, write verdicts, describe": judged,
    "encode the accepted": encoded,
    "load_candidates": lambda folder: load_candidates(folder / "candidates"),
    "export_sft": lambda folder: export_sft(folder / "candidates"),
    "export_dpo": lambda folder: export_dpo(folder / "candidates"),
    "export_kto": lambda folder: export_kto(folder / "candidates"),
    "write_report": lambda folder: write_report(folder / "candidates", folder / "report.html"),
    "open the report in Chromium": shown,
    "write a JSONL file": write_file,
    "import_candidates": lambda folder: import_candidates(folder / "samples.jsonl", folder / "imported"),
    "score_again": lambda folder: score_again(folder / "imported", folder / "scored", length_of),
    "accept_again": lambda folder: accept_again(folder / "scored", folder / "accepted", TopKPerPrompt(2)),
    "export_sft of the imported": lambda folder: export_sft(folder / "accepted"),
}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--num_candidates", type=int, default=1_000_000)
    parser.add_argument("--output_dir", type=Path, help="kept; a temporary folder where it is left out")
    parser.add_argument("--stage", choices=[*STAGES, "write"], help="run this stage alone, in this process")
    options = parser.parse_args()
    if options.stage:
        before = peak_mib()
        work = STAGES.get(options.stage, lambda folder: write_round(folder, options.num_candidates))
        seconds, _ = seconds_of(lambda: work(options.output_dir))
        print(json.dumps({"seconds": seconds["wall"], "mib": peak_mib() - before}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output_dir or Path(temporary)
        words = ["--output_dir", folder, "--num_candidates", options.num_candidates]
        results = {}
        for stage in ("write", *STAGES):
            if STAGES.get(stage) is shown and CHROMIUM is None:
                continue
            results[stage] = run_child(__file__, "--stage", stage, *words)
            if options.json != "-":
                print(f"{stage:34} {results[stage]['seconds']:8.1f} s {results[stage]['mib']:8.0f} MiB", flush=True)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 2**20
        page = (folder / "report.html").stat().st_size / 2**20
    results = {"num_candidates": options.num_candidates, "disk_mib": size, "report_mib": page, "stages": results}
    if options.json != "-":
        print(f"{options.num_candidates} candidates, {size:.0f} MiB on disk, report of {page:.1f} MiB")
    write_json(results, options.json)


if __name__ == "__main__":
    sys.exit(main())
