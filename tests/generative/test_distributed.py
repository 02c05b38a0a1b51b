"""Two processes generate, score and accept what one does, and fail together."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard

import generative_distributed_runs
import generators as g
from generative_runs import SHARDS, CountingEngine, resampler, shards, stored, trained
from rsft_hf.acceptance import Threshold
from rsft_hf.cards import SECTION
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.generative.rounds import mean_lengths, own_shards

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


def test_one_process_writes_the_model_card(two, one) -> None:
    section = lambda folder: (folder / "plain" / "README.md").read_text().split(SECTION)[1].split("Logged by")[0]  # noqa: E731
    assert "TopKPerPrompt" in section(two[1])
    assert section(two[1]) == section(one[1])


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


def shares(num_prompts: int, num_processes: int, lengths: dict, prompt_ids=None) -> list[list[tuple[int, list[int]]]]:
    ids = range(num_prompts) if prompt_ids is None else prompt_ids
    return [
        [(number, list(own)) for number, own in own_shards(ids, num_prompts, lengths, num_processes, process)]
        for process in range(num_processes)
    ]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_prompts", [1, 5, 9, 130, 1000])
def test_every_shard_is_the_work_of_one_process_and_the_same_for_any_number_of_them(num_processes, num_prompts):
    lengths = {prompt: 1.0 + prompt % 11 for prompt in range(0, num_prompts, 2)}
    found = sorted(shard for share in shares(num_prompts, num_processes, lengths) for shard in share)
    assert found == shares(num_prompts, 1, {})[0]
    assert [prompt for _, own in found for prompt in own] == list(range(num_prompts))
    assert max(len(own) for _, own in found) <= 64


def test_shares_are_even_in_tokens_not_in_prompts():
    # Four shards of 25 prompts, of 10, 10, 1 and 1 tokens: the two long ones go apart.
    lengths = {prompt: 10.0 if prompt < 50 else 1.0 for prompt in range(100)}
    first, second = shares(100, 2, lengths)
    assert [number for number, _ in first] == [0, 2]
    assert [number for number, _ in second] == [1, 3]
    # 30, 1, 1, 1: one process has the long one alone. Prompts without a length count as the mean of the others.
    lengths = {prompt: 30.0 if prompt < 25 else 1.0 for prompt in range(100)}
    assert [number for number, _ in shares(100, 2, lengths)[0]] == [0]
    known = {0: 30.0, 99: 30.0}
    assert shares(100, 2, known) == shares(100, 2, {})


def test_a_round_knows_the_lengths_of_the_last_one_and_draws_the_same_candidates(tmp_path):
    asked: list = []

    class Noting(GenerateEngine):
        def __call__(self, model, request):
            asked.append((request.num_candidates, list(request.expected_lengths), list(map(len, request.prompts))))
            yield from super().__call__(model, request)

    options = {"num_candidates": 2, "generation_config": g.sampling(6)}
    run = g.trainer(tmp_path, g.resampler(engine=Noting(), **options), num_prompts=4, args={"num_train_epochs": 2})
    run.train()
    store = run.resampler._bound().store(0)
    lengths = mean_lengths(store)
    by_hand = {prompt: [one.num_tokens for one in g.stored(run) if one.prompt_id == prompt] for prompt in range(4)}
    assert lengths == {prompt: sum(values) / 2 for prompt, values in by_hand.items()}
    assert [expected for _, expected, _ in asked[:4]] == [[0.0]] * 4  # four shards of one prompt, nothing known
    assert [expected for _, expected, _ in asked[4:8]] == [[lengths[prompt]] for prompt in range(4)]


def test_a_round_that_was_never_generated_has_no_lengths(tmp_path):
    run = g.trainer(tmp_path, g.resampler(generation_config=g.sampling(3)))
    run.train()
    assert mean_lengths(run.resampler._bound().store(7)) == {}


def test_processes_get_equal_shares_of_any_number_of_rows(tmp_path):
    """Real processes: test_generative_distributed.py."""
    rewards = iter([1.0] + [0.0] * 99)
    source = g.resampler(
        lambda prompts, **_: [next(rewards) for _ in prompts], Threshold(minimum=0.5), on_nothing_accepted="skip"
    )
    run = g.trainer(tmp_path, source, num_prompts=5)
    run.train()
    assert len(source.pool) == 1  # one prompt of five gave a row; five rows are trained on all the same
    batches = run.get_train_dataloader().batch_sampler
    shares = [list(BatchSamplerShard(batches, 2, rank)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
