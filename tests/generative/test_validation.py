"""Validation: what cannot be generated from or scored is refused by name, early or with the candidates kept."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers as hf
from accelerate.utils import DistributedType
from torch.utils.data import Dataset

import generators
import runs
from generative_runs import CountingEngine, resampler, stored, trained, trainer
from rsft_hf import CandidateResampler, Deduplicate, TopKPerPrompt
from rsft_hf.generative import RejectTruncated
from rsft_hf.generative.validation import validate_training_arguments

PROMPTS = generators.prompts(5)


def refused(tmp_path: Path, error: type[Exception], match: str, made: Any = None, **keywords: Any) -> None:
    """Nothing is generated, and nothing written, before the refusal."""
    engine = CountingEngine(0)
    made = made or resampler(engine=engine)
    with pytest.raises(error, match=match):
        trained(tmp_path, made, **keywords)
    assert engine.calls == []
    assert not (tmp_path / "candidates").exists()


@pytest.mark.parametrize("is_held_out", [False, True])
def test_a_prompt_that_ends_with_the_answer(tmp_path: Path, is_held_out: bool) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    answered = datasets.Dataset.from_list([{"prompt": one, "wanted": "a"} for one in (turns[:1], turns)])
    sets = {"train_dataset": generators.prompts(2, conversational=True), "eval_dataset": answered}
    refused(
        tmp_path,
        ValueError,
        "prompt in row 1 of `(eval|train)_dataset` ends with the assistant's turn.*Move that turn to the column",
        **(sets if is_held_out else {"train_dataset": answered}),
    )


def test_no_prompt_column(tmp_path: Path) -> None:
    rows = PROMPTS.rename_column("prompt", "question")
    refused(
        tmp_path, ValueError, r"no column 'prompt'; it has \['question', 'reference', 'wanted'\]", train_dataset=rows
    )
    trained(tmp_path, resampler(prompt_column="question"), train_dataset=rows)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda n: [1.0] * (n + 1), r"`odd` returned 5 rewards for 4 completions"),
        (lambda n: [math.nan] * n, r"`odd` returned nan for completion 0"),
        (lambda n: [0.0] * (n - 1) + [math.inf], r"`odd` returned inf for completion 3"),
        (lambda n: ["good"] * n, r"`odd` returned 'good' for completion 0"),
        (lambda n: 1.0, r"`odd` returned a float"),
        (lambda n: [1.0][n], r"`odd` raised IndexError: list index out of range"),
    ],
)
def test_a_wrong_reward_is_named_and_the_candidates_are_kept(tmp_path: Path, answer: Any, match: str) -> None:
    def odd(completions: list, **_: Any) -> Any:
        return answer(len(completions))

    with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
        trained(tmp_path, resampler(odd), train_dataset=PROMPTS)  # shards of one prompt
    assert len(stored(tmp_path)) == 4
    engine = CountingEngine()

    def mended(completions: list, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    mended.__name__ = "odd"
    trained(tmp_path, resampler(mended, engine=engine), train_dataset=PROMPTS)
    assert engine.prompts() == PROMPTS["prompt"][1:]


def test_prompts_longer_than_the_context(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([*PROMPTS, {**PROMPTS[0], "prompt": "a " * 60}])
    match = "prompt in row 5 has 60 tokens, more than the model's 64 positions less `max_new_tokens`=8. Shorten"
    refused(tmp_path, ValueError, match, train_dataset=rows)
    limited = resampler(max_prompt_length=59)
    refused(tmp_path, ValueError, "60 tokens, more than .*less `max_new_tokens`=8", limited, train_dataset=rows)
    limited = resampler(max_prompt_length=2)
    refused(tmp_path, ValueError, "prompt in row 1 has 3 tokens, more than `max_prompt_length`=2", limited)
    limited = resampler(max_prompt_length=1, on_long_prompt="drop")
    refused(tmp_path, ValueError, "Each of the 5 prompts has more than 1 tokens", limited, train_dataset=PROMPTS)
    long = resampler(generation_config=generators.sampling(65))
    refused(tmp_path, ValueError, "`max_new_tokens`=65 exceeds the model's 64 positions", long)


@pytest.mark.parametrize("is_plain", [False, True])
def test_long_prompts_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture, is_plain: bool) -> None:
    """What is left is trained on as if it were given, and resumes; dropped are 1 and 4, whatever holds the rows."""
    rows = [{**row, "prompt": "a " * 20} if number in (1, 4) else row for number, row in enumerate(PROMPTS)]
    left = [rows[0], *rows[2:4]]
    settings = {"max_prompt_length": 19, "on_long_prompt": "drop"}
    given = rows if is_plain else datasets.Dataset.from_list(rows)
    args = {"num_train_epochs": 2, "save_strategy": "epoch"}
    dropped = trained(tmp_path / "dropped", resampler(**settings), train_dataset=given, args=args)
    assert "2 of 5 prompts have more than 19 tokens and are dropped: rows 1, 4." in caplog.text
    assert dropped.state.max_steps == 4  # two epochs of three rows in batches of two
    expected = trained(tmp_path / "left", resampler(), train_dataset=datasets.Dataset.from_list(left), args=args)
    assert stored(tmp_path / "dropped", 1) == stored(tmp_path / "left", 1)
    assert runs.largest_difference(dropped, expected) == 0
    engine = CountingEngine()
    made, checkpoint = resampler(engine=engine, **settings), str(tmp_path / "dropped" / "checkpoint-2")
    resumed = trained(tmp_path / "dropped", made, resume=checkpoint, train_dataset=given, args=args)
    assert runs.largest_difference(resumed, expected) == 0
    assert engine.calls == []  # the second round is there
    other = resampler(engine=engine, **settings | {"max_prompt_length": 25})
    with pytest.raises(ValueError, match=r"draws per epoch: 3 in the checkpoint, 5 now"):
        trained(tmp_path / "dropped", other, resume=checkpoint, train_dataset=given, args=args)


def test_an_empty_prompt(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([*PROMPTS, {**PROMPTS[0], "prompt": ""}])
    refused(tmp_path, ValueError, "The prompt '' has no tokens", train_dataset=rows)


def test_text_and_messages_mixed(tmp_path: Path) -> None:
    rows = [PROMPTS[0], generators.prompts(2, conversational=True)[1]]
    refused(tmp_path, ValueError, "mixes prompts that are text with prompts that are messages", train_dataset=rows)


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    tokenizer, rows = generators.tokenizer(), generators.prompts(3, conversational=True)
    tokenizer.chat_template = None
    refused(tmp_path, ValueError, "no chat template", train_dataset=rows, processing_class=tokenizer)


def test_no_length_of_a_candidate(tmp_path: Path) -> None:
    for config in (None, hf.GenerationConfig(temperature=0.7)):
        made = resampler(generation_config=config)
        refused(tmp_path, ValueError, "`max_new_tokens` is unset", made)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"generation_config": generators.sampling(do_sample=False)}, ValueError, "greedy .do_sample=False"),
        ({"generation_config": generators.sampling(temperature=0.0)}, ValueError, "all candidates .* would be equal"),
        ({"generation_config": generators.sampling(num_beams=4)}, ValueError, "beams are not draws"),
        (
            {"generation_config": generators.sampling(do_sample=True, num_return_sequences=4)},
            ValueError,
            "Say it by `num_candidates`",
        ),
        ({"generation_config": {"max_new_tokens": 8}}, TypeError, "must be a transformers GenerationConfig, got dict"),
        ({"num_candidates": 0}, ValueError, "`num_candidates`=0 must be an integer of at least 1"),
        ({"num_candidates": 2.5}, TypeError, "`num_candidates`=2.5"),
        ({"max_attempts": 0}, ValueError, "`max_attempts`=0"),
        ({"min_accepted_per_prompt": 9}, ValueError, r"can never be reached by `num_candidates`=4 x `max_attempts`=1"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs`=0"),
        ({"replay_rounds": -1}, ValueError, "`replay_rounds`=-1"),
        ({"num_draws": 0}, ValueError, "`num_draws`=0"),
        ({"on_nothing_accepted": "ignore"}, ValueError, "must be one of 'raise', 'skip', 'best', 'reference'"),
        ({"round_start": "first"}, ValueError, "must be one of 'last', 'base', 'best'"),
        ({"supervised_fraction": 1.5}, ValueError, r"must lie in \[0, 1\]"),
        ({"supervised_fraction": 0.5}, ValueError, "contradict each other"),
        ({"supervised_dataset": [{}]}, ValueError, "contradict each other"),
        ({"supervised_dataset": [], "supervised_fraction": 0.5}, ValueError, "`supervised_dataset` has no rows"),
        ({"acceptance": TopKPerPrompt}, TypeError, "`acceptance`"),
        ({"filters": (RejectTruncated,)}, TypeError, "`filters` holds"),
        ({"dedup": Deduplicate}, TypeError, "`dedup` must be Deduplicate"),
        ({"reward_funcs": []}, ValueError, "reward"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "`reward_weights` has 2 entries for 1"),
    ],
)
def test_arguments_are_refused_at_construction(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        resampler(**options)


def test_one_greedy_candidate_is_the_most_probable_answer() -> None:
    model, tokenizer, prompts = generators.tiny_model().eval(), generators.tokenizer(), generators.prompts(4)
    one = resampler(num_candidates=1, generation_config=generators.sampling(do_sample=False, temperature=3.0))
    made = [one.generate(model, tokenizer, prompts, seed=seed) for seed in (0, 1)]
    assert [answer.text for answer in made[0]] == [answer.text for answer in made[1]]
    for answer, prompt in zip(made[0], prompts["prompt"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        config = generators.sampling(do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=generators.PAD)
        greedy = model.generate(**ids, generation_config=config)[0, ids["input_ids"].shape[1] :]
        assert answer.token_ids == greedy.tolist()


@pytest.mark.parametrize(("engine", "error"), [("vllm", ValueError), (3, TypeError), (CountingEngine, TypeError)])
def test_wrong_engines(tmp_path: Path, engine: Any, error: type[Exception]) -> None:
    refused(tmp_path, error, "`engine`", resampler(engine=engine))


def test_a_model_that_cannot_generate(tmp_path: Path) -> None:
    config = generators.tiny_model().config
    refused(tmp_path, ValueError, "LlamaModel cannot generate", model=hf.LlamaModel(config))
    made = resampler(proposal_model=hf.LlamaModel(config))
    refused(tmp_path, ValueError, "LlamaModel cannot generate", made)


def test_models_that_share_no_tokenizer(tmp_path: Path) -> None:
    other = generators.tiny_model(vocab_size=30)
    for option in ("proposal_model", "reference_model"):
        made = resampler(**{option: other})
        match = f"has a vocabulary of 30 and the trained model one of {len(generators.WORDS)}"
        refused(tmp_path, ValueError, match, made)


@pytest.mark.parametrize(("reference", "match"), [("base", "this model has none"), ("gpt2", 'must be a model, "base"')])
def test_a_reference_model_that_is_none(tmp_path: Path, reference: str, match: str) -> None:
    refused(tmp_path, ValueError, match, resampler(reference_model=reference))


def test_no_tokenizer(tmp_path: Path) -> None:
    refused(tmp_path, ValueError, "`processing_class` is NoneType", processing_class=None)


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {}, "`dataloader_persistent_workers"),
        ({}, {"round_start": "best"}, "Set `metric_for_best_model`"),
    ],
)
def test_arguments_of_the_trainer_that_do_not_go_with_rounds(
    tmp_path: Path, args: dict, options: dict, match: str
) -> None:
    refused(tmp_path, ValueError, match, resampler(**options), args=args)


def test_a_column_that_a_reward_needs(tmp_path: Path) -> None:
    match = "`share_of_wanted` needs the column `wanted`"
    refused(tmp_path, ValueError, match, train_dataset=PROMPTS.remove_columns("wanted"))
    refused(tmp_path, ValueError, match, eval_dataset=PROMPTS.remove_columns("wanted"))

    def held_out(completions: list, secret: list, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    made = resampler(eval_reward_funcs=held_out)
    refused(tmp_path, ValueError, "`held_out` needs the column `secret`", made, eval_dataset=PROMPTS)


def test_references_that_are_absent(tmp_path: Path) -> None:
    made = resampler(on_nothing_accepted="reference")
    rows = PROMPTS.remove_columns("reference")
    refused(tmp_path, ValueError, "reads the column 'reference', which `train_dataset` lacks", made, train_dataset=rows)


def test_a_supervised_row_of_neither_kind(tmp_path: Path) -> None:
    made = resampler(supervised_dataset=[{"prompt": "a", "answer": "b"}], supervised_fraction=0.5)
    refused(tmp_path, ValueError, r"Row 0 of `supervised_dataset` has the columns \['prompt', 'answer'\]", made)


def test_an_iterable_data_set(tmp_path: Path) -> None:
    rows = PROMPTS.to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset` is a IterableDataset, whose rows cannot be chosen by index"):
        trainer(tmp_path, train_dataset=rows)


def test_an_engine_that_loses_a_candidate(tmp_path: Path) -> None:
    class Lossy(CountingEngine):
        def __call__(self, model: Any, request: Any) -> Any:
            return list(super().__call__(model, request))[1:]

    with pytest.raises(RuntimeError, match="Lossy returned 7 sequences for 2 prompts of 4 candidates"):
        trained(tmp_path, resampler(engine=Lossy()))


def test_a_held_out_prompt_that_is_trained_on_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = datasets.concatenate_datasets([generators.prompts(3, first=50), PROMPTS.select([2])])
    trained(tmp_path, eval_dataset={"clean": generators.prompts(3, first=50), "leaky": shared})
    assert "`leaky` holds 1 prompts that are trained on too (the first in row 3)" in caplog.text
    assert "`clean`" not in caplog.text


def test_stages_before_a_trainer_are_refused() -> None:
    made = CandidateResampler(generators.share_of_wanted, generation_config=generators.sampling())
    with pytest.raises(RuntimeError, match="not bound to a trainer yet"):
        made.resample(0)


class Rows(Dataset):
    """A data set of torch's, whose rows are mappings."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        return dict(PROMPTS[index])


def test_any_data_set_with_a_length_serves(tmp_path: Path) -> None:
    trained(tmp_path / "torch", train_dataset=Rows())
    trained(tmp_path / "list", train_dataset=list(PROMPTS))
    assert stored(tmp_path / "torch") == stored(tmp_path / "list")


def test_a_collator_that_makes_its_own_labels_is_refused(tmp_path: Path) -> None:
    engine = CountingEngine()
    collator = hf.DataCollatorForLanguageModeling(generators.tokenizer(), mlm=False)
    with pytest.raises(ValueError, match=r"DataCollatorForLanguageModeling.*Leave it out, or take DataCollatorForSeq2"):
        trained(tmp_path, resampler(engine=engine), data_collator=collator)
    assert engine.calls == []
    assert not (tmp_path / "candidates").exists()


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
