"""The configuration in force: the model's own, the user's over it, and nothing that a default brings in unasked."""

import logging

import pytest
import torch
import transformers as hf
from transformers import GenerationConfig

import generators as g
from rsft_hf.engines.generation_config import (
    _WITHOUT_EFFECT,
    active_settings,
    check_generation_config,
    check_settings_supported,
    context_length,
    sampling_config,
    shaping_settings,
)
from rsft_hf.generative.resampler import CandidateResampler


def model_with(name: str = "llama", **own):
    """A model whose `generation_config.json` would bring these."""
    model = g.tiny_model(name)
    for setting, value in own.items():
        setattr(model.generation_config, setting, value)
    return model


def test_the_models_own_settings_stay_and_the_users_override_them():
    model = model_with(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, max_new_tokens=50)
    own = active_settings(sampling_config(None, model, g.tokenizer()))
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 50}
    assert own | wanted == own
    mixed = active_settings(sampling_config(g.sampling(9, temperature=1.2, top_k=0), model, g.tokenizer()))
    assert mixed | wanted | {"temperature": 1.2, "top_k": 0, "max_new_tokens": 9} == mixed
    assert model.generation_config.temperature == 0.6  # a copy was changed, not the model's


def test_what_nobody_says_is_plain_sampling():
    model = g.tiny_model()
    config = g.complete(model)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.0, 0, 1.0)
    assert (config.num_beams, config.num_return_sequences, config.max_length) == (1, 1, None)


def test_no_top_k_of_fifty_comes_in():
    # transformers fills an unset top_k with 50: with 400 nearly equal tokens, log q would be log(1/50).
    model = g.tiny_model("gpt2", vocab_size=400, initializer_range=1e-3)
    found = g.generated(model, g.complete(model, max_new_tokens=4), [[7, 8]], num_candidates=60)
    tokens = [token for one in found for token in one.token_ids]
    assert len(set(tokens)) > 100  # of 240 draws from 400; at most 50 a step and 200 in all, seen 45 a step
    log_q = torch.cat([one.log_q for one in found])
    torch.testing.assert_close(log_q, torch.full_like(log_q, -5.9915), atol=0.1, rtol=0)  # log(1/400)


def test_greedy_takes_away_the_sampling_and_keeps_the_users_beams():
    model = model_with(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, num_beams=6)  # Marian's own beams are 6
    greedy = g.complete(model, is_greedy=True)
    assert (greedy.do_sample, greedy.num_beams) == (False, 1)
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (None, None, None)
    assert g.complete(model, is_greedy=True, num_beams=3).num_beams == 3
    assert g.complete(model).num_beams == 1


@pytest.mark.parametrize(
    ("settings", "num_candidates", "message"),
    [
        ({"do_sample": False}, 4, r"is greedy \(do_sample=False.*`num_candidates`=4.*Set do_sample=True"),
        ({"temperature": 0.0, "do_sample": True}, 1, r"temperature=0.0.*temperature above 0"),
        ({"num_beams": 4}, 1, r"num_beams=4: beams are not draws.*`eval_generation_config`"),
        ({"num_return_sequences": 3, "do_sample": True}, 8, r"num_return_sequences=3. Say it by `num_candidates`"),
    ],
)
def test_a_configuration_that_gives_no_candidates_is_refused_at_construction(settings, num_candidates, message):
    config = hf.GenerationConfig(max_new_tokens=8, **settings)
    with pytest.raises(ValueError, match=message):
        check_generation_config(config, num_candidates)
    with pytest.raises(ValueError, match=message):
        CandidateResampler(g.share_of_wanted, num_candidates=num_candidates, generation_config=config)


def test_what_is_fine_is_not_refused():
    check_generation_config(None, 8)
    check_generation_config(g.sampling(do_sample=False), 1)  # the model's one best answer
    check_generation_config(g.sampling(temperature=0.7, top_p=0.9, num_beams=1), 8)
    with pytest.raises(TypeError, match=r"must be a transformers GenerationConfig, got dict. Write"):
        check_generation_config({"max_new_tokens": 8}, 8)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_answer_without_a_limit_is_refused(name):
    with pytest.raises(ValueError, match=r"`max_new_tokens` is unset.*GenerationConfig\(max_new_tokens=...\)"):
        sampling_config(hf.GenerationConfig(temperature=0.7), g.tiny_model(name), g.tokenizer())


def test_the_own_limit_of_an_encoder_decoder_counts_and_that_of_others_does_not():
    # `max_length` counts the prompt of a decoder-only model.
    assert sampling_config(None, model_with("marian", max_length=512), g.tokenizer()).max_new_tokens == 512
    with pytest.raises(ValueError, match="`max_new_tokens` is unset"):
        sampling_config(None, model_with("llama", max_length=512), g.tokenizer())


def without_end() -> hf.PreTrainedTokenizerFast:
    tokenizer = g.tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def test_a_candidate_that_nothing_can_end_is_refused():
    model = model_with(eos_token_id=None)
    with pytest.raises(ValueError, match=r"Nothing can end a candidate.*`eos_token_id`.*`stop_strings`"):
        sampling_config(g.sampling(), model, without_end())
    assert sampling_config(g.sampling(stop_strings=["em"]), model, without_end()).eos_token_id is None
    assert sampling_config(g.sampling(), model, g.tokenizer()).eos_token_id == g.EOS


def test_special_tokens_come_from_the_model_before_the_tokenizer():
    model = model_with(eos_token_id=[g.EOS, g.END], pad_token_id=None)
    config = sampling_config(g.sampling(), model, g.tokenizer())
    assert (config.eos_token_id, config.pad_token_id) == ([g.EOS, g.END], g.PAD)
    without_pad = g.tokenizer(pad_token=None)
    assert sampling_config(g.sampling(), model, without_pad).pad_token_id == g.EOS  # the first end token
    nothing = model_with(eos_token_id=None, pad_token_id=None)
    tokenizer = without_end()
    tokenizer.pad_token = None
    assert sampling_config(g.sampling(stop_strings=["em"]), nothing, tokenizer).pad_token_id == 0


@pytest.mark.parametrize("is_greedy", [False, True])
def test_an_end_that_is_forced_at_the_limit_is_no_end(is_greedy):
    # BART's and Marian's own settings force an end token at the limit: a cut-off answer would look complete.
    model = model_with("bart", forced_eos_token_id=g.EOS)
    assert g.complete(model, is_greedy).forced_eos_token_id is None
    assert g.complete(model, is_greedy, forced_eos_token_id=g.END).forced_eos_token_id == g.END  # a user may
    num_candidates, plain = 1 if is_greedy else 2, g.tiny_model("bart")
    free = g.generated(plain, g.complete(plain, is_greedy), g.prompt_ids(4, True), num_candidates)
    found = g.generated(model, g.complete(model, is_greedy), g.prompt_ids(4, True), num_candidates)
    assert [(one.token_ids, one.finish_reason) for one in found] == [(one.token_ids, one.finish_reason) for one in free]
    assert "length" in {one.finish_reason for one in found}


def test_the_context_of_every_architecture_is_known():
    known = {name: context_length(g.tiny_model(name)) for name in g.NAMES}
    assert known == {"llama": 64, "gpt2": 64, "qwen3": 64, "t5": None, "bart": 64, "marian": 64}


SETTINGS = {
    "num_beams": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9,
    "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "repetition_penalty": 1.2, "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[g.A]], "suppress_tokens": [g.A],
    "begin_suppress_tokens": [g.A], "sequence_bias": [[[g.A], 1.5]], "forced_bos_token_id": 0, "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": [2, 1.1], "guidance_scale": 1.5, "token_healing": True, "min_length": 2,
    "remove_invalid_values": True, "min_new_tokens": 2, "stop_strings": ["em"], "max_time": 9.0,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_refused_unless_it_is_obeyed(name):
    assert len(SETTINGS) == 26
    config = GenerationConfig(**{name: SETTINGS[name]})
    assert shaping_settings(config) == {name: SETTINGS[name]}
    check_settings_supported(config, (name,), "It", "Do without.")
    with pytest.raises(ValueError, match=rf"It cannot sample with {name}=.* obeys seed, top_x only\. Do without\."):
        check_settings_supported(config, ("top_x", "seed"), "It", "Do without.")


def test_what_changes_nothing_is_let_through():
    plain = g.complete(g.tiny_model("llama"))
    greedy = g.complete(g.tiny_model("llama"), is_greedy=True)
    assert (plain.temperature, plain.top_k, plain.top_p) == (1.0, 0, 1.0)
    assert shaping_settings(plain) == shaping_settings(greedy) == {}
    assert shaping_settings(GenerationConfig(repetition_penalty=1.0, suppress_tokens=[], no_repeat_ngram_size=0)) == {}


def test_no_name_is_misspelt():
    missing = set(_WITHOUT_EFFECT) - set(GenerationConfig().to_dict())
    assert missing <= {"top_h", "constraints", "force_words_ids", "num_beam_groups", "penalty_alpha", "dola_layers"}


def test_settings_of_the_model_are_said_and_log_q_is_the_processed_one(tmp_path, caplog):
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
