"""Scoring and training batches of every type and size that a collator may return, against losses computed by hand."""

from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingMixin, RejectionSamplingTrainer, measure_losses
from rsft_hf.weighted.losses import slice_rows

NUM_ROWS, BATCH_SIZE = 10, 4
Result = namedtuple("Result", ["loss", "logits"])


class Linear(torch.nn.Module):
    """Linear classifier with the loss of its own; `outputs` makes the form of what it returns."""

    def __init__(self, outputs: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(3, 2)
        self.outputs = outputs

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if self.outputs is None:
            return logits
        return self.outputs(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(row % 2)} for row in range(NUM_ROWS)]


def expected(model: Linear) -> torch.Tensor:
    rows = examples()
    x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    return F.cross_entropy(model.layer(x), labels, reduction="none").detach().double()


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class TupleTrainer(hf.Trainer):
    """Trainer whose batches are pairs, as torch's `default_collate` returns them for a TensorDataset."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, labels = inputs
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        return (loss, logits) if return_outputs else loss


class ResampledTupleTrainer(RejectionSamplingMixin, TupleTrainer):
    pass


COLLATORS = {
    "dict": stacked,
    "user_dict": lambda rows: UserDict(stacked(rows)),
    "batch_encoding": lambda rows: hf.BatchEncoding(stacked(rows)),
    "batch_feature": lambda rows: hf.BatchFeature(stacked(rows)),
    "tuple": lambda rows: tuple(stacked(rows).values()),
    "list": lambda rows: list(stacked(rows).values()),
}
OUTPUTS = {"dict": dict, "model_output": hf.modeling_outputs.SequenceClassifierOutput, "named_tuple": Result}


def run_arguments(output_dir: Path, **overrides: Any) -> hf.TrainingArguments:
    defaults = {"num_train_epochs": 1, "learning_rate": 0.0, "per_device_train_batch_size": BATCH_SIZE}
    return runs.arguments(output_dir, **{**defaults, "remove_unused_columns": False, **overrides})


def losses_of_epoch(trainer: RejectionSamplingTrainer, epoch: int) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in trainer.resampler.table() if line["epoch"] == epoch]).double()


def test_every_form_is_tested() -> None:
    assert (len(COLLATORS), len(OUTPUTS)) == (6, 3)


@pytest.mark.parametrize("source", ["forward", "training"])
@pytest.mark.parametrize("form", COLLATORS)
def test_every_form_of_batch_is_measured_row_by_row(tmp_path: Path, form: str, source: str) -> None:
    is_sequence = form in ("tuple", "list")
    model = Linear(None if is_sequence else dict)
    trainer = (ResampledTupleTrainer if is_sequence else RejectionSamplingTrainer)(
        model=model,
        args=run_arguments(tmp_path, num_train_epochs=2),
        train_dataset=examples(),
        data_collator=COLLATORS[form],
        resampler=LossResampler(losses=source),
    )
    trainer.train()
    torch.testing.assert_close(losses_of_epoch(trainer, 1), expected(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_of_every_form_are_sliced_for_a_loss_function(tmp_path: Path, form: str) -> None:
    """A loss function outside of the model is called on one row of the outputs at a time."""

    def focal(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits if form != "dict" else outputs["logits"]
        log_probs = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        return (-((1 - log_probs.exp()) ** 2) * log_probs).mean()

    model = Linear(OUTPUTS[form])
    trainer = hf.Trainer(
        model=model,
        args=run_arguments(tmp_path),
        train_dataset=examples(),
        data_collator=stacked,
        compute_loss_func=focal,
    )
    probability = (-expected(model)).exp()  # of the label
    by_hand = (1 - probability) ** 2 * expected(model)
    torch.testing.assert_close(measure_losses(trainer).losses, by_hand, rtol=1e-5, atol=1e-6)


def test_slices_keep_their_type() -> None:
    tensor = torch.arange(4.0)
    for make in (hf.BatchEncoding, hf.BatchFeature, UserDict, dict):
        sliced = slice_rows(make({"x": tensor, "name": "other"}), 2, 4)
        assert type(sliced) is make
        assert (sliced["x"].tolist(), sliced["name"]) == ([2.0], "other")
    nested = slice_rows(Result(loss=torch.tensor(1.0), logits=(tensor, [tensor])), 1, 4)
    assert isinstance(nested, Result)
    assert nested.loss == 1.0  # no rows
    assert nested.logits[1][0].tolist() == [1.0]


def unpadded(num_rows: int = 6) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(1, 5 + row)), "labels": list(range(1, 5 + row))} for row in range(num_rows)]


@pytest.mark.parametrize("source", ["forward", "training"])
@pytest.mark.parametrize("eval_batch_size", [1, 8])
def test_rows_that_cannot_share_a_batch_are_read_in_batches_of_one(
    tmp_path: Path, source: str, eval_batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = hf.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = hf.GPT2LMHeadModel(config)
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": eval_batch_size}
    trainer = RejectionSamplingTrainer(
        model=model,
        args=run_arguments(tmp_path, num_train_epochs=2, **sizes),
        train_dataset=unpadded(),
        resampler=LossResampler(Proportional(), losses=source),
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        alone = [float(model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss) for row in unpadded()]
    torch.testing.assert_close(losses_of_epoch(trainer, 1).tolist(), alone, rtol=1e-5, atol=1e-5)
    warnings = [record.message for record in caplog.records if "cannot be collated" in record.message]
    assert bool(warnings) == (eval_batch_size == 8 and source == "forward")


class SingleRow(torch.nn.Module):
    """Linear regression that reads one row, of shape (1, 1), and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels=None):
        outputs = self.layer(x.reshape(1, -1))
        return {"loss": F.mse_loss(outputs, labels.reshape(1, -1)), "logits": outputs}


@pytest.mark.parametrize("source", ["forward", "training"])
def test_a_model_that_reads_single_rows_is_scored_in_batches_of_one(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"x": [float(row)], "labels": [2.0 * row]} for row in range(6)]
    args = run_arguments(tmp_path, num_train_epochs=2, learning_rate=0.0, per_device_train_batch_size=1)
    trainer = RejectionSamplingTrainer(
        SingleRow(), args, train_dataset=rows, resampler=LossResampler(Proportional(), losses=source)
    )
    trainer.train()
    weight, bias = trainer.model.layer.weight.item(), trainer.model.layer.bias.item()
    by_hand = [(weight * row + bias - 2.0 * row) ** 2 for row in range(6)]
    torch.testing.assert_close(losses_of_epoch(trainer, 1).tolist(), by_hand, rtol=1e-5, atol=1e-5)
    warned = any("reads single rows but not 4 at once (mat1 and mat2 shapes" in one.message for one in caplog.records)
    assert warned == (source == "forward")


def test_an_error_of_the_collator_itself_is_not_hidden(tmp_path: Path) -> None:
    def broken(rows: list[Any]) -> Any:
        raise ValueError("the collator does not work")

    trainer = hf.Trainer(Linear(dict), run_arguments(tmp_path), broken, examples())
    with pytest.raises(ValueError, match="the collator does not work"):
        measure_losses(trainer)


class Diverge(hf.TrainerCallback):
    """Makes the weights infinite at the end of the first epoch."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        model.layer.weight.data.fill_(float("inf"))


@pytest.mark.parametrize("source", ["forward", "training"])
def test_a_diverged_model_is_named_and_no_row_is_blamed(tmp_path: Path, source: str) -> None:
    trainer = RejectionSamplingTrainer(
        model=Linear(dict),
        args=run_arguments(tmp_path, num_train_epochs=3),
        train_dataset=examples(),
        data_collator=stacked,
        resampler=LossResampler(losses=source),
        callbacks=[Diverge()],
    )
    with pytest.raises(ValueError, match=r"losses of all 10 measured rows .* the model has diverged"):
        trainer.train()


def test_masked_language_modelling_in_batch_encodings(tmp_path: Path) -> None:
    config = hf.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    rows = [{"input_ids": [2, *range(5, 9 + row % 3), 3]} for row in range(8)]

    def collate(batch: list[dict[str, list[int]]]) -> hf.BatchEncoding:
        width = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
        is_masked = (torch.rand(ids.shape) < 0.5) & (ids > 4)
        is_masked[:, 1] = True  # every row has a label
        inputs = {"input_ids": ids.masked_fill(is_masked, 4), "attention_mask": (ids > 0).long()}
        return hf.BatchEncoding({**inputs, "labels": ids.masked_fill(~is_masked, -100)})

    dataset = datasets.Dataset.from_list(rows)
    trainer = RejectionSamplingTrainer(
        model=hf.BertForMaskedLM(config), args=run_arguments(tmp_path), train_dataset=dataset, data_collator=collate,
        resampler=LossResampler(Proportional()),
    )  # fmt: skip
    trainer.train()
    losses = losses_of_epoch(trainer, 0)
    # ln 30 = 3.40 for an untrained model of 30 words.
    assert losses.isfinite().all()
    assert float(losses.mean()) == pytest.approx(3.4, abs=0.2)
