"""Continuous batching against the exact engine and teacher-forced passes; what it refuses and what it makes up for."""

import dataclasses
import gc
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import generators as g
from rsft_hf.engines.base import Engine, GenerationRequest
from rsft_hf.engines.continuous import ContinuousEngine, split
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.log_probs import token_log_probabilities
from rsft_hf.engines.random_streams import candidate_seed

NUM_PROMPTS, NUM_CANDIDATES = 4, 3
TRUNCATED = {"temperature": 0.7, "top_p": 0.9, "top_k": 5}


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Each call of `generate_batch` collects garbage twice, half a second each among all that the tests import."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def request_for(model, num_prompts: int = NUM_PROMPTS, num_candidates: int = NUM_CANDIDATES, **settings):
    """A request with log probabilities, and as many seeds as it takes; `settings` go to `generators.complete`."""
    seeds = [[candidate_seed(0, 0, row, 0, index) for index in range(num_candidates)] for row in range(num_prompts)]
    return GenerationRequest(g.prompt_ids(num_prompts), seeds, g.complete(model, **settings), with_log_probs=True)


def run(model, request: GenerationRequest, engine: Engine | None = None):
    """Candidates in order of prompt and index, each there once."""
    found = sorted((engine or ContinuousEngine())(model, request), key=lambda one: (one.prompt, one.index))
    pairs = [(prompt, index) for prompt in range(len(request.prompts)) for index in range(request.num_candidates)]
    assert [(one.prompt, one.index) for one in found] == pairs
    return found


def outcomes(sequences) -> list[tuple[list[int], str]]:
    return [(one.token_ids, one.finish_reason) for one in sequences]


@pytest.mark.parametrize("name", g.DECODER_ONLY)
def test_greedy_candidates_are_those_of_generate(name):
    model = g.tiny_model(name).eval()
    request = request_for(model, num_candidates=1, is_greedy=True, max_new_tokens=10)
    expected, found = run(model, request, GenerateEngine()), run(model, request)
    assert len({tuple(one.token_ids) for one in expected}) >= 2
    assert outcomes(found) == outcomes(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.log_q, other.log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_p, other.log_p, atol=1e-4, rtol=0)


def test_candidates_end_at_each_of_several_end_tokens_and_have_their_log_probabilities():
    model, ends = g.tiny_model("llama").eval(), [g.EOS, g.WORDS.index("h"), g.WORDS.index("j")]
    request = request_for(model, num_candidates=6, eos_token_id=ends, **TRUNCATED)
    found = run(model, request)
    assert {one.token_ids[-1] for one in found if one.finish_reason == "stop"} > {ends[1]}
    for one in found:
        assert not set(one.token_ids[:-1]) & set(ends)
        assert one.finish_reason == "stop" if one.token_ids[-1] in ends else len(one.token_ids) == 8
    prompts = [request.prompts[one.prompt] for one in found]
    scored = token_log_probabilities(model, prompts, [one.token_ids for one in found], request.generation_config)
    for one, (log_q, log_p) in zip(found, scored):
        torch.testing.assert_close(one.log_q, log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_p, log_p, atol=1e-4, rtol=0)
        assert one.log_q.dtype == torch.float32
        assert bool((one.log_q <= 0).all())
    assert any(not torch.allclose(one.log_q, one.log_p, atol=0.1) for one in found)  # truncation shows


def test_first_tokens_follow_the_processed_distribution():
    model, num_candidates = g.tiny_model("llama").eval(), 800
    request = request_for(model, 1, num_candidates, max_new_tokens=1, **TRUNCATED)
    request = dataclasses.replace(request, with_log_probs=False)
    found = run(model, request, ContinuousEngine(max_requests=400))
    assert all(one.log_q is None and one.log_p is None for one in found)
    counts = Counter(one.token_ids[0] for one in found)
    with torch.no_grad():
        logits = model(torch.tensor([request.prompts[0]])).logits[0, -1] / 0.7
    best = logits.topk(5)
    probabilities = best.values.softmax(-1)
    kept = probabilities[probabilities.cumsum(-1) - probabilities < 0.9]
    expected = dict(zip(best.indices.tolist(), (kept / kept.sum()).tolist()))
    assert len(expected) >= 3
    assert set(counts) == set(expected)
    found_counts, wanted = zip(*((counts[token], share * num_candidates) for token, share in expected.items()))
    assert stats.chisquare(found_counts, np.array(wanted) * sum(found_counts) / sum(wanted)).pvalue > 1e-3


def test_limits_are_kept_in_few_calls_and_the_longest_come_first():
    model = g.tiny_model("llama").eval()
    limits = [[3, 3, 3], [4, 4, 4], [1, 8, 8], [8, 8, 8]]
    request = dataclasses.replace(request_for(model), limits=limits, expected_lengths=[1.0, 9.0, 4.0, 5.0])
    calls = [(call.limit, call.prompts, call.indices) for call in split(request)]
    assert calls == [(8, [3], [[0, 1, 2]]), (8, [2], [[1, 2]]), (4, [1, 0], [[0, 1, 2]] * 2), (1, [2], [[0]])]
    found = run(model, request)
    for one in found:
        limit = limits[one.prompt][one.index]
        assert len(one.log_q) == len(one.log_p) == len(one.token_ids) <= limit
        assert len(one.token_ids) == limit if one.finish_reason == "length" else one.token_ids[-1] == g.EOS
    assert sum(one.finish_reason == "length" for one in found) >= 3


def test_log_p_has_the_arithmetic_of_log_q():
    model = g.tiny_model("llama").eval()
    request = request_for(model)  # neither temperature nor truncation: q is p
    with torch.autocast("cpu", torch.bfloat16):  # a trainer's, which does not reach the loop's thread
        found = run(model, request)
    for one in found:
        torch.testing.assert_close(one.log_q, one.log_p, atol=1e-4, rtol=0)


def test_nothing_is_changed_and_the_same_request_gives_the_same_candidates():
    model = g.tiny_model("gpt2")
    request = dataclasses.replace(request_for(model, **TRUNCATED), with_log_probs=False)
    model.transformer.h[0].eval()  # neither all on nor all off
    modes = [module.training for module in model.modules()]
    config, asked = model.generation_config.to_dict(), request.generation_config.to_dict()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = run(model, request)
    torch.manual_seed(99)  # whatever the training drew in between
    again = run(model, request)
    torch.set_rng_state(states[2])
    assert outcomes(first) == outcomes(again)
    other = dataclasses.replace(request, seeds=[[seed + 1 for seed in row] for row in request.seeds])
    assert outcomes(run(model, other)) != outcomes(first)
    assert [module.training for module in model.modules()] == modes
    assert (model.generation_config.to_dict(), request.generation_config.to_dict()) == (config, asked)
    assert model.config._attn_implementation == "sdpa"
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_what_it_refuses():
    llama, bart = g.tiny_model("llama").eval(), g.tiny_model("bart").eval()
    for settings in ({"min_p": 0.1}, {"repetition_penalty": 1.2}, {"stop_strings": ["em"]}, {"min_new_tokens": 2}):
        with pytest.raises(ValueError, match=rf'generate_batch cannot sample with {min(settings)}=.*engine="inflight"'):
            ContinuousEngine()(llama, request_for(llama, **settings))
    with pytest.raises(ValueError, match="num_beams=2"):
        ContinuousEngine()(llama, request_for(llama, is_greedy=True, num_beams=2))
    with pytest.raises(ValueError, match="BartForConditionalGeneration has an encoder"):
        ContinuousEngine()(bart, request_for(bart))
    with pytest.raises(ValueError, match="`max_new_tokens`=63 it takes"):
        ContinuousEngine()(llama, request_for(llama, max_new_tokens=63))
    for field in ("max_requests", "max_batch_tokens", "num_blocks"):
        with pytest.raises(ValueError, match=f"`{field}`=0 must be at least 1"):
            ContinuousEngine(**{field: 0})
    assert isinstance(ContinuousEngine(), Engine)


def test_what_comes_back_broken_is_made_up_for(monkeypatch, caplog):
    model = g.tiny_model("llama").eval()
    request = request_for(model)
    generate_batch = type(model).generate_batch

    def dying(*args, **keywords):
        outputs = list(generate_batch(model, *args, **keywords).items())
        del outputs[3]  # lost
        outputs[0][1].error = "The background thread died"
        outputs[1][1].generated_tokens = []
        outputs[2][1].generated_tokens, outputs[2][1].logprobs = [g.A, g.A], [-1.0, -1.0]  # neither an end nor 8 tokens
        outputs[4][1].logprobs = [float("nan")] * len(outputs[4][1].generated_tokens)
        return dict(outputs)

    monkeypatch.setattr(model, "generate_batch", dying)
    whole, exact = run(model, request), run(model, request, GenerateEngine())
    made_up = [one.token_ids == other.token_ids for one, other in zip(whole, exact)]
    assert 5 <= sum(made_up) < len(made_up)
    assert "ContinuousEngine: 5 of 12 candidates did not come back whole" in caplog.text
    assert all(len(one.log_q) == len(one.log_p) == len(one.token_ids) for one in whole)


def test_a_loop_that_dies_is_made_up_for(caplog):
    model, passes = g.tiny_model("llama").eval(), []
    request = request_for(model)

    def die(*_):
        passes.append(1)
        if len(passes) == 4:
            raise RuntimeError("the device is lost")

    with model.register_forward_pre_hook(die):
        found = run(model, request)
    exact = run(model, request, GenerateEngine())
    num_made_up = sum(one.token_ids == other.token_ids for one, other in zip(found, exact))
    assert 8 <= num_made_up < 12  # one prompt at most had ended within three passes
    assert f"{num_made_up} of 12 candidates" in caplog.text


def test_a_call_that_raises_is_made_up_for_and_leaves_the_model_as_it_was(monkeypatch, caplog):
    model = g.tiny_model("llama").eval()
    request = dataclasses.replace(request_for(model), limits=[[2] * NUM_CANDIDATES] * NUM_PROMPTS)

    def failing(*args, **keywords):
        model.set_attn_implementation("paged|eager")
        torch.manual_seed(0)
        raise RuntimeError("the worker died")

    monkeypatch.setattr(model, "generate_batch", failing)
    state = torch.get_rng_state()
    found = run(model, request)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    assert "generate_batch failed: the worker died" in caplog.text
    assert max(len(one.token_ids) for one in found) == 2


def test_a_cache_that_does_not_fit_is_halved(monkeypatch, caplog):
    model, asked = g.tiny_model("llama").eval(), []
    generate_batch = type(model).generate_batch

    def small(*args, **keywords):
        config = keywords["continuous_batching_config"]
        asked.append((config.max_requests_per_batch, config.num_blocks))
        if config.max_requests_per_batch > 2:
            raise MemoryError("Memory footprint 9 is more than available memory 8")
        return generate_batch(model, *args, **keywords)

    monkeypatch.setattr(model, "generate_batch", small)
    engine = ContinuousEngine(max_requests=8)
    run(model, request_for(model), engine)
    assert engine.max_requests == 2
    # Of 12 candidates at most 8 + 3, 4 + 3, 2 + 3 are alive, of one page each; 11 / 0.8 = 13.75, then 8.75 and 6.25.
    assert asked == [(8, 15), (4, 10), (2, 8)]
    with pytest.raises(MemoryError):
        run(model, request_for(model), ContinuousEngine(num_blocks=10))


def test_a_run_completes_with_it(tmp_path: Path):
    run = g.trainer(tmp_path, g.resampler(engine=ContinuousEngine()))
    assert run.train().global_step == 2  # 4 prompts in batches of 2
    assert len(g.stored(run)) == 8
