"""Servers that take text, or know less of sampling than vLLM: the same candidates, or a refusal that says why."""

import pytest
import torch

import generators as g
from completions_server import CompletionsServer
from endpoint_runs import IDS, MODEL, VOUCHED, engine, request, run, tokens, whole
from rsft_hf.engines.endpoint.protocol import ReplyReader

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server():
    server = CompletionsServer(MODEL)
    yield server
    server.stop()


def test_text_prompts_reach_the_model_as_their_tokens(server):
    expected = tokens(run(engine(server), request(1, is_greedy=True)))
    for dialect in ("openai", "transformers"):
        server.dialect = dialect
        found = tokens(run(engine(server, dialect=dialect), request(1, is_greedy=True)))
        same = [at for at, (ids, _) in expected.items() if not set(ids[:-1]) & set(range(len(g.SPECIAL)))]
        assert len(same) >= 3
        assert {at: found[at] for at in same} == {at: expected[at] for at in same}
    assert '"do_sample": false' in server.bodies[-1]["generation_config"]


@pytest.mark.parametrize(("text", "expected"), [("a b", ([g.A, g.A + 1, g.EOS], "stop")), ("a b c d", (4, "length"))])
def test_a_text_longer_than_was_asked_for_is_cut_and_did_not_end(text, expected):
    reader = ReplyReader(g.tokenizer(), (g.EOS,), (), len(g.WORDS), False, lambda _: None)
    answer = reader({"text": text, "finish_reason": "stop"}, 4)
    ids, reason = expected
    assert answer.finish_reason == reason
    assert answer.token_ids == ids if isinstance(ids, list) else len(answer.token_ids) == ids


def test_the_whole_configuration_reaches_transformers_serve(server):
    server.dialect = "transformers"
    asked = request(2, with_log_probs=True, no_repeat_ngram_size=1, top_k=4, max_new_tokens=6)
    found = run(engine(server, dialect="transformers", **VOUCHED), asked)
    assert found.keys() == whole(asked)
    assert all(len(set(one.token_ids)) == len(one.token_ids) for one in found.values())
    assert all(torch.isfinite(one.log_q).all() and (one.log_q > one.log_p).any() for one in found.values())


def test_what_openai_does_not_know_is_refused(server):
    with pytest.raises(ValueError, match=r"top_k=5, which OpenAI's API does not have.*dialect=.vllm"):
        engine(server, dialect="openai")(MODEL, request(top_k=5))
    with pytest.raises(ValueError, match=r"stop_strings=\['em'\], and a server of OpenAI's API takes them off"):
        engine(server, dialect="openai")(MODEL, request(stop_strings=["em"]))
    assert server.bodies == []
    with pytest.raises(ValueError, match="Prompt 0 has tokens that no text has"):
        run(engine(server, dialect="openai"), request(ids=[[len(g.WORDS) + 5, g.A]]))


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_an_end_that_the_server_does_not_know_ends_all_the_same(server, dialect):
    asked = request(ids=IDS[:4], with_log_probs=True, eos_token_id=[g.EOS, g.A, g.A + 2])
    expected = run(engine(server), asked)
    assert {one.token_ids[-1] for one in expected.values()} >= {g.A, g.A + 2}
    server.dialect, server.manners = dialect, {"knows one end"}
    found = run(engine(server, dialect=dialect, **VOUCHED), asked)
    for at, one in expected.items():
        if set(one.token_ids[:-1]).isdisjoint(range(len(g.SPECIAL))) or dialect == "vllm":
            assert (found[at].token_ids, found[at].finish_reason) == (one.token_ids, one.finish_reason)
            torch.testing.assert_close(found[at].log_q, one.log_q, atol=1e-4, rtol=0)
