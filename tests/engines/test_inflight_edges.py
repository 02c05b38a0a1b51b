"""What the engine with slots does at the edges: bad input, little memory, users' models."""

import dataclasses

import peft
import pytest
import torch
import transformers as hf
from test_generate import short_of_memory

import architectures
import generators as g
from architectures import request_for, run, texts
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.engines.inflight.scheduler import Scheduler
from rsft_hf.engines.model_access import without_wrappers

ENGINES = [InFlightEngine(4), GenerateEngine(4)]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bad_requests_are_refused_before_anything_is_generated(engine, name):
    model = architectures.model_of(name)
    with pytest.raises(ValueError, match="Prompt 1 has no tokens, and nothing can be continued"):
        run(engine, model, request_for(model, [[g.A], []]))
    with pytest.raises(ValueError, match="`limits` holds a number below 1"):
        run(engine, model, request_for(model, [[g.A]], limits=[[0, 3]]))
    with pytest.raises(ValueError, match=r"`limits` must hold 2 numbers for each of 1 prompts, got rows of \[1\]"):
        run(engine, model, request_for(model, [[g.A]], limits=[[3]]))
    uneven = dataclasses.replace(request_for(model, [[g.A], [g.A]]), seeds=[[1, 2], [3]])
    with pytest.raises(ValueError, match=r"`seeds` must hold 2 numbers for each of 2 prompts, got rows of \[1, 2\]"):
        run(engine, model, uneven)
    assert run(engine, model, request_for(model, [])) == []
    assert run(engine, model, request_for(model, [[g.A]], num_candidates=0)) == []


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_prompt_that_fills_the_context_is_refused_and_one_that_just_fits_is_not(engine):
    model = architectures.model_of("llama")  # 64 positions, 8 of them for the answer
    fits = run(engine, model, request_for(model, [[g.A] * 56]))
    assert len(fits) == 2
    with pytest.raises(
        ValueError, match=r"Prompt 1 has 57 tokens, with `max_new_tokens`=8 it takes 65, and the model r"
    ):
        run(engine, model, request_for(model, [[g.A], [g.A] * 57]))
    bart = architectures.model_of("bart")
    with pytest.raises(ValueError, match="Prompt 0 has 65 tokens, and the model reads 64"):
        run(engine, bart, request_for(bart, [[g.A] * 65]))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_without_an_end_token_every_candidate_reaches_the_limit(engine):
    model = architectures.model_of("llama")
    config = g.complete(model)
    config.eos_token_id = model.generation_config.eos_token_id = None
    found = run(engine, model, request_for(model, architectures.prompts_for(model), config=config))
    assert {(len(one.token_ids), one.finish_reason) for one in found} == {(8, "length")}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_candidate_has_a_limit_of_its_own(engine, name):
    model = architectures.model_of(name)
    ids = architectures.prompts_for(model)
    long = run(engine, model, request_for(model, ids))
    limits = [[1 + (number + 3 * index) % 9 for index in range(2)] for number in range(len(ids))]
    short = run(engine, model, request_for(model, ids, limits=limits))
    for one, other in zip(short, long, strict=True):
        most = min(8, limits[one.prompt][one.index])
        assert one.token_ids == other.token_ids[:most]
        assert one.finish_reason == ("length" if len(other.token_ids) > most else other.finish_reason)


def test_beams_and_learned_prompts_are_left_to_generate():
    model = architectures.model_of("llama")
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    config = g.complete(model, is_greedy=True, num_beams=3)
    expected = texts(run(GenerateEngine(), model, request_for(model, ids, 1, config=config)))
    assert texts(run(engine, model, request_for(model, ids, 1, config=config))) == expected
    assert engine._said == {"num_beams=3 searches beams"}
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    engine = InFlightEngine(4)
    assert len(run(engine, prompted, request_for(model, ids))) == 2 * len(ids)
    assert engine._said == {"its adapter puts learned tokens before the prompt"}


def test_a_processor_that_may_look_at_other_rows_is_obeyed_and_never_dropped(caplog):
    model = architectures.model_of("gpt2")
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    config = g.complete(model, sequence_bias=[[[g.A], 5.0]])
    expected = texts(run(GenerateEngine(1), model, request_for(model, ids, config=config)))
    assert texts(run(engine, model, request_for(model, ids, config=config))) == expected
    assert engine._said == {"SequenceBiasLogitsProcessor may look at more than a row"}
    assert expected != texts(run(engine, model, request_for(model, ids)))


@pytest.mark.parametrize("most", [3, 5])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_with_too_little_memory_there_are_fewer_slots_and_nothing_is_lost_or_yielded_twice(name, most):
    model = architectures.model_of(name)
    ids = architectures.prompts_for(model)
    expected = texts(run(InFlightEngine(16), model, request_for(model, ids)))
    passes, engine = short_of_memory(model, most), InFlightEngine(16)
    assert texts(run(engine, model, request_for(model, ids))) == expected
    assert engine.max_sequences == 3  # of 14, by 7
    passes.clear()
    assert texts(run(engine, model, request_for(model, ids))) == expected
    assert max(passes) <= most  # it remembers


def test_one_candidate_that_does_not_fit_is_an_error():
    model, engine = architectures.model_of("llama"), InFlightEngine(8)
    run(engine, model, request_for(model, [[g.A]]))
    short_of_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        run(engine, model, request_for(model, [[g.A]]))


def test_a_budget_of_tokens_bounds_the_slots(monkeypatch):
    model, seen = architectures.model_of("llama"), []
    begin = Scheduler.__init__
    monkeypatch.setattr(Scheduler, "__init__", lambda self, *args: (begin(self, *args), seen.append(self.max_rows))[0])
    run(InFlightEngine(64, max_tokens=50), model, request_for(model, [[g.A] * 2] * 9))
    assert seen == [3, 5]  # the trial run's, and 50 tokens // (2 + 8)


@pytest.mark.parametrize("is_merged", [False, True])
def test_adapters_generate_in_slots(is_merged):
    base = architectures.model_of("llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    if is_merged:
        model.merge_adapter()
    ids, engine = architectures.prompts_for(base), InFlightEngine(4)
    expected = texts(run(GenerateEngine(1), model, request_for(base, ids)))
    assert texts(run(engine, model, request_for(base, ids))) == expected
    assert not engine._said
    with model.disable_adapter():
        assert texts(run(engine, model, request_for(base, ids))) != expected
    assert isinstance(without_wrappers(model), hf.LlamaForCausalLM)


def test_half_precision_gives_the_same_distribution():
    model = architectures.model_of("llama")
    ids, engine = architectures.prompts_for(model, 1), InFlightEngine(64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = run(engine, model, request_for(model, ids, 2000, with_log_probs=True, config=g.complete(model)))
    assert not engine._said
    exact = run(engine, model, request_for(model, ids, 2000, with_log_probs=True))
    first = [[one.token_ids[0] for one in some].count(token) for some in (found, exact) for token in range(20)]
    for token in range(20):  # frequencies of the first token, within five standard deviations
        assert abs(first[token] - first[20 + token]) <= 5 * max(1, first[20 + token]) ** 0.5 + 20
    means = [torch.stack([one.log_q.sum() for one in some]).mean() for some in (found, exact)]
    assert abs(means[0] - means[1]) < 0.5


def test_engines_have_names():
    model = architectures.model_of("llama")
    assert isinstance(choose_engine("auto", model), InFlightEngine)
    assert isinstance(choose_engine("inflight", model), InFlightEngine)
    assert isinstance(choose_engine("generate", model), GenerateEngine)
    for name in ("max_sequences", "max_tokens", "prefill_tokens"):
        with pytest.raises(ValueError, match=f"`{name}`=0 must be at least 1"):
            InFlightEngine(**{name: 0})
