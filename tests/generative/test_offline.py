"""Imported completions in the place of generated ones: verdicts and training rows, later rounds, resuming, refusals."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import generators
from generators import share_of_wanted
from rsft_hf import CandidateResampler, TopKPerPrompt, import_candidates
from rsft_hf.acceptance import DensityRatio
from rsft_hf.generative import stored_prompts

NUM_PROMPTS = 6


def samples(conversational: bool = False) -> list[dict[str, Any]]:
    """Three completions of each prompt, the second one the best."""
    rows = generators.prompts(NUM_PROMPTS, conversational).to_list()
    return [{**row, "completions": ["a b c", f"{row['wanted']} {row['wanted']}", "x"]} for row in rows]


def source(folder: Path, **options: Any) -> CandidateResampler:
    return CandidateResampler(share_of_wanted, TopKPerPrompt(1), candidates=folder, **options)


def trained(tmp_path: Path, resampler: CandidateResampler, name: str = "llama", **keywords: Any) -> Any:
    resume = keywords.pop("resume", None)
    keywords.setdefault("train_dataset", stored_prompts(resampler.config.candidates))
    trainer = generators.trainer(tmp_path, resampler, name, **keywords)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", ["llama", "marian"])
@pytest.mark.parametrize("conversational", [False, True])
def test_the_best_imported_completion_of_each_prompt_is_trained_on(tmp_path: Path, name: str, conversational) -> None:
    if name == "marian" and conversational:
        return  # its tokenizer has no chat template
    folder = import_candidates(samples(conversational), tmp_path / "imported")
    trainer = trained(tmp_path / "out", source(folder), name)  # no `generation_config`: nothing is generated
    found = generators.stored(trainer)
    assert [one.text for one in found if one.is_accepted] == [row["completions"][1] for row in samples()]
    assert [one.index for one in found] == [0, 1, 2] * NUM_PROMPTS
    tokenizer = trainer.processing_class
    for row in trainer.resampler.pool.accepted:
        answer = [token for token in row["labels"] if token != -100]
        assert answer[-1] == tokenizer.eos_token_id
    expected = [f"{row['wanted']} {row['wanted']}" for row in samples()]
    answers = [[token for token in row["labels"] if token != -100] for row in trainer.resampler.pool.accepted]
    assert [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers] == expected


def test_a_later_round_generates(tmp_path: Path) -> None:
    folder = import_candidates(samples(), tmp_path / "imported")
    resampler = source(folder, num_candidates=2, generation_config=generators.sampling(8), filters=(),
                       on_nothing_accepted="best")  # fmt: skip
    trainer = trained(tmp_path / "out", resampler, args={"num_train_epochs": 2})
    assert {one.text for one in generators.stored(trainer, 0)} == {
        text for row in samples() for text in row["completions"]
    }
    second = generators.stored(trainer, 1)
    assert len(second) == 2 * NUM_PROMPTS
    assert {one.index for one in second} == {0, 1}


def test_several_imported_rounds_follow_each_other(tmp_path: Path) -> None:
    rows = samples()
    for number in range(2):
        own = [{**row, "completions": [row["completions"][number]]} for row in rows]
        import_candidates(own, tmp_path / "imported" / f"round-{number:03d}")
    resampler = source(tmp_path / "imported", on_nothing_accepted="best")
    trainer = trained(
        tmp_path / "out", resampler, train_dataset=generators.prompts(NUM_PROMPTS), args={"num_train_epochs": 2}
    )
    for number in range(2):
        assert [one.text for one in generators.stored(trainer, number)] == [row["completions"][number] for row in rows]


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    folder = import_candidates(samples(), tmp_path / "imported")
    args = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    options = {"generation_config": generators.sampling(8), "filters": (), "on_nothing_accepted": "best"}
    whole = trained(tmp_path / "out", source(folder, **options), args=args)
    resumed = trained(
        tmp_path / "out", source(folder, **options), args=args, resume=str(tmp_path / "out" / "checkpoint-2")
    )
    states = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_changed_candidates_are_read_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = import_candidates(samples(), tmp_path / "first")
    trained(tmp_path / "out", source(first))
    other = import_candidates([{**row, "completions": ["y"]} for row in samples()], tmp_path / "other")
    trainer = trained(tmp_path / "out", source(other))
    assert {one.text for one in generators.stored(trainer)} == {"y"}
    assert any("differs in candidates" in record.getMessage() for record in caplog.records)


def test_tokens_of_another_tokenizer_are_not_trained_on(tmp_path: Path) -> None:
    """The first completion brings the tokens of its text, the second those of another one."""
    tokenizer = generators.tokenizer()
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    row = {"prompt": "a", "wanted": "a", "completions": [{"text": "a b", "token_ids": ids},
                                                         {"text": "c a", "token_ids": ids}]}  # fmt: skip
    trainer = trained(tmp_path / "out", source(import_candidates([row], tmp_path / "imported")))
    first, second = generators.stored(trainer)
    assert first.token_ids == [*ids, tokenizer.eos_token_id]  # it stopped, so it ends
    assert second.token_ids == [*tokenizer("c a", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_prompts_are_matched_by_what_they_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = import_candidates(samples()[::-1], tmp_path / "imported")
    rows = generators.prompts(NUM_PROMPTS + 1).select([6, 0, 1, 2])
    trainer = trained(tmp_path / "out", source(folder), train_dataset=rows)
    texts = {one.prompt: one.text for one in generators.stored(trainer) if one.is_accepted}
    assert texts == {row["prompt"]: row["completions"][1] for row in samples()[:3]}
    assert any("3 of 4 prompts have imported candidates; 9 of 18" in record.getMessage() for record in caplog.records)


def test_stored_tokens_are_trained_on_without_padding_and_with_an_end(tmp_path: Path) -> None:
    tokenizer = generators.tokenizer()
    ids, end, pad = tokenizer("b c", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, generators.PAD
    stored = [[*ids, end, pad, pad], ids, [*ids, pad]]
    facts = zip(stored, ["stop", "stop", "length"], strict=True)
    given = [{"text": "b c", "token_ids": one, "finish_reason": reason} for one, reason in facts]
    folder = import_candidates([{"prompt": "a", "wanted": "a", "completions": given}], tmp_path / "imported")
    trainer = trained(tmp_path / "out", source(folder, filters=(), num_draws=1))
    assert [one.token_ids for one in generators.stored(trainer)] == [[*ids, end], [*ids, end], ids]


def test_messages_with_uneven_fields_are_matched(tmp_path: Path) -> None:
    """Arrow fills the fields of all messages with null."""
    rows = samples(conversational=True)[:2]
    rows[0]["prompt"] = [{**rows[0]["prompt"][0], "name": "ann"}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    folder = import_candidates(path, tmp_path / "imported")
    trainer = trained(
        tmp_path / "out", source(folder), train_dataset=datasets.Dataset.from_list(rows).remove_columns("completions")
    )
    assert len(generators.stored(trainer)) == 6


def test_a_decoder_gets_the_first_tokens_that_its_tokenizer_puts_before_an_answer(tmp_path: Path) -> None:
    """Whatever the import has stored: its tokenizer does not say that the model is an encoder-decoder."""
    for number, options in enumerate(({}, {"tokenizer": generators.tokenizer()})):
        folder = import_candidates(samples()[:2], tmp_path / f"in{number}", **options)
        trainer = trained(tmp_path / f"out{number}", source(folder), "marian")
        if not number:
            first = [row["labels"] for row in trainer.resampler.pool.accepted]
    assert [row["labels"] for row in trainer.resampler.pool.accepted] == first


def test_bad_candidates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no candidates"):
        source(tmp_path / "nothing")
    folder = import_candidates(samples(), tmp_path / "imported")
    with pytest.raises(ValueError, match=r"`candidates` come without log p, which DensityRatio"):
        CandidateResampler(share_of_wanted, DensityRatio(), candidates=folder)
    with pytest.raises(ValueError, match=r"No prompt of the imported candidates is in `train_dataset`.*stored_prompts"):
        trained(tmp_path / "a", source(folder), train_dataset=generators.prompts(3, first=50))
    twice = stored_prompts(folder).select([0, 1, 0])
    with pytest.raises(ValueError, match=r"Row 2 of `train_dataset` repeats the prompt of row 0"):
        trained(tmp_path / "b", source(folder), train_dataset=twice)
    with pytest.raises(ValueError, match=r"`max_new_tokens` is unset"):
        trained(tmp_path / "c", source(folder), args={"num_train_epochs": 2})
    long = import_candidates([{"prompt": "a", "wanted": "a", "completion": "a " * 200}], tmp_path / "long")
    with pytest.raises(ValueError, match=r"'a' has 201 tokens, 20[23] with its prompt, more than the model's 64"):
        trained(tmp_path / "d", source(long), model=generators.tiny_model("llama", max_position_embeddings=64))


def test_imported_completions_are_encoded_without_a_trainer(tmp_path: Path) -> None:
    from rsft_hf.generative import Candidate

    tokenizer = generators.tokenizer()
    candidate = Candidate(0, "a", [], "b c", "stop", is_accepted=True, verdict="accepted")
    (row,) = CandidateResampler(share_of_wanted).encode([candidate], tokenizer)
    assert row["labels"][-3:] == [*tokenizer("b c", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_filters_of_tokens_want_tokens() -> None:
    from rsft_hf.generative import Candidate, LengthRange, RejectRepetition

    for rule in (LengthRange(1, 5), RejectRepetition()):
        assert rule(Candidate(0, "a", [], "", "stop")) == (not isinstance(rule, LengthRange))
        with pytest.raises(ValueError, match=r"text but no tokens.*import_candidates\(\.\.\., tokenizer="):
            rule(Candidate(0, "a", [], "b", "stop"))
