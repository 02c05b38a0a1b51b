"""Models and settings by which rows in one batch would disturb each other, or numbers go wrong without an error."""

import copy
import pickle

import peft
import pytest
import torch

import architectures
import generators as g
from architectures import request_for, run, texts
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.engines.sampling import inverse_cdf

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
    "original_max_position_embeddings": 48,
}  # fmt: skip


@pytest.mark.parametrize("engine", [InFlightEngine(8), GenerateEngine()], ids=lambda engine: type(engine).__name__)
def test_a_rope_that_changes_with_the_longest_row_gets_no_company(engine):
    model = architectures.model_of("llama", max_position_embeddings=192, rope_parameters=LONGROPE)
    config = g.complete(model, max_new_tokens=24, suppress_tokens=[g.EOS])
    short, long = [[10, 11, 12, 13], [12, 13, 14, 15]], [16, 11] * 30
    alone = [one.token_ids for one in run(GenerateEngine(1), model, request_for(model, short, 1, config=config))]
    together = run(engine, model, request_for(model, [*short, long], 1, config=config))
    assert [one.token_ids for one in together[:2]] == alone
    with_log_probs = run(engine, model, request_for(model, [*short, long], 1, config=config, with_log_probs=True))
    for one in with_log_probs[:2]:
        whole = torch.tensor([short[one.prompt] + one.token_ids])
        with torch.no_grad():
            logits = model(whole).logits[0, len(short[one.prompt]) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(one.log_p, expected, atol=1e-4, rtol=0)
    flying = InFlightEngine(8)  # as long as no row passes the border there is nothing against slots
    run(flying, model, request_for(model, short, 2, config=config))
    assert not flying._said


def test_an_adapter_that_peft_switches_on_by_place_is_not_left_out():
    base = architectures.model_of("llama")
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, alora_invocation_tokens=[12, 13])
    model = peft.get_peft_model(base, settings).eval()
    ids = [[10, 11, 12, 13], [10, 11, 14, 12, 13], [15, 16]]
    expected = texts(run(GenerateEngine(1), model, request_for(base, ids)))
    with model.disable_adapter():
        assert expected != texts(run(GenerateEngine(1), model, request_for(base, ids)))
    for engine in (InFlightEngine(4), GenerateEngine(64)):
        assert texts(run(engine, model, request_for(base, ids))) == expected


@pytest.mark.parametrize("pad", [g.PAD, g.EOS], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("settings", [{"min_length": 12}, {"no_repeat_ngram_size": 1}], ids=str)
@pytest.mark.parametrize("engine", [InFlightEngine(5), GenerateEngine(128)], ids=lambda engine: type(engine).__name__)
def test_padding_never_counts_as_tokens(engine, settings, pad):
    model = architectures.model_of("gpt2")
    ids, config = architectures.prompts_for(model), g.complete(model, pad_token_id=pad, **settings)
    expected = run(GenerateEngine(1), model, request_for(model, ids, config=config, with_log_probs=True))
    found = run(engine, model, request_for(model, ids, config=config, with_log_probs=True))
    assert texts(found) == texts(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.log_q, other.log_q, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_greedy", [False, True])
@pytest.mark.parametrize("engine", [InFlightEngine(4), GenerateEngine()], ids=lambda engine: type(engine).__name__)
def test_scores_that_are_no_numbers_are_an_error_and_no_token(engine, is_greedy):
    model = architectures.model_of("llama")
    config = g.complete(model, is_greedy=is_greedy)
    run(engine, model, request_for(model, [[g.A]], 1, config=config))  # the trial run, while all is well
    with torch.no_grad():
        model.lm_head.weight[12] = float("nan")
    with pytest.raises(ValueError, match="The scores of 1 of 1 candidates are NaN, or leave no token to choose"):
        run(engine, model, request_for(model, [[g.A]], 1, config=config))


def test_a_cumulative_sum_of_no_numbers_stays_in_the_vocabulary():
    broken = torch.tensor([[float("nan")] * 3, [0.0] * 3])
    assert inverse_cdf(broken, torch.tensor([0.5, 0.5], dtype=torch.float64)).max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_masks_nothing_is_found_out_in_any_precision(dtype):
    model = architectures.model_of("prophetnet").to(dtype)
    with torch.no_grad():
        for values in model.parameters():
            values.mul_(0.6)  # so that what it reads besides changes little
    engine = InFlightEngine(4)
    run(engine, model, request_for(model, architectures.prompts_for(model)))
    assert len(engine._said) == 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2", "t5", "marian", "m2m100"])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_precision_is_no_reason_against_slots(name, is_autocast):
    model, engine = architectures.model_of(name), InFlightEngine(4)
    model = model if is_autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        assert len(run(engine, model, request_for(model, architectures.prompts_for(model)))) == 14
    assert not engine._said


def test_weights_of_two_types_that_autocast_brings_together_fly():
    model, engine = architectures.model_of("llama").to(torch.bfloat16), InFlightEngine(4)
    model.lm_head.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(run(engine, model, request_for(model, architectures.prompts_for(model)))) == 14
    assert not engine._said


def test_a_models_own_padding_token_is_no_reason_against_slots():
    model, engine = architectures.model_of("m2m100"), InFlightEngine(4)  # its positions leave out its own padding
    run(
        engine,
        model,
        request_for(model, architectures.prompts_for(model), config=g.complete(model, pad_token_id=g.EOS)),
    )
    assert not engine._said


@pytest.mark.parametrize("engine", [InFlightEngine(4), GenerateEngine()], ids=lambda engine: type(engine).__name__)
def test_a_models_own_stop_strings_end_its_answers(engine):
    model = architectures.model_of("llama")
    ids = architectures.prompts_for(model)
    expected = texts(run(engine, model, request_for(model, ids, config=g.complete(model, stop_strings=["h"]))))
    model.generation_config.stop_strings = ["h"]
    config = g.complete(model)
    assert config.stop_strings == ["h"]
    assert texts(run(engine, model, request_for(model, ids, config=config))) == expected
    assert model.generation_config.stop_strings == ["h"]


def test_no_graph_is_recorded_though_nobody_said_no_grad():
    model, engine = architectures.model_of("llama"), InFlightEngine(4)
    found = list(engine(model, request_for(model, architectures.prompts_for(model), with_log_probs=True)))
    assert found
    assert not any(one.log_p.requires_grad or one.log_q.requires_grad for one in found)


def fail_once(model, at_least: int) -> None:
    """Lets memory run out in the first pass of at least so many rows."""
    state = {"failed": False}

    def refuse(_, args, keywords):
        if not state["failed"] and len(keywords["input_ids"]) >= at_least:
            state["failed"] = True
            raise torch.OutOfMemoryError("once")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_a_want_of_memory_in_a_small_request_costs_no_slots_for_good():
    model, engine = architectures.model_of("llama"), InFlightEngine()
    run(engine, model, request_for(model, [[g.A]]))
    fail_once(model, at_least=2)
    assert len(run(engine, model, request_for(model, [[g.A]]))) == 2
    assert engine.max_sequences is None


def test_a_want_of_memory_in_reading_makes_for_shorter_readings():
    model, engine = architectures.model_of("llama"), InFlightEngine(8)
    run(engine, model, request_for(model, [[g.A]]))
    fail_once(model, at_least=4)
    assert len(run(engine, model, request_for(model, [[g.A] * 6] * 4))) == 8
    assert (engine.max_sequences, engine.prefill_tokens) == (8, 12)  # of four prompts with six tokens


def test_an_engine_that_has_run_can_be_pickled_and_copied():
    model, engine = architectures.model_of("llama"), InFlightEngine(4)
    expected = texts(run(engine, model, request_for(model, [[g.A]])))
    for other in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert other.max_sequences == 4
        assert texts(run(other, model, request_for(model, [[g.A]]))) == expected
