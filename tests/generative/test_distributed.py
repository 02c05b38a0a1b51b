"""Two processes generate, score and accept what one does, and fail together."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generative_distributed_runs
from generative_runs import SHARDS, CountingEngine, resampler, shards, stored, trained

RUNS = generative_distributed_runs.RUNS


def launch(output_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "helpers" / "generative_distributed_runs.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, script, output_dir, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What each of two gloo processes saw, from one launch."""
    output_dir = tmp_path_factory.mktemp("two_processes")
    done = launch(output_dir)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output_dir / f"rank_{rank}.json").read_text()) for rank in (0, 1)], output_dir


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The same in this process."""
    output_dir = tmp_path_factory.mktemp("one_process")
    return {name: generative_distributed_runs.run(name, output_dir) for name in RUNS}, output_dir


@pytest.mark.parametrize("name", RUNS)
def test_candidates_and_verdicts_are_those_of_one_process(two, one, name: str) -> None:
    assert len(RUNS) == 4
    rows = stored(two[1] / name)
    assert rows == stored(one[1] / name)
    assert [path.name for path in shards(two[1] / name)] == [path.name for path in shards(one[1] / name)]
    verdicts = {row["verdict"] for row in rows}
    assert (
        verdicts
        == {
            "plain": {"accepted", "rejected"},
            "attempts": {"accepted", "rejected", "fallback"},
            "best": {"accepted", "rejected", "duplicate", "fallback"},
            "density": {"accepted", "rejected", "filtered"},
        }[name]
    )


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_draw_the_rows_of_one_process(two, one, name: str) -> None:
    first, second = two[0][0][name], two[0][1][name]
    assert first["indices"] == second["indices"] == one[0][name]["indices"]
    assert first["pool"] == second["pool"] == one[0][name]["pool"]
    assert first["parameters"] == second["parameters"]
    assert first["metrics"] == second["metrics"] == pytest.approx(one[0][name]["metrics"])


def test_the_held_out_figures_are_those_of_one_process(two, one) -> None:
    expected = one[0]["plain"]["evaluation"]
    for rank in two[0]:
        assert rank["plain"]["evaluation"] == pytest.approx(expected)


def test_one_process_goes_on_with_the_shards_of_two(two, tmp_path: Path) -> None:
    shutil.copytree(two[1] / "plain", tmp_path / "plain")
    before = stored(tmp_path / "plain")
    shards(tmp_path / "plain")[2].unlink()
    engine = CountingEngine()
    trained(tmp_path / "plain", resampler(engine=engine))
    assert len(engine.calls) == 1 < SHARDS
    assert stored(tmp_path / "plain") == before


def test_an_error_in_one_process_ends_both(tmp_path: Path) -> None:
    began = time.perf_counter()
    done = launch(tmp_path, "broken")
    assert time.perf_counter() - began < 150  # far below the half hour that gloo waits
    assert done.returncode != 0
    assert "Reward function `broken` raised OSError: the grader of this machine is down" in done.stderr
    assert "Another process failed while generating and scoring round 0: RuntimeError: Reward function" in done.stderr
    rows = stored(tmp_path / "broken")
    assert {row["verdict"] for row in rows} == {None}  # kept, for whoever mends the grader
    assert len(shards(tmp_path / "broken")) == 3 + 1  # process 0 made its own three, process 1 its first
