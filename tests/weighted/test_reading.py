"""Losses that a few rows alone would read wrongly: joined rows, weights, terms of training mode, losses of a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import runs
from rsft_hf import (
    LossResampler,
    Proportional,
    RejectionSamplingMixin,
    RejectionSamplingTrainer,
    measure_losses,
)
from rsft_hf.weighted import NotPerExampleError


def language_model() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, max_position_embeddings=64))


@pytest.mark.parametrize("source", ["forward", "training", None])
def test_rows_joined_into_one_sequence_are_not_split_evenly(tmp_path: Path, source: str | None, caplog) -> None:
    """The probed rows have 8 tokens, the others 4 or 12, so that every batch divides by its number of rows."""
    generator = torch.Generator().manual_seed(1)
    lengths = [8 if number % 8 == 0 else (4, 12)[number % 2] for number in range(32)]
    data = [{"input_ids": torch.randint(5, 50, (length,), generator=generator).tolist()} for length in lengths]
    resampler = LossResampler(losses=source) if source else LossResampler()
    keywords = {"train_dataset": data, "data_collator": hf.DataCollatorWithFlattening(), "resampler": resampler}
    trainer = RejectionSamplingTrainer(language_model(), runs.arguments(tmp_path, num_train_epochs=2), **keywords)
    if source == "training":
        with pytest.raises(ValueError, match='losses="training" needs losses that can be read'):
            trainer.train()
        return
    expected = [float(trainer.model(**hf.DataCollatorWithFlattening()([row])).loss.detach()) for row in data]
    torch.testing.assert_close(measure_losses(trainer).losses.tolist(), expected, rtol=1e-4, atol=1e-5)
    assert trainer.train().global_step == 16
    assert not resampler.source.is_from_training
    assert "rows joined into one sequence" in caplog.text


class Weighted(hf.Trainer):
    """Weighs the rows outside of the criterion; of 26 rows the 8 with the number 3 modulo 3 weigh ten."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs: Any):
        labels, weights = inputs.pop("labels"), inputs.pop("row_weight")
        outputs = model(**inputs)
        loss = (weights * F.cross_entropy(outputs.logits, labels, reduction="none")).mean()
        return (loss, outputs) if return_outputs else loss


def collate_weighted(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return runs.collate(examples) | {"row_weight": torch.tensor([example["row_weight"] for example in examples])}


@pytest.mark.parametrize("resampler", [LossResampler(Proportional()), LossResampler()])
def test_weights_that_the_probed_rows_do_not_show_are_found(tmp_path: Path, resampler, caplog) -> None:
    class Ours(RejectionSamplingMixin, Weighted): ...

    data = [row | {"row_weight": 10.0 if number % 3 == 2 else 1.0} for number, row in enumerate(runs.rows())]
    for probed in (0, 6, 12, 18):
        data[probed]["row_weight"] = 1.0
    keywords = {"train_dataset": data, "data_collator": collate_weighted, "model": runs.bert(dropout=0.0)}
    args = {"learning_rate": 0.0, "remove_unused_columns": False}
    trainer = runs.trained(Ours, tmp_path, resampler=resampler, args=args, **keywords)
    assert trainer.resampler.source._reading.kind == "single"
    rows, weights = runs.collate(data), torch.tensor([row["row_weight"] for row in data])
    labels = rows.pop("labels")
    alone = weights * F.cross_entropy(trainer.model.eval()(**rows).logits, labels, reduction="none")
    last = trainer.resampler.table().to_pandas().query("epoch == 2")["loss"]
    torch.testing.assert_close(torch.tensor(last.values), alone.detach(), rtol=1e-4, atol=1e-5)
    said = [record.message for record in caplog.records if "each row is scored in a batch of its own" in record.message]
    assert len(said) == 1


class RDrop(RejectionSamplingMixin, hf.Trainer):
    """A second pass with other dropout and the distance of both, in training mode only (R-Drop)."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs: Any):
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training:
            again = model(**inputs)
            distance = F.kl_div(outputs.logits.log_softmax(-1), again.logits.softmax(-1), reduction="batchmean")
            loss = (loss + again.loss) / 2 + distance
        return (loss, outputs) if return_outputs else loss


def test_a_term_of_training_mode_is_not_corrected(tmp_path: Path, caplog) -> None:
    trainer = runs.trained(RDrop, tmp_path, resampler=LossResampler())
    source = trainer.resampler.source
    assert (source.is_from_training, source.importance_correction) == (False, 0.0)
    assert "training mode adds terms to them" in caplog.text


def test_a_term_of_training_mode_is_said_where_the_losses_were_asked_for(tmp_path: Path, caplog) -> None:
    runs.trained(RDrop, tmp_path, resampler=LossResampler(Proportional(), losses="training"))
    assert caplog.text.count("Training steps compute more losses of torch.nn.functional than batches") == 1


class InBatch(torch.nn.Module):
    """A loss of pairs of rows, as its kind says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.kind = torch.nn.Embedding(50, 8), kind

    def forward(self, input_ids, attention_mask, labels):
        points = F.normalize((self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(1), dim=1)
        is_same, is_self = labels[:, None] == labels[None], torch.eye(len(labels), dtype=torch.bool)
        distances = torch.cdist(points, points)
        if self.kind == "batch-hard triplet":
            nearest = (distances + distances.amax(1, keepdim=True) * is_same).amin(1)
            return {"loss": ((distances * (is_same & ~is_self)).amax(1) - nearest + 1).relu().mean()}
        log_p = (10 * points @ points.T).masked_fill(is_self, -1e9).log_softmax(1)  # supervised contrastive
        is_pair = is_same & ~is_self
        return {"loss": -((log_p * is_pair).sum(1) / is_pair.sum(1).clamp(min=1)).mean()}


@pytest.mark.parametrize("kind", ["batch-hard triplet", "supervised contrastive"])
@pytest.mark.parametrize("num_classes", [2, 26])
def test_losses_of_pairs_are_refused_without_a_criterion(tmp_path: Path, kind: str, num_classes: int) -> None:
    """Alone every row has the loss 1 or 0."""
    data = [row | {"labels": number % num_classes} for number, row in enumerate(runs.rows())]
    with pytest.raises(NotPerExampleError, match="not defined for one example"):
        runs.trained(RejectionSamplingTrainer, tmp_path, model=InBatch(kind), train_dataset=data)


def test_a_loss_function_may_need_the_number_of_labels(tmp_path: Path) -> None:
    def mean(outputs, labels, num_items_in_batch):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    keywords = {"args": {"learning_rate": 0.0, "num_train_epochs": 2}, "model": runs.bert(dropout=0.0)}
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, compute_loss_func=mean, **keywords)
    plain = measure_losses(hf.Trainer(runs.bert(), runs.arguments(tmp_path), runs.collate, runs.rows())).losses
    torch.testing.assert_close(trainer.resampler.source.ledger.losses, plain, rtol=1e-4, atol=1e-5)
    assert trainer.compute_loss_func is mean


def test_the_own_error_of_a_loss_function_stays(tmp_path: Path) -> None:
    def broken(outputs, labels, **kwargs):
        raise TypeError("no number")

    with pytest.raises(TypeError, match="no number"):
        runs.trained(RejectionSamplingTrainer, tmp_path, compute_loss_func=broken)
