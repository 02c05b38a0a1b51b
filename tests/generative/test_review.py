"""Single findings of a review of rounds, one test each: conversations, fallbacks, refusals, warnings and figures."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from accelerate.utils import DistributedType

import generators
from generative_runs import NUM_PROMPTS, CountingEngine, logged, resampler, stored, trained, trainer
from rsft_hf import RejectionSamplingSeq2SeqTrainer, Threshold
from rsft_hf.acceptance import RandomLike
from rsft_hf.generative.candidates import Candidate, CandidateStore
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import completion_log_probabilities
from rsft_hf.generative.metrics import round_metrics
from rsft_hf.generative.selection import COLUMNS, RoundTable
from rsft_hf.generative.training_rows import CandidatePool, draw_rows
from rsft_hf.generative.validation import validate_training_arguments

NAMED = "{% for m in messages %}{{ '<|im_start|> ' + m['name'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"


def conversations(**changes: Any) -> datasets.Dataset:
    rows = generators.prompts(NUM_PROMPTS, conversational=True).to_list()
    for number, row in enumerate(rows):
        row["prompt"] = [{**message, "name": generators.LETTERS[number], **changes} for message in row["prompt"]]
    return datasets.Dataset.from_list(rows)


def test_training_rows_begin_with_what_the_engine_saw_whatever_the_template_reads(tmp_path: Path) -> None:
    """The store keeps role and content alone; the prompt is encoded from the data set."""
    engine, words = CountingEngine(), generators.tokenizer()
    words.chat_template = NAMED
    ours = trained(tmp_path, resampler(engine=engine), train_dataset=conversations(), processing_class=words)
    seen = [list(ids) for call in engine.calls for ids in call]
    assert [ids[1] for ids in seen] == [generators.A + number for number in range(NUM_PROMPTS)]
    assert set(stored(tmp_path)[0]["prompt"][0]) == {"role", "content"}
    accepted = [row["token_ids"] for row in stored(tmp_path) if row["is_accepted"]]
    rows = ours.resampler.pool.accepted
    assert [row["input_ids"] for row in rows] == [ids + answer for ids, answer in zip(seen, accepted, strict=True)]


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "a"}]], ids=["none", "parts"])
def test_content_that_is_not_text_is_refused_before_anything_is_generated(tmp_path: Path, content: Any) -> None:
    engine = CountingEngine()
    with pytest.raises(ValueError, match="The prompt in row 0 of `train_dataset` has a message whose content is not"):
        trained(tmp_path, resampler(engine=engine), train_dataset=conversations(content=content))
    assert engine.calls == []


def noise(completions: list, **_) -> list[float]:
    return torch.rand(len(completions)).tolist()  # no two are equal, and nothing else is known of them


@pytest.mark.parametrize("is_control", [False, True], ids=["rule", "control"])
def test_the_fallback_of_a_random_control_is_random_and_that_of_a_rule_the_best(tmp_path: Path, is_control) -> None:
    rule = RandomLike(Threshold(5.0)) if is_control else Threshold(5.0)
    made = resampler(noise, rule, on_nothing_accepted="best", num_draws=2)
    ours = trained(tmp_path, made, train_dataset=generators.prompts(40))
    rows, num_best, places = stored(tmp_path), 0, set()
    for prompt in range(40):
        own = [row for row in rows if row["prompt_id"] == prompt]
        (chosen,) = (row for row in own if row["is_accepted"])
        assert chosen["verdict"] == "fallback"
        num_best += chosen["reward"] == max(row["reward"] for row in own)
        places.add(chosen["candidate"])
    # 40 prompts of 4: 10 are the best by chance, with a standard deviation of (40 * 1/4 * 3/4)^0.5 = 2.7.
    assert 2 <= num_best <= 18 if is_control else num_best == 40
    assert places == {0, 1, 2, 3}  # not the first of each prompt either
    (figures,) = (line for line in ours.state.log_history if "candidates/fallback" in line)
    assert (figures["round/acceptance_rate"], figures["round/prompts_without_accepted"]) == (0.0, 1.0)
    assert figures["candidates/fallback"] == 0.25  # one of four
    assert "accepted/reward" not in figures
    assert figures["round/accepted_rows"] == 40


def test_fallbacks_beside_accepted_ones_are_counted_apart(tmp_path: Path) -> None:
    made = resampler(noise, Threshold(0.8), on_nothing_accepted="best", num_draws=2)
    ours = trained(tmp_path, made, train_dataset=generators.prompts(20))
    rows = stored(tmp_path)
    with_accepted = {row["prompt_id"] for row in rows if row["reward"] > 0.8}
    assert 0 < len(with_accepted) < 20
    assert logged(ours, "round/acceptance_rate") == [sum(row["reward"] > 0.8 for row in rows) / 80]
    assert logged(ours, "round/prompts_without_accepted") == [(20 - len(with_accepted)) / 20]
    assert logged(ours, "candidates/fallback") == [(20 - len(with_accepted)) / 80]


def test_pass_at_k_is_of_the_first_attempt_alone(tmp_path: Path) -> None:
    """Attempts 1 to 3 were made for the second prompt only, as it was not solved: they say nothing of one sampling."""
    store = CandidateStore(tmp_path, ["judge"], is_conversational=False)
    for attempt, rewards in enumerate([{0: (1.0, 0.0), 1: (0.0, 0.0)}, {1: (0.0, 0.0)}, {1: (0.0, 0.0)}, {1: (1, 1)}]):
        candidates = [
            Candidate(prompt, "a", [6, 1], "a", "stop", attempt, index, index, reward=float(reward))
            for prompt, both in rewards.items()
            for index, reward in enumerate(both)
        ]
        store.write(store.path(attempt, 0), candidates, "scored")
    table = RoundTable.of(store.columns(COLUMNS))
    verdicts = ["accepted" if reward else "rejected" for reward in table.columns["reward"]]
    figures = round_metrics(store, table, verdicts, Threshold(0.5))
    # pass@1 = (1/2 + 0/2) / 2 and pass@2 = (1 + 0) / 2; with all attempts (1/2 + 2/8) / 2.
    assert {name: value for name, value in figures.items() if "pass@" in name} == {
        "round/pass@1": 0.25,
        "round/pass@2": 0.5,
    }


def test_a_collator_that_makes_its_own_labels_is_refused(tmp_path: Path) -> None:
    engine = CountingEngine()
    collator = hf.DataCollatorForLanguageModeling(generators.tokenizer(), mlm=False)
    with pytest.raises(ValueError, match=r"DataCollatorForLanguageModeling.*Leave it out, or take DataCollatorForSeq2"):
        trained(tmp_path, resampler(engine=engine), data_collator=collator)
    assert engine.calls == []
    assert not (tmp_path / "candidates").exists()


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


def test_arguments_of_evaluate_that_prompts_do_not_heed_are_refused(tmp_path: Path) -> None:
    engine, args = CountingEngine(), generators.arguments(tmp_path, seq2seq=True)
    ours = RejectionSamplingSeq2SeqTrainer(
        model=generators.tiny_model("t5"), args=args, resampler=resampler(engine=engine),
        train_dataset=generators.prompts(4), eval_dataset=generators.prompts(2, first=80),
        processing_class=generators.tokenizer_for("t5"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"evaluate\(\) got max_length, .*eval_generation_config"):
        ours.evaluate(max_length=2)
    assert engine.calls == []
    assert "eval_reward" in ours.evaluate()


@pytest.mark.parametrize(("num_draws", "is_told"), [(20, False), (21, True)])
def test_rows_repeated_more_than_ten_times_are_told(caplog: pytest.LogCaptureFixture, num_draws: int, is_told) -> None:
    pool = CandidatePool()
    pool.replace([{"input_ids": [6], "attention_mask": [1], "labels": [6]}] * 2)
    with caplog.at_level(logging.WARNING):
        draw_rows(pool, num_draws, 0.0, torch.Generator().manual_seed(0))
    expected = "The 2 rows of this round are each read 10 times to fill 21 draws. Accept more of the candidates"
    assert (expected in caplog.text) is is_told
    assert bool(caplog.text) is is_told


@pytest.mark.parametrize("push_to_hub", [False, True])
def test_an_upload_of_the_candidates_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, push_to_hub) -> None:
    """A stand-in: a trainer that pushes looks for its repository when it is made."""
    run = SimpleNamespace(
        args=generators.arguments(tmp_path, push_to_hub=push_to_hub),
        accelerator=SimpleNamespace(distributed_type=DistributedType.NO),
        data_collator=None,
    )
    with caplog.at_level(logging.WARNING):
        validate_training_arguments(resampler().config, run)
    assert (
        f"uploads the candidates too, prompts and answers in plain text: they are in {tmp_path}" in caplog.text
    ) is (push_to_hub)


class SmallMemory:
    """A model on a device that holds some rows, and no more."""

    def __init__(self, model: Any, most_rows: int) -> None:
        self.model, self.device, self.most_rows = model, model.device, most_rows
        self.sizes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.most_rows:
            raise torch.OutOfMemoryError(f"{len(input_ids)} rows")
        return self.model(input_ids=input_ids, **inputs)


def test_likelihoods_take_smaller_batches_when_memory_runs_out() -> None:
    model, encoder = generators.tiny_model().eval(), Encoder(generators.tokenizer(), is_encoder_decoder=False)
    prompts = generators.prompt_ids(5)
    completions = [[6 + row, 7, 8][: 1 + row % 3] for row in range(5)]
    small = SmallMemory(model, 2)
    halved = completion_log_probabilities(small, encoder, prompts, completions)
    assert small.sizes == [5, 2, 2, 1]  # a batch of all five does not fit, batches of 5 // 2 do
    assert torch.allclose(halved, completion_log_probabilities(model, encoder, prompts, completions), atol=1e-5)
    assert len(set(halved.tolist())) == 5
    assert (halved < 0).all()
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        completion_log_probabilities(SmallMemory(model, 0), encoder, prompts, completions)


def test_a_log_by_epoch_has_the_loss_and_the_figures_of_the_round(tmp_path: Path) -> None:
    args = {"logging_strategy": "epoch", "num_train_epochs": 2}
    ours = trainer(tmp_path, args=args)
    ours.train()
    lines = [line for line in ours.state.log_history if "loss" in line]
    assert [line["epoch"] for line in lines] == [1.0, 2.0]
    assert all("candidates/reward" in line and "round/acceptance_rate" in line for line in lines)
    for key in ("candidates/reward", "round/trained_tokens", "train_loss"):
        assert len(logged(ours, key)) == (1 if key == "train_loss" else 2)
