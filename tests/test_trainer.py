"""Validation of the trainer: its arguments at construction, and before the first step the loader that is iterated."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

import generators
import runs
from generative_runs import CountingEngine, resampler
from rsft_hf import (
    LossResampler,
    Proportional,
    RejectionSamplingMixin,
    RejectionSamplingTrainer,
    Tempered,
    measure_losses,
)


def trainer(output_dir: Path, resampler: Any = None, **arguments: Any) -> RejectionSamplingTrainer:
    return RejectionSamplingTrainer(
        model=runs.bert(),
        args=runs.arguments(output_dir, **arguments),
        train_dataset=runs.rows(),
        data_collator=runs.collate,
        resampler=resampler,
    )


@pytest.mark.parametrize("resampler", [Proportional(), LossResampler, "loss"])
def test_what_is_no_resampler_is_refused(resampler, tmp_path):
    with pytest.raises(TypeError, match=r"`resampler` must be a Resampler object such as LossResampler\(\), got"):
        trainer(tmp_path, resampler)


SETTINGS = {
    "dispatch_batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        r"`dispatch_batches=True` lets the main process read every batch",
    ),
    "in_order": (
        {"dataloader_in_order": False, "dataloader_num_workers": 2},
        r"`dataloader_in_order=False` lets the workers hand over their batches as they finish them",
    ),
    "batch_rebalance": (
        {"train_sampling_strategy": "batch_rebalance"},
        r'`train_sampling_strategy="batch_rebalance"` fixes the batches for the whole run',
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_take_the_order_from_the_sampler_are_refused_at_construction(name, tmp_path):
    arguments, message = SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)


def test_settings_of_a_run_do_not_matter_without_training_rows(tmp_path):
    arguments = runs.arguments(tmp_path, **SETTINGS["dispatch_batches"][0])
    ours = RejectionSamplingTrainer(runs.bert(), arguments, runs.collate, eval_dataset=runs.rows())
    assert ours.evaluate()["eval_loss"] > 0
    ours.train_dataset = runs.rows()
    with pytest.raises(ValueError, match="`dispatch_batches=True` lets the main process"):
        ours.train()


@pytest.mark.parametrize("losses", ["forward", "training"])
def test_a_training_step_by_hand_is_that_of_trainer(tmp_path, losses):
    """Outside of train() a step belongs to no epoch: it is not observed, and changes no count."""
    ours, plain = trainer(tmp_path, LossResampler(losses=losses)), hf.Trainer(runs.bert(), runs.arguments(tmp_path))
    batch = runs.collate(runs.rows(4))
    found = []
    for one in (plain, ours):
        torch.manual_seed(0)
        found.append(one.training_step(one.model, dict(batch), 4).item())
    assert found[0] == found[1]
    ours.train()
    torch.manual_seed(0)
    ours.training_step(ours.model, dict(batch), 4)
    assert ours.resampler.table()[0]["epoch"] == 0


# Trainers that build their own loader or sampler: read by the loop, or refused by name.


def weighted_loader(self: hf.Trainer) -> DataLoader:
    """A loader of the trainer's own rows, the usual remedy for unbalanced classes."""
    weights = [1.0 + 9 * row["labels"] for row in runs.rows()]
    sampler = WeightedRandomSampler(weights, len(weights))
    return DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=self.data_collator)


def loader_of_the_sampler(self: hf.Trainer, is_prepared: bool = False) -> DataLoader:
    """A loader of its own that asks for the trainer's sampler."""
    sampler = self._get_train_sampler()
    loader = DataLoader(self.train_dataset, batch_size=4, sampler=sampler, collate_fn=self.data_collator)
    return self.accelerator.prepare(loader) if is_prepared else loader


class ReversedBatches(BatchSampler):
    """A batch sampler around the trainer's sampler, which turns every batch around."""

    def __iter__(self):
        return (batch[::-1] for batch in super().__iter__())


def loader_of_a_batch_sampler(self: hf.Trainer) -> DataLoader:
    batches = ReversedBatches(self._get_train_sampler(), batch_size=4, drop_last=False)
    return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


class OwnLoader(hf.Trainer):
    get_train_dataloader = weighted_loader


class Below(RejectionSamplingMixin, OwnLoader):
    pass


class Above(RejectionSamplingTrainer):
    get_train_dataloader = weighted_loader


class AboveWithSampler(RejectionSamplingTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> WeightedRandomSampler:
        return WeightedRandomSampler([1.0] * runs.NUM_ROWS, runs.NUM_ROWS)


class Bypassing(RejectionSamplingTrainer):
    """Keeps the sampler, and hands the rows to the loop in another order of its own."""

    def get_train_dataloader(self) -> DataLoader:
        super().get_train_dataloader()
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True, collate_fn=self.data_collator)


class SeveralLoaders:
    """The batches of several loaders, one after the other; it has no data set and no sampler."""

    def __init__(self, loaders: list[DataLoader]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self):
        for loader in self.loaders:
            yield from loader


class Twice(RejectionSamplingTrainer):
    def get_train_dataloader(self) -> SeveralLoaders:
        return SeveralLoaders([super().get_train_dataloader(), super().get_train_dataloader()])


OVERRIDES = {
    Twice: "Twice.get_train_dataloader",
    Below: "OwnLoader.get_train_dataloader",
    Above: "Above.get_train_dataloader",
    AboveWithSampler: "AboveWithSampler._get_train_sampler",
    Bypassing: "Bypassing.get_train_dataloader",
}


def test_a_loader_whose_batches_come_out_of_order_is_refused(tmp_path):
    class Hasty(RejectionSamplingTrainer):
        num_workers = 2

        def get_train_dataloader(self) -> DataLoader:
            sampler, workers = self._get_train_sampler(), {"num_workers": self.num_workers, "in_order": False}
            return DataLoader(self.train_dataset, 4, sampler=sampler, collate_fn=self.data_collator, **workers)

    with pytest.raises(ValueError, match="`in_order=False` of the training loader lets the workers hand over"):
        runs.trained(Hasty, tmp_path)
    Hasty.num_workers = 1  # one worker has one order
    runs.trained(Hasty, tmp_path, args={"dataloader_in_order": False, "num_train_epochs": 1})


@pytest.mark.parametrize("losses", ["forward", "training"])
@pytest.mark.parametrize("trainer_class", OVERRIDES)
def test_a_loader_that_ignores_the_draws_is_refused_by_name(tmp_path, trainer_class, losses):
    counter = runs.StepCounter()
    with pytest.raises(ValueError, match=f"would ignore the resampler; see .*{OVERRIDES[trainer_class]}"):
        runs.trained(trainer_class, tmp_path, resampler=LossResampler(losses=losses), callbacks=[counter])
    assert counter.num_steps == 0


SUPPORTED = {
    "loader": loader_of_the_sampler,
    "prepared": lambda self: loader_of_the_sampler(self, is_prepared=True),
    "batch_sampler": loader_of_a_batch_sampler,
}


@pytest.mark.parametrize("losses", ["forward", "training"])
@pytest.mark.parametrize("form", SUPPORTED)
def test_a_loader_of_its_own_may_read_the_draws(tmp_path, form, losses):
    """The rows that the loop reads are those of `table()`, and their losses are their own."""

    class Own(hf.Trainer):
        get_train_dataloader = SUPPORTED[form]

    seen: list[str] = []

    class Reads(RejectionSamplingMixin, Own):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend(str(row[row != 0].tolist()) for row in inputs["input_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    ours = runs.trained(
        Reads, tmp_path, model=runs.bert(dropout=0.0), resampler=LossResampler(losses=losses),
        args={"num_train_epochs": 2, "learning_rate": 0.0},
    )  # fmt: skip
    names = [str(row["input_ids"]) for row in runs.rows()]
    table = [line for line in ours.resampler.table() if line["epoch"] == 1]
    drawn = sorted(names[line["row"]] for line in table for _ in range(line["count"]))
    assert sorted(seen[runs.NUM_ROWS :]) == drawn
    with torch.no_grad():
        batch = runs.collate(runs.rows())
        expected = torch.nn.functional.cross_entropy(
            ours.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
            reduction="none",
        )
    measured = {line["row"]: line["loss"] for line in table if line["loss"] == line["loss"]}
    assert len(measured) == runs.NUM_ROWS
    for row, loss in measured.items():
        assert loss == pytest.approx(float(expected[row]), abs=1e-4)


def test_a_round_is_not_generated_for_a_loader_that_ignores_it(tmp_path):
    class Prompts(RejectionSamplingTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=2)

    engine = CountingEngine()
    made = Prompts(
        model=generators.tiny_model(),
        args=generators.arguments(tmp_path),
        train_dataset=generators.prompts(9),
        processing_class=generators.tokenizer(),
        resampler=resampler(engine=engine),
    )
    with pytest.raises(ValueError, match=r"would ignore the resampler; see .*Prompts.get_train_dataloader"):
        made.train()
    assert engine.calls == []


def test_a_trainer_of_another_library_with_batches_of_its_own_is_refused(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")

    class Ours(RejectionSamplingMixin, sentence_transformers.SentenceTransformerTrainer):
        pass

    class Words(torch.nn.Module):
        """Sums of word vectors, as a module of sentence-transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.vectors = torch.nn.Embedding(50, 4)

        def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[len(text) % 50] for text in texts])}

        def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
            return features | {"sentence_embedding": self.vectors(features["input_ids"]).sum(1)}

        def save(self, *args: Any, **kwargs: Any) -> None: ...

    rows = {
        "a": ["x" * n for n in range(1, 9)],
        "b": ["y" * n for n in range(1, 9)],
        "label": [0.1 * n for n in range(8)],
    }
    model = sentence_transformers.SentenceTransformer(modules=[Words()], device="cpu")
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    made = Ours(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=losses.CosineSimilarityLoss(model),
    )
    with pytest.raises(ValueError, match=r"would ignore the resampler; see sentence_transformers\..*get_batch_sampler"):
        made.train()


@pytest.mark.parametrize("is_above", [True, False])
def test_an_overridden_log_sees_every_line(tmp_path, is_above):
    seen: list[dict] = []

    class Logs:
        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            seen.append(dict(logs))

    if is_above:
        made = type("Above", (Logs, RejectionSamplingTrainer), {})
    else:
        made = type("Below", (RejectionSamplingMixin, type("Plain", (Logs, hf.Trainer), {})), {})
    # No line with a loss in the first epoch: the epoch's metrics come in a line of their own.
    ours = runs.trained(made, tmp_path, args={"num_train_epochs": 2, "logging_steps": 1000}, resampler=LossResampler())
    expected = ours.state.log_history[:-1]  # Trainer adds its total_flos to the last one
    assert sum("resampling/acceptance_rate" in line and "loss" not in line for line in expected) == 2
    assert [sorted(line.keys() - {"epoch", "step"}) for line in seen[:-1]] == [
        sorted(line.keys() - {"epoch", "step"}) for line in expected
    ]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_weights_that_no_checkpoint_holds_are_warned_of(tmp_path, caplog, is_frozen):
    """Marian's fixed positions, loaded as trainable."""
    folder = Path(__file__).parents[1] / "recipes" / "data" / "numbers" / "model"
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    name = "model.encoder.embed_positions.weight"
    for values in (model.get_parameter(name), model.get_parameter(name.replace("encoder", "decoder"))):
        values.requires_grad_(not is_frozen)
    before = model.get_parameter(name).detach().clone()
    rows = [{"input_ids": [5, 6, 0], "labels": [7, 8, 0]}] * 4
    args = runs.arguments(tmp_path, use_cpu=True, learning_rate=0.1)
    trainer = RejectionSamplingTrainer(model, args, train_dataset=rows, resampler=LossResampler(Tempered(0.0)))
    trainer.train()
    trainer.save_model()
    saved = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    is_trained = not torch.equal(before, trainer.model.get_parameter(name))  # older versions give them no gradient
    assert torch.equal(saved.get_parameter(name), trainer.model.get_parameter(name)) != is_trained
    assert not (is_trained and is_frozen)
    message = f"trains {name} and model.decoder.embed_positions.weight, which no checkpoint holds"
    assert (message in caplog.text) != is_frozen


class Questions(hf.Trainer):
    """Arguments in the order of transformers' examples of question answering."""

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix) | {"examples": eval_examples}

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix: str = "test"):
        return super().predict(predict_dataset, ignore_keys, metric_key_prefix), predict_examples


def test_arguments_of_another_evaluate_and_predict_arrive_where_they_belong(tmp_path):
    class Ours(RejectionSamplingMixin, Questions): ...

    args = runs.arguments(tmp_path, eval_strategy="epoch", num_train_epochs=1)
    keywords = {"train_dataset": runs.rows(), "eval_dataset": runs.rows(), "data_collator": runs.collate}
    made = Ours(runs.bert(), args, **keywords)
    made.train()
    found = made.evaluate(metric_key_prefix="x")
    assert found["examples"] is None
    assert "x_loss" in found
    assert not any(name.startswith("eval") for name in found)
    assert made.evaluate(runs.rows(), "examples", None, "y")["examples"] == "examples"
    output, examples = made.predict(predict_dataset=runs.rows(), predict_examples="examples", metric_key_prefix="z")
    assert examples == "examples"
    assert "z_loss" in output.metrics


def test_another_training_set_is_read_as_soon_as_it_is_given(tmp_path):
    made = trainer(tmp_path, LossResampler(Proportional()), num_train_epochs=1, learning_rate=0.0)
    made.train()
    flipped = [row | {"labels": 1 - row["labels"]} for row in runs.rows(30)]
    made.train_dataset = flipped
    plain = measure_losses(hf.Trainer(made.model, runs.arguments(tmp_path), runs.collate, flipped)).losses
    assert torch.equal(measure_losses(made).losses, plain)
    loader = made.get_train_dataloader()
    assert made.num_examples(loader) == len(loader.dataset) == 30
    made.train()
    assert made.resampler.num_rows == 30


class Averaging(torch.optim.SGD):
    """Has two modes, as schedule-free optimizers do: in one of them the weights are others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_training, self.seen = True, []

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)

    def _shift(self, is_training: bool):
        if is_training != self.is_training:
            for group in self.param_groups:
                for values in group["params"]:
                    values.data.add_(0.01 if is_training else -0.01)
        self.is_training = is_training


def test_evaluation_between_the_epochs_changes_no_draw_of_a_schedule_free_run(tmp_path):
    histories = []
    for strategy in ("no", "epoch"):
        args = runs.arguments(tmp_path / strategy, eval_strategy=strategy)
        made = RejectionSamplingTrainer(
            runs.bert(dropout=0.0), args, optimizer_cls_and_kwargs=(Averaging, {"lr": 0.05}), train_dataset=runs.rows(),
            eval_dataset=runs.rows(8), data_collator=runs.collate, resampler=LossResampler(Proportional()),
        )  # fmt: skip
        made.train()
        histories.append(made.resampler.table().to_pandas())
    assert (histories[0]["count"] == histories[1]["count"]).all()
    assert (histories[0]["loss"] - histories[1]["loss"]).abs().max() < 1e-5


def test_held_out_prompts_are_answered_in_the_mode_that_is_saved(tmp_path):
    prompts = generators.prompts(4)
    made = RejectionSamplingTrainer(
        generators.tiny_model(), generators.arguments(tmp_path, num_train_epochs=1),
        optimizer_cls_and_kwargs=(Averaging, {"lr": 0.05}), train_dataset=prompts, eval_dataset=prompts,
        processing_class=generators.tokenizer(), resampler=resampler(),
    )  # fmt: skip
    made.train()
    assert made.optimizer.optimizer.is_training
    made.evaluate()
    assert not made.optimizer.optimizer.is_training
