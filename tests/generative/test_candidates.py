"""What a round leaves on disk: readable at every stage, written whole or not at all, never mixed with another's."""

import contextlib
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

import generators
from generative_runs import (
    NUM_PROMPTS,
    SHARDS,
    CountingEngine,
    Killed,
    resampler,
    round_dir,
    shards,
    stored,
    trained,
)
from rsft_hf import Deduplicate, Threshold, load_candidates
from rsft_hf.generative import Candidate, RejectTruncated
from rsft_hf.generative.candidates import STAGES, CandidateStore

COLUMNS = {
    "prompt_id", "attempt", "candidate", "prompt", "text", "token_ids", "num_tokens", "finish_reason", "log_q", "log_p",
    "reward", "rewards/share_of_wanted", "is_accepted", "verdict", "rule", "duplicate_key", "extras", "seed",
    "template_input", "separator",
}  # fmt: skip


def kill_in_scoring(completions, **_):
    raise RuntimeError("the grader is down")


kill_in_scoring.__name__ = "share_of_wanted"  # the same reward to the facts of the round


def candidate(number: int = 0, **values) -> Candidate:
    return Candidate(
        **{"prompt_id": number, "prompt": "a b", "token_ids": [6, 1], "text": "a", "finish_reason": "stop"} | values
    )


@pytest.mark.parametrize("conversational", [False, True])
def test_a_candidate_returns_as_it_was_written(tmp_path: Path, conversational: bool) -> None:
    prompt = [{"role": "user", "content": "a"}] if conversational else "a"
    written = [
        candidate(
            3, prompt=prompt, rewards={"one": 0.1, "two": None}, reward=0.1, seed=2**62 + 1, extras={"note": "x"}
        ),
        candidate(
            4, prompt=prompt, log_q=-1.25, log_p=-1.5, verdict="filtered", rule="RejectEmpty()", is_accepted=False
        ),
    ]
    store = CandidateStore(tmp_path, ["one", "two"], conversational)
    store.write(store.path(0, 0), written, "scored")
    written[1].rewards = {"one": None, "two": None}
    assert store.read(store.path(0, 0)) == written


def test_the_columns_are_the_same_at_every_stage(tmp_path: Path) -> None:
    for kill, stage in ((1, None), (None, "generated"), (None, "judged")):
        reward = kill_in_scoring if stage == "generated" else generators.share_of_wanted
        made = resampler(reward, engine=CountingEngine(kill))
        folder = tmp_path / str(stage)
        with contextlib.suppress(Killed, RuntimeError):
            trained(folder, made)
        dataset = load_candidates(folder / "candidates")
        assert set(dataset.column_names) == COLUMNS
        plain = datasets.load_dataset("parquet", data_files=f"{round_dir(folder)}/*.parquet", split="train")
        assert plain.to_list() == dataset.to_list() == stored(folder)
        assert len(dataset) == (8 if stage != "judged" else 4 * NUM_PROMPTS)
        stages = {pq.read_schema(path).metadata[b"rsft_hf.stage"].decode() for path in shards(folder)}
        assert stages == {stage or "scored"} <= set(STAGES)


def test_load_candidates_reads_one_round_or_all(tmp_path: Path) -> None:
    trained(tmp_path, args={"num_train_epochs": 2})
    assert len(load_candidates(tmp_path / "candidates")) == 2 * 4 * NUM_PROMPTS
    assert load_candidates(round_dir(tmp_path, 1)).to_list() == stored(tmp_path, 1)
    assert load_candidates(tmp_path).to_list() == load_candidates(tmp_path / "candidates").to_list()
    with pytest.raises(FileNotFoundError, match="holds no candidates"):
        load_candidates(tmp_path / "checkpoint-1")


def test_no_draft_is_left_and_a_half_written_one_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, resampler(engine=CountingEngine(2)))
    assert [path.name for path in shards(tmp_path)] == [f"attempt-00-shard-0000{number}.parquet" for number in (0, 1)]
    draft = round_dir(tmp_path) / ".attempt-00-shard-00002.parquet.incomplete"
    draft.write_bytes(shards(tmp_path)[0].read_bytes()[:100])
    engine = CountingEngine()
    trained(tmp_path, resampler(engine=engine))
    assert len(engine.calls) == SHARDS - 2
    assert not [path for path in round_dir(tmp_path).iterdir() if path.name.startswith(".")]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CandidateStore(tmp_path, [], is_conversational=False)
    store.write(store.path(0, 0), [candidate(1)], "generated")

    def full_disk(table, path, **_):
        Path(path).write_bytes(b"PAR1 half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.write(store.path(0, 0), [candidate(2)], "scored")
    assert store.stage(store.path(0, 0)) == "generated"
    assert [one.prompt_id for one in store.read(store.path(0, 0))] == [1]
    assert store.shards() == [store.path(0, 0)]


def test_the_manifest_tells_the_facts_and_the_figures(tmp_path: Path) -> None:
    ours = trained(tmp_path, resampler(acceptance=Threshold(minimum=0.1), filters=[RejectTruncated()]))
    manifest = json.loads((round_dir(tmp_path) / "manifest.json").read_text())
    facts = manifest["facts"]
    assert facts["seed"] == ours.args.seed
    assert facts["num_candidates"] == 4
    assert facts["generation_config"]["max_new_tokens"] == 8
    assert facts["acceptance"] == "Threshold(minimum=0.1)"
    assert facts["filters"] == ["RejectTruncated()"]
    rows = stored(tmp_path)
    assert manifest["reward_names"] == ["share_of_wanted"]
    assert manifest["metrics"]["candidates/truncated"] == sum(row["finish_reason"] == "length" for row in rows) / 36


def test_a_killed_generation_goes_on_without_generating_again(tmp_path: Path) -> None:
    killed = CountingEngine(3)
    with pytest.raises(Killed):
        trained(tmp_path / "cut", resampler(engine=killed))
    again, whole = CountingEngine(), CountingEngine()
    trained(tmp_path / "cut", resampler(engine=again))
    trained(tmp_path / "whole", resampler(engine=whole))
    assert len(killed.calls) == 3
    assert killed.calls + again.calls == whole.calls
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


def test_a_killed_scoring_goes_on_without_generating_that_shard_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the grader is down"):
        trained(tmp_path, resampler(kill_in_scoring))
    engine, scored = CountingEngine(), []

    def share_of_wanted(completions, **columns):
        scored.extend(completions)
        return generators.share_of_wanted(completions, **columns)

    trained(tmp_path, resampler(share_of_wanted, engine=engine))
    assert len(engine.calls) == SHARDS - 1
    assert len(scored) == 4 * NUM_PROMPTS


def test_a_finished_round_is_neither_generated_nor_scored_again(tmp_path: Path) -> None:
    trained(tmp_path)
    engine = CountingEngine(0)  # would be killed at once
    before = stored(tmp_path)
    trained(tmp_path, resampler(engine=engine))
    assert engine.calls == []
    assert stored(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_candidates": 3}, "num_candidates"),
        ({"generation_config": generators.sampling(temperature=0.5)}, "generation_config"),
        ({"filters": [RejectTruncated()]}, "filters"),
        ({"acceptance": Threshold(minimum=0.0)}, "acceptance"),
        ({"dedup": Deduplicate()}, "dedup"),
        ({"keep_log_probs": True}, "with_log_probs"),
        ({"max_attempts": 2}, "attempts"),
        ({"on_nothing_accepted": "skip"}, "attempts"),
        ({"reward_weights": [2.0]}, "reward_weights"),
        ({"args": {"data_seed": 5}}, "seed"),
        ({"train_dataset": generators.prompts(NUM_PROMPTS, first=20)}, "prompts"),
        ({"model": 1}, "model"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "encoding"),
    ],
)
def test_candidates_of_other_facts_are_moved_aside_never_mixed(tmp_path: Path, caplog, options, name) -> None:
    chat = {"train_dataset": generators.prompts(NUM_PROMPTS, conversational=True)}
    common = chat if "chat_template_kwargs" in options else {}
    with pytest.raises(Killed):
        trained(tmp_path, resampler(engine=CountingEngine(2)), **common)
    before = stored(tmp_path)
    engine = CountingEngine()
    options = dict(options)  # the case may be run again
    keywords = common | {key: options.pop(key) for key in ("args", "train_dataset") if key in options}
    if "model" in options:
        keywords["model"] = generators.tiny_model(seed=options.pop("model"))
    trained(tmp_path, resampler(engine=engine, **options), **keywords)
    if name in ("filters", "acceptance", "dedup", "attempts", "reward_weights"):  # the answers are still those
        assert len(engine.calls) == SHARDS - 2
        assert f"candidates of another run (it differs in {name}" in caplog.text
    else:
        assert len(engine.calls) >= SHARDS
        assert f"candidates of another run (round-000 differs in {name}" in caplog.text
    aside = tmp_path / "candidates" / "replaced" / "round-000-0"
    assert load_candidates(aside).to_list() == before


def test_log_probabilities_of_another_reference_are_never_mixed(tmp_path: Path) -> None:
    killed = resampler(reference_model=generators.tiny_model(seed=3), engine=CountingEngine(2))
    with pytest.raises(Killed):
        trained(tmp_path / "cut", killed)
    trained(tmp_path / "cut", resampler(reference_model=generators.tiny_model(seed=4)))
    trained(tmp_path / "whole", resampler(reference_model=generators.tiny_model(seed=4)))
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


def test_a_round_that_begins_anew_takes_the_later_ones_with_it(tmp_path: Path) -> None:
    """Else `replay_rounds` and deduplication across rounds would read what another run accepted."""
    trained(tmp_path, args={"num_train_epochs": 2})
    before = [stored(tmp_path, number) for number in (0, 1)]
    trained(tmp_path, resampler(num_candidates=3))
    assert not round_dir(tmp_path, 1).exists()
    for number in (0, 1):
        assert load_candidates(tmp_path / "candidates" / "replaced" / f"round-00{number}-0").to_list() == before[number]


def test_a_shorter_run_that_goes_on_from_the_first_round_leaves_no_later_ones(tmp_path: Path, caplog) -> None:
    """Its accepted rows would be exported with those of the longer run, which trained on."""
    still = {"lr_scheduler_type": "constant"}  # or the first round of the longer run trains otherwise
    trained(tmp_path, args={"num_train_epochs": 3, **still})
    before = [stored(tmp_path, number) for number in (0, 1, 2)]
    engine = CountingEngine()
    trained(tmp_path, resampler(engine=engine), args={"num_train_epochs": 2, **still})
    assert engine.calls == []
    assert load_candidates(tmp_path / "candidates").to_list() == before[0] + before[1]
    assert load_candidates(tmp_path / "candidates" / "replaced" / "round-002-0").to_list() == before[2]
    assert "round-002 held candidates of another run (this one ended with round 1)" in caplog.text
