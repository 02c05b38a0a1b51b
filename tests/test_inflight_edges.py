"""What the engine with slots does at the edges: bad input, little memory, prompts that are satisfied, users' models."""

import dataclasses

import architectures
import generators as g
import peft
import pytest
import torch
import transformers as hf

from rsft_hf.generative.engines.choice import choose_engine
from rsft_hf.generative.engines.engine import GenerationRequest
from rsft_hf.generative.engines.flight import Flight
from rsft_hf.generative.engines.generate import GenerateEngine
from rsft_hf.generative.engines.inflight import InFlightEngine
from rsft_hf.generative.engines.refusal import without_wrappers
from rsft_hf.generative.engines.slots import SlotCache
from rsft_hf.generative.streams import candidate_seed

ENGINES = [InFlightEngine(4), GenerateEngine(4)]


def request(model, ids, num_candidates: int = 2, **fields) -> GenerationRequest:
    seeds = [[candidate_seed(0, 0, number, 0, index) for index in range(num_candidates)] for number in range(len(ids))]
    config = fields.pop("config", None) or g.complete(model)
    return GenerationRequest(ids, seeds, config, tokenizer=g.tokenizer(), **fields)


def run(engine, model, asked: GenerationRequest) -> list:
    with torch.no_grad():
        return sorted(engine(model, asked), key=lambda one: (one.prompt, one.index))


def texts(found: list) -> list:
    return [(one.prompt, one.index, one.token_ids, one.finish_reason) for one in found]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bad_requests_are_refused_before_anything_is_generated(engine, name):
    model = architectures.model_of(name)
    with pytest.raises(ValueError, match="Prompt 1 has no tokens, and nothing can be continued"):
        run(engine, model, request(model, [[g.A], []]))
    with pytest.raises(ValueError, match="`limits` holds a number below 1"):
        run(engine, model, request(model, [[g.A]], limits=[[0, 3]]))
    with pytest.raises(ValueError, match=r"`limits` must hold 2 numbers for each of 1 prompts, got rows of \[1\]"):
        run(engine, model, request(model, [[g.A]], limits=[[3]]))
    uneven = dataclasses.replace(request(model, [[g.A], [g.A]]), seeds=[[1, 2], [3]])
    with pytest.raises(ValueError, match=r"`seeds` must hold 2 numbers for each of 2 prompts, got rows of \[1, 2\]"):
        run(engine, model, uneven)
    assert run(engine, model, request(model, [])) == []
    assert run(engine, model, request(model, [[g.A]], num_candidates=0)) == []


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_prompt_that_fills_the_context_is_refused_and_one_that_just_fits_is_not(engine):
    model = architectures.model_of("llama")  # 64 positions, 8 of them for the answer
    fits = run(engine, model, request(model, [[g.A] * 56]))
    assert len(fits) == 2
    with pytest.raises(
        ValueError, match=r"Prompt 1 has 57 tokens, with `max_new_tokens`=8 it takes 65, and the model r"
    ):
        run(engine, model, request(model, [[g.A], [g.A] * 57]))
    bart = architectures.model_of("bart")
    with pytest.raises(ValueError, match="Prompt 0 has 65 tokens, and the model reads 64"):
        run(engine, bart, request(bart, [[g.A] * 65]))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_without_an_end_token_every_candidate_reaches_the_limit(engine):
    model = architectures.model_of("llama")
    config = g.complete(model)
    config.eos_token_id = model.generation_config.eos_token_id = None
    found = run(engine, model, request(model, architectures.prompts_for(model), config=config))
    assert {(len(one.token_ids), one.finish_reason) for one in found} == {(8, "length")}


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_candidate_has_a_limit_of_its_own(engine, name):
    model = architectures.model_of(name)
    ids = architectures.prompts_for(model)
    long = run(engine, model, request(model, ids))
    limits = [[1 + (number + 3 * index) % 9 for index in range(2)] for number in range(len(ids))]
    short = run(engine, model, request(model, ids, limits=limits))
    for one, other in zip(short, long, strict=True):
        most = min(8, limits[one.prompt][one.index])
        assert one.token_ids == other.token_ids[:most]
        assert one.finish_reason == ("length" if len(other.token_ids) > most else other.finish_reason)


def test_beams_and_learned_prompts_are_left_to_generate():
    model = architectures.model_of("llama")
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    config = g.complete(model, is_greedy=True, num_beams=3)
    expected = texts(run(GenerateEngine(), model, request(model, ids, 1, config=config)))
    assert texts(run(engine, model, request(model, ids, 1, config=config))) == expected
    assert engine._said == {"num_beams=3 searches beams"}
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    engine = InFlightEngine(4)
    assert len(run(engine, prompted, request(model, ids))) == 2 * len(ids)
    assert engine._said == {"its adapter puts learned tokens before the prompt"}


def test_a_processor_that_may_look_at_other_rows_is_obeyed_and_never_dropped(caplog):
    model = architectures.model_of("gpt2")
    ids, engine = architectures.prompts_for(model), InFlightEngine(4)
    config = g.complete(model, sequence_bias=[[[g.A], 5.0]])
    expected = texts(run(GenerateEngine(1), model, request(model, ids, config=config)))
    assert texts(run(engine, model, request(model, ids, config=config))) == expected
    assert engine._said == {"SequenceBiasLogitsProcessor may look at more than a row"}
    assert expected != texts(run(engine, model, request(model, ids)))


def low_on_memory(model, most: int) -> list[int]:
    """Makes the model refuse more than `most` rows, and returns the rows of each pass so far."""
    passes: list[int] = []

    def refuse(_, args, keywords):
        rows = keywords["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
        passes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError(f"{len(rows)} rows")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return passes


@pytest.mark.parametrize("most", [3, 5])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_with_too_little_memory_there_are_fewer_slots_and_nothing_is_lost_or_yielded_twice(name, most):
    model = architectures.model_of(name)
    ids = architectures.prompts_for(model)
    expected = texts(run(InFlightEngine(16), model, request(model, ids)))
    passes, engine = low_on_memory(model, most), InFlightEngine(16)
    assert texts(run(engine, model, request(model, ids))) == expected
    assert engine.max_sequences == 3  # of 14, by 7
    passes.clear()
    assert texts(run(engine, model, request(model, ids))) == expected
    assert max(passes) <= most  # it remembers


def test_one_candidate_that_does_not_fit_is_an_error():
    model, engine = architectures.model_of("llama"), InFlightEngine(8)
    run(engine, model, request(model, [[g.A]]))
    low_on_memory(model, 0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        run(engine, model, request(model, [[g.A]]))


def test_a_budget_of_tokens_bounds_the_slots(monkeypatch):
    model, seen = architectures.model_of("llama"), []
    begin = Flight.__init__
    monkeypatch.setattr(Flight, "__init__", lambda self, *args: (begin(self, *args), seen.append(self.max_rows))[0])
    run(InFlightEngine(64, max_tokens=50), model, request(model, [[g.A] * 2] * 9))
    assert seen == [3, 5]  # the trial run's, and 50 tokens // (2 + 8)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_candidates_of_a_satisfied_prompt_are_not_generated_further(engine, name):
    model = architectures.model_of(name)
    ids, done = architectures.prompts_for(model), []
    everything = {(one.prompt, one.index): one for one in run(engine, model, request(model, ids, 6))}
    asked = request(model, ids, 6, is_satisfied=lambda prompt: sum(one.prompt == prompt for one in done) >= 2)
    with torch.no_grad():
        for one in engine(model, asked):
            done.append(one)
    counts = [sum(one.prompt == prompt for one in done) for prompt in range(len(ids))]
    assert min(counts) >= 2
    assert len(done) < 6 * len(ids)
    for one in done:  # the rest is as it would have been
        assert one.token_ids == everything[one.prompt, one.index].token_ids


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_order_of_entering(device):
    model = architectures.model_of("llama")
    ids = [[g.A] * 3, [g.A] * 9, [g.A] * 3, [g.A] * 5]
    asked = request(model, ids, 1, expected_lengths=[2.0, 7.0, 6.0, 7.0])

    class Rows:
        max_rows = 4

    Rows.device = torch.device(device)
    flight = Flight(None, Rows, asked, {(prompt, 0) for prompt in range(4)}, 100)
    # On a CPU narrow rows first, of equal ones the long answer; elsewhere long answers first, of equal ones the narrow.
    assert [one.prompt for one in flight.waiting] == ([2, 0, 3, 1] if device == "cpu" else [3, 1, 2, 0])


def test_each_candidate_leaves_as_it_ends():
    model, steps = architectures.model_of("llama"), []
    engine, asked = InFlightEngine(4), request(model, [[g.A]] * 4, 1, limits=[[1], [8], [2], [8]])
    run(engine, model, asked)
    model.register_forward_pre_hook(lambda *_: steps.append(0))
    with torch.no_grad():
        seen = [(one.prompt, len(steps)) for one in engine(model, asked)]
    limits = dict(enumerate([1, 8, 2, 8]))
    ended = dict(seen)
    assert ended[0] == 1  # with the pass that read the prompts
    assert ended[2] <= 2
    assert all(after <= limits[prompt] for prompt, after in seen)
    assert max(ended.values()) == len(steps)  # and none after that


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_no_row_is_computed_for_nothing_and_a_prompt_is_read_once(name):
    model, engine = architectures.model_of(name), InFlightEngine(5)
    ids, rows, read = architectures.prompts_for(model), [], []

    def note(_, args, keywords):
        tokens = keywords["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]
        is_step = keywords["past_key_values"].get_seq_length() > 0
        (rows if is_step else read).append(len(tokens))

    run(engine, model, request(model, ids))
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    found = run(engine, model, request(model, ids, 4))
    handle.remove()
    assert sum(read) == len(ids)
    assert sum(rows) == sum(len(one.token_ids) - 1 for one in found)  # the first comes with the prompt


def test_more_candidates_than_slots_share_one_reading():
    model, engine, read = architectures.model_of("llama"), InFlightEngine(3), []
    ids = architectures.prompts_for(model, 2)
    expected = texts(run(GenerateEngine(1), model, request(model, ids, 8)))
    run(engine, model, request(model, ids, 1))
    model.register_forward_pre_hook(
        lambda _, args, kw: read.append(kw["past_key_values"].get_seq_length() == 0), with_kwargs=True
    )
    assert texts(run(engine, model, request(model, ids, 8))) == expected
    assert sum(read) == 2


def test_the_cache_grows_moves_and_stays_right():
    cache, generator = SlotCache(max_rows=3), torch.Generator().manual_seed(0)
    written: list[list[torch.Tensor]] = []  # what each row holds, by hand

    def enter(width: int, copies: int) -> None:
        keys = torch.randn(1, 2, width, 4, generator=generator)
        cache.make_room(width)
        cache.admit([(keys, -keys)], [0] * copies)
        written.extend([keys[0, :, column] for column in range(width)] for _ in range(copies))

    def step() -> None:
        cache.make_room(0)
        width = max(len(row) for row in written)
        cache.columns.start = cache.columns.write + 1 - width - 1
        keys = torch.randn(len(written), 2, 1, 4, generator=generator)
        seen, values = cache.update(keys, -keys, 0)
        cache.columns.write += 1
        for row, one in zip(written, keys, strict=True):
            row.append(one[:, 0])
        for row, states in enumerate(seen):
            assert torch.equal(states[:, -len(written[row]) :], torch.stack(written[row], dim=1))
            assert torch.equal(values[row], -states)
        assert torch.isfinite(seen).all()

    enter(4, 2)
    for _ in range(45):
        step()
    enter(70, 1)  # wider than all that has been
    for number in range(60):
        step()
        if number == 5:  # the first row leaves, the last takes its place
            cache.keep_only(2, [2], [0])
            written[0] = written.pop()
        if number == 20:
            enter(3, 1)
    assert cache.columns.capacity < 250


@pytest.mark.parametrize("is_merged", [False, True])
def test_adapters_generate_in_slots(is_merged):
    base = architectures.model_of("llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    if is_merged:
        model.merge_adapter()
    ids, engine = architectures.prompts_for(base), InFlightEngine(4)
    expected = texts(run(GenerateEngine(1), model, request(base, ids)))
    assert texts(run(engine, model, request(base, ids))) == expected
    assert not engine._said
    with model.disable_adapter():
        assert texts(run(engine, model, request(base, ids))) != expected
    assert isinstance(without_wrappers(model), hf.LlamaForCausalLM)


def test_half_precision_gives_the_same_distribution():
    model = architectures.model_of("llama")
    ids, engine = architectures.prompts_for(model, 1), InFlightEngine(64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = run(engine, model, request(model, ids, 2000, with_log_probs=True, config=g.complete(model)))
    assert not engine._said
    exact = run(engine, model, request(model, ids, 2000, with_log_probs=True))
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
