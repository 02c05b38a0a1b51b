"""Checkpoints of `enable_jit_checkpoint`, which come on SIGTERM and may be saved before the step of their losses."""

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import generators
import runs
from generative_runs import CountingEngine, resampler
from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer
from rsft_hf.checkpointing import last_complete_checkpoint

STEPS_PER_EPOCH = 4  # 26 rows in batches of 4, two of them a step


class Terminate(hf.TrainerCallback):
    """Asks for the checkpoint where SIGTERM would, after `event` at a step; the next event of the trainer saves it."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def ask(self, event: str, state: hf.TrainerState) -> None:
        if (event, state.global_step) == (self.event, self.step):
            self.manager.is_checkpoint_requested = True

    def on_step_begin(self, args, state, control, **kwargs):  # answered between the losses and the step
        self.ask("step_begin", state)

    def on_step_end(self, args, state, control, **kwargs):  # answered at the next step's beginning, or the epoch's end
        self.ask("step_end", state)

    def on_epoch_begin(self, args, state, control, **kwargs):  # answered before the first step
        self.ask("epoch_begin", state)


def terminated(trainer: hf.Trainer, event: str, step: int) -> None:
    """Trains until the signal."""
    callback = Terminate(event, step)
    trainer.add_callback(callback)  # behind those of Trainer
    managers = [getattr(one, "jit_manager", None) for one in trainer.callback_handler.callbacks]
    callback.manager = next(one for one in managers if one is not None)
    trainer.train()


def weighted(output_dir: Path, losses: str) -> hf.Trainer:
    args = runs.arguments(output_dir, enable_jit_checkpoint=True, gradient_accumulation_steps=2)
    made = LossResampler(Proportional(), losses=losses)
    model = runs.bert(dropout=0.0)  # Trainer repeats the step with other dropout
    return RejectionSamplingTrainer(model, args, runs.collate, runs.rows(), resampler=made)


@pytest.fixture(scope="module", params=["forward", "training"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, hf.Trainer]:
    trainer = weighted(tmp_path_factory.mktemp("whole"), request.param)
    trainer.train()
    return request.param, trainer


def table(trainer: hf.Trainer) -> list[dict[str, Any]]:
    return [{key: str(value) for key, value in row.items()} for row in trainer.resampler.table()]


@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("epoch_begin", STEPS_PER_EPOCH),
        *[(event, step) for event in ("step_begin", "step_end") for step in (STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH - 1)],
    ],
)
def test_a_terminated_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, whole: tuple[str, hf.Trainer], event: str, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    losses, uninterrupted = whole
    terminated(weighted(tmp_path, losses), event, step)
    again = weighted(tmp_path, losses)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == uninterrupted.state.global_step
    assert table(again) == table(uninterrupted)
    assert runs.largest_difference(again, uninterrupted) == 0
    assert "stopped early" not in caplog.text


def test_a_round_is_not_generated_again(tmp_path: Path) -> None:
    engines = [CountingEngine(), CountingEngine()]

    def trainer(engine: CountingEngine) -> hf.Trainer:
        args = generators.arguments(tmp_path, enable_jit_checkpoint=True, save_strategy="no")
        return RejectionSamplingTrainer(
            generators.tiny_model(), args, train_dataset=generators.prompts(9),
            processing_class=generators.tokenizer(), resampler=resampler(engine=engine),
        )  # fmt: skip

    terminated(trainer(engines[0]), "epoch_begin", 0)
    again = trainer(engines[1])
    again.train(resume_from_checkpoint=True)
    num_rounds = int(again.args.num_train_epochs)
    asked = [len(engine.prompts()) for engine in engines]
    assert asked == [9, 9 * (num_rounds - 1)]
    assert again.state.global_step == again.state.max_steps


def test_a_checkpoint_that_was_being_written_over_is_skipped(tmp_path: Path) -> None:
    runs.trained(RejectionSamplingTrainer, tmp_path, args={"save_strategy": "steps", "save_steps": 5})
    assert Path(last_complete_checkpoint(str(tmp_path))).name == "checkpoint-21"
    (tmp_path / "checkpoint-21" / "checkpoint-is-incomplete.txt").write_text("Checkpoint started")
    assert Path(last_complete_checkpoint(str(tmp_path))).name == "checkpoint-20"
