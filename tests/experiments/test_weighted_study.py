"""The weighted study: rows of its regimes, arms on small digits, resuming, and the table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

import runs
from experiments import weighted_study
from experiments.study import cases
from experiments.study.arms import ARMS, SUBJECTS, Run, arms_of, reweighted_loss
from experiments.study.cases import REGIMES, Loader, Regime, choose, flipped, measures
from experiments.study.rules import LearningProgress, PredictionVariance, WithinClass, hump, infobatch
from rsft_hf import Tempered
from rsft_hf.weighted import ExampleStatistics


@pytest.fixture
def loader(tmp_path, monkeypatch):
    small = replace(REGIMES["digits"], num_rows=64, num_epochs=3)
    monkeypatch.setitem(REGIMES, "digits", small)
    return Loader(tmp_path / "tokens", "no encoder", "held")


def test_every_regime_has_arms_and_every_arm_a_regime():
    assert {regime.split("_")[0] for regime in REGIMES} == set(SUBJECTS)
    used = {arm for regime in REGIMES for arm in arms_of(regime)}
    assert used == set(ARMS)
    assert all("plain" in arms_of(regime) for regime in REGIMES)


def test_noise_changes_the_share_it_says():
    labels = np.arange(700) % 7
    for is_class_noise in (False, True):
        regime = Regime("snips", 700, 1, noise=0.2, is_class_noise=is_class_noise)
        noisy, is_flipped = flipped(labels, regime, 7, np.random.default_rng(1))
        assert is_flipped.sum() == 140
        assert np.array_equal(noisy != labels, is_flipped)
        if is_class_noise:
            assert set(labels[is_flipped] % 2) == {0}
            assert np.array_equal(noisy[is_flipped], (labels[is_flipped] + 1) % 7)


def test_a_minority_has_the_share_it_says():
    labels = np.repeat(np.arange(4), 100)
    rows = choose(labels, 400, Regime("ag_news", 200, 1, minority=0.05), 4, np.random.default_rng(2))
    assert len(set(rows)) == 200
    assert (labels[rows] == 3).sum() == 10


@pytest.mark.parametrize(
    "arm", ["plain", "corrected_training", "control", "class_balanced", "logit_adjustment", "oracle_out"]
)
def test_arms_start_alike_and_take_the_same_steps(loader, arm):
    line = weighted_study.one_run(loader, "digits", arm, seed=1)
    assert "error" not in line
    assert line["steps"] == 6  # 64 rows in batches of 32, three epochs
    assert 0 <= line["score"] <= 1
    assert line["score"] == line["balanced"]
    starts = [Run(loader.load(REGIMES["digits"], 1)).case.build_model().state_dict() for _ in range(2)]
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_features_of_the_frozen_encoder_are_the_means_of_each_row_alone(tmp_path, monkeypatch):
    lengths = [2 + row % 5 for row in range(2100)]
    ids = [[3 + (row + place) % 20 for place in range(length)] for row, length in enumerate(lengths)]
    rows = {"input_ids": ids, "labels": [row % 4 for row in range(2100)], "group": [0] * 2100}
    (tmp_path / "tokens").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "tokens" / "imdb-train.parquet")
    runs.bert().base_model.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(cases, "NUM_HELD", 100)
    monkeypatch.setattr(cases, "NUM_FROZEN", 150)
    monkeypatch.setitem(REGIMES, "few_imdb_frozen", replace(REGIMES["few_imdb_frozen"], num_rows=64, num_epochs=3))
    loader = Loader(tmp_path / "tokens", str(tmp_path / "encoder"), "held")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    pool, held = loader.splits("imdb")
    for tokens, features in zip((pool, held), loader.features("imdb"), strict=True):
        assert len(features) == min(len(tokens), 150)
        for row in (0, 7, len(features) - 1):
            with torch.no_grad():
                alone = encoder(torch.tensor([tokens["input_ids"][row]])).last_hidden_state[0].mean(0)
            assert features["features"][row] == pytest.approx(alone.tolist(), abs=1e-5)
            assert features["labels"][row] == tokens["labels"][row]
    line = weighted_study.one_run(loader, "few_imdb_frozen", "report_dropped", seed=1)
    assert "error" not in line
    assert line["steps"] == 6


@pytest.mark.slow
def test_rows_are_cleaned_by_the_label_report(loader, monkeypatch):
    regime = replace(REGIMES["digits"], num_rows=600, num_epochs=10, minority=None, noise=0.1, learning_rate=2e-3)
    monkeypatch.setitem(REGIMES, "digits", regime)
    line = weighted_study.one_run(loader, "digits", "report_dropped", seed=1)
    assert line["true_errors"] == 60
    assert line["estimated_errors"] > 30
    assert line["steps"] == 10 * 19
    assert line["recall"] > 0.7
    assert line["precision"] > 3 * 0.1  # the model has not learnt all digits, and accuses hard rows


def test_the_rows_to_choose_by_are_neither_trained_on_nor_tested(loader):
    digits = loader.tokens("digits", "train")
    pixels = lambda rows: {json.dumps(row) for row in rows["pixel_values"][:]}  # noqa: E731
    pool, held = loader.splits("digits")
    pool_of_test, test = Loader(loader.cache, "no encoder", "test").splits("digits")
    assert (len(pool), len(held), len(test), len(digits)) == (997, 400, 400, 1797)
    assert pixels(pool) == pixels(pool_of_test)
    assert not pixels(pool) & pixels(held)
    assert not pixels(pool) & pixels(test)
    assert not pixels(held) & pixels(test)


def test_losses_of_other_libraries_are_theirs(loader):
    run = Run(loader.load(REGIMES["digits"], 1))
    logits, labels = torch.randn(5, 10), torch.tensor([0, 3, 9, 9, 1])
    counts = torch.tensor(run.case.num_train_classes).double()
    adjusted = logits.double() + (counts.clamp(min=1) / counts.clamp(min=1).sum()).log()
    loss = reweighted_loss(run, "logit_adjustment")({"logits": logits}, labels)
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(adjusted, labels)), rel=1e-5)
    probabilities = logits.softmax(-1)[torch.arange(5), labels]
    focal = ((1 - probabilities) ** 2 * -probabilities.log()).mean()
    assert float(reweighted_loss(run, "focal")({"logits": logits}, labels)) == pytest.approx(float(focal), rel=1e-5)


def test_measures_by_hand(loader):
    case = loader.load(REGIMES["digits"], 1)
    case.groups = np.array([0, 0, 1, 1])
    predictions = np.array([[0, 0.9], [1, 0.6], [1, 0.8], [1, 0.8]])
    found = measures(case, predictions, np.array([0, 0, 1, 1]))
    assert found["accuracy"] == 0.75
    assert found["balanced"] == found["accuracy"]
    assert found["worst"] == 0.5
    assert found["classes"] == 2
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.4) / 4)


def test_rules_of_the_study_by_hand():
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert hump(0.75, 0.0)(losses).tolist() == pytest.approx([1 / 8, 2 / 8, 3 / 8, 2 / 8])
    assert infobatch(losses).tolist() == [0.5, 0.5, 0.5, 1.0]
    statistics = ExampleStatistics(labels=torch.tensor([0, 0, 0, 1]))
    assert WithinClass(Tempered(1.0))(losses, statistics).tolist() == pytest.approx([0.5, 1, 1.5, 1])
    history = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert LearningProgress(1.0)(losses, ExampleStatistics(loss_history=history)).tolist() == [1.5, 0.5]
    steady = PredictionVariance(0.1)(losses, ExampleStatistics(loss_history=torch.ones(3, 2)))
    assert steady.tolist() == pytest.approx([0.1, 0.1])


def test_a_study_goes_on_where_it_stopped(loader, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weighted_study, "encoder_path", lambda: "no encoder")
    options = weighted_study.parse(
        ["--output_dir", str(tmp_path), "--regimes", "digits", "--arms", "plain", "control", "--seeds", "1", "2"]
    )
    options.until = float("inf")
    weighted_study.work(options)
    lines = weighted_study.read_lines(tmp_path / "runs.jsonl")
    assert sorted((line["arm"], line["seed"]) for line in lines) == [
        ("control", 1), ("control", 2), ("plain", 1), ("plain", 2)
    ]  # fmt: skip
    assert weighted_study.jobs(options) == []
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]) + '{"cut')
    assert len(weighted_study.jobs(options)) == 1
    table = weighted_study.table(lines, "held")
    assert "| digits | plain | 2 |" in table
    assert "+0.0 ± 0.0 | 0 of 2 |" in table
    lines += [{**lines[0], "seed": seed, "arm": arm, "score": score}
              for seed in (8, 9) for arm, score in (("plain", 0.5), ("capped", 0.5 + seed / 100))]  # fmt: skip
    assert weighted_study.matrix(lines[4:], "held").splitlines()[2:] == ["| plain | 50.0 |", "| capped | +8.5 |"]
    assert cases.NUM_HELD == 1500
