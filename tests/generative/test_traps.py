"""The traps of generating and training on it, 1 to 9; what other files hold in full is named."""

import logging

import pytest
import torch
import transformers as hf
from accelerate.data_loader import BatchSamplerShard

import generators as g
from rsft_hf.acceptance import RSO, Threshold
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.sampling import pad_prompts
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.encoding import Encoder, RowCollator
from rsft_hf.generative.filters import RejectTruncated
from rsft_hf.generative.resampler import CandidateResampler

A, B, C = g.A, g.A + 1, g.A + 2


@pytest.mark.parametrize("name", g.NAMES)
def test_every_architecture_completes_a_round(tmp_path, name):
    run = g.trainer(tmp_path, g.resampler(), name)
    before = {path: value.clone() for path, value in run.model.state_dict().items()}
    run.train()
    assert run.state.global_step == 2  # 4 prompts, one accepted answer each, in batches of 2
    assert [(one.prompt_id, one.index) for one in g.stored(run)] == [(p, j) for p in range(4) for j in range(2)]
    assert [one.prompt_id for one in g.stored(run) if one.is_accepted] == [0, 1, 2, 3]
    assert any(not torch.equal(value, before[path]) for path, value in run.model.state_dict().items())
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_trap_01_generation_pads_left_and_training_right():
    """Tokens: tests/engines/test_generate.py, greedy tokens of each prompt alone."""
    rows = [[A], [A, B, C]]
    assert pad_prompts(rows, g.PAD, "cpu", is_left=True)["input_ids"].tolist() == [[g.PAD, g.PAD, A], [A, B, C]]
    assert pad_prompts(rows, g.PAD, "cpu", is_left=True)["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert pad_prompts(rows, g.PAD, "cpu", is_left=False)["input_ids"].tolist() == [[A, g.PAD, g.PAD], [A, B, C]]
    encoder = Encoder(g.tokenizer(), is_encoder_decoder=False)
    batch = RowCollator(g.PAD)([encoder.training_row([A], [B]), encoder.training_row([A, B], [C])])
    assert batch["input_ids"].tolist() == [[A, B, g.PAD], [A, B, C]]


def test_trap_02_sampled_tokens_are_learnt_and_the_prompt_is_not(tmp_path):
    """Tokens that encoding again would change: test_generative_encoding.py."""
    run = g.trainer(tmp_path, g.resampler())
    run.train()
    ids, accepted = g.prompt_ids(4), [one for one in g.stored(run) if one.is_accepted]
    assert any(token < 6 for one in accepted for token in one.token_ids[:-1])  # special tokens, which texts leave out
    for one, row in zip(accepted, run.resampler.pool.accepted, strict=True):
        assert row["input_ids"] == ids[one.prompt_id] + one.token_ids
        assert row["labels"] == [-100] * len(ids[one.prompt_id]) + one.token_ids


def test_trap_03_every_end_token_ends_and_is_learnt_also_as_padding(tmp_path):
    """Ends: tests/engines/test_generate.py. Padding: test_generative_encoding.py."""
    config = g.sampling(12, eos_token_id=[g.EOS, B], pad_token_id=g.EOS)
    run = g.trainer(tmp_path, g.resampler(generation_config=config, num_candidates=8), num_prompts=6)
    run.train()
    ended = [one for one in g.stored(run) if one.finish_reason == "stop"]
    assert {one.token_ids[-1] for one in ended} == {g.EOS, B}
    batch = run.resampler.collator(hf.default_data_collator)(run.resampler.pool.accepted)
    lasts = [labels[labels != -100][-1].item() for labels in batch["labels"]]
    assert lasts == [row["input_ids"][-1] for row in run.resampler.pool.accepted]
    assert g.EOS in lasts


def test_trap_04_a_truncated_candidate_is_in_no_maximum():
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [100.0 if text == "cut" else 1.0 for text in completions]

    candidates = [Candidate(0, "a", [A], "whole", "stop"), Candidate(0, "a", [B], "cut", "length", index=1)]
    # With r_max = 100 the other would be accepted with probability exp(-99 / 0.1).
    source = CandidateResampler(reward, RSO(beta=0.1, k=1), num_candidates=2)
    judged = source.accept(source.score(candidates))
    assert [one.verdict for one in judged] == ["accepted", "filtered"]
    assert seen == ["whole"]
    assert judged[1].rule == repr(RejectTruncated())


def test_trap_05_settings_of_the_model_are_said_and_log_q_is_the_processed_one(tmp_path, caplog):
    """The overriding: tests/engines/test_generation_config.py. The processing: tests/engines/test_generate.py."""
    model = g.tiny_model()
    model.generation_config.temperature, model.generation_config.top_k = 0.5, 3
    with caplog.at_level(logging.INFO, logger="rsft_hf"):
        run = g.trainer(tmp_path, g.resampler(keep_log_probs=True), model=model)
        run.train()
    said = next(line for line in caplog.messages if "Candidates are sampled with" in line)
    assert "'temperature': 0.5" in said
    assert "'top_k': 3" in said
    assert all(one.log_q > one.log_p for one in g.stored(run))  # three tokens share what twenty-one had


@pytest.mark.parametrize("name", g.NAMES)
def test_trap_06_a_prompt_is_read_once_for_all_its_candidates(name):
    model, read = g.tiny_model(name), []
    reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    def note(_, args, keywords):
        ids = keywords.get("input_ids", args[0] if args else None)
        read.append(len(ids) if ids.shape[1] > 1 else 0)

    reader.register_forward_pre_hook(note, with_kwargs=True)
    for max_sequences, rows in ((64, [3]), (9, [2, 1])):  # of 3 prompts with 4 candidates each: whole prompts a batch
        read.clear()
        g.generated(model, g.complete(model), g.prompt_ids(3), 4, GenerateEngine(max_sequences))
        assert [count for count in read if count] == rows


def test_trap_07_training_mode_and_checkpointing_leave_no_trace_and_are_given_back():
    plain, busy = g.tiny_model("gpt2").eval(), g.tiny_model("gpt2").train()
    busy.gradient_checkpointing_enable()
    busy.config.use_cache = False
    busy.transformer.h[0].mlp.eval()  # a frozen part stays as it was
    modes, widths = [module.training for module in busy.modules()], []
    busy.register_forward_pre_hook(lambda _, args, kw: widths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    source = g.resampler(num_candidates=3, engine="generate")  # the other engine first makes a trial run
    found, expected = (source.generate(model, g.tokenizer(), g.prompts(3)) for model in (busy, plain))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert widths[0] > 1
    assert set(widths[1:]) == {1}  # the cache is in use
    assert [module.training for module in busy.modules()] == modes
    assert busy.is_gradient_checkpointing
    assert busy.config.use_cache is False


def test_trap_08_processes_get_equal_shares_of_any_number_of_rows(tmp_path):
    """Real processes: test_generative_distributed.py."""
    rewards = iter([1.0] + [0.0] * 99)
    source = g.resampler(
        lambda prompts, **_: [next(rewards) for _ in prompts], Threshold(minimum=0.5), on_nothing_accepted="skip"
    )
    run = g.trainer(tmp_path, source, num_prompts=5)
    run.train()
    assert len(source.pool) == 1  # one prompt of five gave a row; five rows are trained on all the same
    batches = run.get_train_dataloader().batch_sampler
    shares = [list(BatchSamplerShard(batches, 2, rank)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]


def test_trap_09_a_round_with_nothing_accepted_is_an_error_or_the_policy(tmp_path):
    """Every policy: test_rounds.py."""
    source = g.resampler(acceptance=Threshold(minimum=9.0), on_nothing_accepted="raise")
    with pytest.raises(RuntimeError, match=r"No candidate was accepted in round-000: of 8, 8 rejected.*Remedies:"):
        g.trainer(tmp_path / "raise", source).train()
    run = g.trainer(tmp_path / "best", g.resampler(acceptance=Threshold(minimum=9.0)))
    run.train()
    assert [one.verdict for one in g.stored(run)].count("fallback") == 4
    assert run.state.global_step == 2
