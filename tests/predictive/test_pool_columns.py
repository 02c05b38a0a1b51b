"""What unlabelled rows bring along: padding, columns, names of classes, true labels; and what teachers do."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf

import runs
from predictive_runs import POOL, logged, resampler, token_rows, token_trainer, trained
from rsft_hf.predictive import Agreement, PredictionResampler, Teacher, load_pseudo_labels


def test_padding_of_the_pool_is_no_unit(tmp_path: Path) -> None:
    pool = token_rows(50, with_labels=False)[40:]
    padded = [{name: one + [0] * (12 - len(one)) for name, one in row.items()} for row in pool]
    marked = [row | {"special_tokens_mask": [1] + [0] * 11} for row in padded]
    for number, (rows, num_special) in enumerate(((padded, 0), (marked, 1))):
        made = PredictionResampler(rows, warmup_epochs=1, accepts_tokens=True)
        token_trainer(tmp_path / str(number), made, num_train_epochs=2).train()
        stored = load_pseudo_labels(tmp_path / str(number), only_accepted=False)
        assert [len(label) for label in stored["label"]] == [len(row["input_ids"]) - num_special for row in pool]


def test_a_collator_that_cuts_tokens_stops_the_run_with_a_reason(tmp_path: Path) -> None:
    trainer = token_trainer(tmp_path, PredictionResampler(token_rows(50, with_labels=False)[40:], warmup_epochs=0))
    whole = trainer.data_collator
    trainer.data_collator = lambda rows: whole([{name: one[:5] for name, one in row.items()} for row in rows])
    with pytest.raises(ValueError, match=r"Unlabelled row \d+ has \d+ tokens to label, and predictions of 5"):
        trainer.train()


def test_accuracy_of_nothing_is_not_logged(tmp_path: Path) -> None:
    trainer = trained(tmp_path, resampler(min_confidence=1.0))
    assert logged(trainer, "accuracy") == logged(trainer, "accepted_calibration_error") == []
    assert logged(trainer, "wrong") == [0, 0]


def test_a_mask_of_doubtful_rows_names_those_that_it_marks() -> None:
    mask = torch.tensor([number in (4, 9) for number in range(26)])
    for given in (mask, mask.numpy(), mask.tolist(), [9, 4, 4], torch.tensor([4, 9])):
        assert resampler(doubtful_rows=given).doubtful_rows == (4, 9)
    for given in ([4.7], torch.tensor([0.5]), ["4"], [True, 3]):
        with pytest.raises(TypeError, match="`doubtful_rows` holds"):
            resampler(doubtful_rows=given)


def named(first: str, second: str) -> hf.PreTrainedModel:
    model = runs.bert(dropout=0.0, initializer_range=0.5)
    model.config.id2label, model.config.label2id = {0: first, 1: second}, {first: 0, second: 1}
    return model


def test_classes_of_a_teacher_and_of_references_are_those_of_the_same_names(tmp_path: Path) -> None:
    teacher = named("no", "yes")
    with torch.no_grad():
        head = teacher.classifier
        head.weight.copy_(head.weight.flip(0)), head.bias.copy_(head.bias.flip(0))
    keywords = {"args": {"learning_rate": 0.0, "num_train_epochs": 2}}
    made = resampler(target=Teacher(teacher), warmup_epochs=0)
    trained(tmp_path / "same", made, model=named("yes", "no"), **keywords)
    assert logged(made.trainer, "acceptance_rate")[0] == 1.0  # the same model, with its classes the other way round
    made = resampler(target=Teacher(named("yes", "maybe")), warmup_epochs=0)
    with pytest.raises(ValueError, match=r"has the classes \['yes', 'no'\], and the teacher \['yes', 'maybe'\]"):
        trained(tmp_path / "other", made, model=named("yes", "no"), **keywords)
    rows = datasets.Dataset.from_list(runs.rows()).cast_column("labels", datasets.ClassLabel(names=["even", "odd"]))
    found = []
    for names, flips in ((["even", "odd"], 0), (["odd", "even"], 1)):
        pool = datasets.Dataset.from_list([row | {"truth": abs(flips - row["truth"])} for row in POOL])
        made = resampler(unlabelled_dataset=pool.cast_column("truth", datasets.ClassLabel(names=names)))
        found.append(logged(trained(tmp_path / names[0], made, train_dataset=rows), "accuracy"))
    assert found[0] == found[1]


def test_references_of_text_are_refused(tmp_path: Path) -> None:
    pool = [row | {"truth": "even"} for row in POOL]
    with pytest.raises(ValueError, match=r"has 'even' in `reference_column`='truth'. Give the numbers"):
        trained(tmp_path, resampler(unlabelled_dataset=pool))


def test_columns_of_the_model_that_only_the_pool_has_are_refused(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert len({frozenset(row) for row in rows}) == 1
        return runs.collate(rows)

    noted = [row | {"note": "x"} for row in POOL]  # no input of the model: left out
    args = {"remove_unused_columns": False}
    trained(tmp_path, resampler(unlabelled_dataset=noted), data_collator=collate, args=args)
    pool = [row | {"token_type_ids": [0] * len(row["input_ids"])} for row in POOL]
    with pytest.raises(ValueError, match=r"has the columns \['token_type_ids'\], which the model reads"):
        trained(tmp_path, resampler(unlabelled_dataset=pool))


def test_agreement_sees_dropout_that_a_model_calls_as_a_function(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.3, "num_labels": 2}
    torch.manual_seed(0)
    model = hf.BartForSequenceClassification(
        hf.BartConfig(vocab_size=50, max_position_embeddings=32, eos_token_id=2, pad_token_id=0, **sizes, **heads)
    )

    def end(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = [[*row["input_ids"], 2] for row in rows]
        return [row | {"input_ids": one, "attention_mask": [1] * len(one)} for row, one in zip(rows, ids, strict=True)]

    made = PredictionResampler(end(POOL), Agreement(4), warmup_epochs=0)
    trainer = trained(tmp_path, made, model=model, train_dataset=end(runs.rows()), args={"num_train_epochs": 1})
    assert logged(trainer, "acceptance_rate")[0] < 1.0
