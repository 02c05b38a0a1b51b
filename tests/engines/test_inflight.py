"""Candidates in slots against `model.generate` and teacher-forced passes: who flies with whom must not show."""

import dataclasses

import peft
import pytest
import torch
import transformers as hf
from scipy.stats import chisquare

import architectures
import generators as g
from architectures import request_for, run, texts
from generation_oracle import check_log_probs, cut, short_of_memory
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.engines.inflight.scheduler import Scheduler
from rsft_hf.engines.model_access import without_wrappers
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


ENGINES = [InFlightEngine(4), GenerateEngine(4)]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bad_requests_are_refused_before_anything_is_generated(engine, name):
    model = architectures.model_of(name)
    with pytest.raises(ValueError, match="Prompt 1 has no tokens, and nothing can be continued"):
        run(engine, model, request_for(model, [[g.A], []]))
    with pytest.raises(ValueError, match="`limits` holds a number below 1"):
        run(engine, model, request_for(model, [[g.A]], limits=[[0, 3]]))
    with pytest.raises(ValueError, match=r"`limits` must hold 2 numbers for each of 1 prompts, got rows of \[1\]"):
        run(engine, model, request_for(model, [[g.A]], limits=[[3]]))
    uneven = dataclasses.replace(request_for(model, [[g.A], [g.A]]), seeds=[[1, 2], [3]])
    with pytest.raises(ValueError, match=r"`seeds` must hold 2 numbers for each of 2 prompts, got rows of \[1, 2\]"):
        run(engine, model, uneven)
    assert run(engine, model, request_for(model, [])) == []
    assert run(engine, model, request_for(model, [[g.A]], num_candidates=0)) == []


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_prompt_that_fills_the_context_is_refused_and_one_that_just_fits_is_not(engine):
    model = architectures.model_of("llama")  # 64 positions, 8 of them for the answer
    fits = run(engine, model, request_for(model, [[g.A] * 56]))
    assert len(fits) == 2
    with pytest.raises(
        ValueError, match=r"Prompt 1 has 57 tokens, with `max_new_tokens`=8 it takes 65, and the model r"
    ):
        run(engine, model, request_for(model, [[g.A], [g.A] * 57]))
    bart = architectures.model_of("bart")
    with pytest.raises(ValueError, match="Prompt 0 has 65 tokens, and the model reads 64"):
        run(engine, bart, request_for(bart, [[g.A] * 65]))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_without_an_end_token_every_candidate_reaches_the_limit(engine):
    model = architectures.model_of("llama")
    config = g.complete(model)
    config.eos_token_id = model.generation_config.eos_token_id = None
    found = run(engine, model, request_for(model, architectures.prompts_for(model), config=config))
    assert {(len(one.token_ids), one.finish_reason) for one in found} == {(8, "length")}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_candidate_has_a_limit_of_its_own(engine, name):
    model = architectures.model_of(name)
    ids = architectures.prompts_for(model)
    long = run(engine, model, request_for(model, ids))
    limits = [[1 + (number + 3 * index) % 9 for index in range(2)] for number in range(len(ids))]
    short = run(engine, model, request_for(model, ids, limits=limits))
    for one, other in zip(short, long, strict=True):
        most = min(8, limits[one.prompt][one.index])
        assert one.token_ids == other.token_ids[:most]
        assert one.finish_reason == ("length" if len(other.token_ids) > most else other.finish_reason)


def test_beams_and_learned_prompts_are_left_to_generate():
    model = architectures.model_of("llama")
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    config = g.complete(model, is_greedy=True, num_beams=3)
    expected = texts(run(GenerateEngine(), model, request_for(model, ids, 1, config=config)))
    assert texts(run(engine, model, request_for(model, ids, 1, config=config))) == expected
    assert engine._said == {"num_beams=3 searches beams"}
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    engine = InFlightEngine(4)
    assert len(run(engine, prompted, request_for(model, ids))) == 2 * len(ids)
    assert engine._said == {"its adapter puts learned tokens before the prompt"}


def test_a_processor_that_may_look_at_other_rows_is_obeyed_and_never_dropped(caplog):
    model = architectures.model_of("gpt2")
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    config = g.complete(model, sequence_bias=[[[g.A], 5.0]])
    expected = texts(run(GenerateEngine(1), model, request_for(model, ids, config=config)))
    assert texts(run(engine, model, request_for(model, ids, config=config))) == expected
    assert engine._said == {"SequenceBiasLogitsProcessor may look at more than a row"}
    assert expected != texts(run(engine, model, request_for(model, ids)))


@pytest.mark.parametrize("most", [3, 5])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_with_too_little_memory_there_are_fewer_slots_and_nothing_is_lost_or_yielded_twice(name, most):
    model = architectures.model_of(name)
    ids = architectures.prompts_for(model)
    expected = texts(run(InFlightEngine(16), model, request_for(model, ids)))
    passes, engine = short_of_memory(model, most), InFlightEngine(16)
    assert texts(run(engine, model, request_for(model, ids))) == expected
    assert engine.max_sequences == 3  # of 14, by 7
    passes.clear()
    assert texts(run(engine, model, request_for(model, ids))) == expected
    assert max(passes) <= most  # it remembers


def test_one_candidate_that_does_not_fit_is_an_error():
    model, engine = architectures.model_of("llama"), InFlightEngine(8)
    run(engine, model, request_for(model, [[g.A]]))
    short_of_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        run(engine, model, request_for(model, [[g.A]]))


def test_a_budget_of_tokens_bounds_the_slots(monkeypatch):
    model, seen = architectures.model_of("llama"), []
    begin = Scheduler.__init__
    monkeypatch.setattr(Scheduler, "__init__", lambda self, *args: (begin(self, *args), seen.append(self.max_rows))[0])
    run(InFlightEngine(64, max_tokens=50), model, request_for(model, [[g.A] * 2] * 9))
    assert seen == [3, 5]  # the trial run's, and 50 tokens // (2 + 8)


@pytest.mark.parametrize("is_merged", [False, True])
def test_adapters_generate_in_slots(is_merged):
    base = architectures.model_of("llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    if is_merged:
        model.merge_adapter()
    ids, engine = architectures.prompts_for(base), InFlightEngine(4)
    expected = texts(run(GenerateEngine(1), model, request_for(base, ids)))
    assert texts(run(engine, model, request_for(base, ids))) == expected
    assert not engine._said
    with model.disable_adapter():
        assert texts(run(engine, model, request_for(base, ids))) != expected
    assert isinstance(without_wrappers(model), hf.LlamaForCausalLM)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_model_that_accelerate_has_prepared_for_autocast_generates_in_slots(is_adapter, tmp_path):
    """Its autocast is around the outer `forward`, which a trial run goes through and slots do not."""
    model = architectures.model_of("llama", hidden_size=256, intermediate_size=512, initializer_range=0.5)
    if is_adapter:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    args = hf.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, bf16=True)
    prepared = hf.Trainer(model, args).accelerator.prepare(model.eval())
    forward, engine = prepared.forward, InFlightEngine(4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        run(engine, prepared, request_for(prepared, architectures.prompts_for(without_wrappers(prepared))))
    assert not engine._said
    assert prepared.forward is forward


def test_half_precision_gives_the_same_distribution():
    model = architectures.model_of("llama")
    ids, engine = architectures.prompts_for(model, 1), InFlightEngine(64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = run(engine, model, request_for(model, ids, 2000, with_log_probs=True, config=g.complete(model)))
    assert not engine._said
    exact = run(engine, model, request_for(model, ids, 2000, with_log_probs=True))
    first = [[one.token_ids[0] for one in some].count(token) for some in (found, exact) for token in range(20)]
    for token in range(20):  # frequencies of the first token, within five standard deviations
        assert abs(first[token] - first[20 + token]) <= 5 * max(1, first[20 + token]) ** 0.5 + 20
    means = [torch.stack([one.log_q.sum() for one in some]).mean() for some in (found, exact)]
    assert abs(means[0] - means[1]) < 0.5


def test_engines_have_names():
    model = architectures.model_of("llama")
    assert isinstance(choose_engine("auto", model), InFlightEngine)
    assert isinstance(choose_engine("inflight", model), InFlightEngine)
    assert isinstance(choose_engine("generate", model), GenerateEngine)
    for name in ("max_sequences", "max_tokens", "prefill_tokens"):
        with pytest.raises(ValueError, match=f"`{name}`=0 must be at least 1"):
            InFlightEngine(**{name: 0})
