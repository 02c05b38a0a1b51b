"""Scheduler and KV cache: order of admission and removal, and the positions that are computed."""

import pytest
import torch

import architectures
import generators as g
from architectures import request_for, run, texts
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.engines.inflight.kv_cache import BatchCache
from rsft_hf.engines.inflight.scheduler import Scheduler
from rsft_hf.upstream import cache_name

ENGINES = [InFlightEngine(4), GenerateEngine(4)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_order_of_entering(device):
    model = architectures.model_of("llama")
    ids = [[g.A] * 3, [g.A] * 9, [g.A] * 3, [g.A] * 5]
    asked = request_for(model, ids, 1, expected_lengths=[2.0, 7.0, 6.0, 7.0])

    class RunningBatch:
        max_rows = 4

    RunningBatch.device = torch.device(device)
    scheduler = Scheduler(None, RunningBatch, asked, {(prompt, 0) for prompt in range(4)}, 100)
    # On a CPU narrow rows first, of equal ones the long answer; elsewhere long answers first, of equal ones the narrow.
    assert [one.prompt for one in scheduler.waiting] == ([2, 0, 3, 1] if device == "cpu" else [3, 1, 2, 0])


def test_each_candidate_leaves_as_it_ends():
    model, steps = architectures.model_of("llama"), []
    engine, asked = InFlightEngine(4), request_for(model, [[g.A]] * 4, 1, limits=[[1], [8], [2], [8]])
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
        is_step = keywords[cache_name(keywords)].get_seq_length() > 0
        (rows if is_step else read).append(len(tokens))

    run(engine, model, request_for(model, ids))
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    found = run(engine, model, request_for(model, ids, 4))
    handle.remove()
    assert sum(read) == len(ids)
    assert sum(rows) == sum(len(one.token_ids) - 1 for one in found)  # the first comes with the prompt


def test_more_candidates_than_slots_share_one_reading():
    model, engine, read = architectures.model_of("llama"), InFlightEngine(3), []
    ids = architectures.prompts_for(model, 2)
    expected = texts(run(GenerateEngine(1), model, request_for(model, ids, 8)))
    run(engine, model, request_for(model, ids, 1))
    model.register_forward_pre_hook(
        lambda _, args, kw: read.append(kw[cache_name(kw)].get_seq_length() == 0), with_kwargs=True
    )
    assert texts(run(engine, model, request_for(model, ids, 8))) == expected
    assert sum(read) == 2


def test_the_cache_grows_moves_and_stays_right():
    cache, generator = BatchCache(max_rows=3), torch.Generator().manual_seed(0)
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
