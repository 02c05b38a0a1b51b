"""WaitKEngine: what is read before each token, against `generate` where everything is, and the lagging by hand."""

from pathlib import Path

import pytest
import torch

import generators as g
from generation_oracle import NUM_CANDIDATES, ids_for
from generative_runs import resampler as make
from generative_runs import stored, trained
from rsft_hf.engines import WaitKEngine, average_lagging
from rsft_hf.engines.generate import GenerateEngine

ENCODER_DECODERS = ("t5", "bart", "marian")


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_with_the_whole_source_it_generates_as_generate_does(name: str, is_greedy: bool) -> None:
    model, ids = g.tiny_model(name), ids_for(name)
    config, num_candidates = (
        g.complete(model, is_greedy=is_greedy, max_new_tokens=10),
        1 if is_greedy else NUM_CANDIDATES,
    )
    expected = g.generated(model, config, ids, num_candidates, engine=GenerateEngine())
    for max_sequences in (3, 128):
        found = g.generated(model, config, ids, num_candidates, engine=WaitKEngine(100, max_sequences))
        assert [(one.token_ids, one.finish_reason) for one in found] == [
            (one.token_ids, one.finish_reason) for one in expected
        ]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_each_token_is_that_of_the_tokens_read_so_far(name: str, k: int) -> None:
    """By hand, a sentence at a time: the most probable token after a forward pass over the prefix of the source."""
    model, ids = g.tiny_model(name).eval(), ids_for(name)
    config = g.complete(model, is_greedy=True, max_new_tokens=8)
    found = g.generated(model, config, ids, engine=WaitKEngine(k))
    whole = g.generated(model, config, ids, engine=GenerateEngine())
    assert [one.token_ids for one in found] != [one.token_ids for one in whole]
    for source, one in zip(ids, found, strict=True):
        written = [model.config.decoder_start_token_id]
        for step, token in enumerate(one.token_ids):
            inputs = {"input_ids": torch.tensor([source[: k + step]]), "decoder_input_ids": torch.tensor([written])}
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            if name == "marian":
                logits[model.config.pad_token_id] = -torch.inf
            assert token == int(logits.argmax()), (step, one)
            written.append(token)


def test_lagging_by_hand() -> None:
    # |x| = 6, |y| = 3: g = 2, 3, 4; ideal 0, 2, 4; the source is not read to its end, so tau = 3.
    assert average_lagging(2, 6, 3) == pytest.approx((2 + 1 + 0) / 3)
    # |x| = |y| = 4, k = 3: g = 3, 4; tau = 2.
    assert average_lagging(3, 4, 4) == pytest.approx((3 + 3) / 2)
    assert average_lagging(9, 4, 2) == 4.0
    assert average_lagging(1, 1, 5) == 1.0


def test_rounds_with_it_resume_and_other_policies_are_other_candidates(tmp_path: Path) -> None:
    keywords = {"model": g.tiny_model("marian"), "processing_class": g.tokenizer_for("marian")}
    trained(tmp_path, make(engine=WaitKEngine(2)), **keywords)
    first = [row["token_ids"] for row in stored(tmp_path)]
    keywords["model"] = g.tiny_model("marian")
    trained(tmp_path, make(engine=WaitKEngine(3)), **keywords)
    assert [row["token_ids"] for row in stored(tmp_path)] != first


def test_what_it_cannot_do_is_refused() -> None:
    model = g.tiny_model("marian")
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        WaitKEngine(3).check(g.tiny_model("llama"), g.complete(g.tiny_model("llama")))
    with pytest.raises(ValueError, match="gives no log probabilities"):
        WaitKEngine(3).check(model, g.complete(model), ("log_q",))
    with pytest.raises(ValueError, match="token by token"):
        WaitKEngine(3).check(model, g.complete(model, is_greedy=True, num_beams=2))
    with pytest.raises(ValueError, match="`k`=0 must be an integer of at least 1"):
        WaitKEngine(0)
    with pytest.raises(ValueError, match="`max_sequences`=0"):
        WaitKEngine(1, 0)
