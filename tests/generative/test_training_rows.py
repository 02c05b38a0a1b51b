"""Training rows of accepted candidates, references and supervised rows, and the rows that an epoch draws."""

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import generators as g
from generative_runs import resampler, trained
from rsft_hf.acceptance import Threshold, TopKPerPrompt
from rsft_hf.generative.encoding import Encoder, RowCollator
from rsft_hf.generative.generation import completion_log_probabilities
from rsft_hf.generative.training_rows import CandidatePool, PackedRows, draw_rows


def test_the_mask_of_supervised_rows_is_their_own(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [6, 7, 8], "attention_mask": [0, 1, 1], "labels": [-100, -100, 8]},
        {"input_ids": [6, 8], "labels": [-100, 8]},
    ]
    made = resampler(supervised_dataset=rows, supervised_fraction=1.0)
    ours = trained(tmp_path, made)
    assert made.pool.supervised == [rows[0], {**rows[1], "attention_mask": [1, 1]}]
    (batch,) = (ours.get_train_dataloader().collate_fn(made.pool.supervised),)
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(("num_draws", "is_told"), [(20, False), (21, True)])
def test_rows_repeated_more_than_ten_times_are_told(caplog: pytest.LogCaptureFixture, num_draws: int, is_told) -> None:
    pool = CandidatePool()
    pool.replace([{"input_ids": [6], "attention_mask": [1], "labels": [6]}] * 2)
    with caplog.at_level(logging.WARNING):
        draw_rows(pool, num_draws, 0.0, torch.Generator().manual_seed(0))
    expected = "The 2 rows of this round are each read 10 times to fill 21 draws. Accept more of the candidates"
    assert (expected in caplog.text) is is_told
    assert bool(caplog.text) is is_told


@pytest.mark.parametrize(("num_rows", "is_told"), [(20, False), (21, True)])
def test_rows_that_are_never_read_are_told(caplog: pytest.LogCaptureFixture, num_rows: int, is_told: bool) -> None:
    pool = CandidatePool()
    pool.replace([{"input_ids": [6], "attention_mask": [1], "labels": [6]}] * num_rows)
    with caplog.at_level(logging.WARNING):
        draw_rows(pool, 2, 0.0, torch.Generator().manual_seed(0))
    assert ("Of the 21 accepted rows of this round 2 are read, and the others never" in caplog.text) is is_told
    assert bool(caplog.text) is is_told


def losses(run: hf.Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("rule", [TopKPerPrompt(1), Threshold(quantile=0.9)], ids=["half", "a_tenth"])
def test_the_loss_is_that_of_accepted_tokens_whatever_the_acceptance(tmp_path, rule):
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    fixed = {"attention_dropout": 0.0}
    source = g.resampler(acceptance=rule, on_nothing_accepted="skip", num_candidates=4)
    keywords = {"model": g.tiny_model(**fixed), "args": settings}
    run = g.trainer(tmp_path / "ours", source, num_prompts=8, **keywords)
    run.train()
    rows = [source.pool[index] for index in run._progress.indices.tolist()]
    assert len(rows) == 8  # the epoch, and so the number of steps, is as long as there are prompts
    plain = hf.Trainer(
        g.tiny_model(**fixed), g.arguments(tmp_path / "plain", **settings), RowCollator(g.PAD), train_dataset=rows
    )
    plain.train()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert len(losses(run)) == 2
    for path, value in plain.model.state_dict().items():
        assert (run.model.state_dict()[path] - value).abs().max() < 1e-6
    # By hand: nats of the answers of the first four rows over their tokens, however they fall into micro-batches.
    answers = [[label for label in row["labels"] if label != -100] for row in rows[:4]]
    asked = [row["input_ids"][: -len(answer)] for row, answer in zip(rows, answers)]
    encoder = Encoder(g.tokenizer(), is_encoder_decoder=False)
    log_p = completion_log_probabilities(g.tiny_model(**fixed).eval(), encoder, asked, answers)
    # The log rounds to four digits.
    assert losses(run)[0] == pytest.approx(-float(log_p.sum()) / sum(map(len, answers)), abs=1e-3)


@pytest.mark.parametrize("policy", ["skip", "reference"])
def test_the_reference_is_no_candidate_unless_asked_for(tmp_path, policy):
    # Prompts "a a", "b a a", "c a a b", "d a a b c".
    reward = lambda prompts, **_: [float(text[0] in "bd") for text in prompts]  # noqa: E731
    source = g.resampler(reward, Threshold(minimum=0.5), on_nothing_accepted=policy)
    run = g.trainer(tmp_path, source)
    run.train()
    references = [one for one in g.stored(run) if one.finish_reason == "reference"]
    assert len(references) == (2 if policy == "reference" else 0)
    assert {one.verdict for one in references} <= {"fallback"}
    assert all(one.reward is None and one.index == -1 for one in references)
    assert source.metrics()["round/acceptance_rate"] == 0.5  # of the 8 generated: references count in no rate


def test_packed_rows_are_the_rows(tmp_path: Path) -> None:
    """Rows of a decoder-only model, and of one whose answer has another length than its prompt."""
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, -100, 7]},
        {"input_ids": [8], "attention_mask": [1], "labels": [2**31 - 1, 9]},
        {"input_ids": [], "attention_mask": [], "labels": []},
    ]
    packed = PackedRows(iter(rows))
    assert list(packed) == packed[:] == rows
    assert packed[-2] == rows[1]
    assert packed[::2] == rows[::2]
    with pytest.raises(IndexError):
        packed[3]
    save_file(packed.state(), tmp_path / "rows.safetensors")
    again = PackedRows.from_state(load_file(tmp_path / "rows.safetensors"))
    assert list(again) == rows
    assert list(again.num_trained) == list(packed.num_trained) == [1, 2, 0]
    assert list(PackedRows.from_state(PackedRows().state())) == []
    pool = CandidatePool(rows[:1])
    pool.replace(rows)
    assert pool.num_tokens([0, 1, 2, 2, 3]) == 1 + 1 + 2 + 2 + 0
