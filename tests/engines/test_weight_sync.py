"""Weight sync of an engine with weights of its own: once per round and per evaluation, before anything is generated.

Errors, with two processes: test_model_access_sharded.py.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import generators as g
from generative_runs import CountingEngine, resampler, trained, trainer
from rsft_hf.engines.base import Engine
from rsft_hf.generative.round_cache import model_fingerprint
from sharded_runs import with_adapter


class Server(CountingEngine):
    """Generates with the weights it was handed, and notes when that was."""

    has_own_weights = True

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.handed: list[str] = []
        self.modes: list[tuple[bool, bool, bool]] = []

    def sync_weights(self, model: Any, is_main_process: bool) -> None:
        self.events.append("hand over")
        self.handed.append(model_fingerprint(model))
        self.modes.append((is_main_process, model.training, torch.is_grad_enabled()))

    def __call__(self, model: Any, request: Any) -> Any:
        if self.events[-1] != "generate":
            self.events.append("generate")
        assert model_fingerprint(model) == self.handed[-1]
        return super().__call__(model, request)


def test_the_seam_is_told_from_that_of_engines_without_weights() -> None:
    assert Server().has_own_weights
    assert isinstance(CountingEngine(), Engine)
    assert not CountingEngine().has_own_weights


def test_weights_are_handed_over_once_a_round_and_once_an_evaluation(tmp_path: Path) -> None:
    server = Server()
    settings = {"num_train_epochs": 3, "eval_strategy": "epoch"}
    trained(tmp_path, resampler(engine=server), args=settings, eval_dataset=g.prompts(3, first=82))
    assert server.events == ["hand over", "generate"] * 6  # three rounds, an evaluation after each
    first, after_one, second, after_two, third, after_three = server.handed
    assert (after_one, after_two) == (second, third)  # an evaluation sees what the next round starts from
    assert len({first, second, third, after_three}) == 4  # what training has changed is handed over
    assert set(server.modes) == {(True, False, False)}


def test_attempts_of_a_round_share_one_handing_over(tmp_path: Path) -> None:
    server = Server()
    options = {"max_attempts": 3, "min_accepted_per_prompt": 2, "on_nothing_accepted": "skip"}
    trained(tmp_path, resampler(engine=server, **options))
    assert len(server.calls) == 3 * 5
    assert server.events == ["hand over", "generate"]


@pytest.mark.parametrize("merges", [False, True])
def test_what_is_handed_over_is_merged_if_what_generates_is(tmp_path: Path, merges: bool) -> None:
    server, seen = Server(), []

    def sync_weights(model: Any, is_main_process: bool) -> None:
        seen.append(any(layer.merged for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)))
        Server.sync_weights(server, model, is_main_process)

    server.sync_weights = sync_weights
    trained(tmp_path, resampler(engine=server, merge_adapter=merges), model=with_adapter(g.tiny_model()))
    assert seen == [merges]


def test_another_model_that_proposes_is_handed_over_and_the_policy_never(tmp_path: Path) -> None:
    """A server started for the proposal may have no place for the policy's weights: that is evaluated here."""
    server, teacher = Server(), g.tiny_model(seed=17)
    ours = trainer(tmp_path, resampler(engine=server, proposal_model=teacher))
    ours.train()
    ours.evaluate(g.prompts(3, first=82))
    assert server.handed == [model_fingerprint(teacher)]
    assert server.events == ["hand over", "generate"]


def test_by_hand_weights_are_handed_over_too() -> None:
    server, model = Server(), g.tiny_model()
    source = resampler(engine=server)
    for _ in range(2):
        source.generate(model, g.tokenizer(), g.prompts(2))
    assert server.events == ["hand over", "generate"] * 2
    assert set(server.modes) == {(True, False, False)}
    assert model.training


def test_the_adapter_is_off_in_the_reference_beside_a_proposal_too(tmp_path: Path) -> None:
    """log p of the trained model without its adapter, whoever has generated."""
    model, teacher = with_adapter(g.tiny_model()), g.tiny_model(seed=17)
    options = {"proposal_model": teacher, "reference_model": "base", "keep_log_probs": True}
    ours = trained(tmp_path, resampler(**options), model=model)
    found = g.stored(ours)
    by_hand = resampler(proposal_model=teacher, reference_model=g.tiny_model(), keep_log_probs=True)
    expected = g.stored(trained(tmp_path / "other", by_hand, model=with_adapter(g.tiny_model())))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.log_p for one in found] == pytest.approx([one.log_p for one in expected])
    assert [one.log_p for one in found] != pytest.approx([one.log_q for one in found])
