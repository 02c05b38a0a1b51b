"""Cost of an epoch against plain Trainer: seconds and memory at equal draws, for both ways of measuring losses.

    make bench-overhead                     # or: make bench-overhead ARGS="--quick --json -"

`training losses` keeps the losses that training computes anyway (as InfoBatch does, Qin et al. 2023, arXiv:2303.04947,
who report a cost near zero: its row measures that claim here); `forward losses` scores all rows before each epoch.
Every loss is measured and every epoch drawn, but the weights are equal: all contenders then read the same batches, and
the difference between them is the overhead. They alternate within one process, A B C D A B C D, and a ratio is to
`plain` of the same round; `best` is the ratio of the fastest epochs, which a busy machine disturbs least. The distance
of `plain again` from 1 is the error of measurement. The peak of memory is measured in a process for each contender.
One thread, about ten minutes.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers as hf
from measures import build_parser, peak_mib, run_child, spread, write_json
from torch import Tensor

from rsft_hf import LossResampler, RejectionSamplingTrainer, Tempered

IGNORED = -100
NUM_EPOCHS = 3
QUICK_ROWS = 64
CONTENDERS = ("plain", "plain again", "training losses", "forward losses")

# Two threads that wait for each other spin, and on a busy machine their waiting is most of the processor time.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Task:
    """A model and its rows: texts of at most `longest` words, in batches of `batch_size`."""

    build: Callable[[], hf.PreTrainedModel]
    num_rows: int
    longest: int
    batch_size: int
    vocab_size: int
    is_causal: bool


def bert() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 768}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=2000, **sizes, max_position_embeddings=128))


def llama() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=8192, **sizes, max_position_embeddings=64))


TASKS = {
    "bert": Task(bert, num_rows=192, longest=128, batch_size=16, vocab_size=2000, is_causal=False),
    "llama": Task(llama, num_rows=256, longest=64, batch_size=8, vocab_size=8192, is_causal=True),
}


def random_rows(task: Task, num_rows: int) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for _ in range(num_rows):
        words = [rng.randrange(3, task.vocab_size) for _ in range(rng.randint(task.longest // 8, task.longest))]
        rows.append({"input_ids": words, "labels": list(words) if task.is_causal else rng.randrange(2)})
    return rows


def pad_and_stack(rows: list[dict]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def stack(columns: list[list[int]], filler: int) -> Tensor:
        return torch.stack([F.pad(torch.tensor(ids), (0, longest - len(ids)), value=filler) for ids in columns])

    is_causal = isinstance(rows[0]["labels"], list)
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": stack([row["input_ids"] for row in rows], 0),
        "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": stack(labels, IGNORED) if is_causal else torch.tensor(labels),
    }


class EpochClock(hf.TrainerCallback):
    """Processor and wall seconds from one epoch's end to the next: resampling included, start-up left out."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append((time.process_time(), time.perf_counter()))

    def epochs(self) -> list[tuple[float, float]]:
        pairs = zip(self.ends[:-1], self.ends[1:], strict=True)
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def build_trainer(task: Task, contender: str, num_rows: int) -> hf.Trainer:
    """Returns the contender's trainer; model, rows, order of rows and arguments are the same for all."""
    torch.manual_seed(0)
    arguments = hf.TrainingArguments(
        output_dir="outputs/benchmark",
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=task.batch_size,
        learning_rate=1e-5,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    parts = {"model": task.build(), "args": arguments, "data_collator": pad_and_stack}
    parts["train_dataset"] = random_rows(task, num_rows)
    if contender.startswith("plain"):
        return hf.Trainer(**parts)
    # L ** 0 = 1: with equal weights the draws are those of plain Trainer, row for row.
    resampler = LossResampler(Tempered(0.0), losses=contender.removesuffix(" losses"))
    return RejectionSamplingTrainer(**parts, resampler=resampler)


def time_epochs(task: Task, contender: str, num_rows: int) -> list[tuple[float, float]]:
    """Returns (processor, wall) seconds of every epoch but the first, which warms up and has no losses yet."""
    trainer = build_trainer(task, contender, num_rows)
    clock = EpochClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.epochs()


def child_times(arguments: argparse.Namespace) -> dict:
    """Returns, for each contender and round, (processor, wall) seconds of each epoch."""
    task = TASKS[arguments.task]
    seconds: dict[str, list] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, rounds in seconds.items():
            rounds.append(time_epochs(task, name, QUICK_ROWS if arguments.quick else task.num_rows))
    return seconds


def child_memory(arguments: argparse.Namespace) -> dict:
    """Returns the peak of resident memory before and after training, in MiB."""
    task = TASKS[arguments.task]
    trainer = build_trainer(task, arguments.contender, QUICK_ROWS if arguments.quick else task.num_rows)
    before = peak_mib()
    trainer.train()
    return {"before_mib": before, "peak_mib": peak_mib()}


def compare(ours: list, plain: list, clock: int) -> dict[str, float]:
    """Returns the ratio of one clock, 0 processor or 1 wall: round by round, and best epoch to best epoch."""

    def medians(rounds: list) -> list[float]:
        return [statistics.median(epoch[clock] for epoch in epochs) for epochs in rounds]

    def best(rounds: list) -> float:
        return min(epoch[clock] for epochs in rounds for epoch in epochs)

    ratios = [mine / theirs for mine, theirs in zip(medians(ours), medians(plain), strict=True)]
    return {**spread(ratios), "best": best(ours) / best(plain), "best_s": best(ours)}


def measure(task: str, arguments: argparse.Namespace) -> dict:
    words = ("--task", task, "--rounds", arguments.rounds, *["--quick"] * arguments.quick)
    seconds = run_child(__file__, "--child", "times", *words)
    memory = {name: run_child(__file__, "--child", "memory", "--contender", name, *words) for name in seconds}
    return {
        name: {
            "processor": compare(rounds, seconds["plain"], 0),
            "wall": compare(rounds, seconds["plain"], 1),
            **memory[name],
            "peak_ratio": memory[name]["peak_mib"] / memory["plain"]["peak_mib"],
        }
        for name, rounds in seconds.items()
    }


def report(task: str, results: dict) -> None:
    columns = "min median    max   best"
    print(f"\n{task:16s} {'epoch, s':>9s}   {'processor ratio':^27s}   {'wall ratio':^27s}   {'peak memory':^18s}")
    print(f"{'':16s} {'best':>9s}   {columns:>27s}   {columns:>27s}   {'MiB':>8s} {'ratio':>9s}")
    for name, row in results.items():
        processor, wall = (
            " ".join(f"{row[clock][place]:6.3f}" for place in ("min", "median", "max", "best"))
            for clock in ("processor", "wall")
        )
        memory = f"{row['peak_mib']:8.0f} {row['peak_ratio']:9.3f}"
        print(f"{name:16s} {row['wall']['best_s']:9.2f}   {processor}   {wall}   {memory}")


def parse() -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows: shows that it runs, proves little")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--task", choices=TASKS, help="one model only")
    parser.add_argument("--child", choices=("times", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(child_times(arguments) if arguments.child == "times" else child_memory(arguments)))
        return
    results = {}
    for task in [arguments.task] if arguments.task else TASKS:
        results[task] = measure(task, arguments)
        if arguments.json != "-":
            report(task, results[task])
    write_json(results, arguments.json)


if __name__ == "__main__":
    main()
