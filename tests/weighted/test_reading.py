"""Losses that a few rows alone would read wrongly: joined rows, weights, terms of training mode, losses of a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer, models
from torch import nn

import runs
import zoo
from rsft_hf import (
    LossResampler,
    Proportional,
    RejectionSamplingMixin,
    RejectionSamplingTrainer,
    measure_losses,
)
from rsft_hf.weighted import NotPerExampleError, reading


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


class Tagger(nn.Module):
    """Selects the labelled tokens of the whole batch before the criterion, as examples for NER once did."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 5)

    def forward(self, input_ids, labels, **inputs: Any):
        logits = self.head(self.words(input_ids))
        is_labelled = labels != -100
        return F.cross_entropy(logits[is_labelled], labels[is_labelled]), logits


def tagged(lengths: list[int]) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 50, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [word % 5 for word in row]} for row in ids]


@pytest.mark.parametrize("sizes", [(4, 1), (1, 8), (4, 8)], ids=str)
def test_rows_of_a_batch_that_lie_unevenly_are_not_split_evenly(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """The probed rows have four tokens, the others two or six: every batch of four could be split evenly."""
    lengths = [4 if number % 8 == 0 else (2, 6)[number % 2] for number in range(32)]
    data = tagged(lengths)
    args = {"per_device_train_batch_size": sizes[0], "per_device_eval_batch_size": sizes[1], "learning_rate": 0.0}
    trainer = runs.trained(
        RejectionSamplingTrainer, tmp_path, model=Tagger(), train_dataset=data, data_collator=runs.pad_tokens,
        args=args, resampler=LossResampler(),
    )  # fmt: skip
    found = trainer.resampler.table().to_pandas().query("epoch == 2")["loss"]
    expected = [float(trainer.model(**runs.pad_tokens([row]))[0].detach()) for row in data]
    torch.testing.assert_close(
        torch.tensor(found.values).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5
    )


class HardNegatives(hf.Trainer):
    """In-batch negatives, and one of each row's own, so that the loss does not vanish alone."""

    scale, penalty, is_hard = 1.0, 0.0, True

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs: Any):
        inputs.pop("labels")
        outputs = model(**inputs)
        left, right = outputs.logits.unbind(1)
        scores = torch.outer(left, right)
        scores = torch.cat((scores, -left[:, None]), 1) if self.is_hard else scores
        loss = -scores.log_softmax(1).diagonal().mean() * self.scale + self.penalty * model.classifier.weight.norm()
        return (loss, outputs) if return_outputs else loss


class Penalised(hf.Trainer):
    """The sum over the rows, and a penalty of the weights."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs: Any):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = -outputs.logits.log_softmax(1).gather(1, labels[:, None]).sum() + model.classifier.weight.square().sum()
        return (loss, outputs) if return_outputs else loss


def test_negatives_of_the_batch_are_refused_beside_those_of_the_row(tmp_path: Path) -> None:
    for values in ({}, {"scale": 0.5, "is_hard": False, "penalty": 0.5}):
        for size in (1, 4):
            made = type("Ours", (RejectionSamplingMixin, type("Base", (HardNegatives,), values)), {})
            args = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size}
            with pytest.raises(NotPerExampleError, match="compares the examples"):
                runs.trained(made, tmp_path, args=args, resampler=LossResampler())

    class Summed(RejectionSamplingMixin, Penalised): ...

    assert runs.trained(Summed, tmp_path, resampler=LossResampler(Proportional())).state.global_step == 21


def test_negatives_of_the_batch_are_found_where_batches_that_are_scored_have_one_row(tmp_path: Path) -> None:
    data = [row | {"input_ids": [word % zoo.VOCABULARY for word in row["input_ids"]]} for row in runs.rows()]
    keywords = {"model": zoo.InBatchContrastive(), "train_dataset": data, "resampler": LossResampler(Proportional())}
    with pytest.raises(NotPerExampleError, match="compares the examples"):
        runs.trained(RejectionSamplingTrainer, tmp_path, args={"per_device_eval_batch_size": 1}, **keywords)


class Boxes(nn.Module):
    """Reads the labels of each row as a mapping in a list, and another number of patches for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 1)

    def forward(self, patches, counts, labels: list[dict[str, torch.Tensor]]):
        found = [self.head(part).mean() for part in patches.split(counts.tolist())]
        losses = [(one - label["size"]).square().mean() for one, label in zip(found, labels, strict=True)]
        return torch.stack(losses).mean(), torch.stack(found)


@pytest.mark.parametrize("is_random", [False, True])
def test_batches_of_lists_and_of_patches_are_read_row_by_row(tmp_path: Path, is_random: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    data = [
        {"patches": torch.rand(1 + number % 3, 3, generator=generator), "size": float(number)} for number in range(12)
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        patches = torch.cat([row["patches"] for row in rows])
        noise = 1e-6 * torch.rand_like(patches) if is_random else 0.0
        labels = [{"size": torch.tensor(row["size"])} for row in rows]
        return {
            "patches": patches + noise,
            "counts": torch.tensor([len(row["patches"]) for row in rows]),
            "labels": labels,
        }

    trainer = runs.trained(
        RejectionSamplingTrainer, tmp_path, model=Boxes(), train_dataset=data, data_collator=collate,
        args={"remove_unused_columns": False, "learning_rate": 0.0}, resampler=LossResampler(),
    )  # fmt: skip
    found = trainer.resampler.table().to_pandas().query("epoch == 2")["loss"]
    expected = [float(trainer.model(**collate([row]))[0].detach()) for row in data]
    torch.testing.assert_close(
        torch.tensor(found.values).double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("name", "value", "match"), [("packing", True, "packed row"), ("lmbda", 0.5, "`lmbda`=0.5")])
def test_rows_that_are_no_examples_are_refused(tmp_path: Path, name: str, value: Any, match: str) -> None:
    args = runs.arguments(tmp_path)
    vars(args)[name] = value
    with pytest.raises(ValueError, match=match):
        runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=LossResampler())


class Noisy(hf.Trainer):
    """A loss of its own with dropout that is always on."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs: Any):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = F.dropout(outputs.logits, 0.5, training=True)
        loss = -logits.log_softmax(1).gather(1, labels[:, None]).mean()
        return (loss, outputs) if return_outputs else loss


class Norm(hf.Trainer):
    """The length of the vector of errors, which is no mean of its rows', and compares none of them."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs: Any):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.linalg.norm(outputs.logits[:, 0] - labels)
        return (loss, outputs) if return_outputs else loss


class OneRow(nn.Module):
    """Takes single rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 2)

    def forward(self, input_ids, attention_mask, labels):
        assert len(input_ids) == 1
        return {"loss": -self.words(input_ids).mean(1).log_softmax(1)[0, labels[0]]}


@pytest.mark.parametrize("base", [Noisy, Norm])
def test_random_losses_and_norms_are_no_comparison_of_rows(tmp_path: Path, base: type) -> None:
    class Ours(RejectionSamplingMixin, base): ...

    for size in (1, 4):
        args = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "num_train_epochs": 1}
        runs.trained(Ours, tmp_path, args=args, resampler=LossResampler(Proportional()))


def test_models_and_collators_that_take_no_copies_are_read_row_by_row(tmp_path: Path, monkeypatch) -> None:
    args = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "num_train_epochs": 2}
    runs.trained(RejectionSamplingTrainer, tmp_path, model=OneRow(), args=args, resampler=LossResampler(Proportional()))

    def distinct(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert len({tuple(row["input_ids"]) for row in examples}) == len(examples), "duplicate rows"
        return runs.collate(examples)

    runs.trained(RejectionSamplingTrainer, tmp_path, data_collator=distinct, args=args, resampler=LossResampler())

    def limited(trainer, model, batch, num_rows, **options):
        if num_rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(trainer, model, batch, num_rows, **options)

    whole = reading.compute_loss
    monkeypatch.setattr(reading, "compute_loss", limited)
    runs.trained(RejectionSamplingTrainer, tmp_path, args=args, resampler=LossResampler())


def test_masks_at_batch_size_1_are_no_comparison_of_rows(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({str(number): number for number in range(50)}, unk_token="0"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", mask_token="1")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in runs.rows()]
    args = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "num_train_epochs": 1}
    collator = hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    runs.trained(RejectionSamplingTrainer, tmp_path, model=model, train_dataset=data, data_collator=collator, args=args)


def test_a_loss_of_padding_is_found_where_the_probed_rows_are_of_one_length(tmp_path: Path, caplog) -> None:
    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(50, 2)

        def forward(self, input_ids, attention_mask, labels):
            logits = self.words(input_ids).mean(1)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    lengths = [8 if number % 8 == 0 else (3, 6)[number % 2] for number in range(32)]
    data = [{"input_ids": one["input_ids"], "attention_mask": [1] * len(one["input_ids"]), "labels": number % 2}
            for number, one in enumerate(tagged(lengths))]  # fmt: skip
    made = LossResampler(losses="training")
    runs.trained(RejectionSamplingTrainer, tmp_path, model=Unmasked(), train_dataset=data, resampler=made)
    assert made.source._reading.is_scored_singly
    assert "depends on the padding" in caplog.text
