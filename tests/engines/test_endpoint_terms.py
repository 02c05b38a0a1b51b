"""Arguments of an engine that cannot be right are refused where it is made, and settings where it is asked."""

import pytest
from test_endpoint import MODEL, engine, request, run

import generators as g
from completions_server import NAME, CompletionsServer
from rsft_hf.engines.endpoint.engine import _NEVER, _SPARED, EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")

URL = "http://localhost:1/v1"


@pytest.fixture
def server():
    server = CompletionsServer(MODEL)
    yield server
    server.stop()


WRONG = [
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


@pytest.mark.parametrize(("keywords", "kind", "message"), WRONG, ids=str)
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
