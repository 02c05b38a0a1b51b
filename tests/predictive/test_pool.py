"""Rows of a run with pseudo-labels: which labels are true ones, and of which type they are."""

from pathlib import Path

import datasets
import transformers as hf

import runs
from rsft_hf import RejectionSamplingTrainer
from rsft_hf.predictive import PredictionResampler, load_pseudo_labels

POOL = [{**row, "labels": 1 - row["labels"]} for row in runs.rows(60)[26:]]


def test_the_label_of_a_doubtful_row_is_no_true_label_and_neither_is_minus_one(tmp_path: Path) -> None:
    rows = [{**row, "labels": -1} for row in POOL[:10]] + [dict(row) for row in POOL[10:]]
    made = PredictionResampler(unlabelled_dataset=rows, reference_column="labels", doubtful_rows=[3, 5])
    runs.trained(RejectionSamplingTrainer, tmp_path, resampler=made)
    found = load_pseudo_labels(tmp_path, only_accepted=False)["reference"][:36]
    assert found == [-100] * 10 + [row["labels"] for row in POOL[10:]] + [-100] * 2


def test_labels_are_of_the_type_that_the_collator_stacks(tmp_path: Path) -> None:
    keep = lambda rows: datasets.Dataset.from_list(rows).select_columns(["input_ids", "labels"])  # noqa: E731
    pairs = [[{**row, "input_ids": row["input_ids"][:3]} for row in rows] for rows in (runs.rows(), POOL)]
    labelled, pool = (keep(rows).with_format("torch") for rows in pairs)
    made = PredictionResampler(unlabelled_dataset=pool)
    keywords = {"train_dataset": labelled, "data_collator": hf.default_data_collator}
    runs.trained(RejectionSamplingTrainer, tmp_path, resampler=made, **keywords)
    assert len(load_pseudo_labels(tmp_path)) > 0
