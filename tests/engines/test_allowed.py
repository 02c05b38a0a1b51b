"""Every setting that shapes a distribution is seen, whoever cannot obey it; what changes nothing is let through."""

import pytest
from transformers import GenerationConfig

import generators as g
from rsft_hf.engines.generation_config import _WITHOUT_EFFECT, check_settings_supported, shaping_settings

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
