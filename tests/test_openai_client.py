"""What the client of completion servers and judges says of addresses and keys: nothing that opens a door."""

import http.server
import logging
import threading
import traceback
from pathlib import Path

import pytest

import generators
from generative_runs import resampler, trained
from rsft_hf.engines import EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload
from rsft_hf.openai_client import OpenAIClient, RequestRefused
from rsft_hf.rewards import JudgeReward

KEY, PASSWORD = "sk-very-secret-key-123", "hunter22"


class Echo(http.server.BaseHTTPRequestHandler):
    """Refuses every request, and repeats the key that it was sent, as careless servers do."""

    def do_POST(self):
        body = f"no such key: {self.headers['Authorization']}".encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def is_clean(text: str) -> bool:
    return KEY not in text and PASSWORD not in text


def test_a_refusal_shows_neither_key_nor_password(address: str) -> None:
    for url, said in ((address, "no such key: Basic"), (address.replace(f"me:{PASSWORD}@", ""), "Bearer ***")):
        client = OpenAIClient(url, KEY, 5.0, 0, 0.0)
        match = r"The server at http://127.0.0.1:\d+/v1/completions refused"
        with pytest.raises(RequestRefused, match=match) as caught:
            client.post("/completions", {"model": "m", "prompt": "a"}, "prompt 0")
        assert is_clean(str(caught.value))
        assert said in str(caught.value)


def test_weights_that_are_not_taken_over_show_no_key(address: str, tmp_path: Path) -> None:
    bare = address.replace(f"me:{PASSWORD}@", "")
    hand_over = SaveAndReload(tmp_path, f"{bare}/load?key={PASSWORD}", {"path": "{path}"}, api_key=KEY)
    with pytest.raises(RuntimeError, match="did not take over the weights") as caught:
        hand_over(generators.tiny_model())
    assert is_clean(str(caught.value))


def test_the_options_of_engine_and_judge_are_shown_without_them(address: str, tmp_path: Path) -> None:
    engine = EndpointEngine(address, "m", api_key=KEY)
    judge = JudgeReward("m", address, KEY)
    hand_over = SaveAndReload(tmp_path, address, {"path": "{path}"}, api_key=KEY)
    for one in (engine, judge, hand_over, engine.facts(), [engine, judge]):
        assert is_clean(repr(one))
    assert "server='http://127.0.0.1" in repr(judge)  # another judge is another reward


def test_a_round_leaves_them_in_no_file_and_no_log(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = JudgeReward("m", address, KEY, max_retries=0)
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError) as caught:  # of the HTTP client, too
        trained(tmp_path, resampler(judge))
    assert is_clean("".join(traceback.format_exception(caught.value)))
    assert "POST http://127.0.0.1" in caplog.text
    assert is_clean(caplog.text)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in files)
    for path in files:
        assert is_clean(path.read_bytes().decode("latin-1"))


def test_a_query_is_refused(address: str) -> None:
    for made in (EndpointEngine, lambda url, model: JudgeReward(model, url, KEY)):
        with pytest.raises(ValueError, match=r"`base_url`='http://127.0.0.1:\d+/v1' is followed by a query") as caught:
            made(f"{address}?key={KEY}", "m")
        assert is_clean(str(caught.value))


def test_the_weights_are_not_handed_to_whom_the_server_names(address: str, tmp_path: Path) -> None:
    class Elsewhere(Echo):
        def do_POST(self):
            self.send_response(302)
            self.send_header("Location", address.replace("me:hunter22@", ""))
            self.end_headers()

        do_GET = do_POST

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hand_over = SaveAndReload(tmp_path, f"http://127.0.0.1:{server.server_port}/load", {"path": "{path}"}, api_key=KEY)
    with pytest.raises(RuntimeError, match=r"did not take over the weights.*302"):
        hand_over(generators.tiny_model())
    server.shutdown()


@pytest.mark.parametrize("value", [f"me:{PASSWORD}@host/v1", f"ftp://me:{PASSWORD}@host"])
def test_an_address_that_is_none_is_named_without_its_password(value: str) -> None:
    with pytest.raises(ValueError, match="is no address of a server") as caught:
        EndpointEngine(value, "m")
    assert is_clean(str(caught.value))
