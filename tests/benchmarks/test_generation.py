"""Generation benchmark: it runs, and counts tokens, passes and rows correctly. No timing is asserted."""

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """Modules of the benchmark, which import each other by their bare names."""
    names = ("measures", "workloads", "limits", "rollouts", "generation")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def small(bench):
    """Three prompts of two candidates of 1 to 9 tokens, and a model of two layers for them."""
    size = bench["workloads"].Size(3, 2, prompt_mean=6, prompt_range=(3, 9), mean=4, longest=9, slots=4)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=bench["workloads"].VOCAB_SIZE, **sizes)).eval()
    model.generation_config = hf.GenerationConfig(pad_token_id=bench["workloads"].PAD, use_cache=True)
    return model, bench["workloads"].build_workload(size)


def test_the_same_size_gives_the_same_workload_within_its_bounds(bench):
    workloads = bench["workloads"]
    first, second = (workloads.build_workload(workloads.Size()) for _ in range(2))
    assert first == second
    assert first.num_candidates == 256  # 32 prompts x 8
    assert all(16 <= len(ids) <= 512 and min(ids) >= workloads.FIRST_WORD for ids in first.prompts)
    assert all(1 <= length <= 256 for row in first.lengths for length in row)
    assert first.num_prompt_tokens / 32 == pytest.approx(49, abs=2)
    assert first.num_tokens / 256 == pytest.approx(34.5, abs=1)


def test_the_mean_context_is_weighted_by_tokens(bench):
    workloads = bench["workloads"]
    workload = workloads.Workload(workloads.Size(2, 1), [[2] * 10, [2] * 20], [[1], [3]])
    # Four tokens: one after 10 tokens of prompt, three after 20; before them 0 and 0, 1, 2 tokens of answer.
    assert workload.mean_context == ((10 + 3 * 20) / 4, (0 + 0 + 1 + 2) / 4)


def test_tokens_count_up_to_the_first_end_token(bench):
    tokens = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 1], [1, 0, 0, 0], [5, 6, 7, 8], [1, 1, 5, 1]])
    assert bench["rollouts"].count_to_end(tokens) == [2, 4, 1, 4, 1]


def test_a_row_can_end_at_its_length_and_nowhere_else(bench):
    ends = bench["rollouts"].ForcedEnds(torch.tensor([1, 3]))
    end = bench["workloads"].END
    for step in (1, 2, 3):
        chances = ends(torch.zeros(2, step, dtype=torch.long), torch.zeros(2, 4)).softmax(-1)[:, end]
        assert chances.tolist() == [1.0, 1.0 if step == 3 else 0.0]


def test_a_forked_request_has_the_largest_limit_and_its_copies_the_others(bench):
    limit = bench["rollouts"].ChildLimits([3, 9, 5])
    parent = {"most": limit, "also": limit}
    copies = [copy.deepcopy(parent) for _ in range(2)]
    assert limit == 9
    assert copies == [{"most": 5, "also": 5}, {"most": 3, "also": 3}]


CONTENDERS = [
    *("naive", "fixed", "sorted", "generate_batch 4 forked", "generate_batch 4 alone"),
    *("generate_engine", "in_flight", "in_flight log_probs", "in_flight longest_first"),
]


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_generates_the_lengths_meant_for_it(bench, small, name):
    model, workload = small
    with torch.random.fork_rng(devices=[]), bench["limits"].count_forwards(model) as count:
        lengths = bench["rollouts"].build_rollout(name, model, workload).generate(workload)
    bench["rollouts"].check_lengths(name, lengths, workload)
    assert count.passes > 0


def test_trl_generates_the_lengths_meant_for_it(bench, small):
    trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
    if "use_transformers_continuous_batching" not in vars(trl.GRPOConfig)["__dataclass_fields__"]:
        pytest.skip("this version of trl has no continuous batching by this name")
    model, workload = small
    for name in ("trl", "trl_rloo", "trl_continuous"):
        with torch.random.fork_rng(devices=[]):
            lengths = bench["rollouts"].build_rollout(name, model, workload).generate(workload)
        bench["rollouts"].check_lengths(name, lengths, workload)


def test_another_length_than_meant_is_an_error(bench, small):
    _, workload = small
    wrong = [[row[0] + 1, *row[1:]] for row in workload.lengths]
    with pytest.raises(RuntimeError, match="fixed gave prompt 0 answers of"):
        bench["rollouts"].check_lengths("fixed", wrong, workload)


def test_decode_rows_of_fixed_batches_are_rows_times_the_longest_but_one(bench, small):
    model, workload = small
    with torch.random.fork_rng(devices=[]), bench["limits"].count_forwards(model) as count:
        bench["rollouts"].build_rollout("fixed", model, workload).generate(workload)
    # Four slots hold two prompts of two; the first token of each candidate comes with its prompt.
    longest = [max(max(row) for row in rows) for rows in (workload.lengths[:2], workload.lengths[2:])]
    assert count.passes == sum(longest)
    assert count.decode_rows == 4 * (longest[0] - 1) + 2 * (longest[1] - 1)


def test_fewest_steps_are_the_longest_answer_or_all_slots_filled(bench):
    workloads, limits = bench["workloads"], bench["limits"]
    size = workloads.Size(1, 3, slots=2)
    assert limits.fewest_steps(workloads.Workload(size, [[2]], [[9, 1, 2]])) == 9  # 12 tokens in 2 slots take 6
    assert limits.fewest_steps(workloads.Workload(size, [[2]], [[5, 4, 4]])) == 7  # 13 tokens in 2 slots


def test_ratios_keep_the_best_setting_and_the_lesser_of_two_models(bench):
    def rows(**ratios):
        return {"contenders": {name: {"ratio_to_ours": ratio, "is_best_setting": name != "generate_batch 16 forked"}
                               for name, ratio in ratios.items()}}  # fmt: skip

    causal = rows(fixed=4.0, in_flight=1.0)
    causal["contenders"] |= rows(**{"generate_batch 16 forked": 3.0, "generate_batch 32 forked": 2.0})["contenders"]
    causal["contenders"] |= rows(**{"in_flight log_probs": 1.1})["contenders"]
    found = {"causal": causal, "t5": rows(fixed=5.0, in_flight=1.0), "marian": rows(fixed=3.5, in_flight=1.0)}
    ratios = bench["generation"].ratios_of(found)
    assert ratios["causal"] == {"fixed": 4.0, "generate_batch": 2.0}
    assert ratios["encoder_decoder"] == {"fixed": 3.5}
    assert ratios["log_probs"] == {"in_flight": 1.1}


def test_a_quick_run_prints_nothing_but_json():
    command = [sys.executable, "benchmarks/generation.py", "--quick", "--prompts", "1", "--json", "-"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads(finished.stdout)
    assert results["ratios"]["causal"]["fixed"] > 0
    assert results["ratios"]["encoder_decoder"]["fixed"] > 0
    assert set(results["contenders"]["causal"]) == {"fixed", "in_flight"}
