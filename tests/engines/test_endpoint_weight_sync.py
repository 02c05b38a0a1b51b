"""Weights handed over to a server: the checkpoint is really loaded there, and no failure leaves old weights at work."""

import logging
import re

import pytest
import torch

import generators as g
from completions_server import NAME, CompletionsServer
from endpoint_runs import IDS, MODEL, engine, request, run, tokens
from rsft_hf.engines.endpoint.engine import EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server():
    server = CompletionsServer(g.tiny_model())
    yield server
    server.stop()


def greedy(model) -> dict:
    local = g.generated(model, g.complete(model, is_greedy=True), IDS)
    return {(one.prompt, one.index): (one.token_ids, one.finish_reason) for one in local}


def test_the_server_generates_from_the_weights_it_was_handed(server, tmp_path):
    one = engine(server, weights=SaveAndReload.sglang(server.base_url, tmp_path / "weights"))
    other = g.tiny_model(seed=3).eval()
    assert greedy(other) != greedy(MODEL)
    for number, (model, expected) in enumerate(((MODEL, greedy(MODEL)), (other, greedy(other))), start=1):
        # The engine was handed the weights once when it was made, to the folder of number 0.
        one.sync_weights(model, is_main_process=True)
        assert tokens(run(one, request(1, is_greedy=True))) == expected
        (folder,) = (tmp_path / "weights").iterdir()  # the one before is gone
        assert re.fullmatch(rf"weights-[0-9a-f]{{12}}-{number}", folder.name)
        assert server.updates[-1] == ("/update_weights_from_disk", {"model_path": str(folder)})
    salts = [body["cache_salt"] for body in server.bodies]
    assert len(set(salts)) == 2  # what was computed under other weights is not found again
    assert (len(set(salts[:5])), len(set(salts[5:]))) == (1, 1)


def test_only_the_main_process_feeds_the_server(server):
    fed = []
    one = engine(server, weights=fed.append)
    fed.clear()
    one.sync_weights(MODEL, is_main_process=False)
    assert fed == []
    assert len(run(one, request(1))) == len(IDS)
    one.sync_weights(MODEL, is_main_process=True)
    assert fed == [MODEL]


def test_an_adapter_is_dropped_and_loaded_anew(server, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(g.tiny_model(), config).eval()
    sync_weights = SaveAndReload.vllm_lora(server.base_url, tmp_path, "adapter")
    with pytest.raises(ValueError, match="loads the adapter 'adapter', and `model`='tiny'"):
        EndpointEngine(server.base_url, NAME, weights=sync_weights)
    one = EndpointEngine(server.base_url, "adapter", weights=sync_weights)
    seen = []
    for scale in (0.0, 3.0):
        with torch.no_grad():
            for name, values in adapted.named_parameters():
                if "lora_B" in name:
                    values.fill_(scale)
        one.sync_weights(adapted, is_main_process=True)
        seen.append(tokens(run(one, request(1, is_greedy=True))))
        assert seen[-1] == greedy(adapted)
    assert seen[0] == greedy(MODEL) != seen[1]
    routes = [path for path, _ in server.updates]
    assert routes == ["/v1/unload_lora_adapter", "/v1/load_lora_adapter"] * 2


def test_a_failed_hand_over_stops_the_generation(server, tmp_path):
    sync_weights = SaveAndReload.sglang(server.base_url, tmp_path)
    one = engine(server, weights=sync_weights)
    server.manners = {"refuses weights"}
    with pytest.raises(RuntimeError, match=r"did not take over the weights: http.*no such parameter.*sees /.*"):
        one.sync_weights(MODEL, is_main_process=True)
    with pytest.raises(RuntimeError, match="No weights were handed over to the server"):
        one(MODEL, request())
    assert server.bodies == []
    server.manners = set()
    one.sync_weights(MODEL, is_main_process=True)
    assert len(run(one, request(1))) == len(IDS)
    assert len(list(tmp_path.iterdir())) == 1
    absent = SaveAndReload.sglang("http://127.0.0.1:9/v1", tmp_path)
    with pytest.raises(RuntimeError, match=r"127.0.0.1:9.*refused"):
        absent(MODEL)
    wrong_route = SaveAndReload(
        tmp_path, f"{server.base_url}/load_lora_adapter", {"lora_name": NAME, "lora_path": "{path}"}
    )
    with pytest.raises(RuntimeError, match=r"400.*already loaded"):
        wrong_route(MODEL)


def test_what_was_saved_must_be_what_the_server_loads(server, tmp_path):
    with pytest.raises(ValueError, match=r"`saves`='adapter' expects adapter_config.json.*SaveAndReload.sglang"):
        SaveAndReload.vllm_lora(server.base_url, tmp_path, "adapter")(MODEL)
    assert server.updates == []
    with pytest.raises(ValueError, match="nowhere names the folder to load"):
        SaveAndReload(tmp_path, server.base_url, {"model_path": str(tmp_path)})
    nested = SaveAndReload(
        tmp_path, server.base_url, {"method": "load", "kwargs": {"paths": ["{path}/x"]}}, api_key="sesame"
    )
    assert "sesame" not in repr(nested)


def test_a_server_with_weights_of_its_own_is_warned_of_once(server, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    one = engine(server)
    for is_main in (False, True, True):
        one.sync_weights(MODEL, is_main_process=is_main)
    assert caplog.text.count("all candidates come from the weights that the server holds") == 1
    assert len(run(one, request(1))) == len(IDS)
    assert "cache_salt" not in server.bodies[-1]


REPLIES = {
    "<html>Welcome to nginx</html>": (False, False),
    '{"error": "unknown route"}': (False, False),
    '{"detail": "Not Found"}': (False, False),
    '{"status": "error", "message": "x"}': (False, False),
    '{"success": false}': (False, False),
    "{}": (False, True),
    "null": (False, True),
    "": (False, True),
    "Success: LoRA adapter added.": (False, True),
    '{"success": true, "message": "done"}': (True, True),
}


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_with_200_must_not_say_otherwise_and_sglangs_must_say_so(server, tmp_path, reply):
    server.load = lambda path, body: (200, reply)
    others = {"lora_path": "{path}"}
    for sync_weights, is_taken in zip(
        (SaveAndReload.sglang(server.base_url, tmp_path), SaveAndReload(tmp_path, server.base_url, others)),
        REPLIES[reply],
    ):
        if is_taken:
            sync_weights(MODEL)
        else:
            with pytest.raises(RuntimeError, match="did not take over the weights"):
                sync_weights(MODEL)
    own = SaveAndReload(tmp_path, server.base_url, others, succeeds=lambda answer: answer == reply)
    own(MODEL)


def test_only_folders_of_its_own_are_removed(server, tmp_path):
    """Neither this package's candidates nor what another run's server was told to load."""
    (tmp_path / "round-000").mkdir()
    first, second = (SaveAndReload.sglang(server.base_url, tmp_path) for _ in range(2))
    for sync_weights in (first, second, first, second, second):
        sync_weights(MODEL)
    told = [body["model_path"] for _, body in server.updates]
    assert len(set(told)) == 5
    assert {str(path) for path in tmp_path.iterdir()} == {told[2], told[4], str(tmp_path / "round-000")}


def test_of_several_adapters_the_active_one_is_handed_over(server, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(g.tiny_model(), peft.LoraConfig(**config)).eval()
    adapted.add_adapter("policy", peft.LoraConfig(**config))
    adapted.eval()
    of_default = greedy(adapted)
    adapted.set_adapter("policy")
    assert greedy(adapted) != of_default
    sync_weights = SaveAndReload.vllm_lora(server.base_url, tmp_path, "adapter")
    one = EndpointEngine(server.base_url, "adapter", weights=sync_weights)
    one.sync_weights(adapted, is_main_process=True)
    assert tokens(run(one, request(1, is_greedy=True))) == greedy(adapted)
    adapted.base_model.set_adapter(["default", "policy"])
    with pytest.raises(ValueError, match=r"adapters \['default', 'policy'\] at once, and a server loads one"):
        one.sync_weights(adapted, is_main_process=True)
    assert len(server.updates) == 2
