"""Stored candidates in the forms that TRL's trainers read, rounds inside SFTTrainer, and the stages by hand."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import generators
from generative_runs import CountingEngine, logged, resampler, round_dir, stored, trained
from rsft_hf import (
    CandidateResampler,
    Deduplicate,
    LossResampler,
    RejectionSamplingMixin,
    Threshold,
    TopKPerPrompt,
    export_dpo,
    export_kto,
    export_sft,
    import_candidates,
    load_candidates,
)
from rsft_hf.generative import RejectTruncated, accept_again, score_again

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

ARGS = {
    "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "max_length": None,
}  # fmt: skip


class SFTInRounds(RejectionSamplingMixin, trl.SFTTrainer):
    """What a user writes."""


@pytest.fixture(scope="module", params=[False, True], ids=["text", "messages"])
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds."""
    output_dir = tmp_path_factory.mktemp("rounds")
    made = resampler(acceptance=TopKPerPrompt(2), filters=(RejectTruncated(),))
    rows = generators.prompts(9, conversational=request.param)
    trained(output_dir, made, train_dataset=rows, args={"num_train_epochs": 2})
    return output_dir


def one_step(name: str, dataset: datasets.Dataset, tmp_path: Path, **settings: Any) -> float:
    config = getattr(trl, f"{name}Config")(str(tmp_path), max_steps=1, **ARGS, **settings)
    models = {"model": generators.tiny_model(attention_dropout=0.0)}
    if name != "SFT":
        models["ref_model"] = generators.tiny_model(
            attention_dropout=0.0
        )  # of a model without a name TRL finds none by itself
    made = getattr(trl, f"{name}Trainer")(
        **models, args=config, train_dataset=dataset, processing_class=generators.tokenizer()
    )
    made.train()
    return logged(made, "loss")[0]


@pytest.mark.parametrize("as_messages", [False, True])
def test_sft_reads_what_is_exported(folder: Path, tmp_path: Path, as_messages: bool) -> None:
    exported = export_sft(folder / "candidates", as_messages)
    accepted = [row for number in (0, 1) for row in stored(folder, number) if row["is_accepted"]]
    assert len(exported) == len(accepted) > 9
    assert exported.column_names == (["messages"] if as_messages else ["prompt", "completion"])
    for row, source in zip(exported, accepted, strict=True):
        answer = row["messages"] if as_messages else row["completion"]
        text = source["separator"] + source["text"] if isinstance(answer, str) else source["text"]
        assert text == (answer if isinstance(answer, str) else answer[-1]["content"])
    assert 0 < one_step("SFT", exported, tmp_path) < 30


def test_dpo_reads_what_is_exported(folder: Path, tmp_path: Path) -> None:
    exported = export_dpo(folder / "candidates")
    for row in exported:
        assert row["chosen_reward"] > row["rejected_reward"]
    rows = stored(folder)
    rewards: dict = {}
    for row in rows:
        if row["reward"] is not None:
            rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    expected = [(max(each), min(each)) for each in rewards.values() if max(each) > min(each)]
    first = export_dpo(round_dir(folder))
    assert list(zip(first["chosen_reward"], first["rejected_reward"], strict=True)) == expected != []
    assert one_step("DPO", exported, tmp_path) == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference agree
    with pytest.raises(ValueError, match="no candidates that were rewarded more than 5 apart"):
        export_dpo(folder / "candidates", min_margin=5)
    with pytest.raises(ValueError, match="`min_margin`=-1 must be at least 0"):
        export_dpo(folder / "candidates", min_margin=-1)


def test_kto_reads_what_is_exported(folder: Path, tmp_path: Path) -> None:
    exported = export_kto(folder / "candidates")
    rows = [row for number in (0, 1) for row in stored(folder, number) if row["verdict"] != "filtered"]
    assert exported["label"] == [row["is_accepted"] for row in rows]
    assert set(exported["label"]) == {True, False}
    assert 0 < one_step("KTO", exported, tmp_path) < 30


def test_trainers_read_the_exports_of_imported_candidates(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completions": ["c a", "d b"], "scores": [1, 0]} for prompt in ("a b", "b", "c d", "d")]
    imported = import_candidates(rows, tmp_path / "imported")
    accepted = accept_again(imported, tmp_path / "accepted", Threshold(minimum=0.5))
    for name, export in (("SFT", export_sft), ("DPO", export_dpo), ("KTO", export_kto)):
        assert 0 < one_step(name, export(accepted), tmp_path / name) < 30


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no candidates"):
        export_sft(tmp_path)
    with pytest.raises(RuntimeError, match="No candidate was accepted"):
        trained(tmp_path, resampler(acceptance=Threshold(minimum=1.0)))
    with pytest.raises(ValueError, match="holds no candidates that were accepted"):
        export_sft(tmp_path / "candidates")


@pytest.mark.parametrize("dataset_kwargs", [None, {"skip_prepare_dataset": True}])
@pytest.mark.parametrize("conversational", [False, True])
def test_sft_trainer_trains_rounds(tmp_path: Path, conversational: bool, dataset_kwargs: Any) -> None:
    config = trl.SFTConfig(str(tmp_path), num_train_epochs=2, dataset_kwargs=dataset_kwargs, learning_rate=1e-3, **ARGS)
    rows = generators.prompts(9, conversational=conversational)
    made, model = resampler(), generators.tiny_model()
    held_out = generators.prompts(3, conversational, first=82)
    ours = SFTInRounds(
        model=model,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=generators.tokenizer(),
        resampler=made,
    )
    ours.train()
    assert ours.state.global_step == 10
    assert len(logged(ours, "accepted/reward")) == 2
    assert ours.evaluate()["eval_length"] > 0
    # The loss is that of the completions alone, as in plain Trainer.
    plain = trained(tmp_path / "plain", train_dataset=rows, args={"num_train_epochs": 2})
    assert stored(tmp_path) == stored(tmp_path / "plain")
    assert logged(ours, "loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=1e-4)


def test_sft_trainer_still_prepares_held_out_rows(tmp_path: Path) -> None:
    ours = SFTInRounds(
        model=generators.tiny_model(),
        args=trl.SFTConfig(str(tmp_path), **ARGS),
        train_dataset=generators.prompts(4),
        eval_dataset={
            "prompts": generators.prompts(2, first=82),
            "texts": datasets.Dataset.from_dict({"text": ["a b"]}),
        },
        processing_class=generators.tokenizer(),
        resampler=resampler(),
    )
    figures = ours.evaluate()
    assert {"eval_prompts_reward", "eval_texts_loss"} <= figures.keys()


@pytest.mark.parametrize("made", [resampler, LossResampler])
def test_grpo_trainer_is_refused_with_the_reason(tmp_path: Path, made: Any) -> None:
    class InGRPO(RejectionSamplingMixin, trl.GRPOTrainer):
        pass

    with pytest.raises(ValueError, match=r"GRPOTrainer generates inside its training steps.*over SFTTrainer"):
        InGRPO(
            model=generators.tiny_model(),
            reward_funcs=generators.share_of_wanted,
            args=trl.GRPOConfig(str(tmp_path), num_generations=2, report_to="none", use_cpu=True, bf16=False),
            train_dataset=generators.prompts(8),
            processing_class=generators.tokenizer(),
            resampler=made(),
        )


def test_a_trainer_of_preferences_is_refused_before_the_first_round(tmp_path: Path) -> None:
    class InDPO(RejectionSamplingMixin, trl.DPOTrainer):
        pass

    engine = CountingEngine()
    ours = InDPO(
        model=generators.tiny_model(),
        ref_model=generators.tiny_model(),
        args=trl.DPOConfig(str(tmp_path), **ARGS),
        train_dataset=generators.prompts(8),
        processing_class=generators.tokenizer(),
        resampler=resampler(engine=engine),
    )
    with pytest.raises(
        ValueError, match=r"`data_collator` \(DataCollatorForPreference\) cannot read rows of input_ids"
    ):
        ours.train()
    assert engine.calls == []


def by_hand(**options: Any) -> CandidateResampler:
    return resampler(**{"acceptance": TopKPerPrompt(2), "filters": (RejectTruncated(),), **options})


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_stages_by_hand_are_the_round(tmp_path: Path, name: str) -> None:
    model, tokenizer, rows = generators.tiny_model(name), generators.tokenizer_for(name), generators.prompts(9)
    made, options = by_hand(), {"on_nothing_accepted": "best"}
    trained(tmp_path, by_hand(**options), model=generators.tiny_model(name), processing_class=tokenizer)
    made = by_hand(**options)
    candidates = made.accept(made.score(made.generate(model, tokenizer, rows, seed=42)), seed=42)
    for ours, row in zip(candidates, stored(tmp_path), strict=True):
        assert (ours.token_ids, ours.reward, ours.verdict) == (row["token_ids"], row["reward"], row["verdict"])
    encoded = made.encode(candidates, tokenizer, is_encoder_decoder=name == "t5")
    assert len(encoded) == sum(row["is_accepted"] for row in stored(tmp_path))
    assert model.training
    assert made.generate(model, tokenizer, rows, seed=42, attempt=1)[0].seed != candidates[0].seed


def test_generating_by_hand_moves_no_random_state() -> None:
    before = torch.get_rng_state()
    made = by_hand()
    made.score(made.generate(generators.tiny_model(), generators.tokenizer(), generators.prompts(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_candidates_are_scored_and_accepted_again_without_being_generated(folder: Path, tmp_path: Path) -> None:
    def words(completions: list, wanted: list[str], **_: Any) -> list[float]:
        return [float(len((one if isinstance(one, str) else one[0]["content"]).split())) for one in completions]

    source, before = round_dir(folder), stored(folder)
    rows = generators.prompts(9, conversational=not isinstance(before[0]["prompt"], str))
    dedup = Deduplicate(key=lambda text: text[:1])
    scored = score_again(source, tmp_path / "scored", words, rows, filters=(), dedup=dedup)
    accepted = accept_again(scored, tmp_path / "accepted", Threshold(minimum=3))
    again = load_candidates(accepted).to_list()
    assert stored(folder) == before
    assert [row["token_ids"] for row in again] == [row["token_ids"] for row in before]
    for row in again:
        assert row["reward"] == row["rewards/words"] == len(row["text"].split())
        assert row["is_accepted"] == (row["verdict"] == "accepted")
        assert row["verdict"] in (("duplicate", "accepted") if row["reward"] > 3 else ("duplicate", "rejected"))
    assert {row["verdict"] for row in again} == {"accepted", "rejected", "duplicate"}
    with pytest.raises(FileExistsError, match="is not empty"):
        accept_again(scored, tmp_path / "accepted", Threshold(minimum=3))
    with pytest.raises(FileNotFoundError, match="Give the folder of one round"):
        accept_again(tmp_path, tmp_path / "new", Threshold(minimum=3))


def test_the_same_rule_and_seed_accept_the_same_again(folder: Path, tmp_path: Path) -> None:
    accept_again(round_dir(folder), tmp_path / "same", TopKPerPrompt(2), seed=42)
    assert load_candidates(tmp_path / "same").to_list() == stored(folder)


def test_references_are_no_candidates_when_judged_again(tmp_path: Path) -> None:
    made = resampler(acceptance=Threshold(minimum=0.2), on_nothing_accepted="reference", engine=CountingEngine())
    trained(tmp_path, made)
    accept_again(round_dir(tmp_path), tmp_path / "again", Threshold(minimum=0.2))
    expected = [row for row in stored(tmp_path) if row["finish_reason"] != "reference"]
    assert len(expected) < len(stored(tmp_path))
    assert load_candidates(tmp_path / "again").to_list() == expected
