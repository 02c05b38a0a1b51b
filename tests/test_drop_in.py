"""Drop-in equality: with equal weights the trainers equal plain Trainer bit for bit, in rows, noise and parameters."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, TaskType, get_peft_model

import runs
import zoo
from rsft_hf import LossResampler, Proportional, RejectionSamplingSeq2SeqTrainer, RejectionSamplingTrainer, Tempered

EQUAL = Tempered(0.0)  # L ** 0


def lora_bert():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runs.SEED)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], lora_dropout=0.1)
        return get_peft_model(runs.bert(), config)


# transformers 5.24 renamed it.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in hf.TrainingArguments.__annotations__
)
SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "activation_checkpointing": {CHECKPOINTING: True},
    "two_workers": {"dataloader_num_workers": 2},
    "max_steps": {"max_steps": 17},
    "drop_last": {"dataloader_drop_last": True},
    "data_seed": {"data_seed": 3},
    "sequential": {"train_sampling_strategy": "sequential"},
    "split_batches": {"accelerator_config": {"split_batches": True}},
    "auto_find_batch_size": {"auto_find_batch_size": True, "num_train_epochs": 1.5},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
    "lora": {},
}


@pytest.mark.parametrize("source", ["forward", "training"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equal_weights_are_plain_trainer(tmp_path: Path, name: str, source: str) -> None:
    model = lora_bert if name == "lora" else runs.bert
    common = {"args": SETTINGS[name], "eval_dataset": runs.rows(10)}
    plain = runs.trained(hf.Trainer, tmp_path / "plain", model=model(), **common)
    resampler = LossResampler(EQUAL, losses=source)
    ours = runs.trained(RejectionSamplingTrainer, tmp_path / "ours", model=model(), resampler=resampler, **common)
    assert runs.losses(ours) == runs.losses(plain)
    assert runs.largest_difference(ours, plain) == 0.0
    assert len(runs.losses(plain)) >= 6  # three epochs really ran


@pytest.mark.parametrize("source", ["forward", "training"])
def test_equal_weights_are_plain_seq2seq_trainer(tmp_path: Path, source: str) -> None:
    case = next(case for case in zoo.CASES if case.name == "t5_seq2seq")
    args = hf.Seq2SeqTrainingArguments(
        str(tmp_path), num_train_epochs=3, logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no"
    )

    def train(trainer_class: type, **keywords) -> hf.Trainer:
        parts = case.build()
        return runs.trained(
            trainer_class,
            tmp_path,
            args=args,
            model=parts.model,
            train_dataset=parts.dataset,
            data_collator=parts.data_collator,
            **keywords,
        )

    plain = train(hf.Seq2SeqTrainer)
    ours = train(RejectionSamplingSeq2SeqTrainer, resampler=LossResampler(EQUAL, losses=source))
    assert runs.losses(ours) == runs.losses(plain)
    assert runs.largest_difference(ours, plain) == 0.0


def test_unequal_weights_are_not_plain_trainer(tmp_path: Path) -> None:
    """The comparison above can fail."""
    plain = runs.trained(hf.Trainer, tmp_path / "plain")
    ours = runs.trained(RejectionSamplingTrainer, tmp_path / "ours")
    assert runs.largest_difference(ours, plain) > 1e-3


def test_sequential_reads_accepted_rows_in_order(tmp_path: Path) -> None:
    trainer = runs.trained(
        RejectionSamplingTrainer,
        tmp_path,
        args={"train_sampling_strategy": "sequential"},
        resampler=LossResampler(Proportional()),
    )
    indices = trainer._progress.indices
    assert indices.tolist() == sorted(indices.tolist())
    assert len(set(indices.tolist())) < len(indices)  # rejection sampling repeats rows


def test_group_by_length_puts_like_lengths_together(tmp_path: Path) -> None:
    """Each batch of a mega-batch holds like lengths: fewer padding tokens than in the order of acceptance."""

    def padding(trainer: hf.Trainer, indices: list[int]) -> int:
        lengths = [len(trainer.train_dataset[row]["input_ids"]) for row in indices]
        batches = [lengths[start : start + 4] for start in range(0, len(lengths), 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    data = runs.rows(96)
    arms = {}
    for strategy in ("random", "group_by_length"):
        settings = {"train_sampling_strategy": strategy, "num_train_epochs": 1}
        trainer = runs.trained(RejectionSamplingTrainer, tmp_path / strategy, args=settings, train_dataset=data)
        indices = trainer._progress.indices.tolist()
        arms[strategy] = (sorted(indices), padding(trainer, indices))
    assert arms["random"][0] == arms["group_by_length"][0]  # the same rows are accepted
    assert arms["group_by_length"][1] < 0.7 * arms["random"][1]


def test_fewer_draws_shorten_the_epoch_and_the_schedule(tmp_path: Path) -> None:
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, resampler=LossResampler(num_draws=8))
    assert trainer.state.global_step == 3 * 2  # 8 draws in batches of 4, three epochs
    assert trainer.state.log_history[-2]["learning_rate"] < 1e-3  # the schedule came to its end
    assert trainer.state.log_history[-1]["train_samples_per_second"] > 0
    assert trainer.num_examples(trainer._train_loader) == 8


def test_higher_losses_are_read_more_often(tmp_path: Path) -> None:
    """20 epochs at learning rate 0: counts follow the losses, which never change."""
    args = {"num_train_epochs": 20, "learning_rate": 0.0, "logging_steps": 100}
    trainer = runs.trained(
        RejectionSamplingTrainer,
        tmp_path,
        args=args,
        model=runs.bert(0.0, initializer_range=0.5),
        resampler=LossResampler(Proportional()),
    )
    table = trainer.resampler.table().to_pandas()
    counts, weights = table.groupby("row")["count"].sum(), table.groupby("row")["weight"].mean()
    expected = weights * 20 * runs.NUM_ROWS
    # Counts vary less than a Poisson number of the same mean, whose standard deviation is the root of the mean.
    assert ((counts - expected).abs() < 4 * expected**0.5).all()
    assert counts.corr(expected) > 0.8


def test_figures_are_logged_once_per_epoch_with_the_first_loss(tmp_path: Path) -> None:
    for steps, where in ((1, "with a loss"), (1000, "alone")):
        trainer = runs.trained(
            RejectionSamplingTrainer, tmp_path, args={"logging_steps": steps}, resampler=LossResampler(Proportional())
        )
        lines = [line for line in trainer.state.log_history if "resampling/envelope_M" in line]
        assert len(lines) == 3
        assert all(("loss" in line) == (where == "with a loss") for line in lines)
        assert "train_runtime" in trainer.state.log_history[-1]  # where users look for it
        keys = {key.removeprefix("resampling/") for key in lines[0] if key.startswith("resampling/")}
        assert keys == {
            "envelope_M",
            "acceptance_rate",
            "effective_sample_size",
            "unique_fraction",
            "max_repeats",
            "mean_loss",
            "top_1_percent_share",
            "excluded_rows",
            "seconds",
            "overhead_fraction",
        }


def test_measuring_moves_no_generator_and_no_mode(tmp_path: Path) -> None:
    from rsft_hf import measure_losses

    trainer = RejectionSamplingTrainer(
        model=runs.bert(), args=runs.arguments(tmp_path), train_dataset=runs.rows(), data_collator=runs.collate
    )
    loader = trainer.get_train_dataloader()
    trainer.model.train()
    trainer.model.bert.pooler.eval()
    state = torch.get_rng_state()
    first = measure_losses(trainer, loader=loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    assert not trainer.model.bert.pooler.training
    second = measure_losses(trainer, loader=loader, batch_size=5)
    assert torch.allclose(first.losses, second.losses, atol=1e-6)
