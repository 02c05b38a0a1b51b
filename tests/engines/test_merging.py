"""An adapter is merged for the time of a round, and every weight comes back bit for bit; what cannot be is refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_model_access import bits, quantised, same_bits

import generators as g
from generative_runs import CountingEngine, Killed, resampler, round_dir, stored, trained
from rsft_hf.engines.model_access import merged, whole_model
from sharded_runs import with_adapter


def answers(model: Any) -> list[list[int]]:
    """Greedy, and so without chance."""
    return [one.token_ids for one in g.generated(model, g.complete(model, is_greedy=True), g.prompt_ids(6))]


ADAPTERS: dict[str, Any] = {
    "lora": lambda: with_adapter(g.tiny_model()),
    "gpt2": lambda: with_adapter(g.tiny_model("gpt2"), ["c_attn"], fan_in_fan_out=True, use_rslora=True),
    "dora": lambda: with_adapter(g.tiny_model(), use_dora=True),
    "embedding": lambda: with_adapter(g.tiny_model(), ["embed_tokens", "lm_head"]),
    "t5": lambda: with_adapter(g.tiny_model("t5"), ["q", "v"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_and_unmerged_models_answer_alike(name: str) -> None:
    assert len(ADAPTERS) == 5
    model = ADAPTERS[name]()
    apart = answers(model)
    with model.disable_adapter():
        assert answers(model) != apart  # the adapter is far from nothing
    with whole_model(None, model, merge_adapter=True) as whole:
        assert answers(whole) == apart
    assert answers(model) == apart


@pytest.mark.parametrize("is_failing", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merging_gives_every_weight_back_bit_for_bit(name: str, is_failing: bool) -> None:
    model = ADAPTERS[name]()
    before, places = bits(model), [values.data_ptr() for values in model.parameters()]
    trained_weights = [name for name, values in model.named_parameters() if values.requires_grad]
    with pytest.raises(Killed) if is_failing else contextlib.nullcontext(), merged(model):
        assert not same_bits(model, before)
        if is_failing:
            raise Killed
    assert same_bits(model, before)
    assert [values.data_ptr() for values in model.parameters()] == places
    assert [name for name, values in model.named_parameters() if values.requires_grad] == trained_weights
    assert not any(
        layer.merged for layer in model.modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    )


def test_the_unmerging_of_peft_alone_would_not() -> None:
    model = with_adapter(g.tiny_model().to(torch.bfloat16))
    before = bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not same_bits(model, before)
    with merged(model):
        pass
    assert not same_bits(model, before)  # it was not we who changed it
    model = with_adapter(g.tiny_model().to(torch.bfloat16))
    with merged(model):
        pass
    assert same_bits(model, before)


def test_a_merge_that_breaks_off_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(g.tiny_model())
    before, last = bits(model), model.base_model.model.model.layers[1].self_attn.v_proj
    monkeypatch.setattr(last, "merge", lambda **_: (_ for _ in ()).throw(ValueError("the second layer cannot")))
    with pytest.raises(ValueError, match=r"peft cannot merge LORA: the second layer cannot. Use merge_adapter=False"):
        merged(model).__enter__()
    assert same_bits(model, before)
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged


def prompt_tuned() -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(g.tiny_model(), config)


REFUSED: dict[str, Any] = {
    "no adapter": (g.tiny_model, "merges a PEFT adapter, and LlamaForCausalLM has none. Leave it at False."),
    "prompt": (prompt_tuned, "PROMPT_TUNING learns a prompt, which no weight could take up. Use merge_adapter=False"),
    "quantised": (lambda: with_adapter(quantised()), "The base layer Int8Linear holds quantised weights, into which"),
    "tied": (
        lambda: with_adapter(g.tiny_model(tie_word_embeddings=True), ["embed_tokens"]),
        "are one tied weight: merged into it, the adapter of one would change the other. Use merge_adapter=False",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_merged_is_refused_before_the_first_round(tmp_path: Path, name: str) -> None:
    assert len(REFUSED) == 4
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, resampler(merge_adapter=True), model=build())
    assert not round_dir(tmp_path).exists()


def test_an_adapter_cannot_be_merged_and_off() -> None:
    with pytest.raises(ValueError, match="turns off the adapter that `merge_adapter=True` has merged"):
        resampler(merge_adapter=True, reference_model="base")


def test_merging_is_a_fact_of_a_round(tmp_path: Path) -> None:
    """Merged arithmetic differs in the last bits: candidates of the one are not continued by the other."""
    found = {}
    for merges in (False, True):
        engine = CountingEngine()
        ours = trained(tmp_path, resampler(engine=engine, merge_adapter=merges), model=with_adapter(g.tiny_model()))
        assert len(engine.calls) == 5
        found[merges] = [one["token_ids"] for one in stored(tmp_path)]
        facts = json.loads((round_dir(tmp_path) / "manifest.json").read_text())["facts"]
        assert facts["merge_adapter"] is merges
        assert not any(module.training is False for module in ours.model.modules())
    assert found[False] == found[True]  # in fp32, of a tiny model
