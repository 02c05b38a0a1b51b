"""Candidates in slots against `model.generate` and teacher-forced passes: who flies with whom must not show."""

import pytest
import torch
import transformers as hf
from scipy.stats import chisquare
from test_generate import check_log_probs, cut

import architectures
import generators as g
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import completion_log_probabilities

NUM_CANDIDATES = 3


def one_by_one(model, ids: list[list[int]], **settings) -> list[list[int]]:
    """What `model.generate` says to each prompt alone, without the prompt."""
    config = hf.GenerationConfig(do_sample=False, pad_token_id=g.PAD, eos_token_id=g.EOS)
    config.update(**settings)
    is_encoder_decoder = model.config.is_encoder_decoder
    start = {"decoder_start_token_id": model.config.decoder_start_token_id} if is_encoder_decoder else {}
    rows = []
    for prompt in ids:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": mask, "tokenizer": g.tokenizer()}
        row = model.generate(**inputs, generation_config=config, **start)[0].tolist()
        rows.append(row[1 if is_encoder_decoder else len(prompt) :])
    return rows


def same(found: list, expected: list) -> None:
    assert [(one.prompt, one.index) for one in found] == [(one.prompt, one.index) for one in expected]
    assert [(one.token_ids, one.finish_reason) for one in found] == [
        (one.token_ids, one.finish_reason) for one in expected
    ]


def test_the_architectures_are_here():
    assert len(architectures.SLOTTED) == 16
    assert {"llama", "gpt2", "qwen3", "gemma3", "mixtral", "phi", "t5", "bart", "marian"} <= set(architectures.SLOTTED)


@pytest.mark.parametrize("kind", ["plain", "end tokens", "stop strings"])
@pytest.mark.parametrize("name", architectures.SLOTTED)
def test_greedy_tokens_are_those_of_generate(name, kind):
    model, settings = architectures.model_of(name), {}
    ids, engine = architectures.prompts_for(model), InFlightEngine(max_sequences=3)
    expected = one_by_one(model, ids, max_new_tokens=12)
    if kind != "plain":  # end at the word that makes the lengths differ most
        ends = {word: [at for at, other in enumerate(g.WORDS) if word in other] for word in g.WORDS[g.A - 4 :]}
        if kind == "end tokens":
            ends = {word: [g.WORDS.index(word)] for word in ends}
        lengths = {word: {len(cut(row, [g.EOS, *ids])) for row in expected} for word, ids in ends.items()}
        word = max(lengths, key=lambda word: len(lengths[word]))
        assert len(lengths[word]) > 1
        settings = {"eos_token_id": [g.EOS, *ends[word]]} if kind == "end tokens" else {"stop_strings": [word]}
        expected = one_by_one(model, ids, max_new_tokens=12, **settings)
        assert {len(row) for row in expected} == lengths[word]
    config = g.complete(model, is_greedy=True, max_new_tokens=12, **settings)
    assert [one.token_ids for one in g.generated(model, config, ids, engine=engine)] == expected
    assert not engine._said  # slots, not the fallback


@pytest.mark.parametrize("name", architectures.UNSLOTTED)
def test_what_slots_cannot_hold_is_left_to_generate(name, caplog):
    model, engine = architectures.model_of(name), InFlightEngine(max_sequences=3)
    ids = architectures.prompts_for(model)
    expected = one_by_one(model, ids, max_new_tokens=9)
    found = g.generated(model, g.complete(model, is_greedy=True, max_new_tokens=9), ids, engine=engine)
    assert [one.token_ids for one in found] == expected
    (reason,) = engine._said
    assert architectures.UNSLOTTED[name] in reason


SETTINGS = {
    "plain": {},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.02},
    "penalised": {"repetition_penalty": 1.8},
    "pad_is_eos": {"no_repeat_ngram_size": 2, "pad_token_id": g.EOS},
    "long_enough": {"min_new_tokens": 3, "forced_eos_token_id": g.EOS},
    "forbidden": {"bad_words_ids": [[11], [12, 13]], "suppress_tokens": [14], "begin_suppress_tokens": [10]},
}
CASES = [(name, "plain") for name in architectures.SLOTTED]
CASES += [(name, kind) for name in ("gpt2", "t5", "bart") for kind in [*SETTINGS][1:]]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_candidates_depend_on_no_slots_order_or_company(name, settings):
    model = architectures.model_of(name)
    ids, config = architectures.prompts_for(model), g.complete(model, **SETTINGS[settings])
    alone = g.generated(model, config, ids, NUM_CANDIDATES, GenerateEngine(1))
    assert len({tuple(one.token_ids) for one in alone}) > len(ids)
    by_name = {(one.prompt, one.index): one for one in alone}
    for slots, numbers in ((64, range(len(ids))), (1, range(2)), (2, [6, 0, 3]), (5, [3, 1, 0, 6, 2, 5, 4])):
        chosen, engine = [ids[number] for number in numbers], InFlightEngine(slots, prefill_tokens=11)
        found = g.generated(model, config, chosen, NUM_CANDIDATES, engine, list(numbers))
        assert not engine._said
        assert len(found) == len(chosen) * NUM_CANDIDATES
        for one in found:
            other = by_name[numbers[one.prompt], one.index]
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            torch.testing.assert_close(one.log_q, other.log_q, atol=3e-4, rtol=0)
            torch.testing.assert_close(one.log_p, other.log_p, atol=3e-4, rtol=0)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (1.3, 6, 0.8)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "t5", "marian"])
def test_log_q_and_log_p_are_those_of_a_teacher_forced_pass(name, settings):
    temperature, top_k, top_p = settings
    model = architectures.model_of(name)
    ids, config = architectures.prompts_for(model), g.complete(model, temperature=temperature, top_k=top_k, top_p=top_p)
    found = g.generated(model, config, ids, NUM_CANDIDATES, InFlightEngine(5))
    check_log_probs(model, ids, found, settings)
    encoder = Encoder(g.tokenizer_for(name), model.config.is_encoder_decoder)
    sums = torch.stack([one.log_p.double().sum() for one in found])
    asked, answers = [ids[one.prompt] for one in found], [one.token_ids for one in found]
    torch.testing.assert_close(completion_log_probabilities(model, encoder, asked, answers), sums, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_frequencies_are_those_of_the_processed_distribution(name):
    # Two tokens of each candidate: the second is drawn in slots, whoever shares them.
    model, num_candidates, end = architectures.model_of(name), 4000, 2
    ids = architectures.prompts_for(model, 2)
    config = g.complete(model, temperature=0.8, top_p=0.95, max_new_tokens=end, suppress_tokens=[g.EOS])
    found = g.generated(model, config, ids, num_candidates, InFlightEngine(64))
    exact = g.generated(model, config, ids, num_candidates, GenerateEngine(512))
    same(found, exact)
    for prompt in range(2):
        pairs = [(tuple(one.token_ids), float(one.log_q.double().sum())) for one in found if one.prompt == prompt]
        probability = {tokens: 2.718281828459045**value for tokens, value in pairs}
        frequent = [tokens for tokens, value in probability.items() if value * num_candidates >= 5]
        counts = [sum(tokens == other for other, _ in pairs) for tokens in frequent]
        expected = [probability[tokens] * num_candidates for tokens in frequent]
        rest, rest_expected = num_candidates - sum(counts), num_candidates - sum(expected)
        if rest_expected < 5:
            counts[-1], expected[-1] = counts[-1] + rest, expected[-1] + rest_expected
        else:
            counts, expected = [*counts, rest], [*expected, rest_expected]
        assert len(counts) > 3
        assert chisquare(counts, expected).pvalue > 1e-4
        assert chisquare(counts[::-1], expected).pvalue < 1e-4  # it can tell


def test_every_end_token_ends_and_padding_with_one_changes_nothing():
    model, ends = architectures.model_of("llama"), [g.EOS, g.WORDS.index("h"), g.WORDS.index("j")]
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    long = g.generated(model, g.complete(model, max_new_tokens=10), ids, NUM_CANDIDATES, engine)
    for pad in (g.PAD, g.EOS):
        config = g.complete(model, max_new_tokens=10, eos_token_id=ends, pad_token_id=pad)
        short = g.generated(model, config, ids, NUM_CANDIDATES, engine)
        assert [one.token_ids for one in short] == [cut(one.token_ids, ends) for one in long]
        assert [one.finish_reason == "stop" for one in short] == [one.token_ids[-1] in ends for one in short]
