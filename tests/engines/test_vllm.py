"""What is asked of vLLM and made of its answers, against the recorded contract of its interface."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import generators as g
import recorded_vllm
from rsft_hf.engines.base import Engine, GenerationRequest
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.log_probs import token_log_probabilities
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.engines.vllm import VLLMEngine, checkpoint_weights, sampling_params

NUM_PROMPTS, NUM_CANDIDATES = 4, 3


@pytest.fixture(autouse=True)
def _recorded(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", recorded_vllm)


def request_for(model, num_prompts: int = NUM_PROMPTS, num_candidates: int = NUM_CANDIDATES, **settings):
    seeds = [[candidate_seed(0, 0, row, 0, index) for index in range(num_candidates)] for row in range(num_prompts)]
    config = g.complete(model, **settings)
    return GenerationRequest(g.prompt_ids(num_prompts), seeds, config, with_log_probs=True, tokenizer=g.tokenizer())


def engine_for(model, **llm_kwargs) -> VLLMEngine:
    engine = VLLMEngine(llm_kwargs)
    engine.sync_weights(model, is_main_process=True)
    return engine


def run(engine, model, request: GenerationRequest):
    found = sorted(engine(model, request), key=lambda one: (one.prompt, one.index))
    pairs = [(prompt, index) for prompt in range(len(request.prompts)) for index in range(request.num_candidates)]
    assert [(one.prompt, one.index) for one in found] == pairs
    return found


def outcomes(sequences) -> list[tuple[list[int], str]]:
    return [(one.token_ids, one.finish_reason) for one in sequences]


@pytest.mark.parametrize("name", g.DECODER_ONLY)
def test_greedy_candidates_are_those_of_generate(name):
    model = g.tiny_model(name).eval()
    ends = [g.EOS, g.WORDS.index("h")]
    request = request_for(model, num_candidates=1, is_greedy=True, max_new_tokens=10, eos_token_id=ends)
    expected, found = run(GenerateEngine(), model, request), run(engine_for(model), model, request)
    assert len({tuple(one.token_ids) for one in expected}) >= 2
    assert outcomes(found) == outcomes(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.log_q, other.log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_p, other.log_p, atol=1e-4, rtol=0)


SETTINGS = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {"temperature": 1.3, "min_p": 0.1},
    {"repetition_penalty": 1.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_log_q_and_log_p_are_those_of_teacher_forcing(settings):
    model = g.tiny_model("llama").eval()
    request = request_for(model, **settings)
    found = run(engine_for(model), model, request)
    prompts = [request.prompts[one.prompt] for one in found]
    answers = [one.token_ids for one in found]
    # Row by row: older versions of transformers penalise the padding of a prompt too.
    scored = token_log_probabilities(model, prompts, answers, request.generation_config, batch_size=1)
    for one, (log_q, log_p) in zip(found, scored):
        torch.testing.assert_close(one.log_q, log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_p, log_p, atol=1e-4, rtol=0)
    assert {one.finish_reason for one in found} == {"stop", "length"}
    assert len({tuple(one.token_ids) for one in found}) > NUM_PROMPTS


def test_a_candidate_depends_on_no_company_and_nothing_global_moves():
    model = g.tiny_model("llama").eval()
    torch.manual_seed(3)
    environment, state = dict(os.environ), torch.get_rng_state()
    engine, request = engine_for(model), request_for(model)
    whole = run(engine, model, request)
    part = dataclasses.replace(request, prompts=request.prompts[2:], seeds=request.seeds[2:])
    assert outcomes(run(engine, model, part)) == outcomes(whole)[2 * NUM_CANDIDATES :]
    with torch.autocast("cpu", torch.bfloat16):  # as a trainer's surroundings; vLLM has a type of its own
        again = run(engine, model, request)
    assert all(torch.equal(one.log_q, other.log_q) for one, other in zip(whole, again))
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == environment
    assert engine._llm.llm.launched == ["0", "0", "1", "127.0.0.1"]


def test_each_round_has_its_weights_and_forgets_the_prompts_of_the_last():
    model = g.tiny_model("llama").eval()
    request = request_for(model, num_candidates=1, is_greedy=True)
    engine = engine_for(model)
    first, llm = run(engine, model, request), engine._llm
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert outcomes(run(engine, model, request)) == outcomes(first)  # not yet
    engine.sync_weights(model, is_main_process=False)
    assert engine._llm is llm
    assert outcomes(run(engine, model, request)) == outcomes(run(GenerateEngine(), model, request)) != outcomes(first)


def test_an_adapter_is_merged_for_vllm_and_stays_apart_for_training():
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(g.tiny_model("llama"), config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    plain = dict(g.tiny_model("llama").named_parameters())
    assert [name for name, _ in checkpoint_weights(model)] == list(plain)
    request = request_for(model, num_candidates=1, is_greedy=True)
    found = run(engine_for(model), model, request)
    assert outcomes(found) == outcomes(run(GenerateEngine(), model, request))
    with model.disable_adapter():
        assert outcomes(found) != outcomes(run(GenerateEngine(), model, request))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_tied_weights_are_pushed_once():
    model = g.tiny_model("gpt2").eval()
    names = [name for name, _ in checkpoint_weights(model)]
    assert "lm_head.weight" not in names
    assert names[0] == "transformer.wte.weight"
    engine_for(model)


def test_weights_that_vllm_names_otherwise_are_an_error(monkeypatch):
    load = recorded_vllm._Model.load_weights
    monkeypatch.setattr(recorded_vllm._Model, "load_weights", lambda self, weights: load(self, list(weights)[1:]))
    with pytest.raises(RuntimeError, match=r"1 weights that got no value, such as model\.model\.embed_tokens\.weight"):
        engine_for(g.tiny_model("llama"))


def test_limits_and_order():
    model = g.tiny_model("llama").eval()
    limits = [[3, 2, 3], [4, 4, 4], [1, 8, 8], [8, 8, 8]]
    request = dataclasses.replace(request_for(model), limits=limits, expected_lengths=[1.0, 9.0, 4.0, 5.0])
    engine = engine_for(model)
    unlimited = run(engine, model, dataclasses.replace(request, limits=None))
    for one, other in zip(run(engine, model, request), unlimited):
        assert one.token_ids == other.token_ids[: limits[one.prompt][one.index]]
    asked = engine._llm.llm.requests[-12:]
    assert [ids for ids, _ in asked[::3]] == [request.prompts[prompt] for prompt in (1, 3, 2, 0)]
    assert [params.max_tokens for _, params in asked] == [4, 4, 4, 8, 8, 8, 1, 8, 8, 3, 2, 3]


def test_stop_strings_need_a_tokenizer(tmp_path: Path):
    model = g.tiny_model("llama").eval()
    request = request_for(model, num_candidates=1, is_greedy=True, stop_strings=["em"])
    with pytest.raises(ValueError, match=r"`stop_strings`=.*llm_kwargs=\{\"tokenizer\": name_or_folder\}"):
        engine_for(model)(model, request)
    g.tokenizer().save_pretrained(tmp_path)
    found = run(engine_for(model, tokenizer=str(tmp_path)), model, request)
    assert outcomes(found) == outcomes(run(GenerateEngine(), model, request))


def broken(outputs):
    outputs[0].outputs[0].finish_reason = "abort"
    outputs[1].outputs.clear()
    outputs[2].outputs[0].logprobs[0].clear()
    outputs[3].outputs[0].token_ids = []
    outputs[4].outputs[0].logprobs = None
    return outputs


@pytest.mark.parametrize(("damage", "count"), [(broken, 5), (lambda outputs: outputs[:-1], 12)])
def test_what_comes_back_broken_is_made_up_for(monkeypatch, caplog, damage, count):
    model = g.tiny_model("llama").eval()
    engine, request = engine_for(model), request_for(model)
    intact, generate = run(engine, model, request), engine._llm.llm.generate
    monkeypatch.setattr(engine._llm.llm, "generate", lambda *args, **keywords: damage(generate(*args, **keywords)))
    found, exact = run(engine, model, request), run(GenerateEngine(), model, request)
    assert outcomes(found) == outcomes(exact)[:count] + outcomes(intact)[count:]
    assert f"VLLMEngine: {count} of 12 candidates did not come back whole" in caplog.text
    assert all(len(one.log_q) == len(one.log_p) == len(one.token_ids) for one in found)


def test_what_it_refuses(monkeypatch):
    model, bart = g.tiny_model("llama").eval(), g.tiny_model("bart").eval()
    engine = engine_for(model)
    for name, value in {"no_repeat_ngram_size": 2, "min_new_tokens": 2, "typical_p": 0.9}.items():
        with pytest.raises(ValueError, match=f"vLLM cannot sample with {name}={value}"):
            engine(model, request_for(model, **{name: value}))
    for temperature in (0.005, 2.5):
        with pytest.raises(ValueError, match=f"`temperature`={temperature}"):
            engine(model, request_for(model, temperature=temperature))
    with pytest.raises(ValueError, match="has an encoder"):
        engine(bart, request_for(bart))
    with pytest.raises(RuntimeError, match="has no weights yet"):
        VLLMEngine()(model, request_for(model))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install rsft-hf\[vllm\]"):
        engine_for(model)


def test_the_contract_is_strict():
    model = g.tiny_model("llama")
    assert isinstance(VLLMEngine(), Engine)
    assert VLLMEngine().has_own_weights
    known = {field.name for field in dataclasses.fields(recorded_vllm.SamplingParams)}
    assert set(sampling_params(request_for(model), 0, 0)) <= known
    with pytest.raises(TypeError, match="max_new_tokens"):
        recorded_vllm.SamplingParams(max_new_tokens=3)
    with pytest.raises(TypeError, match="gpu_memory_utilisation"):
        engine_for(model, gpu_memory_utilisation=0.5)


def test_a_run_completes_with_it(tmp_path: Path):
    engine = VLLMEngine({"gpu_memory_utilization": 0.5})
    run = g.trainer(tmp_path, g.resampler(engine=engine))
    assert run.train().global_step == 2
    assert len(g.stored(run)) == 8
    assert len(engine._llm.llm.requests) == 8
    assert engine._llm.llm.args["gpu_memory_utilization"] == 0.5


def test_states_of_the_old_weights_that_vllm_keeps_are_an_error(monkeypatch):
    model = g.tiny_model().eval()
    engine = engine_for(model)
    monkeypatch.setattr(recorded_vllm.LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RuntimeError, match="could not empty its prefix cache"):
        engine.sync_weights(model, is_main_process=True)


def test_a_length_that_vllm_was_started_with_is_the_limit_of_prompts():
    model = g.tiny_model().eval()
    longest = max(map(len, g.prompt_ids(NUM_PROMPTS)))
    request = request_for(model, max_new_tokens=10)
    with pytest.raises(ValueError, match=str(longest + 9)):
        engine_for(model, max_model_len=longest + 9)(model, request)
    assert run(engine_for(model, max_model_len=longest + 10), model, request)
