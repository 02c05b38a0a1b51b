"""What generates is the model as it is trained, out of its wrappers, and training finds it as it was; one process.

Sharded models: test_model_access_sharded.py.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import generators as g
from generative_runs import CountingEngine, Killed, resampler, round_dir, stored, trained, trainer
from rsft_hf.engines.model_access import merged, unwrapped, whole_model
from sharded_runs import with_adapter


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(values, before[name]) for name, values in after.items())


class Int8Linear(torch.nn.Linear):
    """A quantised base layer in small: codes of a byte, and a scale per row."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale)


def quantised() -> Any:
    model = g.tiny_model()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    return model


def test_an_adapter_on_a_quantised_base_completes_a_round(tmp_path: Path) -> None:
    model = with_adapter(quantised())
    codes = {name: values for name, values in bits(model).items() if values.dtype == torch.int8}
    assert len(codes) == 2 * 4
    ours = trained(tmp_path, model=model, args={"num_train_epochs": 2})
    assert all(torch.equal(values, model.state_dict()[name]) for name, values in codes.items())
    assert [one["token_ids"] for one in stored(tmp_path)] != [one["token_ids"] for one in stored(tmp_path, 1)]
    assert ours.state.global_step == 10  # 9 rows in batches of 2, twice


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_quantised_by_torch_generates() -> None:
    model = g.tiny_model().eval()
    whole = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found = resampler().generate(whole, g.tokenizer(), g.prompts(3))
    assert len(found) == 3 * 4
    assert any(one.finish_reason == "stop" for one in found)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


COMPILED: dict[str, Any] = {
    "by the trainer": (lambda model: model, {"torch_compile": True, "torch_compile_backend": "eager"}),
    "by hand": (compiled, {"remove_unused_columns": False}),  # Trainer cannot see the columns that it reads
    "in place": (compiled_in_place, {}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_completes_a_round_with_the_same_candidates(tmp_path: Path, name: str) -> None:
    assert len(COMPILED) == 3
    compile_model, args = COMPILED[name]
    ours = trained(tmp_path / "compiled", model=compile_model(g.tiny_model()), args=args)
    assert ours.state.global_step == 5
    trained(tmp_path / "plain")
    assert stored(tmp_path / "compiled") == stored(tmp_path / "plain")


def test_wrappers_come_off_in_any_order() -> None:
    model = g.tiny_model()
    assert unwrapped(compiled(torch.nn.DataParallel(compiled(model)))) is model
    assert unwrapped(model) is model
    found = resampler().generate(compiled(model), g.tokenizer(), g.prompts(2))
    assert [one.token_ids for one in found] == [
        one.token_ids for one in resampler().generate(model, g.tokenizer(), g.prompts(2))
    ]


class Watching(CountingEngine):
    """Notes the surroundings that it generates in, and may fail in them."""

    def __init__(self, kill_before: int | None = None) -> None:
        super().__init__(kill_before)
        self.surroundings: list[Any] = []

    def __call__(self, model: Any, request: Any) -> Any:
        self.surroundings.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), model.training))
        return super().__call__(model, request)


@pytest.mark.parametrize("merges", [False, True])
def test_a_round_in_bf16_leaves_the_weights_in_fp32(tmp_path: Path, merges: bool) -> None:
    engine = Watching()
    source = resampler(engine=engine, merge_adapter=merges)
    ours = trained(tmp_path, source, model=with_adapter(g.tiny_model()), args={"bf16": True})
    assert ours.state.global_step == 5
    assert set(engine.surroundings) == {(True, False, False)}
    assert {values.dtype for values in ours.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kill_before", [None, 1])
def test_checkpointing_and_training_mode_are_given_back(tmp_path: Path, kill_before: int | None) -> None:
    model = with_adapter(g.tiny_model())
    engine = Watching(kill_before)
    source = resampler(engine=engine, merge_adapter=True)
    ours = trainer(tmp_path, source, model=model)
    g.checkpoint_activations(model)
    model.train()
    model.get_base_model().model.layers[0].mlp.eval()  # a frozen part stays as it was
    before, state = (
        bits(model),
        [(module.training, vars(module).get("gradient_checkpointing")) for module in model.modules()],
    )
    assert (True, True) in state
    with pytest.raises(Killed) if kill_before else contextlib.nullcontext():
        ours.evaluate(g.prompts(70, first=10))  # two batches
    assert len(engine.surroundings) == 2
    assert [(module.training, vars(module).get("gradient_checkpointing")) for module in model.modules()] == state
    assert same_bits(model, before)


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


def test_training_mode_and_checkpointing_leave_no_trace_and_are_given_back():
    plain, busy = g.tiny_model("gpt2").eval(), g.tiny_model("gpt2").train()
    g.checkpoint_activations(busy)
    busy.config.use_cache = False
    busy.transformer.h[0].mlp.eval()  # a frozen part stays as it was
    modes, widths = [module.training for module in busy.modules()], []
    busy.register_forward_pre_hook(lambda _, args, kw: widths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    source = g.resampler(num_candidates=3, engine="generate")  # the other engine first makes a trial run
    found, expected = (source.generate(model, g.tokenizer(), g.prompts(3)) for model in (busy, plain))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert widths[0] > 1
    assert set(widths[1:]) == {1}  # the cache is in use
    assert [module.training for module in busy.modules()] == modes
    assert getattr(busy, "is_activation_checkpointing", None) or busy.is_gradient_checkpointing
    assert busy.config.use_cache is False
