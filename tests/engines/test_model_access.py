"""What generates is the model as it is trained, out of its wrappers, and training finds it as it was; one process.

Sharded models: test_model_access_sharded.py. Merged ones: test_merging.py.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import generators as g
from generative_runs import CountingEngine, Killed, resampler, stored, trained, trainer
from rsft_hf.engines.model_access import unwrapped
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
    model.gradient_checkpointing_enable()
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
