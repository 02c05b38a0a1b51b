"""Teacher-forced log probabilities of each token against what the local engine noted when it drew them."""

import pytest
import torch

import architectures
import generators as g
from generation_oracle import SETTINGS, ids_for, processed_by_hand, short_of_memory
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.log_probs import token_log_probabilities

CASES = [(name, {}) for name in g.NAMES]
CASES += [(name, SETTINGS[kind]) for name in ("llama", "bart") for kind in ("truncated", "penalised", "pad_is_eos")]
CASES += [(name, {"min_new_tokens": 3, "temperature": 1.5}) for name in ("qwen3", "t5")]


def score(model, ids, found, config, **keywords):
    return token_log_probabilities(model, [ids[one.prompt] for one in found], [one.token_ids for one in found], config,
                                   **keywords)  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_each_token_has_the_log_probabilities_it_was_drawn_with(name, settings):
    model, ids = g.tiny_model(name), ids_for(name)
    config = g.complete(model, **settings)
    found = g.generated(model, config, ids, num_candidates=3)
    assert len({len(one.token_ids) for one in found}) > 1
    assert all(torch.equal(one.log_q, one.log_p) for one in found) == (not settings)  # else nothing is in force
    for batch_size in (1, 4, 64):
        for one, (log_q, log_p) in zip(found, score(model, ids, found, config, batch_size=batch_size)):
            assert log_q.shape == log_p.shape == (len(one.token_ids),)
            torch.testing.assert_close(log_p, one.log_p, atol=1e-4, rtol=0)
            torch.testing.assert_close(log_q, one.log_q, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_log_p_alone_costs_no_log_q(name):
    model, ids = g.tiny_model(name), ids_for(name)
    config = g.complete(model, temperature=0.7)
    found = g.generated(model, config, ids)
    scored = score(model, ids, found, config, with_log_q=False)
    assert all(log_q is None for log_q, _ in scored)
    torch.testing.assert_close(scored[0][1], found[0].log_p, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "by_hand"), [({"top_k": 2}, (1.0, 2, 1.0)), ({"top_p": 0.5}, (1.0, 0, 0.5))], ids=str
)
def test_a_token_on_the_edge_counts_as_the_last_of_those_kept(settings, by_hand):
    """What another machine drew may be left out here by rounding: it joins those kept, and takes its share."""
    model, prompt = g.tiny_model().eval(), ids_for("llama")[0]
    config = g.complete(model, **settings)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1:]
    kept = processed_by_hand(logits, *by_hand)[0].isfinite()
    left_out = int(logits[0].masked_fill(kept, -torch.inf).argmax())
    others = logits[0, kept].exp().sum()
    expected = (logits[0, left_out].exp() / (others + logits[0, left_out].exp())).log()
    ((log_q, log_p),) = token_log_probabilities(model, [prompt], [[left_out]], config)
    assert float(log_q) == pytest.approx(float(expected), abs=1e-4)
    assert float(log_p) == pytest.approx(float(logits[0].log_softmax(-1)[left_out]), abs=1e-4)


def test_an_end_that_was_forbidden_has_no_probability():
    model, prompt = g.tiny_model().eval(), ids_for("llama")[0]
    ((log_q, log_p),) = token_log_probabilities(model, [prompt], [[g.EOS]], g.complete(model, min_new_tokens=2))
    assert (float(log_q), bool(log_p.isfinite())) == (-torch.inf, True)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_batch_that_is_too_large_is_halved_and_loses_nothing(name):
    model, ids = g.tiny_model(name), ids_for(name)
    config = g.complete(model)
    found = g.generated(model, config, ids, num_candidates=3)
    passes = short_of_memory(model, most=4)
    scored = score(model, ids, found, config)
    assert len(scored) == 15
    assert passes[:3] == [15, 7, 3]
    torch.testing.assert_close(scored[-1][1], found[-1].log_p, atol=1e-4, rtol=0)
    short_of_memory(model, most=0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        score(model, ids, found, config, batch_size=1)


@pytest.mark.parametrize("settings", [{"min_length": 12}, {"no_repeat_ngram_size": 1}], ids=str)
def test_padding_never_counts_as_tokens(settings):
    model = architectures.model_of("gpt2")
    ids, config = architectures.prompts_for(model), g.complete(model, **settings)
    sampled = architectures.request_for(model, ids, config=config, with_log_probs=True)
    found = architectures.run(GenerateEngine(1), model, sampled)
    answers = [one.token_ids for one in found]
    scored = token_log_probabilities(model, [ids[one.prompt] for one in found], answers, config)
    for one, (log_q, log_p) in zip(found, scored, strict=True):
        torch.testing.assert_close(log_q, one.log_q, atol=1e-4, rtol=0)
        torch.testing.assert_close(log_p, one.log_p, atol=1e-4, rtol=0)


def test_a_models_own_stop_strings_change_no_probability():
    model = architectures.model_of("llama")
    plain = token_log_probabilities(model, [[10, 11], [12]], [[13], [14, 15]], g.complete(model))
    model.generation_config.stop_strings = ["h"]
    found = token_log_probabilities(model, [[10, 11], [12]], [[13], [14, 15]], g.complete(model))
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one[0], other[0])
