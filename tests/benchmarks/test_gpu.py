"""The GPU check runs in small on a CPU, so that it works the first time a GPU is at hand."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_every_check_runs_in_small_and_passes():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--small", "--device", "cpu", "--json", "-"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert results["device"] == "CPU"
    checks = results["checks"]
    assert {name: one["passed"] for name, one in checks.items()} == dict.fromkeys(
        ("greedy", "sampled", "weighted", "generation", "lora", "fsdp2", "resume"), True
    )
    assert checks["greedy"]["differing"] == 0
    assert len(checks["greedy"]["by"]) == 12
    assert checks["weighted"]["differences"] == {"forward": 0.0, "training": 0.0}
    assert set(checks["generation"]["by"]) == {"fixed", "generate_batch 64 forked", "generate_engine", "in_flight"}
    assert checks["resume"]["largest_difference"] == 0.0


def test_an_error_of_one_check_is_reported_and_fails():
    code = "import gpu, json\nprint(json.dumps([gpu.run_check(lambda: 1 / 0, 1.0), gpu.run_check(lambda: 1 / 0, 0.0)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=SCRIPT.parent)
    failed, skipped = json.loads(done.stdout)
    assert (failed["passed"], failed["failed"]) == (False, "ZeroDivisionError: division by zero")
    assert skipped == {"passed": None, "skipped": "no time is left"}
