"""The crash harness: a dozen kills of weighted and generative runs, and what they leave when they end."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "crash.py"


def test_runs_that_were_killed_leave_what_whole_runs_leave():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--num_kills", "12", "--json", "-"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout[done.stdout.index("{") :])["runs"]
    assert {line["run"] for line in results} == {"weighted", "weighted, losses of training", "generative"}
    for line in results:
        assert line["kills"] >= 4
        assert line["writes"] > 50
        assert line["differing"] == []


def test_a_difference_is_found():
    """A run with another seed differs in everything that the harness compares."""
    code = (
        "import crash, json, pathlib, random, sys, tempfile\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "crash.in_child(lambda: crash.describe_whole_run('weighted', folder / 'a', folder / 'whole.json'))\n"
        "whole = json.loads((folder / 'whole.json').read_text())\n"
        "crash.SEED += 1\n"
        "(folder / 'b').mkdir()\n"
        "kills, differing = crash.killed_run('weighted', whole, random.Random(0), folder / 'b')\n"
        "print(json.dumps(differing))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    differing = json.loads(done.stdout.splitlines()[-1])
    assert {"drawn rows", "logged", "table", "classifier.weight"} <= set(differing)
