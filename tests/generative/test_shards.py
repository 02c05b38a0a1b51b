"""Shards of prompts: who generates what, and in what order, from the lengths of the last round."""

import pytest

import generators as g
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.generative.rounds import mean_lengths, own_shards


def shares(num_prompts: int, num_processes: int, lengths: dict, prompt_ids=None) -> list[list[tuple[int, list[int]]]]:
    ids = range(num_prompts) if prompt_ids is None else prompt_ids
    return [
        [(number, list(own)) for number, own in own_shards(ids, num_prompts, lengths, num_processes, process)]
        for process in range(num_processes)
    ]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
@pytest.mark.parametrize("num_prompts", [1, 5, 9, 130, 1000])
def test_every_shard_is_the_work_of_one_process_and_the_same_for_any_number_of_them(num_processes, num_prompts):
    lengths = {prompt: 1.0 + prompt % 11 for prompt in range(0, num_prompts, 2)}
    found = sorted(shard for share in shares(num_prompts, num_processes, lengths) for shard in share)
    assert found == shares(num_prompts, 1, {})[0]
    assert [prompt for _, own in found for prompt in own] == list(range(num_prompts))
    assert max(len(own) for _, own in found) <= 64


def test_shares_are_even_in_tokens_not_in_prompts():
    # Four shards of 25 prompts, of 10, 10, 1 and 1 tokens: the two long ones go apart.
    lengths = {prompt: 10.0 if prompt < 50 else 1.0 for prompt in range(100)}
    first, second = shares(100, 2, lengths)
    assert [number for number, _ in first] == [0, 2]
    assert [number for number, _ in second] == [1, 3]
    # 30, 1, 1, 1: one process has the long one alone. Prompts without a length count as the mean of the others.
    lengths = {prompt: 30.0 if prompt < 25 else 1.0 for prompt in range(100)}
    assert [number for number, _ in shares(100, 2, lengths)[0]] == [0]
    known = {0: 30.0, 99: 30.0}
    assert shares(100, 2, known) == shares(100, 2, {})


def test_a_round_knows_the_lengths_of_the_last_one_and_draws_the_same_candidates(tmp_path):
    asked: list = []

    class Noting(GenerateEngine):
        def __call__(self, model, request):
            asked.append((request.num_candidates, list(request.expected_lengths), list(map(len, request.prompts))))
            yield from super().__call__(model, request)

    options = {"num_candidates": 2, "generation_config": g.sampling(6)}
    run = g.trainer(tmp_path, g.resampler(engine=Noting(), **options), num_prompts=4, args={"num_train_epochs": 2})
    run.train()
    store = run.resampler._bound().store(0)
    lengths = mean_lengths(store)
    by_hand = {prompt: [one.num_tokens for one in g.stored(run) if one.prompt_id == prompt] for prompt in range(4)}
    assert lengths == {prompt: sum(values) / 2 for prompt, values in by_hand.items()}
    assert [expected for _, expected, _ in asked[:4]] == [[0.0]] * 4  # four shards of one prompt, nothing known
    assert [expected for _, expected, _ in asked[4:8]] == [[lengths[prompt]] for prompt in range(4)]


def test_a_round_that_was_never_generated_has_no_lengths(tmp_path):
    run = g.trainer(tmp_path, g.resampler(generation_config=g.sampling(3)))
    run.train()
    assert mean_lengths(run.resampler._bound().store(7)) == {}
