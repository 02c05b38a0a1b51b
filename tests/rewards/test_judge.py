"""The judge against a real server that misbehaves on demand: a failed judge is no verdict, and costs nothing twice."""

import asyncio
import json
import logging
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rsft_hf.rewards import JudgeReward
from rsft_hf.rewards.functions import RewardFunctions

pytest.importorskip("openai", reason="the extra `judge` is not installed")


class Judge(BaseHTTPRequestHandler):
    """Answers by what the completion asks for; the server keeps what it saw."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wish = body["messages"][-1]["content"]
        with server.lock:
            server.bodies.append(body)
            server.attempts[wish] = server.attempts.get(wish, 0) + 1
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            self.answer(wish, server.attempts[wish])
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, wish: str, attempt: int):
        if wish.startswith("together"):
            self.server.together.wait(5)
            self.server.released.wait(0.1)  # time for one more to arrive, were it sent
        if wish == "hang":
            self.server.released.wait(5)
        codes = {"always 500": 500, "wrong key": 401, "forbidden": 403, "unknown model": 404, "too long": 400}
        if wish in codes or (wish.startswith("500 once") and attempt == 1):
            return self.send(codes.get(wish, 500), json.dumps({"error": {"message": f"no: {wish}"}}))
        bodies = {"no choices": "{}", "empty choices": '{"choices": []}', "no json": "<html>", "a list": "[1]"}
        if wish in bodies:
            return self.send(200, bodies[wish])
        message = {"content": {"refusal": None}.get(wish, wish), "role": "assistant"}
        if not wish.startswith(("{", "`")) and message["content"] is not None and wish != "garbage":
            message["content"] = json.dumps({"score": 7})
        return self.send(200, json.dumps({"choices": [{"message": message, "index": 0, "finish_reason": "stop"}]}))

    def send(self, code: int, body: str):
        try:
            self.send_response(code)
            # The client waits as long as it is told: the test need not.
            if self.server.is_patient:
                self.send_header("retry-after-ms", "1")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())
        except ConnectionError:
            pass  # it stopped waiting

    def log_message(self, *args): ...


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.lock, server.released = threading.Lock(), threading.Event()
    server.bodies, server.attempts, server.busy, server.most_busy = [], {}, 0, 0
    server.together, server.is_patient = threading.Barrier(3), True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def judge(server, **keywords) -> JudgeReward:
    keywords = {"template": "{completion}", "max_retries": 1, **keywords}
    return JudgeReward("tiny", base_url=f"http://127.0.0.1:{server.server_port}/v1", **keywords)


def score(judge, completions):
    functions = RewardFunctions(judge)
    scores = functions(["p"] * len(completions), completions, [[1]] * len(completions), {})
    rewards = [None if reward != reward else reward for reward in scores.rewards.tolist()]
    return rewards, scores.metrics


def test_the_score_is_read_and_the_request_says_what_is_wanted(server):
    one = judge(server, low=1, high=5, template="{prompt}|{completion}|{gold}", options={"temperature": 0})
    assert one.requires == {"gold"}
    logged = {}
    columns = {"gold": ["x", None], "log_metric": logged.__setitem__}
    prompts = [[{"role": "user", "content": "Why?"}]] * 2
    completions = [[{"role": "assistant", "content": "{so}"}]] * 2
    assert asyncio.run(one(prompts=prompts, completions=completions, **columns)) == [None, None]  # 7 is above 5
    assert logged == {"judge/requests": 1, "judge/failures": 1}
    (body,) = server.bodies
    system, user = body["messages"]
    assert user == {"role": "user", "content": "Why?|{so}|x"}
    assert "from 1 (useless" in system["content"]
    assert (body["model"], body["temperature"]) == ("tiny", 0)
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 1, "maximum": 5}


def test_a_server_error_is_tried_again(server):
    assert score(judge(server), ["500 once"]) == ([7.0], {"judge/requests": 1.0, "judge/failures": 0.0})
    assert server.attempts == {"500 once": 2}


def test_retries_leave_the_global_generator_alone(server, monkeypatch):
    """The retries of the library wait for a random time, drawn from the generator of the training."""
    monkeypatch.setattr("rsft_hf.rewards.judge._BACKOFF_SECONDS", 0.001)
    server.is_patient = False
    state = random.getstate()
    assert score(judge(server), ["500 once"])[0] == [7.0]
    assert random.getstate() == state


FAILURES = ["always 500", "no choices", "empty choices", "no json", "a list", "refusal", "garbage", "too long"]
FAILURES += ['{"score": 10.5}', '{"score": -1}', '{"score": "7"}', '{"score": true}', '{"score": NaN}', '{"points": 7}']
FAILURES += ['{"score": null}', "{}"]


def test_failures_are_none_and_counted(server, caplog):
    wishes = [*FAILURES, "fine", '{"score": 0}', '```json\n{"score": 3}\n```']
    with caplog.at_level(logging.INFO):
        rewards, metrics = score(judge(server), wishes)
    assert rewards == [None] * len(FAILURES) + [7.0, 0.0, 3.0]
    assert metrics == {"judge/requests": len(wishes), "judge/failures": len(FAILURES)}
    assert server.attempts["always 500"] == 2
    assert server.attempts["too long"] == 1
    assert f"judge: {len(FAILURES)} of {len(wishes)} requests got no score, the last one: " in caplog.text
    assert "no: too long" in caplog.text


def test_a_slow_judge_is_given_up(server):
    rewards, metrics = score(judge(server, timeout_seconds=0.2, max_retries=0), ["hang", "fine"])
    assert rewards == [None, 7.0]
    assert metrics["judge/failures"] == 1


def test_an_absent_server_is_no_verdict(server):
    absent = JudgeReward("tiny", base_url="http://127.0.0.1:9/v1", max_retries=0)
    assert score(absent, ["fine"]) == ([None], {"judge/requests": 1.0, "judge/failures": 1.0})


@pytest.mark.parametrize("wish", ["wrong key", "forbidden", "unknown model"])
def test_what_can_never_work_is_raised(server, wish):
    with pytest.raises(RuntimeError, match=rf"refused `model`='tiny' or its `api_key`: .*no: {wish}") as caught:
        score(judge(server), ["fine", wish])
    assert isinstance(caught.value.__cause__, ValueError)


def test_so_many_requests_at_once_and_no_more(server):
    """The barrier opens for three together: with fewer at once it would break, and more are never seen."""
    rewards, _ = score(judge(server, concurrency=3), [f"together {number}" for number in range(9)])
    assert rewards == [7.0] * 9
    assert server.most_busy == 3
    assert not server.together.broken


def test_equal_requests_are_sent_once_and_kept_on_disk(server, tmp_path, monkeypatch):
    wishes = ["fine", "fine", "garbage", "500 once"]
    first, _ = score(judge(server, cache_dir=tmp_path), wishes)
    assert first == [7.0, 7.0, None, 7.0]
    assert server.attempts == {"fine": 1, "garbage": 1, "500 once": 2}
    again, metrics = score(judge(server, cache_dir=str(tmp_path)), wishes)
    assert again == first
    assert server.attempts == {"fine": 1, "garbage": 2, "500 once": 2}  # only the failure is asked for again
    assert metrics == {"judge/requests": 1, "judge/failures": 1}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".json", ".json"]
    files[0].write_text('{"sco', encoding="utf-8")  # broken from outside
    files[1].write_bytes(b"\xff\xfe")
    assert score(judge(server, cache_dir=tmp_path), ["fine", "500 once"])[0] == [7.0, 7.0]
    assert score(judge(server, cache_dir=tmp_path, rubric="Be strict."), ["fine"])[1]["judge/requests"] == 1
    keys = set()
    for address in ("http://a/v1", "http://b/v1"):  # another server is another judge
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        keys.add(JudgeReward("tiny", cache_dir=tmp_path)._request("fine")[0])
    assert len(keys) == 2


WRONG = [
    ({"low": 2.0, "high": 2.0}, "`low`=2.0 must be less than `high`=2.0"),
    ({"concurrency": 0}, "`concurrency`=0 must be at least 1"),
    ({"max_retries": -1}, "`max_retries`=-1 at least 0"),
    ({"timeout_seconds": 0}, "`timeout_seconds`=0 more than 0"),
    ({"base_url": None}, "No `api_key` was given"),
    ({"template": "{}"}, "fields"),
]


@pytest.mark.parametrize(("keywords", "message"), WRONG)
def test_impossible_judges_are_refused(monkeypatch, keywords, message):
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=message):
        JudgeReward("tiny", **{"base_url": "http://localhost:1/v1", **keywords})


def test_the_key_is_not_shown():
    assert "sesame" not in repr(JudgeReward("tiny", api_key="sesame"))
