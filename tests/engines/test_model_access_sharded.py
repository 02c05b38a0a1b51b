"""What two gloo processes generate with a model that FSDP2 shards is what they generate with a whole one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

import runs
import sharded_runs

MODELS, ROUNDS = sharded_runs.MODELS, sharded_runs.ROUNDS
NUM_PROMPTS = {0: 2, 1: 5}  # of each process: they need not end together


def launch(output_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[1] / "helpers" / "sharded_runs.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, script, output_dir, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes saw, from one launch."""
    output_dir = tmp_path_factory.mktemp("sharded")
    done = launch(output_dir)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output_dir / f"rank_{rank}.json").read_text()) for rank in NUM_PROMPTS]


@pytest.mark.parametrize("name", MODELS)
def test_a_twin_answers_as_the_whole_model_does(ranks, name: str) -> None:
    assert len(MODELS) == 6
    for rank, num_prompts in NUM_PROMPTS.items():
        facts = ranks[rank]["twins"][name]
        assert [len(answers) for answers in facts["answers"]] == [num_prompts] * ROUNDS
        assert facts["answers"] == facts["expected"]


@pytest.mark.parametrize("name", MODELS)
def test_a_twin_follows_training(ranks, name: str) -> None:
    for rank in ranks:
        facts = rank["twins"][name]
        assert facts["answers"][0] != facts["answers"][-1]
        # T5 adds the gradients of its shared embedding in another order: bits, of weights of a size of 1.
        assert max(facts["differences"]) <= (1e-6 if name == "t5" else 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_twin_is_a_plain_model_and_leaves_no_weights(ranks, name: str) -> None:
    for rank in ranks:
        facts = rank["twins"][name]
        assert facts["class"] == {"t5": "T5ForConditionalGeneration", "lora": "PeftModel", "merged": "PeftModel"}.get(
            name, "LlamaForCausalLM"
        )
        assert facts["dtypes"] == ["torch.bfloat16" if name == "bf16" else "torch.float32"]
        assert facts["is tied"] is (name in ("tied", "t5"))
        assert not facts["is of fsdp"]
        assert facts["is sharded still"]
        assert facts["kept numbers"] == 0


def test_a_twin_has_the_trained_weights_not_those_computed_with(ranks) -> None:
    """After a forward pass without a backward one the root's weights lie about in the dtype of the computation."""
    for rank in ranks:
        facts = rank["mixed"]
        assert facts["dtypes of the model"] == ["torch.bfloat16", "torch.float32"]
        assert facts["dtypes"] == ["torch.float32"]
        assert facts["difference"] == 0.0
        assert facts["kept numbers"] == 0  # an error went through the block


@pytest.mark.parametrize(
    ("name", "reference"), [("fsdp", "ddp"), ("fsdp, merged", "ddp, merged"), ("loaded", "ddp"), ("resumed", "fsdp")]
)
def test_rounds_of_a_sharded_model_are_those_of_a_whole_one(ranks, name: str, reference: str) -> None:
    """`fsdp`: as accelerate shards. `loaded`: as `from_pretrained` does. `resumed`: without its last round."""
    if name not in ranks[0]:
        assert (name == "loaded" and not sharded_runs.LOADS_SHARDS) or (
            name == "resumed" and not runs.RESUMES_PROCESSES
        )
        pytest.skip(f"transformers {transformers.__version__} cannot do this on a CPU")
    for rank in ranks:
        ours, expected = rank[name], rank[reference]
        assert ours["class"].startswith("FSDP")
        assert len(ours["candidates"]) == ROUNDS
        assert ours["candidates"][0] != ours["candidates"][-1]
        assert ours["candidates"] == expected["candidates"]
        assert ours["pool"] == expected["pool"]
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert ours["held out"] == pytest.approx(expected["held out"])


def test_what_fsdp_does_not_allow_is_said(ranks) -> None:
    spread = "puts whole weights back, and FSDP2 has spread them over the processes"
    for rank in ranks:
        assert rank["refusals"] == {
            "last": "RuntimeError: Under FSDP2 the model can generate once training has begun. Call train() first.",
            "base": f'ValueError: round_start="base" {spread}. Use "last".',
            "best": f'ValueError: round_start="best" {spread}. Use "last".',
        }


def test_an_error_in_the_handing_over_ends_both(tmp_path: Path) -> None:
    began = time.perf_counter()
    done = launch(tmp_path, "broken")
    assert time.perf_counter() - began < 150  # far below the half hour that gloo waits
    assert done.returncode != 0
    assert "OSError: the server of this machine is down" in done.stderr
    assert "Another process failed while handing the weights to BrokenServer: OSError" in done.stderr
