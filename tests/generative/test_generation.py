"""Rollouts: rounds on every architecture, candidates independent of batches, log probabilities by teacher forcing."""

from typing import Any

import pytest
import torch

import generators
import generators as g
from rsft_hf.acceptance import Threshold
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import completion_log_probabilities


class SmallMemory:
    """A model on a device that holds some rows, and no more."""

    def __init__(self, model: Any, most_rows: int) -> None:
        self.model, self.device, self.most_rows = model, model.device, most_rows
        self.sizes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.most_rows:
            raise torch.OutOfMemoryError(f"{len(input_ids)} rows")
        return self.model(input_ids=input_ids, **inputs)


def test_likelihoods_take_smaller_batches_when_memory_runs_out() -> None:
    model, encoder = generators.tiny_model().eval(), Encoder(generators.tokenizer(), is_encoder_decoder=False)
    prompts = generators.prompt_ids(5)
    completions = [[6 + row, 7, 8][: 1 + row % 3] for row in range(5)]
    small = SmallMemory(model, 2)
    halved = completion_log_probabilities(small, encoder, prompts, completions)
    assert small.sizes == [5, 2, 2, 1]  # a batch of all five does not fit, batches of 5 // 2 do
    assert torch.allclose(halved, completion_log_probabilities(model, encoder, prompts, completions), atol=1e-5)
    assert len(set(halved.tolist())) == 5
    assert (halved < 0).all()
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        completion_log_probabilities(SmallMemory(model, 0), encoder, prompts, completions)


@pytest.mark.parametrize("name", g.NAMES)
def test_every_architecture_completes_a_round(tmp_path, name):
    run = g.trainer(tmp_path, g.resampler(), name)
    before = {path: value.clone() for path, value in run.model.state_dict().items()}
    run.train()
    assert run.state.global_step == 2  # 4 prompts, one accepted answer each, in batches of 2
    assert [(one.prompt_id, one.index) for one in g.stored(run)] == [(p, j) for p in range(4) for j in range(2)]
    assert [one.prompt_id for one in g.stored(run) if one.is_accepted] == [0, 1, 2, 3]
    assert any(not torch.equal(value, before[path]) for path, value in run.model.state_dict().items())
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_a_round_with_nothing_accepted_is_an_error_or_the_policy(tmp_path):
    """Every policy: test_rounds.py."""
    source = g.resampler(acceptance=Threshold(minimum=9.0), on_nothing_accepted="raise")
    with pytest.raises(RuntimeError, match=r"No candidate was accepted in round-000: of 8, 8 rejected.*Remedies:"):
        g.trainer(tmp_path / "raise", source).train()
    run = g.trainer(tmp_path / "best", g.resampler(acceptance=Threshold(minimum=9.0)))
    run.train()
    assert [one.verdict for one in g.stored(run)].count("fallback") == 4
    assert run.state.global_step == 2


def test_candidates_are_the_same_in_any_batch_and_again_and_new_in_a_retry(tmp_path):
    """Resumed runs: test_generative_resume.py. Processes: test_generative_distributed.py."""

    def made(folder: str, most: int, attempts: int) -> dict:
        source = g.resampler(
            acceptance=Threshold(minimum=9.0), engine=GenerateEngine(most), max_attempts=attempts, num_candidates=3
        )
        run = g.trainer(tmp_path / folder, source)
        run.train()
        return {(one.prompt_id, one.attempt, one.index): (one.seed, one.token_ids) for one in g.stored(run)}

    first = made("first", 64, attempts=1)
    assert len(first) == 4 * 3
    assert made("again", 64, attempts=1) == first
    assert made("small", 2, attempts=1) == first
    retried = made("retried", 5, attempts=2)
    assert {key: value for key, value in retried.items() if key[1] == 0} == first
    seeds = [seed for seed, _ in retried.values()]
    assert len(seeds) == len(set(seeds)) == 2 * len(first)


def test_no_last_batch_shard_or_prompt_is_dropped(tmp_path):
    # 9 prompts: shards of 2 and one of 1, training batches of 2 and one of 1, generation of 5 rows at a time.
    source = g.resampler(engine=GenerateEngine(5), num_candidates=3)
    answered = []

    def count(prediction):
        answered.append(len(prediction.predictions))
        return {}

    held_out = g.prompts(66, first=30)  # evaluation generates for 64 at once
    source.eval_generation_config = g.sampling(2)
    run = g.trainer(tmp_path, source, num_prompts=9, eval_dataset=held_out, compute_metrics=count)
    run.train()
    assert len(list((tmp_path / "candidates" / "round-000").glob("*.parquet"))) == 5
    assert [(one.prompt_id, one.index) for one in g.stored(run)] == [(p, j) for p in range(9) for j in range(3)]
    assert sorted(run._progress.indices.tolist()) == list(range(9))
    assert run.state.global_step == 5
    run.evaluate()
    assert answered == [66]
