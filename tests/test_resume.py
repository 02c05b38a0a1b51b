"""Exact resume: a run killed and resumed from its last checkpoint equals an uninterrupted one bit for bit."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pandas
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import runs
from rsft_hf import Chain, Clipped, Floored, LossResampler, Proportional, RejectionSamplingTrainer
from rsft_hf.checkpointing import load_renamed_weights
from rsft_hf.weighted import Entropy

STEPS_PER_EPOCH = 7  # 26 rows in batches of 4


class Killed(Exception):
    """Simulates a killed process: the trainer is not used again."""


class KillAfter(hf.TrainerCallback):
    """Raises after a step, when that step's checkpoint has been saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def resumed(tmp_path: Path, at: int, make_resampler, **args) -> tuple[hf.Trainer, hf.Trainer]:
    settings = {"save_strategy": "steps", "save_steps": at, **args}
    whole = runs.trained(RejectionSamplingTrainer, tmp_path / "whole", args=settings, resampler=make_resampler())
    with pytest.raises(Killed):
        runs.trained(
            RejectionSamplingTrainer,
            tmp_path / "cut",
            args=settings,
            resampler=make_resampler(),
            callbacks=[KillAfter(at)],
        )
    torch.manual_seed(12345)  # another process starts from another state
    cut = runs.trained(
        RejectionSamplingTrainer,
        tmp_path / "cut",
        resume=str(tmp_path / "cut" / f"checkpoint-{at}"),
        args=settings,
        resampler=make_resampler(),
    )
    return whole, cut


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["forward", "training"])
@pytest.mark.parametrize("at", [STEPS_PER_EPOCH + 3, 2 * STEPS_PER_EPOCH], ids=["inside", "boundary"])
def test_resume_is_exact(tmp_path: Path, at: int, source: str, num_workers: int) -> None:
    whole, cut = resumed(
        tmp_path, at, lambda: LossResampler(losses=source, ema_decay=0.5), dataloader_num_workers=num_workers
    )
    assert runs.largest_difference(whole, cut) == 0.0
    assert runs.losses(cut) == runs.losses(whole)
    pandas.testing.assert_frame_equal(
        cut.resampler.table().to_pandas(), whole.resampler.table().to_pandas(), check_exact=True
    )


@pytest.mark.parametrize(
    "make_resampler",
    [
        pytest.param(lambda: LossResampler(importance_correction=1.0), id="correction"),
        pytest.param(lambda: LossResampler(importance_correction=0.5, losses="training"), id="corrected_ledger"),
        pytest.param(lambda: LossResampler(Chain(Entropy(), Floored(0.2)), every_n_epochs=2), id="stale_entropy"),
        pytest.param(lambda: LossResampler(lambda losses: losses.sqrt(), ema_decay=0.5), id="plain_function"),
        pytest.param(lambda: LossResampler(Clipped(0.5), warmup_epochs=1, uniform_final_epochs=1), id="phases"),
        pytest.param(lambda: LossResampler(num_draws=18, losses="training", every_n_epochs=2), id="fewer_draws"),
    ],
)
def test_options_resume_exactly(tmp_path: Path, make_resampler) -> None:
    whole, cut = resumed(tmp_path, 8, make_resampler)
    assert runs.largest_difference(whole, cut) == 0.0
    assert runs.losses(cut) == runs.losses(whole)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"train_sampling_strategy": "group_by_length"}, id="group_by_length"),
        pytest.param({"gradient_accumulation_steps": 2, "save_steps": 6}, id="accumulation"),
        pytest.param({"save_strategy": "epoch"}, id="epoch_strategy"),
    ],
)
def test_settings_resume_exactly(tmp_path: Path, args: dict) -> None:
    at = args.get("save_steps", 2 * STEPS_PER_EPOCH)
    whole, cut = resumed(tmp_path, at, lambda: LossResampler(losses="training"), **args)
    assert runs.largest_difference(whole, cut) == 0.0


def test_an_unlogged_epoch_is_logged_after_the_resume(tmp_path: Path) -> None:
    whole, cut = resumed(tmp_path, STEPS_PER_EPOCH + 3, LossResampler, logging_steps=1000)
    for trainer in (whole, cut):
        assert sum("resampling/envelope_M" in line for line in trainer.state.log_history) == 3


def test_state_is_json_and_safetensors_never_pickle(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 10, "max_steps": 10}
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, args=args)
    folder = tmp_path / "checkpoint-10" / "resampler"
    assert {path.name for path in folder.iterdir()} == {
        "progress.json",
        "progress.safetensors",
        "weighted.json",
        "weighted.safetensors",
    }
    assert json.loads((folder / "progress.json").read_text())["epoch"] == 1
    indices = load_file(folder / "progress.safetensors")["indices"]
    assert torch.equal(indices, trainer._progress.indices)
    assert not list(tmp_path.glob("**/*.incomplete"))


@pytest.mark.parametrize("damage", ["trainer_state.json", "resampler"])
def test_resume_true_skips_a_checkpoint_cut_off_in_saving(tmp_path: Path, damage: str) -> None:
    args = {"save_strategy": "steps", "save_steps": 5}
    whole = runs.trained(RejectionSamplingTrainer, tmp_path, args=args)
    newest = tmp_path / "checkpoint-21"  # Trainer saves at the end too
    if damage == "resampler":
        shutil.rmtree(newest / damage)
    else:
        (newest / damage).write_text('{"best_global_step": nu')  # the disk was full, or the power went
    counter = runs.StepCounter()
    again = runs.trained(RejectionSamplingTrainer, tmp_path, resume=True, args=args, callbacks=[counter])
    assert counter.num_steps == 1  # from checkpoint-20
    assert runs.largest_difference(whole, again) == 0.0


def test_resume_true_without_a_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match=r"No valid checkpoint found in output directory .* of 1 checkpoint folders"):
        runs.trained(RejectionSamplingTrainer, tmp_path, resume=True)


def test_an_epoch_stopped_early_does_not_confuse_the_count(tmp_path: Path) -> None:
    class StopFirstEpoch(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 3

    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, callbacks=[StopFirstEpoch()])
    assert trainer.resampler.history.epochs == [0, 1, 2]
    assert trainer.state.global_step == 3 + 2 * STEPS_PER_EPOCH


@pytest.mark.parametrize("at", [3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3])
def test_a_resumed_run_logs_the_figures_of_an_epoch_at_the_same_steps(tmp_path: Path, at: int) -> None:
    whole, cut = resumed(tmp_path, at, LossResampler, logging_steps=500, num_train_epochs=3)
    steps = [
        [line["step"] for line in trainer.state.log_history if "resampling/acceptance_rate" in line]
        for trainer in (whole, cut)
    ]
    assert steps[0] == steps[1] == [7, 14, 21]


@pytest.mark.parametrize("at", [STEPS_PER_EPOCH + 3, 2 * STEPS_PER_EPOCH + 3])
def test_suspects_count_measured_epochs_alone_and_alike_after_a_resume(tmp_path: Path, at: int) -> None:
    """Four epochs, of which the first and the third are measured."""
    whole, cut = resumed(tmp_path, at, lambda: LossResampler(Proportional(), every_n_epochs=2), num_train_epochs=4)
    tables = [trainer.resampler.suspects(runs.NUM_ROWS).to_list() for trainer in (whole, cut)]
    assert {len(row["losses"]) for row in tables[0]} == {2}
    assert tables[0] == tables[1]


def test_suspects_of_a_finished_run_are_those_of_its_last_checkpoint(tmp_path: Path) -> None:
    def run(resume: str | None) -> list[dict]:
        resampler = LossResampler(losses="training", warmup_epochs=3)
        args = {"save_strategy": "steps", "save_steps": STEPS_PER_EPOCH}
        trainer = runs.trained(RejectionSamplingTrainer, tmp_path, resume=resume, resampler=resampler, args=args)
        return trainer.resampler.suspects(5).to_list()

    whole = run(None)
    assert {len(row["losses"]) for row in whole} == {3}
    assert run(str(tmp_path / f"checkpoint-{3 * STEPS_PER_EPOCH}")) == whole


def rates(trainer: hf.Trainer) -> list[float]:
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.mark.parametrize("source", ["forward", "training"])
@pytest.mark.parametrize(
    "args",
    [
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["smaller", "larger", "accumulated"],
)
def test_the_next_epoch_may_come_in_other_batches(tmp_path: Path, args: dict, source: str) -> None:
    """A run of 4 epochs in batches of 4 is killed after one and goes on in others, then once more inside an epoch."""

    def trained(resume=None, callbacks=(), **others):
        settings = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, **others}
        return runs.trained(
            RejectionSamplingTrainer, tmp_path, args=settings, resume=resume, callbacks=list(callbacks),
            resampler=LossResampler(losses=source),
        )  # fmt: skip

    with pytest.raises(Killed):
        trained(callbacks=[KillAfter(STEPS_PER_EPOCH)])
    first = str(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}")
    whole = trained(first, **args)
    per_epoch = math.ceil(
        runs.NUM_ROWS / (args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1))
    )
    assert whole.state.global_step == whole.state.max_steps == STEPS_PER_EPOCH + 3 * per_epoch
    assert whole.resampler.history.epochs == [0, 1, 2, 3]
    assert whole.state.epoch == 4.0
    # The learning rate falls from where an epoch of the four leaves it, to the end.
    total = 4 * per_epoch
    expected = [5e-3 * (1 - step / total) for step in range(per_epoch, total)]
    assert rates(whole)[STEPS_PER_EPOCH:] == pytest.approx(expected)
    at = STEPS_PER_EPOCH + per_epoch + 1
    again = trained(str(tmp_path / f"checkpoint-{at}"), **args)
    assert again.state.global_step == whole.state.global_step
    assert rates(again) == rates(whole)
    assert runs.losses(again) == runs.losses(whole)
    assert runs.largest_difference(again, whole) == 0.0


def test_inside_an_epoch_and_under_max_steps_other_batches_are_refused(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        runs.trained(
            RejectionSamplingTrainer, tmp_path, args=settings, resampler=LossResampler(),
            callbacks=[KillAfter(STEPS_PER_EPOCH)],
        )  # fmt: skip
    for step, args in ((STEPS_PER_EPOCH - 1, {}), (STEPS_PER_EPOCH, {"max_steps": 20})):
        with pytest.raises(ValueError, match="rows per micro-batch and process: 4 in the checkpoint, 2 now"):
            runs.trained(
                RejectionSamplingTrainer, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"),
                args={**settings, "per_device_train_batch_size": 2, **args}, resampler=LossResampler(),
            )  # fmt: skip


@pytest.mark.parametrize("name", ["weighted", "progress"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from rsft_hf import checkpointing

    args, save_file, calls = {"save_strategy": "steps", "save_steps": 3}, checkpointing.save_file, []
    whole = runs.trained(RejectionSamplingTrainer, tmp_path / "whole", args=args, resampler=LossResampler())

    def failing(tensors, path):
        calls.append(path)
        if Path(path).stem == name and len(calls) > 4:
            Path(path).write_bytes(b"cut off")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_file", failing)
        with pytest.raises(OSError, match="No space left on device"):
            runs.trained(RejectionSamplingTrainer, tmp_path / "cut", args=args, resampler=LossResampler())
    cut = runs.trained(RejectionSamplingTrainer, tmp_path / "cut", args=args, resume=True, resampler=LossResampler())
    assert runs.largest_difference(whole, cut) == 0.0
    assert runs.losses(whole) == runs.losses(cut)


def vision_run(folder: Path, resume: str | None = None, **args) -> RejectionSamplingTrainer:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=4, patch_size=2, **size))
    rows = [{"pixel_values": torch.randn(3, 4, 4), "labels": number % 2} for number in range(16)]
    made = RejectionSamplingTrainer(
        model, runs.arguments(folder, **args), train_dataset=rows, eval_dataset=rows, resampler=LossResampler()
    )
    made.train(resume_from_checkpoint=resume)
    return made


def test_weights_that_transformers_saves_under_other_names_are_resumed_and_the_best_are_loaded(tmp_path: Path) -> None:
    settings = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch", "learning_rate": 0.05}
    whole = vision_run(tmp_path / "whole", **settings)
    cut = vision_run(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-4"), **settings)
    assert runs.largest_difference(whole, cut) == 0.0
    best = vision_run(tmp_path / "best", load_best_model_at_end=True, greater_is_better=True, **settings,
                      metric_for_best_model="eval_loss")  # fmt: skip
    lines = {line["step"]: line["eval_loss"] for line in best.state.log_history if "eval_loss" in line}
    assert best.evaluate()["eval_loss"] == pytest.approx(max(lines.values()), rel=1e-5)
    assert best.state.best_global_step == 4 != max(lines)


class HeadAlone(RejectionSamplingTrainer):
    """Saves what is trained, and nothing else."""

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(exist_ok=True)
        kept = {name: values for name, values in self.model.state_dict().items() if name.startswith("classifier")}
        save_file(kept, Path(output_dir) / "model.safetensors")


def test_a_checkpoint_of_some_weights_is_taken_as_it_is(tmp_path: Path) -> None:
    def frozen() -> hf.PreTrainedModel:
        model = runs.bert()
        model.bert.requires_grad_(False)
        return model

    settings = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    keywords = {"args": settings | {"load_best_model_at_end": True}, "eval_dataset": runs.rows()}
    whole = runs.trained(HeadAlone, tmp_path, model=frozen(), **keywords)
    checkpoint = str(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}")
    cut = runs.trained(HeadAlone, tmp_path, resume=checkpoint, model=frozen(), **keywords)
    assert runs.largest_difference(whole, cut) == 0.0


def test_weights_under_other_names_keep_their_precision_and_a_head_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=4, patch_size=2, **size))
    model.vit.bfloat16()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 2))
    model.save_pretrained(tmp_path)
    expected = {name: values.clone() for name, values in model.state_dict().items()}
    with torch.no_grad():
        for values in model.parameters():
            values.zero_()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)  # as Trainer does
    assert load_renamed_weights(model, tmp_path) == []
    assert all(torch.equal(values, expected[name]) for name, values in model.state_dict().items())
    (tmp_path / "other").mkdir()
    save_file({"other": torch.zeros(1)}, tmp_path / "other" / "model.safetensors")
    assert load_renamed_weights(model, tmp_path / "other")
