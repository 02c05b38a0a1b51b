"""The engine of a server against the local one: the same tokens and numbers, every habit made up for or named."""

import random
import sys
import threading

import pytest
import torch

import generators as g
from completions_server import NAME, CompletionsServer
from endpoint_runs import IDS, MODEL, VOUCHED, engine, request, run, tokens, whole
from rsft_hf.engines.base import GenerationRequest
from rsft_hf.engines.endpoint.engine import _NEVER, _SPARED, EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload
from rsft_hf.engines.generate import GenerateEngine

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server():
    server = CompletionsServer(MODEL)
    yield server
    server.stop()


def test_greedy_candidates_are_those_of_the_local_engine(server):
    local = g.generated(MODEL, g.complete(MODEL, is_greedy=True), IDS)
    expected = {(one.prompt, one.index): (one.token_ids, one.finish_reason) for one in local}
    assert len({tuple(ids) for ids, _ in expected.values()}) > 1
    assert engine(server).has_own_weights
    assert tokens(run(engine(server), request(1, is_greedy=True))) == expected
    assert all(body["temperature"] == 0 for body in server.bodies)


def test_first_tokens_follow_the_distribution_of_the_model(server):
    asked = request(600, ids=IDS[:1], max_new_tokens=1)
    found = run(engine(server, candidates_per_request=150), asked)
    counts = torch.zeros(len(g.WORDS))
    for one in found.values():
        counts[one.token_ids[0]] += 1
    with torch.no_grad():
        expected = MODEL(torch.tensor(IDS[:1])).logits[0, -1].softmax(-1) * 600
    often = expected >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    assert len(wanted) >= 4
    chi_square = float(((seen - wanted) ** 2 / wanted.clamp(min=1e-6)).sum())
    assert chi_square < 2.5 * len(wanted) + 10  # far beyond the 99.9 % point of as many degrees of freedom
    assert len(server.bodies) == 4


def test_the_same_request_gives_the_same_candidates(server):
    asked = request()
    first = tokens(run(engine(server), asked))
    assert first.keys() == whole(asked)
    assert len({tuple(ids) for ids, _ in first.values()}) > 5
    assert tokens(run(engine(server, concurrency=1), asked)) == first
    alone = tokens(run(engine(server, candidates_per_request=1), asked))
    assert alone[2, 0] == first[2, 0]  # its own seed begins that of its prompt
    assert all(0 <= body["seed"] + body["n"] <= 2**31 - 1 for body in server.bodies)


SETTINGS = [
    ({}, "raw", True),
    ({"temperature": 0.7}, "raw", False),
    ({"temperature": 1.3, "top_k": 6, "top_p": 0.8}, "raw", False),
    ({"temperature": 1.3, "top_k": 6, "top_p": 0.8, "repetition_penalty": 1.3}, "processed", True),
    ({"min_new_tokens": 3}, "processed", True),
    ({"is_greedy": True}, "raw", True),
]


@pytest.mark.parametrize(("settings", "mode", "is_asked"), SETTINGS, ids=str)
def test_log_q_and_log_p_are_those_of_the_local_engine(server, settings, mode, is_asked):
    """Seeded by hand, the local engine draws what the server drew."""
    server.logprobs_mode = mode
    asked = request(1, with_log_probs=True, **settings)
    found = run(engine(server, logprobs_mode=mode, **VOUCHED), asked)
    assert all(("logprobs" in body) == is_asked for body in server.bodies)
    for (prompt, _), one in found.items():
        (seed,) = (body["seed"] for body in server.bodies if body["prompt"] == IDS[prompt])
        alone = GenerationRequest([IDS[prompt]], [[seed]], asked.generation_config, True, g.tokenizer())
        with torch.no_grad():
            (local,) = GenerateEngine()(MODEL, alone)
        assert one.token_ids == local.token_ids
        torch.testing.assert_close(one.log_q, local.log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_p, local.log_p, atol=1e-4, rtol=0)


def test_cuts_whose_order_differs_at_the_server_are_refused_where_log_q_is_computed_here(server):
    settings = {"temperature": 1.5, "top_p": 0.7, "min_p": 0.1}
    with pytest.raises(ValueError, match=r"`min_p`=0.1 and `top_p`=0.7 together: servers cut by `min_p` first"):
        engine(server, **VOUCHED)(MODEL, request(with_log_probs=True, **settings))
    assert run(engine(server, **VOUCHED), request(1, **settings))
    server.logprobs_mode = "processed"
    assert run(engine(server, logprobs_mode="processed", **VOUCHED), request(1, with_log_probs=True, **settings))


def test_a_fixed_server_says_log_q_itself_or_nobody_does(server):
    with pytest.raises(ValueError, match=r"server's do not serve \(temperature.*weights=lambda model: None"):
        engine(server)(MODEL, request(with_log_probs=True, temperature=0.7))
    server.logprobs_mode = "processed"
    found = run(engine(server, logprobs_mode="processed"), request(with_log_probs=True, temperature=0.7))
    assert all(one.log_q is not None and one.log_p is None for one in found.values())  # nobody here knows log p
    plain = run(engine(server, logprobs_mode="processed"), request(with_log_probs=True))
    assert all(torch.equal(one.log_q, one.log_p) for one in plain.values())
    server.manners = {"no log probs"}
    with pytest.raises(ValueError, match="it gave none that fit its tokens"):
        run(engine(server), request(with_log_probs=True))


def test_a_request_says_every_setting(server):
    settings = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    more = {"min_new_tokens": 2, "stop_strings": ["em"], "eos_token_id": [g.EOS, g.END]}
    one = engine(server, options={"priority": 3, "min_p": None}, logprobs_mode="processed")
    run(one, request(2, ids=IDS[:1], with_log_probs=True, **settings, **more))
    (body,) = server.bodies
    assert body == {
        "model": NAME, "prompt": IDS[0], "n": 2, "seed": body["seed"], "max_tokens": 8, "temperature": 0.7,
        "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2, "min_tokens": 2, "stop": ["em"],
        "stop_token_ids": [g.EOS, g.END], "include_stop_str_in_output": True, "skip_special_tokens": False,
        "return_token_ids": True, "logprobs": 1, "return_tokens_as_token_ids": True, "priority": 3,
    }  # fmt: skip
    run(engine(server), request(1, ids=IDS[:1]))
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    assert plain.items() <= server.bodies[-1].items()  # or the server would fill in its own


def test_limits_are_asked_for_and_the_longest_go_first(server):
    limits = [[2, 8, 2]] * len(IDS)
    asked = request(more={"limits": limits, "expected_lengths": [3.0, 1.0, 9.0, 2.0, 5.0]})
    found = run(engine(server, concurrency=1), asked)
    assert found.keys() == whole(asked)
    assert all(len(one.token_ids) <= limits[prompt][index] for (prompt, index), one in found.items())
    assert any(len(one.token_ids) > 2 for one in found.values())
    assert [(body["n"], body["max_tokens"]) for body in server.bodies[:2]] == [(2, 2), (1, 8)]
    assert [body["prompt"] for body in server.bodies[::2]] == [IDS[number] for number in (2, 4, 0, 3, 1)]


def test_requests_overlap_and_no_more_than_may(server):
    """Nothing is answered until three are there: with fewer at once the barrier would break."""
    server.together = threading.Barrier(3)
    asked = request(1, ids=IDS + IDS[:1])
    assert run(engine(server, concurrency=3), asked).keys() == whole(asked)
    assert server.most_busy == 3


def test_a_generation_that_is_left_asks_no_more(server):
    found = engine(server, concurrency=1)(MODEL, request(1, ids=IDS * 4))
    next(found)
    found.close()
    assert len(server.bodies) <= 4


def test_retries_leave_the_global_generator_alone(server):
    server.mishaps = ["500"]
    state = random.getstate()
    run(engine(server), request())
    assert random.getstate() == state


REFUSED = [
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2, which a completions server cannot be asked for"),
    ({"bad_words_ids": [[g.A]]}, "bad_words_ids="),
    ({"sequence_bias": [[[g.A], 1.5]]}, "sequence_bias="),
    ({"suppress_tokens": [g.A]}, "suppress_tokens="),
    ({"forced_eos_token_id": g.EOS}, "forced_eos_token_id=1"),
    ({"typical_p": 0.9}, "typical_p=0.9"),
    ({"epsilon_cutoff": 0.1}, "epsilon_cutoff=0.1"),
    ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty=1.2"),
    ({"num_beams": 2, "is_greedy": True}, "num_beams=2"),
    ({"min_length": 3}, "min_length=3.*Use min_new_tokens"),
    ({"of_a_later_version": 3}, "of_a_later_version=3"),
    ({"max_new_tokens": 64}, "it takes 66, and the model reads 64"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_cannot_be_said_is_refused_before_anything_is_asked(server, settings, message):
    later = {name: settings[name] for name in settings if name == "of_a_later_version"}
    asked = request(**{name: value for name, value in settings.items() if name not in later})
    for name, value in later.items():
        setattr(asked.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        engine(server)(MODEL, asked)
    assert server.bodies == []


WRONG = [
    ({"dialect": "tgi"}, "`dialect`='tgi' must be one of 'vllm', 'openai', 'transformers'"),
    ({"logprobs_mode": "both"}, "`logprobs_mode`='both' 'raw' or 'processed'"),
    ({"concurrency": 0}, "`concurrency`=0 must be at least 1"),
    ({"candidates_per_request": 0}, "`candidates_per_request`=0 must be at least 1"),
    ({"max_retries": -1}, "`max_retries`=-1"),
    ({"timeout_seconds": 0}, "`timeout_seconds`=0 must be more than 0"),
]


@pytest.mark.parametrize(("keywords", "message"), WRONG)
def test_impossible_engines_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        EndpointEngine("http://localhost:1/v1", NAME, **keywords)


def test_the_key_is_not_shown_and_the_client_is_named(monkeypatch):
    assert "sesame" not in repr(EndpointEngine("http://localhost:1/v1", NAME, api_key="sesame"))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"rsft-hf\[endpoint\]"):
        EndpointEngine("http://localhost:1/v1", NAME)


pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


URL = "http://localhost:1/v1"


WRONG_ARGUMENTS = [
    ({"base_url": "localhost:1/v1"}, ValueError, "`base_url`='localhost:1/v1' is no address.*'http://"),
    ({"base_url": ""}, ValueError, "`base_url`='' is no address"),
    ({"base_url": "http:///v1"}, ValueError, "`base_url`='http:///v1' is no address"),
    ({"base_url": None}, TypeError, "`base_url`=None must be text"),
    ({"weights": "/shared"}, TypeError, "`weights`='/shared' must be None, or what takes a model"),
    ({"weights": SaveAndReload}, TypeError, "`weights`=.*with its arguments"),
    ({"weights": SaveAndReload.sglang}, TypeError, "`weights`=.*with its arguments"),
    ({"max_retries": None}, TypeError, "`max_retries`=None must be an integer of at least 0"),
    ({"concurrency": 2.5}, TypeError, "`concurrency`=2.5 must be an integer"),
    ({"candidates_per_request": -1}, ValueError, "`candidates_per_request`=-1 must be at least 1"),
    ({"timeout_seconds": "9"}, TypeError, "`timeout_seconds`='9' must be a number"),
    ({"timeout_seconds": float("nan")}, ValueError, "`timeout_seconds`=nan must be more than 0"),
    ({"backoff_seconds": -1.0}, ValueError, "`backoff_seconds`=-1.0 must be at least 0"),
]


@pytest.mark.parametrize(("keywords", "kind", "message"), WRONG_ARGUMENTS, ids=str)
def test_wrong_arguments_are_refused_where_the_engine_is_made(keywords, kind, message):
    with pytest.raises(kind, match=message):
        EndpointEngine(**{"base_url": URL, "model": NAME, **keywords})


def test_an_address_that_takes_weights_must_be_one(tmp_path):
    with pytest.raises(ValueError, match="`url`='localhost:1/update_weights_from_disk' is no address"):
        SaveAndReload.sglang("localhost:1/v1", tmp_path)


def test_methods_and_functions_may_bring_the_weights():
    class Mine:
        def bring(self, model): ...

    for weights in (Mine().bring, lambda model: None, SaveAndReload.sglang(URL, "somewhere")):
        assert not EndpointEngine(URL, NAME, weights=weights).is_fixed
    assert EndpointEngine(URL, NAME).is_fixed


def test_what_a_request_says_is_not_said_otherwise(server):
    one = request(2, with_log_probs=True, stop_strings=["em"])
    run(engine(server), one)
    assert server.bodies[0].keys() <= _NEVER | _SPARED.keys()
    for name in (*_NEVER, *_SPARED):
        with pytest.raises(ValueError, match=f"`options` has {name}=1, which every request says by itself"):
            EndpointEngine(URL, NAME, options={name: 1})
    for name in _NEVER:
        with pytest.raises(ValueError, match=f"`options` has {name}=None"):
            EndpointEngine(URL, NAME, options={name: None})


TAKEN_OUT = [
    ("min_p", {"min_p": 0.1}, "takes min_p out .* has min_p=0.1"),
    ("top_p", {"top_p": 0.9}, "takes top_p out"),
    ("top_k", {"top_k": 5}, "takes top_k out"),
    ("repetition_penalty", {"repetition_penalty": 1.2}, "takes repetition_penalty out"),
    ("min_tokens", {"min_new_tokens": 2}, "takes min_tokens out .* has min_new_tokens=2"),
    ("include_stop_str_in_output", {"stop_strings": ["em"]}, "takes include_stop_str_in_output out .* stop_strings="),
]


@pytest.mark.parametrize(("name", "settings", "message"), TAKEN_OUT)
def test_a_field_is_taken_out_only_where_it_would_say_nothing(server, name, settings, message):
    one = engine(server, options={name: None})
    with pytest.raises(ValueError, match=message):
        one(MODEL, request(**settings))
    assert server.bodies == []
    if name != "top_p":  # the tests' server wants it
        assert len(run(one, request(1, ids=g.prompt_ids(2)))) == 2
        assert name not in server.bodies[-1]
