"""A run killed in generation, scoring or training and taken up again is the uninterrupted run, to the bit."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf

import generators
import runs
from generative_runs import (
    NUM_PROMPTS,
    SHARDS,
    CountingEngine,
    Killed,
    logged,
    resampler,
    shards,
    stored,
    trained,
)
from rsft_hf import Deduplicate, DensityRatio, Threshold
from rsft_hf.acceptance import RandomPerPrompt

STEPS = 5  # of an epoch: 9 rows in batches of two
SAVED = {"num_train_epochs": 3, "save_strategy": "epoch"}
SOME = Threshold(minimum=0.2)


class KillAt(hf.TrainerCallback):
    """Raises at the end of a step, or when that step's checkpoint has been saved."""

    def __init__(self, step: int, event: str = "step_end") -> None:
        self.step, self.event = step, event

    def on_step_end(self, args, state, control, **kwargs):
        if self.event == "step_end" and state.global_step == self.step:
            raise Killed

    def on_save(self, args, state, control, **kwargs):
        if self.event == "save" and state.global_step == self.step:
            raise Killed


def killed_in_reward(call: int):
    """A reward that is killed in its n-th call, and has the name of the one that is not."""
    calls = []

    def share_of_wanted(completions, **columns):
        calls.append(1)
        if len(calls) > call:
            raise KeyboardInterrupt  # what the operating system sends
        return generators.share_of_wanted(completions, **columns)

    return share_of_wanted


def assert_equal_runs(left: hf.Trainer, right: hf.Trainer, num_rounds: int) -> None:
    for number in range(num_rounds):
        ours, theirs = (stored(Path(each.args.output_dir), number) for each in (left, right))
        assert ours == theirs
        assert len(ours) >= 4 * NUM_PROMPTS
    assert runs.losses(left) == runs.losses(right)
    assert len(runs.losses(left)) == 5 * left.state.num_train_epochs
    assert runs.largest_difference(left, right) == 0.0


def whole_and_resumed(tmp_path: Path, make, killed: dict, resume: bool, **args) -> tuple[hf.Trainer, hf.Trainer]:
    """An uninterrupted run, and one that is killed as `killed` says and gone on with."""
    settings = {**SAVED, **args}
    whole = trained(tmp_path / "whole", make(), args=settings)
    keywords = dict(killed)
    with pytest.raises((Killed, KeyboardInterrupt)):
        trained(tmp_path / "cut", make(**keywords.pop("options", {})), args=settings, **keywords)
    torch.manual_seed(12345)  # another process starts from another state
    cut = trained(tmp_path / "cut", make(), resume=True if resume else None, args=settings)
    return whole, cut


@pytest.mark.parametrize("at", [2, SHARDS + 3, 2 * SHARDS], ids=["first", "second", "third_round"])
def test_killed_in_generation(tmp_path: Path, at: int) -> None:
    engine = CountingEngine(at)
    whole, cut = whole_and_resumed(tmp_path, resampler, {"options": {"engine": engine}}, resume=at > SHARDS)
    assert_equal_runs(whole, cut, 3)


@pytest.mark.parametrize("at", [2, SHARDS + 2])
def test_killed_in_scoring(tmp_path: Path, at: int) -> None:
    options = {"reward_funcs": killed_in_reward(at)}
    whole, cut = whole_and_resumed(tmp_path, resampler, {"options": options}, resume=at > SHARDS)
    assert_equal_runs(whole, cut, 3)


@pytest.mark.parametrize(
    ("step", "args"),
    [
        pytest.param(2 * STEPS, {}, id="boundary"),
        pytest.param(STEPS + 2, {}, id="after_boundary"),
        pytest.param(STEPS + 3, {"save_strategy": "steps", "save_steps": 2}, id="inside"),
        pytest.param(STEPS + 4, {"save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 1}, id="workers"),
    ],
)
def test_killed_in_training(tmp_path: Path, step: int, args: dict) -> None:
    event = "save" if step == 2 * STEPS else "step_end"
    whole, cut = whole_and_resumed(tmp_path, resampler, {"callbacks": [KillAt(step, event)]}, resume=True, **args)
    assert_equal_runs(whole, cut, 3)


def test_candidates_go_on_with_the_seed_of_the_saved_run(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path / "cut", args=SAVED, callbacks=[KillAt(2 * STEPS, "save")])
    cut = trained(tmp_path / "cut", resume=True, args={**SAVED, "data_seed": 5})
    whole = trained(tmp_path / "whole", args=SAVED)
    assert stored(tmp_path / "cut", 2) == stored(tmp_path / "whole", 2)
    assert cut._progress.indices.tolist() == whole._progress.indices.tolist()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"round_start": "base"}, id="base"),
        pytest.param({"acceptance": SOME, "replay_rounds": 1, "on_nothing_accepted": "skip"}, id="replay"),
        pytest.param({"every_n_epochs": 2, "num_draws": 10}, id="stale"),
        pytest.param({"acceptance": DensityRatio(), "on_nothing_accepted": "best"}, id="density"),
        pytest.param({"acceptance": RandomPerPrompt(2), "dedup": Deduplicate(across_rounds=True)}, id="dedup"),
        pytest.param(
            {
                "supervised_dataset": [{"prompt": "a b", "completion": "c"}, {"prompt": "b", "completion": "d"}],
                "supervised_fraction": 0.4,
            },
            id="supervised",
        ),
        pytest.param({"acceptance": SOME, "max_attempts": 2, "on_nothing_accepted": "reference"}, id="reference"),
    ],
)
def test_options_resume_exactly(tmp_path: Path, options: dict) -> None:
    callbacks = {"callbacks": [KillAt(STEPS + 3)]}
    args = {"save_strategy": "steps", "save_steps": 2}
    whole, cut = whole_and_resumed(tmp_path, lambda: resampler(**options), callbacks, resume=True, **args)
    assert_equal_runs(whole, cut, 1)
    last = 2 // options.get("every_n_epochs", 1)
    assert stored(tmp_path / "cut", last) == stored(tmp_path / "whole", last)


@pytest.mark.parametrize(("calls_done", "policy"), [(1, "best"), (2, "reference"), (3, "best"), (4, "skip")])
def test_killed_within_a_later_attempt(tmp_path: Path, calls_done: int, policy: str) -> None:
    """What the cut-off attempt already accepted must not change who is in need of it, nor which shard is whose."""

    def make(engine: CountingEngine) -> object:
        return resampler(
            acceptance=SOME, max_attempts=3, min_accepted_per_prompt=2, on_nothing_accepted=policy, engine=engine
        )

    whole, killed, rest = CountingEngine(), CountingEngine(SHARDS + calls_done), CountingEngine()
    reference = trained(tmp_path / "whole", make(whole))
    with pytest.raises(Killed):
        trained(tmp_path / "cut", make(killed))
    cut = trained(tmp_path / "cut", make(rest))
    assert killed.calls + rest.calls == whole.calls
    assert_equal_runs(reference, cut, 1)


def test_killed_between_the_verdicts_of_two_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rsft_hf.generative.candidates import CandidateStore

    whole = trained(tmp_path / "whole", resampler(acceptance=SOME, max_attempts=2))
    write, judged = CandidateStore.write_verdicts, []

    def killed_write(self, path, *args):
        judged.append(path)
        if len(judged) == 3:
            raise Killed
        write(self, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CandidateStore, "write_verdicts", killed_write)
        with pytest.raises(Killed):
            trained(tmp_path / "cut", resampler(acceptance=SOME, max_attempts=2))
    engine = CountingEngine(0)
    cut = trained(tmp_path / "cut", resampler(acceptance=SOME, max_attempts=2, engine=engine))
    assert_equal_runs(whole, cut, 1)


def test_the_figures_of_a_resumed_epoch_are_logged_once(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    whole, cut = whole_and_resumed(tmp_path, resampler, {"callbacks": [KillAt(STEPS + 3)]}, resume=True, **args)
    for key in ("candidates/reward", "accepted/length", "round/accepted_rows"):
        assert logged(cut, key) == logged(whole, key)
        assert len(logged(whole, key)) == 3


def test_a_pool_without_accepted_rows_resumes(tmp_path: Path) -> None:
    supervised = [{"prompt": "a b", "completion": "c"}, {"prompt": "b", "completion": "d"}]

    def make() -> object:
        rule, options = Threshold(minimum=1.0), {"on_nothing_accepted": "skip", "supervised_fraction": 0.5}
        return resampler(acceptance=rule, supervised_dataset=supervised, **options)

    args = {"save_strategy": "steps", "save_steps": 2}
    whole, cut = whole_and_resumed(tmp_path, make, {"callbacks": [KillAt(STEPS + 3)]}, resume=True, **args)
    assert runs.largest_difference(whole, cut) == 0.0
    assert logged(whole, "round/accepted_rows") == [0.0] * 3


def test_a_process_killed_by_the_system_is_gone_on_with(tmp_path: Path) -> None:
    """kill -9 in the middle of the second round, by the process itself: nothing of Python is run after it."""
    script = (
        "import os, sys; sys.path[:0] = sys.argv[2:5]\n"
        "import conftest, torch, generative_runs as g; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "class Engine(g.CountingEngine):\n"
        "    def __call__(self, model, request):\n"
        f"        if len(self.calls) == {SHARDS + 2}: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "        return super().__call__(model, request)\n"
        f"g.trained(Path(sys.argv[1]), g.resampler(engine=Engine()), args={SAVED})\n"
    )
    tests = Path(__file__).parents[1]
    launch = [sys.executable, "-c", script, tmp_path / "cut", tests, tests / "helpers", tests.parent]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(shards(tmp_path / "cut", 1)) == 2
    engine = CountingEngine()
    cut = trained(tmp_path / "cut", resampler(engine=engine), resume=True, args=SAVED)
    assert len(engine.calls) == 2 * SHARDS - 2
    assert_equal_runs(trained(tmp_path / "whole", args=SAVED), cut, 3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full disk", "read-only"])
@pytest.mark.parametrize("at", [2, SHARDS + 2, 3 * SHARDS - 1], ids=["scored", "generated", "judged"])
def test_a_write_that_fails_leaves_the_last_state_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, code: int
) -> None:
    whole = trained(tmp_path / "whole")
    write_table, calls = pq.write_table, []

    def failing(table, path, **options):
        calls.append(path)
        if len(calls) == at:
            Path(path).write_bytes(b"PAR1 cut off")
            raise OSError(code, os.strerror(code), str(path))
        write_table(table, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", failing)
        with pytest.raises(OSError, match=r"What was written before is kept.*run again") as caught:
            trained(tmp_path / "cut")
    assert caught.value.errno == code
    assert os.strerror(code) in str(caught.value)
    assert not list((tmp_path / "cut").rglob("*.incomplete"))
    for path in (tmp_path / "cut").rglob("*.parquet"):
        pq.read_table(path)  # every shard is whole
    engine = CountingEngine()
    cut = trained(tmp_path / "cut", resampler(engine=engine))
    assert_equal_runs(whole, cut, 1)
    assert len(engine.calls) == SHARDS - min(at // 2, SHARDS)  # a shard is written when generated, and when scored
