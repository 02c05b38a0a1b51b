"""What does an epoch cost beside plain Trainer? Seconds and memory at equal draws, for both ways of measuring losses.

    make bench-overhead                     # or: make bench-overhead ARGS="--quick --json -"

`training losses` keeps the losses that training computes anyway (as InfoBatch does, Qin et al. 2023, arXiv:2303.04947,
who report a cost near zero: its row is that claim, measured here); `forward losses` scores all rows before each epoch.
Contenders take turns within one process, A B C D A B C D, and a ratio is to `plain` of the same round; `best` is the
ratio of the fastest epochs, which a busy machine disturbs least. How far `plain again` is from 1 is the error of them
all. The peak of memory is measured in a process for each contender. One thread, about ten minutes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

# This process stays small (no torch): a child's peak of memory would otherwise begin at its parent's.
TASK_NAMES = ("bert", "llama")
QUICK_ROWS = 64


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def run_child(mode: str, task: str, contender: str, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--child", mode, "--task", task, "--contender", contender]
    command += ["--rounds", str(arguments.rounds)] + ["--quick"] * arguments.quick
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def child_times(arguments: argparse.Namespace) -> dict:
    """Returns, for each contender and round, (processor, wall) seconds of each epoch."""
    import contenders

    task = contenders.TASKS[arguments.task]
    num_rows = QUICK_ROWS if arguments.quick else task.num_rows
    seconds: dict[str, list] = {name: [] for name in contenders.CONTENDERS}
    for _ in range(arguments.rounds):
        for name, rounds in seconds.items():
            rounds.append(contenders.time_epochs(task, name, num_rows))
    return seconds


def child_memory(arguments: argparse.Namespace) -> dict:
    """Returns the peak of resident memory before and after training, in MiB."""
    import contenders

    task = contenders.TASKS[arguments.task]
    num_rows = QUICK_ROWS if arguments.quick else task.num_rows
    trainer = contenders.build_trainer(task, arguments.contender, num_rows)
    before = peak_mib()
    trainer.train()
    return {"before_mib": before, "peak_mib": peak_mib()}


def peak_mib() -> float:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def compare(ours: list, plain: list, clock: int) -> dict[str, float]:
    """Returns the ratio of one clock, 0 processor or 1 wall: round by round, and best epoch to best epoch."""

    def medians(rounds: list) -> list[float]:
        return [statistics.median(epoch[clock] for epoch in epochs) for epochs in rounds]

    def best(rounds: list) -> float:
        return min(epoch[clock] for epochs in rounds for epoch in epochs)

    ratios = [mine / theirs for mine, theirs in zip(medians(ours), medians(plain), strict=True)]
    return {**spread(ratios), "best": best(ours) / best(plain), "best_s": best(ours)}


def measure(task: str, arguments: argparse.Namespace) -> dict:
    seconds = run_child("times", task, "all", arguments)
    memory = {name: run_child("memory", task, name, arguments) for name in seconds}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows: shows that it runs, proves little")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--task", choices=TASK_NAMES, help="one model only")
    parser.add_argument("--json", metavar="PATH", help="also write the numbers to PATH, or - for standard output only")
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
    for task in [arguments.task] if arguments.task else TASK_NAMES:
        results[task] = measure(task, arguments)
        if arguments.json != "-":
            report(task, results[task])
    if arguments.json == "-":
        print(json.dumps(results, indent=2))
    elif arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
