"""Faults of a completions server: retries, refusals, missing candidates, and what came before a failure."""

import email.utils
import logging
import threading
import time

import pytest
import torch

import generators as g
from completions_server import NAME, CompletionsServer
from endpoint_runs import IDS, MODEL, VOUCHED, engine, request, run, tokens, whole
from rsft_hf.engines.endpoint.client import ask_choices
from rsft_hf.engines.endpoint.engine import EndpointEngine
from rsft_hf.openai_client import OpenAIClient

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server():
    server = CompletionsServer(MODEL)
    yield server
    server.stop()


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What was warned of; transformers' loggers do not propagate by themselves."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("rsft_hf"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("mishap", ["500", "503", "429", "drop", "hang"])
def test_passing_faults_are_tried_again(server, mishap):
    asked = request()
    undisturbed = tokens(run(engine(server), asked))
    server.bodies.clear()
    server.mishaps = [mishap] * 2
    quick = {"timeout_seconds": 1.5} if mishap == "hang" else {}
    assert tokens(run(engine(server, **quick), asked)) == undisturbed
    assert len(server.bodies) == len(IDS) + 2


def test_the_pause_is_the_one_the_server_asks_for_or_doubles(server, monkeypatch):
    waited = []
    client = OpenAIClient(server.base_url, None, 5.0, 3, 0.5)
    monkeypatch.setattr(client._is_closing, "wait", waited.append)
    body = {"model": NAME, "prompt": IDS[0], "n": 1, "seed": 0, "max_tokens": 1, "temperature": 0.0, "top_p": 1.0}
    for retry_after in ("", "7", "never", "1000000", email.utils.formatdate(usegmt=True)):
        server.mishaps, server.retry_after = ["429", "503", "500"], retry_after
        assert len(ask_choices(client, body, 0)) == 1
    assert waited == [0.5, 1.0, 2.0, 7.0, 7.0, 7.0, 0.5, 1.0, 2.0, 60.0, 60.0, 60.0, 0.5, 1.0, 2.0]
    monkeypatch.undo()
    client.close()
    with pytest.raises(RuntimeError, match="the client has been closed"):
        client.pause(9)


def test_a_reply_that_was_cut_off_on_its_way_is_asked_for_again(server):
    client = OpenAIClient(server.base_url, None, 5.0, 1, 0.01)
    body = {"model": NAME, "prompt": IDS[0], "n": 1, "seed": 0, "max_tokens": 1, "temperature": 0.0, "top_p": 1.0}
    server.mishaps = ["cut off"]
    assert len(ask_choices(client, body, 0)) == 1
    server.mishaps = ["cut off"] * 2
    with pytest.raises(RuntimeError, match=r"answered prompt 0 with something that is no completion: '\{\"choices"):
        ask_choices(client, body, 0)


def test_a_server_that_stays_down_is_given_up_by_name(server):
    server.mishaps = ["503"] * 100
    message = r"server at http://127.0.0.1:\d+/v1/completions gave no answer to prompt 0 in 3 tries.*503.*no: 503"
    with pytest.raises(RuntimeError, match=message):
        run(engine(server), request(ids=IDS[:1]))
    assert len(server.bodies) == 3
    server.mishaps = ["hang"] * 100
    with pytest.raises(RuntimeError, match=r"in 1 tries.*APITimeoutError"):
        run(engine(server, timeout_seconds=0.2, max_retries=0), request(ids=IDS[:1]))
    absent = EndpointEngine("http://127.0.0.1:9/v1", NAME, max_retries=1, backoff_seconds=0.01)
    with pytest.raises(RuntimeError, match=r"127.0.0.1:9.*in 2 tries.*Connection"):
        run(absent, request(ids=IDS[:1]))


REFUSALS = [
    ("400", "refused the request of prompt 0 with 400.*no: 400.*request is at fault"),
    ("401", "401.*Set `api_key`"),
    ("404", "404.*Check `model`.*ends in /v1"),
    ("422", '422.*no: 422.*see `dialect`, "openai" or "transformers"'),
]


@pytest.mark.parametrize(("mishap", "message"), REFUSALS)
def test_a_refusal_is_not_tried_again(server, mishap, message):
    server.mishaps = [mishap]
    with pytest.raises(ValueError, match=message):
        run(engine(server), request(ids=IDS[:1]))
    assert len(server.bodies) == 1


GARBAGE = [
    ("no json", "no completion: '<html>busy</html>'.*Check that `base_url`"),
    ("no choices", "no completion"),
    ("empty choices", "no completion"),
    ("a list", "no completion"),
    ("choice of text", "choice is no object: 'a'"),
    ("nothing said", "neither `token_ids` nor `text`"),
]


@pytest.mark.parametrize(("mishap", "message"), GARBAGE)
def test_garbage_is_named(server, mishap, message):
    server.mishaps = [mishap]
    with pytest.raises(RuntimeError, match=message):
        run(engine(server), request(ids=IDS[:1]))


@pytest.mark.parametrize("manner", ["ignores n", "one choice fewer"])
def test_missing_candidates_are_asked_for_by_their_own_seeds(server, manner):
    asked = request()
    server.manners = {manner}
    found = tokens(run(engine(server), asked))
    assert found.keys() == whole(asked)
    assert len({tuple(ids) for ids, _ in found.values()}) > 8  # no copies of one another
    again = len(IDS) * (2 if manner == "ignores n" else 1)
    assert [body["n"] for body in server.bodies].count(1) == again
    assert tokens(run(engine(server), asked)) == found


def test_an_aborted_candidate_is_asked_for_again(server):
    undisturbed = tokens(run(engine(server), request(ids=IDS[:1])))
    server.mishaps = ["abort"]
    found = tokens(run(engine(server), request(ids=IDS[:1])))
    assert found.keys() == undisturbed.keys()
    assert {place: found[place] for place in ((0, 0), (0, 1))} == {
        place: undisturbed[place] for place in ((0, 0), (0, 1))
    }


@pytest.mark.parametrize(("manner", "reason"), [("aborts", "'abort'"), ("no reason", "None")])
def test_candidates_that_never_end_are_given_up_by_name(server, manner, reason):
    server.manners = {manner}
    message = f"no usable candidate 0 of prompt 0, asked for alone 3 times; the last one: finish_reason={reason}"
    with pytest.raises(RuntimeError, match=message):
        run(engine(server), request(ids=IDS[:1]))


WRONG_TOKENS = [
    ("other ids", ValueError, r"token 1000, and the tokenizer has \d+: it has another model's tokenizer"),
    ("words for ids", RuntimeError, "no list of integers"),
    ("too many ids", RuntimeError, r"returned 5\d tokens where at most 8"),
]


@pytest.mark.parametrize(("manner", "kind", "message"), WRONG_TOKENS)
def test_tokens_that_cannot_be_the_models_are_refused(server, manner, kind, message):
    server.manners = {manner}
    with pytest.raises(kind, match=message):
        run(engine(server), request(ids=IDS[:1]))


@pytest.mark.parametrize("settings", [{}, {"stop_strings": ["em"]}], ids=str)
@pytest.mark.parametrize("manner", ["text only", "names tokens", "strips the end"])
def test_tokens_are_found_however_the_server_names_them(server, warnings, manner, settings):
    asked = request(6, with_log_probs=True, max_new_tokens=4, **settings)
    expected = run(engine(server), asked)
    server.manners = {manner}
    found = run(engine(server, **VOUCHED), asked)
    if manner != "names tokens":  # special tokens are not in a text, and one that ends it is taken for the end
        others = set(range(len(g.SPECIAL))) - {g.EOS}
        expected = {at: one for at, one in expected.items() if not set(one.token_ids) & others}
        found = {at: found[at] for at in expected}
    assert warnings.text.count("returns text alone") == (manner == "text only")
    assert len(expected) >= 6
    assert {one.finish_reason for one in expected.values()} == {"stop", "length"}
    assert tokens(found) == tokens(expected)
    for at, one in expected.items():
        torch.testing.assert_close(found[at].log_q, one.log_q, atol=1e-4, rtol=0)


def test_text_of_another_tokenizer_is_refused(server):
    server.manners = {"text only", "other words"}
    with pytest.raises(ValueError, match=r"'Zwölf Boxkämpfer' reads '<unk> <unk>'.*another model's tokenizer"):
        run(engine(server), request(ids=IDS[:1]))


WRONG_NUMBERS = [
    "no log probs",
    "short log probs",
    "positive log probs",
    "log probs that are no number",
    "least log probs",
]


@pytest.mark.parametrize("manner", WRONG_NUMBERS)
def test_log_probabilities_that_do_not_fit_are_computed_here(server, warnings, manner):
    asked = request(2, with_log_probs=True)
    expected = run(engine(server), asked)
    server.manners = {manner}
    for at, one in run(engine(server, **VOUCHED), asked).items():
        torch.testing.assert_close(one.log_q, expected[at].log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.log_p, expected[at].log_p, atol=1e-4, rtol=0)
    assert warnings.text.count("gave no log probabilities that fit") == 1


def test_copies_of_one_candidate_are_suspicious(server, warnings):
    server.manners = {"one seed"}
    found = run(engine(server), request(max_new_tokens=12))
    assert all(found[prompt, 0].token_ids == found[prompt, 1].token_ids for prompt in range(len(IDS)))
    assert warnings.text.count("candidates_per_request=1") == 1
    found = run(engine(server, candidates_per_request=1), request(max_new_tokens=12))
    assert any(found[prompt, 0].token_ids != found[prompt, 1].token_ids for prompt in range(len(IDS)))


def places(sequences):
    return ((one.prompt, one.index) for one in sequences)


def test_what_came_before_a_failure_is_not_lost(server):
    """What has come is yielded, and of the request that fails the candidates that its own first reply held."""
    server.mishaps = ["", "", "abort", "400"]
    found = []
    with pytest.raises(ValueError, match="refused the request"):
        found.extend(places(engine(server, concurrency=1)(MODEL, request(3))))
    assert set(found) == {*((prompt, index) for prompt in (0, 1) for index in range(3)), (2, 0), (2, 1)}
    assert len(found) == len(set(found))


def test_a_refusal_is_said_at_once_whatever_is_under_way(server):
    server.mishaps = ["hang", "400"]
    began = time.perf_counter()
    with pytest.raises(ValueError, match="refused the request"):
        run(engine(server, concurrency=2), request(1))
    assert time.perf_counter() - began < 2  # the other request hangs for 5 seconds


def test_nobody_waits_for_the_threads_of_a_generation_that_failed(server):
    server.mishaps = ["hang", "400"]
    with pytest.raises(ValueError, match="refused the request"):
        run(engine(server, concurrency=2), request(1))
    at_work = [thread for thread in threading.enumerate() if thread.name.endswith("(worker)")]
    assert at_work  # the other request hangs for 5 seconds
    assert all(thread.daemon for thread in at_work)  # or the process could not end before the reply


def test_a_lost_connection_may_be_a_restart_with_other_weights(server):
    server.mishaps = ["drop"]
    with pytest.raises(RuntimeError, match=r"connection to the server at .* was lost.*other weights.*run again"):
        run(engine(server, concurrency=1, **VOUCHED), request())
    assert len(server.bodies) <= 2
    absent = EndpointEngine("http://127.0.0.1:9/v1", NAME, weights=lambda model: None)
    absent.sync_weights(MODEL, is_main_process=True)
    with pytest.raises(RuntimeError, match=r"127.0.0.1:9.*was lost.*refused"):
        run(absent, request(ids=IDS[:1]))
    for mishap in ("500", "429", "hang"):
        server.mishaps = [mishap]
        quick = {"timeout_seconds": 0.5} if mishap == "hang" else {}
        assert len(run(engine(server, **quick, **VOUCHED), request(1))) == len(IDS)
