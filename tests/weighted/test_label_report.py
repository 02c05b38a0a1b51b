"""Label reports: error probabilities, margins of the training steps, tables, dropping and relabelling."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from accelerate import Accelerator

import runs
from rsft_hf import LossResampler, Proportional, RejectionSamplingTrainer, Tempered
from rsft_hf.weighted import LabelReport
from rsft_hf.weighted.criterion import Choices
from rsft_hf.weighted.label_errors import evidence, learning
from rsft_hf.weighted.label_margins import LabelMargins
from rsft_hf.weighted.labels import stored_labels

CPU = Accelerator(cpu=True)


def choices(labels: list[int], rivals: list[int], margins: list[float]) -> Choices:
    return Choices(torch.tensor(labels), torch.tensor(rivals), torch.tensor(margins))


def test_margins_by_hand():
    """Rows of 1, 0, 2 labels; row 2 is drawn twice in the second batch, once with its second label lower."""
    margins = LabelMargins(lambda: torch.tensor([1, 0, 2]))
    everything = torch.ones(4, dtype=torch.bool)
    margins.record(
        [2, 0], choices([3, 4, 7, 0], [1, 1, 2, 0], [1.0, 2.0, -1.0, 9.0]), everything & (torch.arange(4) < 3)
    )
    margins.record([2, 2], choices([3, 4, 3, 4], [5, 6, 7, 8], [2.0, -3.0, 0.5, math.inf]), everything)
    margins.end_epoch(CPU)
    ((means, rivals),) = margins.epochs
    assert means.tolist() == pytest.approx([-1, 3.5 / 3, -1 / 2])
    assert margins.labels.tolist() == [7, 3, 4]
    assert rivals.tolist() == [2, 7, 6]
    margins.record([0], choices([7], [5], [4.0]), everything[:1])
    margins.end_epoch(CPU)
    assert [str(mean) for mean in margins.epochs[1][0].tolist()] == ["4.0", "nan", "nan"]
    assert margins.labels.tolist() == [7, 3, 4]


def margins_of(epochs: list[list[float]], labels: list[int]) -> LabelMargins:
    """Margins of one label per row; the rival in epoch e is class 10 + e."""
    margins, rows = LabelMargins(lambda: torch.ones(len(labels), dtype=torch.int64)), list(range(len(labels)))
    for number, sizes in enumerate(epochs):
        rivals = [10 + number] * len(labels)
        margins.record(rows, choices(labels, rivals, sizes), torch.ones(len(labels), dtype=torch.bool))
        margins.end_epoch(CPU)
    return margins


def test_evidence_is_the_mean_margin_and_the_rival_at_the_lowest():
    epochs = [[9.0, 9.0, 9.0], [1.0, -2.0, 3.0], [3.0, -4.0, -1.0], [9.0, 9.0, -9.0]]
    means, rivals = evidence(margins_of(epochs, [0] * 3), torch.tensor([False, True, True, False]))
    assert (means.tolist(), rivals.tolist()) == ([2.0, -3.0, 1.0], [11, 12, 12])


@pytest.mark.parametrize("num_read", [1, 40])
def test_an_epoch_that_was_interrupted_does_not_count(num_read):
    """A fifth of the rows, without those of the class that is never learnt: no better model, and no other report."""
    sizes = [2.0 + row / 200 for row in range(160)] + [-3.0] * 40
    sizes[7] = -4.0
    labels = [0, 1] * 80 + [2] * 40
    partial = [math.nan] * 200
    partial[7 : 7 + num_read] = [5.0] * num_read
    whole, cut = (LabelReport(margins_of(epochs, labels), "class") for epochs in ([sizes] * 2, [*[sizes] * 2, partial]))
    assert torch.equal(whole.probabilities.nan_to_num(-1), cut.probabilities.nan_to_num(-1))
    assert whole.agreement == cut.agreement == pytest.approx((79 / 80 + 1 + 0) / 3)


def test_a_rare_class_that_is_not_learnt_is_not_judged(caplog):
    """Nine rows in ten are learnt; those of the last class always contradict, which is no reason to drop them all."""
    labels = [0, 1, 2] * 30 + [3] * 10
    sizes = [2.0 + row / 90 for row in range(90)] + [-3.0] * 10
    sizes[7] = -4.0
    report = LabelReport(margins_of([sizes] * 2, labels), "class")
    assert report.probabilities[90:].isnan().all()
    assert "10 labels of the classes [3] are not judged" in caplog.records[-1].getMessage()
    kept = report.drop(datasets.Dataset.from_dict({"label": labels}))
    assert len(kept) == 99
    assert kept["label"][:].count(3) == 10
    assert len(report.table()) == 90


@pytest.mark.parametrize("num_minority", [10, 45])
def test_a_model_that_predicts_one_of_two_classes_is_not_trusted(caplog, num_minority):
    labels = [0] * (90 - num_minority) + [1] * num_minority
    report = LabelReport(margins_of([[2.0] * (90 - num_minority) + [-2.0] * num_minority], labels), "class")
    assert "Do not trust the label report" in caplog.records[-1].getMessage()
    with pytest.raises(RuntimeError, match=r"agrees with 50% of the labels of a class, .* it has not learnt the task"):
        report.relabel(datasets.Dataset.from_dict({"label": labels}))


def test_chance_is_a_half_for_a_yes_or_no_and_counts_no_label_that_was_not_read(caplog):
    """Agreement of 0.55: well above 1/8, the share of a class among 4 yes and 4 no, but not above 1/2."""
    margins = LabelMargins(lambda: torch.full((40,), 4))
    given = [number % 2 for number in range(160)]
    signs = [1.0 if number % 20 < 11 else -1.0 for number in range(160)]
    margins.record(list(range(40)), choices(given, [1 - one for one in given], signs), torch.ones(160) > 0)
    margins.end_epoch(CPU)
    report = LabelReport(margins, "multi_label")
    assert report.agreement == pytest.approx(0.55, abs=0.01)
    with pytest.raises(RuntimeError, match="has not learnt the task"):
        report.drop(datasets.Dataset.from_dict({"labels": [[0.0, 1.0, 0.0, 1.0]] * 40}))
    history = torch.tensor([[1.0, 1.0, -1.0, 1.0, 1.0, -1.0, float("nan")]])  # 2 of 3 in both classes, one not read
    for unread in (2, -100):  # 2/3 is above 5/8, of two classes
        found = learning(history, torch.tensor([0, 0, 0, 1, 1, 1, unread]))
        assert (found.agreement, found.is_trusted) == (pytest.approx(2 / 3), True)
        of_half = learning(torch.tensor([[1.0, -1.0, 1.0, -1.0, float("nan")]]), torch.tensor([0, 0, 1, 1, unread]))
        assert (of_half.agreement, of_half.is_trusted) == (0.5, False)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("ends", [[0, 1, 2], [2], [0]])
def test_margins_go_on_from_their_state(at, ends):
    batches = [([0, 1], choices([0, 1], [1, 2], [0.5, -1.0])), ([1, 1], choices([1, 1], [0, 3], [-2.0, -3.0])),
               ([0, 1], choices([0, 1], [2, 0], [1.5, -1.0]))]  # fmt: skip
    whole, cut = (LabelMargins(lambda: torch.ones(2, dtype=torch.int64)) for _ in range(2))
    for number, batch in enumerate(batches):
        if number == at:
            resumed = LabelMargins(lambda: torch.ones(2, dtype=torch.int64))
            resumed.load(cut.state(CPU), is_main_process=True)
            cut = resumed
        for one in (whole, cut):
            one.record(*batch, torch.ones(2, dtype=torch.bool))
            if number in ends:
                one.end_epoch(CPU)
    assert str(whole.state(CPU)) == str(cut.state(CPU))
    assert len(whole.epochs) == len(cut.epochs) == len(ends)
    fresh = LabelMargins(lambda: torch.ones(2, dtype=torch.int64))
    fresh.load({}, is_main_process=True)
    assert fresh.epochs == []


@pytest.mark.parametrize(
    ("rows", "num_elements", "message"),
    [
        ([0, 1], 3, r"the loss of 2 rows has 3 elements"),
        ([1, 0], 4, r"row 1 has 1 labels in the data set and 2 in its"),
    ],
)
def test_margins_that_are_not_those_of_the_labels_are_refused(rows, num_elements, message):
    margins = LabelMargins(lambda: torch.ones(2, dtype=torch.int64))
    zeros = [0] * num_elements
    margins.record(rows, choices(zeros, zeros, [1.0] * num_elements), torch.ones(num_elements, dtype=torch.bool))
    margins.end_epoch(CPU)
    with pytest.raises(RuntimeError, match=message):
        LabelReport(margins, "class")


def report_of(
    kind: str, num_per_row: list[int], labels: list[int], wrong: list[int], is_binary: bool | None = None
) -> LabelReport:
    """A report of sure margins, negative at the given places with the class one above as the rival."""
    margins = LabelMargins(lambda: torch.tensor(num_per_row))
    first = 0
    for row, count in enumerate(num_per_row):
        own = labels[first : first + count]
        sizes = [-3.0 if place in wrong else 3.0 + place / 100 for place in range(first, first + count)]
        rivals = [1 - label if kind == "multi_label" else label + 1 for label in own]
        binary = kind == "multi_label" if is_binary is None else is_binary
        compared = replace(choices(own, rivals, sizes), is_binary=binary)
        margins.record([row], compared, torch.ones(count, dtype=torch.bool))
        first += count
    margins.end_epoch(CPU)
    return LabelReport(margins, kind)


def test_classes_are_dropped_and_relabelled():
    labels = [0, 1] * 30
    report = report_of("class", [1] * 60, labels, wrong=[4, 9])
    assert report.num_errors == pytest.approx(2, abs=1)
    rows = datasets.Dataset.from_dict({"text": [f"text {row}" for row in range(60)], "label": labels})
    assert report.drop(rows)["text"][:6] == ["text 0", "text 1", "text 2", "text 3", "text 5", "text 6"]
    assert len(report.drop(rows)) == 58
    relabelled = report.relabel(rows)
    assert relabelled.column_names == ["text", "label"]
    assert relabelled["label"][:] == [{4: 1, 9: 2}.get(row, label) for row, label in enumerate(labels)]
    assert report.relabel(rows, threshold=1.0)["label"][:] == labels
    table = report.table(rows, num_labels=3)
    assert table.column_names == ["row", "given_label", "suggested_label", "error_probability", "margin", "text"]
    assert sorted(table["row"][:2]) == [4, 9]
    assert table["text"][:2] == [f"text {row}" for row in table["row"][:2]]
    assert table["error_probability"][:] == sorted(table["error_probability"][:], reverse=True)
    assert len(report.table()) == 60


def test_names_of_classes_stand_in_the_table_and_survive_a_change():
    feature = datasets.ClassLabel(names=["no", "yes", "maybe"])
    labels = [0, 1] * 30
    margins_report = report_of("class", [1] * 60, labels, wrong=[4])
    margins_report._names = feature.names
    rows = datasets.Dataset.from_dict({"labels": labels}, features=datasets.Features({"labels": feature}))
    line = margins_report.table(rows)[0]
    assert (line["given_label"], line["suggested_label"]) == ("no", "yes")
    assert margins_report.relabel(rows).features["labels"] == feature


def test_a_token_is_masked_or_relabelled_alone():
    tags = [[0, -100, 1], [-100, 2, 0, 1]] * 20
    labels = [tag for row in tags for tag in row if tag != -100]
    report = report_of("token", [2, 3] * 20, labels, wrong=[1, 7])  # the second tag of row 0, the first of row 3
    rows = datasets.Dataset.from_dict({"labels": tags})
    assert report.drop(rows)["labels"][:4] == [[0, -100, -100], [-100, 2, 0, 1], [0, -100, 1], [-100, -100, 0, 1]]
    assert report.relabel(rows)["labels"][:4] == [[0, -100, 2], [-100, 2, 0, 1], [0, -100, 1], [-100, 3, 0, 1]]
    assert report.table(num_labels=2).column_names[:2] == ["row", "position"]
    assert sorted(zip(*report.table(num_labels=2).select_columns(["row", "position"])[:].values(), strict=True)) == [
        (0, 1), (3, 0)]  # fmt: skip
    assert report.table(rows).column_names == report.table().column_names


def test_multi_label_rows():
    sets = [[0.0, 1.0], [1.0, 0.0]] * 30
    labels = [int(value) for row in sets for value in row]
    report = report_of("multi_label", [2] * 60, labels, wrong=[3])
    rows = datasets.Dataset.from_dict({"labels": sets})
    assert report.relabel(rows)["labels"][:3] == [[0, 1], [1, 1], [0, 1]]
    assert len(report.drop(rows)) == 59


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: rows.select(range(59)), ValueError, r"`dataset` has 59 rows and the report is of 60"),
        (lambda rows: rows.rename_column("labels", "topic"), ValueError, r"no column 'labels' .*\['topic'\]"),
        (lambda rows: rows.shuffle(seed=1), ValueError, r"Row \d+ of `dataset` has the label \d and was trained"),
        (lambda rows: rows.select([*range(59), 0]).map(lambda row, at: {"labels": None if at == 3 else row["labels"]},
         with_indices=True), ValueError, r"Row 3 of `dataset` has 0 labels and the report is of 1"),
        (lambda rows: rows.to_list(), TypeError, r"must be a datasets.Dataset, got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["drop", "relabel", "table"])
def test_another_data_set_is_refused(change, error, message, method):
    labels = [0, 1] * 30
    report = report_of("class", [1] * 60, labels, wrong=[4])
    other = change(datasets.Dataset.from_dict({"labels": labels}))
    if method == "table" and "no column" in message:  # texts alone can be shown
        assert report.table(other)["topic"][:1] == [labels[4]]
        return
    with pytest.raises(error, match=message):
        getattr(report, method)(other)


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (lambda names: names, datasets.Value("string")),  # as a CSV file holds them
        (lambda names: [int(name) for name in names], datasets.Value("int64")),
        (lambda names: [["5", "3"].index(name) for name in names], datasets.ClassLabel(names=["5", "3"])),
    ],
    ids=["strings", "integers", "another order"],
)
def test_labels_are_compared_by_the_names_of_the_classes(values, feature):
    """Classes "3" and "5" were trained on as 0 and 1."""
    given = [0, 1] * 30
    margins = LabelMargins(lambda: torch.ones(60, dtype=torch.int64))
    sizes = [-3.0 if row == 4 else 3.0 for row in range(60)]
    margins.record(list(range(60)), choices(given, [1 - one for one in given], sizes), torch.ones(60) > 0)
    margins.end_epoch(CPU)
    report = LabelReport(margins, "class", "label", ["3", "5"])
    names = [("3", "5")[label] for label in given]
    rows = datasets.Dataset.from_dict({"label": values(names), "text": [f"t{row}" for row in range(60)]})
    rows = rows.cast_column("label", feature)
    assert report.table(rows)[0] | {"margin": 0, "error_probability": 0} == {
        "row": 4, "given_label": "3", "suggested_label": "5", "text": "t4", "margin": 0, "error_probability": 0
    }  # fmt: skip
    assert report.relabel(rows)["label"][4] == values(["5"])[0]
    assert len(report.drop(rows)) == 59
    for method in (report.table, report.drop, report.relabel, report.validate):
        with pytest.raises(ValueError, match=r"Row 0 of `dataset` has the label 1 and was trained on with 0"):
            method(rows.select(range(59, -1, -1)))


def test_a_threshold_outside_of_its_interval_is_refused():
    report = report_of("class", [1] * 20, [0, 1] * 10, wrong=[4])
    with pytest.raises(ValueError, match=r"`threshold`=50 must lie in \[0, 1\]"):
        report.drop(datasets.Dataset.from_dict({"labels": [0, 1] * 10}), threshold=50)


NUM_ROWS, WRONG = 120, [5, 17, 40, 63, 88, 101]


def learnable(num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Rows whose label is told by every word: even or odd words alone."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(num_rows):
        label = number % 2
        ids = (2 * torch.randint(3, 20, (6,), generator=generator) + label).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * 6, "labels": label})
    return rows


def observed(tmp_path: Path, dataset: Any, model: Any = None, num_epochs: int = 3, **keywords: Any) -> Any:
    args = {"num_train_epochs": num_epochs, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    resampler = LossResampler(losses="training", warmup_epochs=num_epochs)
    model = runs.bert(dropout=0.0) if model is None else model
    return runs.trained(RejectionSamplingTrainer, tmp_path, train_dataset=dataset, model=model,
                        args=args | keywords.pop("args", {}), resampler=resampler, **keywords)  # fmt: skip


def flipped(rows: list[dict[str, Any]]) -> datasets.Dataset:
    for row in WRONG:
        rows[row]["labels"] = 1 - rows[row]["labels"]
    return datasets.Dataset.from_list(rows)


def test_planted_errors_of_a_run_are_found_and_repaired(tmp_path):
    dataset = flipped(learnable())
    trainer = observed(tmp_path, dataset)
    report = trainer.resampler.label_report()
    assert sorted(report.table(num_labels=len(WRONG))["row"][:]) == WRONG
    assert report.num_errors == pytest.approx(len(WRONG), abs=2)
    assert len(report.drop(dataset)) == NUM_ROWS - len(WRONG)
    assert report.relabel(dataset)["labels"][:] == [row["labels"] for row in learnable()]


@pytest.mark.parametrize(
    "args", [{"label_smoothing_factor": 0.1}, {"bf16": True, "use_cpu": True}], ids=["smoothed", "bf16"]
)
def test_errors_are_found_whatever_computes_the_loss(tmp_path, args):
    report = observed(tmp_path, flipped(learnable()), args=args).resampler.label_report()
    assert sorted(report.table(num_labels=len(WRONG))["row"][:]) == WRONG


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("as_stored", [float, int])
def test_tokens_and_multi_labels_of_a_run(tmp_path, smoothing, as_stored):
    config = runs.bert(dropout=0.0).config
    rows = learnable()
    for row in rows:
        row["labels"] = [-100, *[word % 2 for word in row["input_ids"][1:]]]
    rows[7]["labels"][3] = 1 - rows[7]["labels"][3]
    dataset = datasets.Dataset.from_list(rows)
    torch.manual_seed(0)
    model = hf.BertForTokenClassification(config)
    args = {"label_smoothing_factor": smoothing}
    report = observed(tmp_path, dataset, model=model, args=args).resampler.label_report()
    assert (report.kind, len(report.labels)) == ("token", 5 * NUM_ROWS)
    line = report.table()[0]
    assert (line["row"], line["position"], line["error_probability"] > 0.5) == (7, 2, True)
    assert report.drop(dataset)["labels"][7][3] == -100

    rows = learnable()
    for row in rows:
        row["labels"] = [as_stored(row["labels"]), as_stored(1 - row["labels"])]
    rows[7]["labels"] = [as_stored(1), as_stored(1)]
    dataset = datasets.Dataset.from_list(rows)
    config.problem_type = "multi_label_classification"
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config)

    def collate(rows):
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        return batch | {"labels": batch["labels"].float()}

    report = observed(tmp_path, dataset, model=model, data_collator=collate).resampler.label_report()
    line = report.table()[0]
    assert report.kind == "multi_label"
    assert (line["row"], line["position"], line["given_label"], line["suggested_label"]) == (7, 1, 1, 0)
    assert len(report.drop(dataset)) == NUM_ROWS - 1
    assert report.relabel(dataset)["labels"][7] == [1, 0]


def test_the_report_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    dataset = flipped(learnable())
    whole = observed(tmp_path / "whole", dataset, num_epochs=3, args={"save_strategy": "steps", "save_steps": 20})
    cut = observed(tmp_path / "cut", dataset, num_epochs=3, resume=str(tmp_path / "whole" / "checkpoint-20"))
    first, second = (trainer.resampler.label_report() for trainer in (whole, cut))
    assert torch.equal(first.probabilities, second.probabilities)
    assert torch.equal(first.suggestions, second.suggestions)


@pytest.mark.parametrize("last_step", [15, 20, 30])
def test_a_checkpoint_has_the_report_of_the_run_that_stopped_there(tmp_path, last_step):
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == last_step

    report = observed(tmp_path, flipped(learnable()), callbacks=[Stop()]).resampler.label_report()
    stored = LabelReport.from_checkpoint(tmp_path)
    torch.testing.assert_close(stored.probabilities, report.probabilities, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(stored.margins, report.margins, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stored.suggestions, report.suggestions)
    assert (stored.kind, stored.agreement) == (report.kind, report.agreement)


@pytest.mark.parametrize("resampler", [LossResampler(lambda losses: losses), None], ids=["forward", "untrained"])
def test_a_run_without_margins_says_so(tmp_path, resampler):
    trainer = runs.trained(RejectionSamplingTrainer, tmp_path, resampler=resampler, args={"max_steps": 1})
    if resampler is None:
        trainer = RejectionSamplingTrainer(runs.bert(), runs.arguments(tmp_path), runs.collate, runs.rows())
        trainer.get_train_dataloader()
    with pytest.raises(RuntimeError, match=r'No label has been read yet.*LossResampler\(losses="training"\)'):
        trainer.resampler.label_report()


def test_a_language_model_has_no_label_report(tmp_path):
    import zoo

    case = next(case for case in zoo.CASES if case.name == "gpt2_lm")
    resampler = LossResampler(losses="training")
    trainer = case.trainer(tmp_path, RejectionSamplingTrainer, {"num_train_epochs": 1}, resampler=resampler)
    trainer.train()
    with pytest.raises(RuntimeError, match=r"cannot be assigned to the labels: row \d+ has 1 labels"):
        resampler.label_report()


def test_draws_that_gather_wrong_labels_are_warned_of(tmp_path, caplog):
    for weighting in (Tempered(0.0), Proportional()):
        args = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
        resampler = LossResampler(weighting, losses="training", warmup_epochs=2)
        runs.trained(RejectionSamplingTrainer, tmp_path, train_dataset=flipped(learnable()), args=args,
                     model=runs.bert(dropout=0.0), resampler=resampler)  # fmt: skip
        found = [record.message for record in caplog.records if "probably wrong" in record.message]
        assert len(found) == (weighting == Proportional())
    assert "wrong labels show up in `label_report()`" in found[0]


def test_unknown_labels_of_a_multi_label_row_are_refused(tmp_path):
    """A place that is masked, by a weight of 0, say, is no label: neither judged nor overwritten."""
    dataset = datasets.Dataset.from_list(learnable()).map(
        lambda row, number: {"labels": [float(row["labels"]), -1.0 if number % 3 else 0.0]}, with_indices=True
    )

    def masked(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        weight = (labels >= 0).float()
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits[:, :2], labels.clamp(0), weight)

    trainer = observed(tmp_path, dataset, compute_loss_func=masked, args={"save_strategy": "epoch"})
    for report in (trainer.resampler.label_report, lambda: LabelReport.from_checkpoint(tmp_path)):
        with pytest.raises(RuntimeError, match=r"row \d+ has 1 labels in the data set and 2 in its batch"):
            report()
    resumed = LossResampler(losses="training", warmup_epochs=3)
    checkpoint = sorted(tmp_path.glob("checkpoint-*"))[0]
    runs.trained(RejectionSamplingTrainer, tmp_path, train_dataset=dataset, model=runs.bert(dropout=0.0),
                 args={"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
                 resampler=resumed, compute_loss_func=masked, resume=str(checkpoint))  # fmt: skip
    with pytest.raises(RuntimeError, match="has 1 labels in the data set"):
        resumed.label_report()


@pytest.mark.parametrize("kind", ["class", "multi_label"])
def test_labels_that_are_booleans(kind):
    labels = [row % 2 for row in range(100)]
    report = report_of(kind, [1] * 100, labels, wrong=list(range(0, 100, 10)))
    values = [bool(label) if kind == "class" else [bool(label)] for label in labels]
    relabelled = report.relabel(dataset := datasets.Dataset.from_dict({"labels": values}))
    assert relabelled.features == dataset.features
    changed = [row for row in range(100) if relabelled["labels"][row] != values[row]]
    assert changed == list(range(0, 100, 10))


def test_missing_booleans_stay_missing():
    report = report_of("class", [1, 0] * 50, [row % 2 for row in range(50)], wrong=[6])
    values = [None if row % 2 else bool(row // 2 % 2) for row in range(100)]
    relabelled = report.relabel(datasets.Dataset.from_dict({"labels": values}))["labels"][:]
    assert [row for row in range(100) if relabelled[row] is not values[row]] == [12]


@pytest.mark.parametrize("missing", [None, math.nan, -1.0, -100.0])
def test_a_label_is_changed_at_its_own_place(missing):
    """Place 0 of each row has no label, so that the report's first label of a row is its second value."""
    values = [[missing, float(row % 2)] if row else [0.0, 0.0] for row in range(50)]
    labels = [0, 0, *[row % 2 for row in range(1, 50)]]
    report = report_of("multi_label", [2] + [1] * 49, labels, wrong=[8], is_binary=False)
    dataset = datasets.Dataset.from_dict({"labels": values})
    for changed, value in ((report.relabel(dataset), 0.0), (report.drop(dataset), -100.0)):
        assert [row for row in range(50) if changed["labels"][row][1] != values[row][1]] == [7]
        assert changed["labels"][7][1] == value
        assert str(changed["labels"][7][0]) == str(missing)


def test_no_is_written_as_the_column_has_it():
    dataset = datasets.Dataset.from_dict({"labels": [[-1.0, 1.0]] * 50})
    report = report_of("multi_label", [2] * 50, [0, 1] * 50, wrong=[5])
    relabelled = report.relabel(dataset)
    assert relabelled["labels"][2] == [-1.0, -1.0]
    report.validate(dataset)


@pytest.mark.parametrize("dtype", ["uint8", "bool"])
def test_tags_of_a_type_without_negative_numbers_can_be_masked(dtype):
    feature = datasets.Features({"labels": datasets.List(datasets.Value(dtype))})
    dataset = datasets.Dataset.from_dict({"labels": [[0, 1]] * 50}, features=feature)
    stored = stored_labels(dataset, "labels")  # which cannot tell tags that are booleans from several labels
    report = report_of(stored.kind, [2] * 50, [0, 1] * 50, wrong=[5], is_binary=False)
    assert report.drop(dataset)["labels"][2] == [0, -100]
    assert report.relabel(dataset, threshold=1.0).features == dataset.features
