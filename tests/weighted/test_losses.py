"""Per-example losses against a slow oracle (a batch of one through plain Trainer) for every model of the zoo."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import runs
import zoo
from rsft_hf import (
    LossResampler,
    Proportional,
    RejectionSamplingMixin,
    RejectionSamplingTrainer,
    Tempered,
    measure_losses,
)
from rsft_hf.weighted import Learnability, NotPerExampleError
from rsft_hf.weighted.criterion import CriterionCapture

CASES = {case.name: case for case in zoo.CASES}
READABLE = [name for name, case in CASES.items() if not case.is_in_batch]
# Batches of one, and why; every other model is read from its batches.
SLOW = {"mixtral_router_loss": "a term", "bert_question_answering": "the padding"}


def test_the_zoo_is_whole() -> None:
    assert len(CASES) == len(zoo.CASES) == 26
    assert len(READABLE) == 25
    assert set(SLOW) <= set(READABLE)


@pytest.mark.parametrize("name", READABLE)
def test_measured_losses_are_batch_of_one_losses(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    expected = torch.tensor(case.batch_of_one_losses(tmp_path / "oracle"), dtype=torch.float64)
    expected[list(case.unlabelled)] = float("nan")
    assert len(set(expected.tolist())) > 3  # equal losses would hide a wrong order
    measured = measure_losses(case.trainer(tmp_path), batch_size=3).losses
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    reasons = [record.message for record in caplog.records if "batch of its own" in record.message]
    assert [SLOW[name] in reason for reason in reasons] == ([True] if name in SLOW else [])


@pytest.mark.parametrize("name", [name for name in READABLE if name != "mixtral_router_loss"])
def test_a_training_step_fills_the_ledger_with_the_same_losses(tmp_path: Path, name: str) -> None:
    """At learning rate 0 and without dropout the ledger is the oracle; three steps of 3, 3 and 1 rows."""
    case = CASES[name]
    expected = torch.tensor(case.batch_of_one_losses(tmp_path / "oracle"), dtype=torch.float64)
    expected[list(case.unlabelled)] = float("nan")
    trainer = case.trainer(
        tmp_path,
        RejectionSamplingTrainer,
        {"learning_rate": 0.0, "num_train_epochs": 1},
        resampler=LossResampler(losses="training"),
    )
    trainer.train()
    trainer.resampler.source.ledger.merge(trainer.accelerator)
    losses = trainer.resampler.source.ledger.losses
    if name == "bert_question_answering":  # what the row cost in its batch, whose padding was in the softmax
        assert (losses > 0).all()
        assert not torch.allclose(losses, expected, rtol=1e-3)
    else:
        torch.testing.assert_close(losses, expected, rtol=2e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(losses.isnan(), trainer.resampler.source.ledger.is_unlabelled)


def test_a_contrastive_loss_is_refused(tmp_path: Path) -> None:
    case = next(case for case in zoo.CASES if case.is_in_batch)
    with pytest.raises(NotPerExampleError, match="compares the examples of a batch with each other"):
        measure_losses(case.trainer(tmp_path))


def test_a_loss_with_a_term_of_the_batch_is_refused_by_the_ledger(tmp_path: Path) -> None:
    resampler = LossResampler(losses="training")
    trainer = CASES["mixtral_router_loss"].trainer(tmp_path, RejectionSamplingTrainer, resampler=resampler)
    with pytest.raises(ValueError, match=r'losses="training" needs losses that can be read from the training step'):
        trainer.train()
    assert trainer.state.global_step == 0


def test_unlabelled_rows_are_excluded_and_counted(tmp_path: Path) -> None:
    case = CASES["bert_without_labels"]
    assert case.unlabelled
    options = {"num_train_epochs": 2, "logging_steps": 1}
    trainer = case.trainer(tmp_path, RejectionSamplingTrainer, options, resampler=LossResampler(Proportional()))
    trainer.train()
    table = trainer.resampler.table().to_pandas()
    assert table[table["row"].isin(case.unlabelled)]["count"].sum() == 0
    line = next(line for line in trainer.state.log_history if "resampling/excluded_rows" in line)
    assert line["resampling/excluded_rows"] == len(case.unlabelled)


class Silent(torch.nn.Module):
    """Model that computes its loss without a criterion, so that the losses of the rows cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(50, 2)

    def forward(self, input_ids, attention_mask, labels):
        logits = (self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
        log_p = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1))
        return {"loss": -log_p.mean(), "logits": logits}


def by_hand(outputs, labels) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"], labels, reduction="none")


@pytest.mark.parametrize("source", ["forward", "training"])
def test_per_example_loss_serves_what_cannot_be_read(tmp_path: Path, source: str) -> None:
    resampler = LossResampler(losses=source, per_example_loss=by_hand)
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, model=Silent(), resampler=resampler)
    last = trainer.resampler.history.table().to_pandas().query("epoch == 2")["loss"]
    assert last.between(0, 20).all()
    assert last.nunique() > 10


def test_a_loss_computed_by_hand_is_scored_in_batches_of_one(tmp_path: Path) -> None:
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, model=Silent())
    assert trainer.resampler.source._reading.kind == "single"
    with pytest.raises(ValueError, match='losses="training" needs losses that can be read'):
        runs.trained(RejectionSamplingTrainer, tmp_path, model=Silent(), resampler=LossResampler(losses="training"))


def test_per_example_loss_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    resampler = LossResampler(per_example_loss=lambda outputs, labels: by_hand(outputs, labels).mean())
    with pytest.raises(ValueError, match=r"`per_example_loss` returned shape \(\) for \d+ examples"):
        runs.trained(RejectionSamplingTrainer, tmp_path, resampler=resampler)


def test_a_ledger_that_captures_nothing_raises(tmp_path: Path) -> None:
    """The probe intercepts a criterion, the training step none, as with a model compiled in between."""

    class Changes(Silent):
        def forward(self, input_ids, attention_mask, labels):
            outputs = super().forward(input_ids, attention_mask, labels)
            if not self.training:
                outputs["loss"] = F.cross_entropy(outputs["logits"], labels)
            return outputs

    with pytest.raises(RuntimeError, match="captured nothing in a step of 4 rows"):
        runs.trained(RejectionSamplingTrainer, tmp_path, model=Changes(), resampler=LossResampler(losses="training"))


def test_a_nan_loss_names_its_row(tmp_path: Path) -> None:
    data = [{**row, "labels": float(row["labels"])} for row in runs.rows()]
    data[11]["attention_mask"] = [float("inf")] * len(data[11]["input_ids"])
    with pytest.raises(ValueError, match="Row 11 of the training set has loss nan"):
        runs.trained(
            RejectionSamplingTrainer,
            tmp_path,
            model=Silent(),
            train_dataset=[{**row, "labels": int(row["labels"])} for row in data],
            resampler=LossResampler(per_example_loss=by_hand),
        )


def test_out_of_memory_halves_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Small(hf.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, labels):
            if len(input_ids) > 4:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model = Small(runs.bert().config)
    plain = runs.bert()
    model.load_state_dict(plain.state_dict())

    def measure(model) -> torch.Tensor:
        trainer = hf.Trainer(model, runs.arguments(tmp_path), runs.collate, runs.rows())
        return measure_losses(trainer, batch_size=16).losses

    torch.testing.assert_close(measure(model), measure(plain), rtol=1e-6, atol=1e-6)
    assert [record.message for record in caplog.records if "Out of memory" in record.message] == [
        "Out of memory with 16 rows in one batch; continuing with 8.",
        "Out of memory with 8 rows in one batch; continuing with 4.",
    ]


def test_full_correction_leaves_equal_weights_alone(tmp_path: Path) -> None:
    """Equal weights give c_i = 1: the corrected run is the uncorrected one, up to the order of a sum."""
    one = runs.trained(
        RejectionSamplingTrainer,
        tmp_path,
        resampler=LossResampler(Tempered(0.0), importance_correction=1.0),
    )
    other = runs.trained(hf.Trainer, tmp_path)
    assert runs.largest_difference(one, other) < 1e-4


CORRECTED = {
    "bert_single_label": "rows",
    "bert_label_smoothing": "rows",
    "llama_lm": "tokens of the window",
    "gpt2_lm": "tokens of the window",
    "llama_label_smoothing": "tokens of the window",
    "bert_token_classification": "tokens of the batch",
}


@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_losses_of_an_accumulation_window_are_those_worked_by_hand(tmp_path: Path, name: str) -> None:
    """Six draws at learning rate 0, with factors c, tokens n and losses l of each row.

    Rows that count alike: mean of c l. Tokens: sum c n l / sum c n, over a window of two micro-batches if Trainer
    counts its items, over the batch if the model divides.
    """
    case = CASES[name]
    alone = torch.tensor(case.batch_of_one_losses(tmp_path / "oracle"))
    resampler = LossResampler(Tempered(2.0), num_draws=6, importance_correction=1.0)
    sizes = (3, 2) if CORRECTED[name] == "tokens of the window" else (6, 1)
    args = {"learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 1}
    args |= dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), sizes, strict=True))
    trainer = case.trainer(tmp_path, RejectionSamplingTrainer, args, resampler=resampler)
    trainer.train()
    rows = trainer._sampler.indices
    assert len(set(rows.tolist())) > 2
    factors = resampler._row_factors[rows]
    assert float(factors.max() / factors.min()) > 1.2
    counts = torch.ones(6)
    if CORRECTED[name] != "rows":
        shift = 0 if name == "bert_token_classification" else 1
        labels = [trainer.data_collator([trainer.train_dataset[row]])["labels"][..., shift:] for row in rows.tolist()]
        counts = torch.tensor([float(values.ne(-100).sum()) for values in labels])
        assert len(set(counts.tolist())) > 1
    weighted, denominators = factors * counts * alone[rows], (factors if len(set(counts.tolist())) > 1 else 1) * counts
    expected = weighted.sum() / denominators.sum()
    assert runs.losses(trainer)[0] == pytest.approx(float(expected), rel=1e-4)


def test_correction_refuses_a_sum_over_tokens_that_another_number_divides() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, 3], [1, -100, -100]])
    loss = lambda: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")  # noqa: E731
    message = "divided by a number other than Trainer's `num_items_in_batch`"
    with pytest.raises(RuntimeError, match=message), CriterionCapture(2, torch.tensor([2.0, 0.5])):
        loss()
    with CriterionCapture(2, torch.tensor([2.0, 0.5]), is_count_weighted=True):
        corrected = loss()
    single = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(2, 3).sum(1)
    assert float(corrected) == pytest.approx(float(2 * single[0] + 0.5 * single[1]), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "is_from_training", "correction"),
    [("llama_lm", True, 1.0), ("focal", True, 0.0), ("mixtral_router_loss", False, 0.0), ("wav2vec2_ctc", True, 1.0)],
)
def test_the_safe_rule_takes_what_the_loss_allows(tmp_path, name, is_from_training, correction, caplog) -> None:
    args = {"num_train_epochs": 3, "save_strategy": "epoch"}
    trainer = CASES[name].trainer(tmp_path / "whole", RejectionSamplingTrainer, args)
    trainer.train()
    source = trainer.resampler.source
    assert (source.is_from_training, source.importance_correction) == (is_from_training, correction)
    warnings = [record.message for record in caplog.records if "cannot be corrected for the draws" in record.message]
    assert len(warnings) == (correction == 0)
    table = trainer.resampler.table().to_pandas()
    assert table[table["epoch"] == 2]["weight"].nunique() > 1
    resumed = CASES[name].trainer(tmp_path / "cut", RejectionSamplingTrainer, args)
    resumed.train(resume_from_checkpoint=str(sorted((tmp_path / "whole").glob("checkpoint-*"))[0]))
    # transformers loads Mixtral's experts under other names, so that plain Trainer resumes it inexactly, too.
    assert runs.largest_difference(trainer, resumed) <= (1e-3 if name == "mixtral_router_loss" else 0.0)
    source = resumed.resampler.source
    assert (source.is_from_training, source.importance_correction) == (is_from_training, correction)


def test_a_training_step_that_hides_its_loss_is_named(tmp_path: Path) -> None:
    class Old(hf.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    class New(RejectionSamplingMixin, Old):
        pass

    with pytest.raises(RuntimeError, match="saw it 0 times"):
        runs.trained(New, tmp_path, resampler=LossResampler(losses="training"))


def test_a_term_that_appears_later_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A penalty on the distance from the start is zero before the first step, and a term of the batch after it."""

    class Anchored(hf.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, labels):
            outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            outputs["loss"] = outputs["loss"] + 10 * (self.classifier.weight - self.start).pow(2).sum()
            return outputs

    model = Anchored(runs.bert().config)
    model.start = model.classifier.weight.detach().clone()
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, model=model)
    assert trainer.resampler.source._reading.kind == "single"
    assert sum("a term of the loss appeared" in record.message for record in caplog.records) == 1


def test_importance_correction_makes_the_gradient_unbiased() -> None:
    """Rows that count alike: the mean of c_i L_i: worked by hand on two rows with c = (2, 2/3)."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    single = F.cross_entropy(logits, labels, reduction="none")  # (ln(1 + 1/e), ln(1 + e)) = (.3133, 1.3133)
    with CriterionCapture(2, torch.tensor([2.0, 2.0 / 3.0])):
        loss = F.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx((2 * 0.3132617 + 2 / 3 * 1.3132617) / 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.autograd.grad((single * torch.tensor([2.0, 2.0 / 3.0])).mean(), logits)[0]
    torch.testing.assert_close(gradient, expected)


def test_a_question_that_is_ignored_has_no_margin_and_no_harm() -> None:
    """Question-answering heads ignore the index one beyond the last position."""
    logits, labels = torch.randn(3, 8), torch.tensor([1, 8, 2])
    with CriterionCapture(3) as capture:
        loss = F.cross_entropy(logits, labels, weight=torch.ones(8), ignore_index=8)
    assert torch.equal(loss, F.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    assert capture.calls[0].normalisers.tolist() == [1, 0, 1]


def test_corrected_means_weigh_their_denominator_too() -> None:
    """Two rows of class weights 1 and 9 with factors 2 and 2/3: sum c w l / sum c w = (2 l0 + 6 l1) / 8."""
    logits, labels, weight = torch.tensor([[1.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 1]), torch.tensor([1.0, 9.0])
    single = F.cross_entropy(logits, labels, reduction="none")
    with CriterionCapture(2, torch.tensor([2.0, 2.0 / 3.0])):
        loss = F.cross_entropy(logits, labels, weight=weight)
    assert loss.item() == pytest.approx(((2 * single[0] + 6 * single[1]) / 8).item())


UNLABELLED = [2, 5]


def weights_of_epoch(resampler: LossResampler, epoch: int) -> list[float]:
    return [line["weight"] for line in resampler.table() if line["epoch"] == epoch]


def test_rows_without_a_label_are_never_drawn(tmp_path):
    resampler = LossResampler(Proportional(), num_draws=40)
    CASES["bert_without_labels"].trainer(
        tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 1}, resampler=resampler
    ).train()
    counts = resampler.table()["count"][:]
    assert sum(counts) == 40
    assert [row for row, count in enumerate(counts) if count == 0] == UNLABELLED
    assert [row for row, weight in enumerate(weights_of_epoch(resampler, 0)) if weight == 0] == UNLABELLED
    assert resampler.metrics()["resampling/excluded_rows"] == 2


def test_learnability_takes_a_measured_reference_that_is_nan_where_there_is_no_label(tmp_path):
    case = CASES["bert_without_labels"]
    reference = measure_losses(case.trainer(tmp_path)).losses
    assert reference.isnan().nonzero().flatten().tolist() == UNLABELLED
    resampler = LossResampler(Learnability(reference - 1))
    case.trainer(tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 1}, resampler=resampler).train()
    # The model is the reference: every loss is 1 above, so the five rows with a label share the weight.
    expected = [0.0 if row in UNLABELLED else 0.2 for row in range(7)]
    assert torch.allclose(torch.tensor(weights_of_epoch(resampler, 0)), torch.tensor(expected), atol=1e-4)


class Hiding:
    """Collator that removes each label with probability .4, as random masking does to short rows."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.collate([{**row, "labels": -100} if torch.rand(()) < 0.4 else row for row in rows])


def test_a_row_whose_label_was_hidden_once_is_drawn_again(tmp_path):
    resampler = LossResampler(losses="training", num_draws=14)
    trainer = CASES["bert_single_label"].trainer(
        tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 4}, resampler=resampler
    )
    trainer.data_collator = Hiding(trainer.data_collator)
    trainer.train()
    assert bool(resampler.source.ledger.is_unlabelled.any())  # some label was hidden
    for epoch in range(4):
        assert min(weights_of_epoch(resampler, epoch)) > 0


def test_a_label_that_weighs_nothing_beside_others_has_no_margin():
    """The second of two questions has weight 0: it is not trained on. The only one of a row keeps its margin."""
    logits, labels = torch.tensor([[2.0, 3.0], [-1.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    with CriterionCapture(num_rows=2) as capture:
        F.binary_cross_entropy_with_logits(logits, labels, torch.tensor([1.0, 0.0]))
        F.binary_cross_entropy_with_logits(logits[:, :1], labels[:, :1], weight=torch.tensor([[0.0], [1.0]]))
    several, single = (call.choices.margins.tolist() for call in capture.calls)
    assert several == pytest.approx([2.0, math.nan, -1.0, math.nan], nan_ok=True)
    assert single == [2.0, -1.0]
