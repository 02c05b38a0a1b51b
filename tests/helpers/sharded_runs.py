"""Models sharded by FSDP2 over two gloo processes on the CPU, for `test_model_access_sharded.py`: started by torchrun.

torchrun --nproc_per_node 2 tests/helpers/sharded_runs.py OUTPUT_DIR [broken]

accelerate makes DDP of FSDP on a CPU, without a word: `Sharding` tells it otherwise after it has looked at the machine.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import peft
import torch
import torch.distributed as dist
import transformers as hf
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import generative_runs
import generators
import runs
from process_groups import write_and_leave
from rsft_hf import RejectionSamplingTrainer
from rsft_hf.engines.model_access import whole_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "bf16": {},
    "t5": {},
    "lora": {},
    "merged": {},
}
ROUNDS = 3

# `from_pretrained` shards a model by itself, and Trainer takes it as it is, in newer versions of transformers.
LOADS_SHARDS = Version(hf.__version__) >= Version("5.19")


def with_adapter(model: Any, targets: Any = ("q_proj", "v_proj"), **settings: Any) -> Any:
    """Returns a PEFT model whose LoRA is far from doing nothing, equal at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings)
        made = peft.get_peft_model(model, config)
        for name, values in made.named_parameters():
            if "lora_" in name:
                values.data = 0.3 * torch.randn_like(values)
    return made


def built(name: str) -> Any:
    """Returns a model in evaluation mode, equal at every call."""
    model = generators.tiny_model("t5" if name == "t5" else "llama", **MODELS[name])
    if name == "bf16":
        model = model.to(torch.bfloat16)
    return (with_adapter(model) if name in ("lora", "merged") else model).eval()


def shard(model: Any, is_tied: bool = False, **settings: Any) -> None:
    """Shards a model as accelerate does: by layers, and the rest at the root, which a forward pass leaves whole."""
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in ("LlamaDecoderLayer", "T5Block"):
            fully_shard(module, mesh=mesh, **settings)
    if is_tied:
        fully_shard([model.lm_head, model.model.embed_tokens], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, **settings)
    register_fsdp_forward_method(model, "generate")  # as Trainer does


def answers(model: Any) -> list[list[int]]:
    """Greedy answers to two prompts on the first process, and to five on the second."""
    ids = generators.prompt_ids(2 + 3 * dist.get_rank(), closes_text=isinstance(model, hf.T5ForConditionalGeneration))
    settings = generators.complete(model, is_greedy=True)
    return [one.token_ids for one in generators.generated(model, settings, ids)]


def step(model: Any) -> None:
    """Takes a step on a row that is the same on both processes, and looks at it without learning after."""
    row = torch.tensor([[generators.A, generators.A + 2, generators.A + 1, generators.EOS]])
    trained = [values for values in model.parameters() if values.requires_grad]
    model(input_ids=row, labels=row).loss.backward()
    with torch.no_grad():
        for values in trained:
            if values.grad is not None:
                values -= 0.5 * values.grad
                values.grad = None
        model(input_ids=row, labels=row)


def difference(model: Any, other: Any) -> float:
    """Returns the largest difference between the weights of two models."""
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    return max(float((values - expected[name]).abs().max()) for name, values in model.state_dict().items())


def twin_facts(name: str, accelerator: Accelerator) -> dict[str, Any]:
    """Returns what can be said of the twins of a sharded model, which trains between them as a whole one does."""
    sharded, plain = built(name), built(name)
    shard(sharded, is_tied=name == "tied")
    is_merged = name == "merged"
    facts: dict[str, Any] = {"answers": [], "expected": [], "differences": []}
    for _ in range(ROUNDS):
        with whole_model(accelerator, sharded, is_merged) as whole, whole_model(None, plain, is_merged) as reference:
            facts["answers"].append(answers(whole))
            facts["expected"].append(answers(reference))
            facts["differences"].append(difference(whole, reference))
            facts["class"] = type(whole).__name__
            facts["dtypes"] = sorted({str(values.dtype) for values in whole.parameters()})
            facts["is tied"] = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
            facts["is of fsdp"] = any(
                isinstance(module, FSDPModule) or "_is_fsdp_managed_module" in vars(module)  # `generate` asks for it
                for module in whole.modules()
            )
        facts["kept numbers"] = sum(values.numel() for values in (*whole.parameters(), *whole.buffers()))
        step(sharded)
        step(plain)
    facts["is sharded still"] = isinstance(sharded, FSDPModule)
    return facts


def mixed_facts(accelerator: Accelerator) -> dict[str, Any]:
    """Returns what a twin has of a model that computes in bf16, and what an error leaves of it."""
    sharded, plain = built("llama"), built("llama")
    shard(sharded, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        sharded(input_ids=torch.tensor([[generators.A]]))
    facts = {"dtypes of the model": sorted({str(values.dtype) for values in sharded.parameters()})}
    try:
        with whole_model(accelerator, sharded) as whole:
            facts["dtypes"] = sorted({str(values.dtype) for values in whole.parameters()})
            facts["difference"] = difference(whole, plain)
            raise KeyError
    except KeyError:
        facts["kept numbers"] = sum(values.numel() for values in whole.parameters())
    return facts


class Sharding(RejectionSamplingTrainer):
    """A trainer whose accelerate takes the way of FSDP2, which it otherwise takes on accelerators only."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        layers = ["LlamaDecoderLayer"]
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers,
            reshard_after_forward=True, state_dict_type="FULL_STATE_DICT",
        )  # fmt: skip
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def run(output_dir: Path, model: Any, trainer_class: Any, resume: Any = None, **options: Any) -> dict[str, Any]:
    """Returns what a run of three rounds ended with, as this process sees it."""
    ours = generative_runs.trainer(
        output_dir,
        generative_runs.resampler(**options),
        model=model,
        trainer_class=trainer_class,
        args={"per_device_train_batch_size": 1, "num_train_epochs": ROUNDS, "eval_strategy": "epoch",
              "save_strategy": "no" if trainer_class is RejectionSamplingTrainer else "epoch"},
        eval_dataset=generators.prompts(5, first=82),
    )  # fmt: skip
    ours.train(resume_from_checkpoint=resume)
    lines = ours.state.log_history
    return {
        "class": type(ours.model).__name__,
        "candidates": [[one["token_ids"] for one in generative_runs.stored(output_dir, n)] for n in range(ROUNDS)],
        "held out": [line["eval_reward"] for line in lines if "eval_reward" in line],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "pool": list(ours.resampler.pool.accepted),
    }


def refusals(output_dir: Path) -> dict[str, str]:
    """Returns what is said to those who ask for what FSDP2 does not allow."""
    said = {}
    for round_start in ("last", "base", "best"):
        source = generative_runs.resampler(round_start=round_start)
        ours = generative_runs.trainer(output_dir / round_start, source, trainer_class=Sharding)
        try:
            ours.evaluate(generators.prompts(5, first=82))  # before training
        except (RuntimeError, ValueError) as error:
            said[round_start] = f"{type(error).__name__}: {error}"
    return said


def loaded_in_shards(output_dir: Path) -> Any:
    """Returns the tiny model as `from_pretrained` shards it by itself."""
    if dist.get_rank() == 0:
        generators.tiny_model().save_pretrained(output_dir / "model")
    dist.barrier()
    config = hf.distributed.DistributedConfig(fsdp_size=2)
    return hf.AutoModelForCausalLM.from_pretrained(output_dir / "model", distributed_config=config)


class BrokenServer(generative_runs.CountingEngine):
    """Takes over no weights, on the first process."""

    has_own_weights = True

    def sync_weights(self, model: Any, is_main_process: bool) -> None:
        if is_main_process:
            raise OSError("the server of this machine is down")


def main() -> None:
    """Writes what each process saw."""
    output_dir = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if sys.argv[2:] == ["broken"]:
        generative_runs.trained(output_dir / "broken", generative_runs.resampler(engine=BrokenServer()))
    results: dict[str, Any] = {"twins": {name: twin_facts(name, accelerator) for name in MODELS}}
    results["mixed"] = mixed_facts(accelerator)
    merged = {"merge_adapter": True}
    tiny = generators.tiny_model
    results["ddp"] = run(output_dir / "ddp", tiny(), RejectionSamplingTrainer)
    results["ddp, merged"] = run(output_dir / "ddp_m", with_adapter(tiny()), RejectionSamplingTrainer, **merged)
    if LOADS_SHARDS:
        results["loaded"] = run(output_dir / "loaded", loaded_in_shards(output_dir), RejectionSamplingTrainer)
    results["refusals"] = refusals(output_dir)
    results["fsdp"] = run(output_dir / "fsdp", tiny(), Sharding)
    dist.barrier()  # both have read what one deletes
    if dist.get_rank() == 0:
        shutil.rmtree(generative_runs.round_dir(output_dir / "fsdp", ROUNDS - 1))
    last = str(output_dir / "fsdp" / "checkpoint-10")  # of 15, when two rounds are over
    if runs.RESUMES_PROCESSES:
        results["resumed"] = run(output_dir / "fsdp", tiny(seed=17), Sharding, resume=last)
    results["fsdp, merged"] = run(output_dir / "fsdp_m", with_adapter(tiny()), Sharding, **merged)
    write_and_leave(output_dir, results)


if __name__ == "__main__":
    main()
