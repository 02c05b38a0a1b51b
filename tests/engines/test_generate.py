"""The engine against `model.generate` and teacher-forced passes, one prompt at a time: batches must not show."""

import inspect

import pytest
import torch
import transformers as hf

import generators as g
from generation_oracle import NUM_CANDIDATES, NUM_PROMPTS, SETTINGS, check_log_probs, cut, ids_for, short_of_memory
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import completion_log_probabilities


def one_at_a_time(model, ids: list[list[int]], **settings) -> list[list[int]]:
    """What `model.generate` says to each prompt alone: nothing is padded on the left."""
    start = [1 if model.config.is_encoder_decoder else len(prompt) for prompt in ids]
    config = hf.GenerationConfig(do_sample=False, pad_token_id=g.PAD, eos_token_id=g.EOS, **settings)
    keywords = {"generation_config": config, "tokenizer": g.tokenizer()}
    keywords["decoder_start_token_id"] = model.config.to_dict().get("decoder_start_token_id")
    rows = [model.eval().generate(torch.tensor([prompt]), **keywords)[0].tolist() for prompt in ids]
    return [row[at:] for row, at in zip(rows, start)]


def test_all_six_architectures_are_here():
    assert len(g.NAMES) == 6
    types = {g.tiny_model(name).config.model_type for name in g.NAMES}
    assert types == {"llama", "gpt2", "qwen3", "t5", "bart", "marian"}


@pytest.mark.parametrize("name", g.NAMES)
def test_greedy_tokens_are_those_of_each_prompt_alone(name):
    model, ids = g.tiny_model(name), ids_for(name)
    expected = one_at_a_time(model, ids, max_new_tokens=10)
    assert len({tuple(row) for row in expected}) >= 2  # a model that says one thing to everybody would prove nothing
    for max_sequences in (64, 4):
        engine = GenerateEngine(max_sequences)
        found = g.generated(model, g.complete(model, is_greedy=True, max_new_tokens=10), ids, engine=engine)
        assert [one.token_ids for one in found] == expected
        assert [one.finish_reason == "stop" for one in found] == [row[-1] == g.EOS for row in expected]


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_every_end_token_ends(name):
    # A stream does not know of ends: with more of them the same candidates stop earlier.
    model, ids, ends = g.tiny_model(name), ids_for(name), [g.EOS, g.WORDS.index("h"), g.WORDS.index("j")]
    long = g.generated(model, g.complete(model, max_new_tokens=10), ids, NUM_CANDIDATES)
    short = g.generated(model, g.complete(model, max_new_tokens=10, eos_token_id=ends), ids, NUM_CANDIDATES)
    assert [one.token_ids for one in short] == [cut(one.token_ids, ends) for one in long]
    stopped = [one.token_ids[-1] for one in short if one.finish_reason == "stop"]
    assert set(stopped) <= set(ends)
    assert len(set(stopped)) > 1
    assert all(len(one.token_ids) == 10 for one in short if one.finish_reason == "length")


def test_padding_with_the_end_token_changes_nothing():
    model, ids = g.tiny_model("llama"), ids_for("llama")
    apart = g.generated(model, g.complete(model), ids, NUM_CANDIDATES)
    shared = g.generated(model, g.complete(model, pad_token_id=g.EOS), ids, NUM_CANDIDATES)
    assert [(one.token_ids, one.finish_reason) for one in shared] == [
        (one.token_ids, one.finish_reason) for one in apart
    ]
    stopped = [one.token_ids for one in shared if one.finish_reason == "stop"]
    assert stopped
    assert all(ids[-1] == g.EOS and g.EOS not in ids[:-1] for ids in stopped)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2, "is_greedy": True}], ids=["sampled", "beams"])
def test_stop_strings_end_a_candidate(settings):
    model, ids = g.tiny_model("llama"), ids_for("llama")
    ends = [g.EOS, g.WORDS.index("system")]
    found = g.generated(model, g.complete(model, stop_strings=["em"], **settings), ids)
    if settings:
        rows = one_at_a_time(model, ids, max_new_tokens=8, stop_strings=["em"], num_beams=2)
    else:
        rows = [one.token_ids for one in g.generated(model, g.complete(model), ids)]
    assert [one.token_ids for one in found] == [cut(row, ends) for row in rows]
    assert [one.finish_reason == "stop" for one in found] == [one.token_ids[-1] in ends for one in found]
    assert any(one.token_ids[-1] == ends[1] for one in found)


CASES = [(name, "plain") for name in g.NAMES] + [(name, kind) for name in ("gpt2", "t5") for kind in [*SETTINGS][1:]]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_candidates_depend_on_no_batch_order_or_company(name, settings):
    penalty = inspect.signature(hf.RepetitionPenaltyLogitsProcessor.__init__).parameters["prompt_ignore_length"]
    if (name, settings) == ("gpt2", "penalised") and "Tensor" not in str(penalty.annotation):
        pytest.skip("this version of transformers counts the padding of a prompt as said")
    model, ids = g.tiny_model(name), ids_for(name)
    config = g.complete(model, **SETTINGS[settings])
    alone = [
        one
        for number, prompt in enumerate(ids)
        for one in g.generated(model, config, [prompt], NUM_CANDIDATES, GenerateEngine(1), [number])
    ]
    expected = {(place // NUM_CANDIDATES, one.index): one for place, one in enumerate(alone)}
    assert len({tuple(one.token_ids) for one in alone}) > NUM_PROMPTS
    for max_sequences, numbers in ((64, [3, 1, 0, 2, 4]), (2, [4, 1]), (5, [2, 0, 3])):
        chosen = [ids[number] for number in numbers]
        found = g.generated(model, config, chosen, NUM_CANDIDATES, GenerateEngine(max_sequences), numbers)
        assert len(found) == len(numbers) * NUM_CANDIDATES
        for one in found:
            other = expected[numbers[one.prompt], one.index]
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            torch.testing.assert_close(one.log_q, other.log_q, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 6, 0.8)], ids=str)
@pytest.mark.parametrize("name", g.NAMES)
def test_log_q_and_log_p_are_those_of_a_teacher_forced_pass(name, settings):
    temperature, top_k, top_p = settings
    model, ids = g.tiny_model(name), ids_for(name)
    config = g.complete(model, temperature=temperature, top_k=top_k, top_p=top_p)
    found = g.generated(model, config, ids, NUM_CANDIDATES)
    check_log_probs(model, ids, found, settings)
    encoder = Encoder(g.tokenizer_for(name), model.config.is_encoder_decoder)
    answers = [one.token_ids for one in found]
    sums = torch.stack([one.log_p.double().sum() for one in found])
    for batch_size in (1, 5):
        asked = [ids[one.prompt] for one in found]
        total = completion_log_probabilities(model, encoder, asked, answers, batch_size)
        torch.testing.assert_close(total, sums, atol=1e-4, rtol=0)


@pytest.mark.parametrize("most", [1, 3, 5])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_batch_that_is_too_large_is_halved_and_loses_nothing(name, most):
    model, ids = g.tiny_model(name), ids_for(name)
    config = g.complete(model)
    expected = g.generated(model, config, ids, NUM_CANDIDATES)
    passes, engine = short_of_memory(model, most), GenerateEngine(max_sequences=16)
    found = g.generated(model, config, ids, NUM_CANDIDATES, engine)
    assert [(one.prompt, one.index, one.token_ids) for one in found] == [
        (one.prompt, one.index, one.token_ids) for one in expected
    ]
    assert max(passes) > most
    assert 1 <= engine.max_sequences < 16
    passes.clear()
    g.generated(model, config, ids, NUM_CANDIDATES, engine)
    assert max(passes) <= most  # it remembers


def test_one_sequence_that_does_not_fit_is_an_error():
    model = g.tiny_model("llama")
    short_of_memory(model, most=0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        g.generated(model, g.complete(model), ids_for("llama"), NUM_CANDIDATES)


@pytest.mark.parametrize("name", g.NAMES)
def test_beams_of_an_evaluation_are_those_of_generate(name):
    model, ids = g.tiny_model(name), ids_for(name)
    expected = [cut(row, [g.EOS]) for row in one_at_a_time(model, ids, max_new_tokens=8, num_beams=2)]
    found = g.generated(model, g.complete(model, is_greedy=True, num_beams=2), ids)
    assert [one.token_ids for one in found] == expected
    assert [one.finish_reason == "stop" for one in found] == [row[-1] == g.EOS for row in expected]


def test_engines_are_chosen_by_name_or_given():
    engine = GenerateEngine(3)
    assert choose_engine(engine, None) is engine
    assert isinstance(choose_engine("generate", g.tiny_model()), GenerateEngine)
    with pytest.raises(ValueError, match="`engine`='vllm' is unknown"):
        choose_engine("vllm", None)
    with pytest.raises(TypeError, match="must be a name or an Engine object"):
        choose_engine(GenerateEngine, None)
    with pytest.raises(ValueError, match="`max_sequences`=0 must be at least 1"):
        GenerateEngine(0)


@pytest.mark.parametrize("name", g.NAMES)
def test_a_prompt_is_read_once_for_all_its_candidates(name):
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
