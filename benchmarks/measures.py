"""Measurement helpers of the benchmarks: seconds, peak memory, child processes, spread of repeats, JSON output."""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS_STATUS = Path("/proc/self/status")


def seconds_of(action: Callable[[], Any], device: str = "cpu") -> tuple[dict[str, float], Any]:
    """Returns processor ("cpu") and wall ("wall") seconds of a call, and the result of the call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    wait()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}, result


def peak_mib(device: str = "cpu") -> float:
    """Returns the peak of memory so far: resident memory of the process, or what torch holds on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if PROCESS_STATUS.exists():
        # Linux hands `ru_maxrss` on to child processes, so theirs would begin at the parent's peak; VmHWM begins at 0.
        return int(re.search(r"VmHWM:\s+(\d+) kB", PROCESS_STATUS.read_text()).group(1)) / 2**10
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def run_child(script: str, *words: Any) -> dict:
    """Runs a benchmark script in a process of its own; returns the JSON of the last line it printed."""
    command = [sys.executable, script, *map(str, words)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def build_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the option `--json`, which `write_json` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="also write the numbers to PATH, or - for standard output only")
    return parser


def write_json(results: dict, path: str | None) -> None:
    """Writes the results to `path`, to standard output if it is "-", nowhere if it is None."""
    text = json.dumps(results, indent=2)
    if path == "-":
        print(text)
    elif path:
        Path(path).write_text(text + "\n", encoding="utf-8")
