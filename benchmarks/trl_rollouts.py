"""TRL's rollouts as contenders of `generation.py`: `_generate_and_score_completions` of GRPO and RLOO, on a CPU.

In: a model and a workload. Out: how many tokens of each candidate came back. A trainer is built once, untimed, with a
reward that costs nothing, no reference model and prompts as text of one word per token; timed is all that it does
between a batch of prompts and the batch that it trains on, which for RLOO includes its own log probabilities. The model
is a subclass that knows how long each row is to be, since a trainer hands nothing through to `generate`.
"""

import tempfile
from typing import Any

import transformers as hf
import trl
from datasets import Dataset
from rollouts import Lengths, Rollout, continuous_settings, forced_generate, run_requests
from tokenizers import Tokenizer, models, pre_tokenizers
from workloads import END, PAD, VOCAB_SIZE, Workload

NUM_REQUESTS = 32  # in flight under continuous batching: the best of `generate_batch` here
TRAINERS = {
    "trl": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "trl_continuous": (trl.GRPOTrainer, trl.GRPOConfig, {"use_transformers_continuous_batching": True}),
    "trl_rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}),
}


class SteeredLlama(hf.LlamaForCausalLM):
    """A model whose rows end at the lengths in `row_lengths`, set before each call."""

    row_lengths: list[int]

    def generate(self, *args: Any, **keywords: Any) -> Any:
        inputs = {name: keywords.pop(name) for name in ("input_ids", "attention_mask")}
        return forced_generate(super(), inputs, keywords.pop("generation_config"), self.row_lengths, **keywords)

    def generate_batch(self, inputs: list, generation_config: Any, continuous_batching_config: Any, **_: Any) -> dict:
        outputs = run_requests(self, inputs, self.row_lengths, generation_config, continuous_batching_config)
        return {name: outputs[name] for name in map(str, range(len(inputs)))}


def word_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Returns a tokenizer for which token 17 is the word "17"."""
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token=str(PAD)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(PAD), eos_token=str(END))


def no_reward(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def build_trainer(name: str, model: Any, workload: Workload) -> Any:
    """Returns the trainer; its model is a copy of `model`."""
    trainer_class, config_class, settings = TRAINERS[name]
    size = workload.size
    if name == "trl_continuous":
        settings = settings | {"transformers_continuous_batching_config": continuous_settings(NUM_REQUESTS)}
    steered = SteeredLlama(model.config)
    steered.load_state_dict(model.state_dict())
    steered.generation_config = model.generation_config
    arguments = config_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size.slots,
        num_generations=size.num_candidates,
        max_completion_length=size.longest,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    rows = Dataset.from_list([{"prompt": as_text(ids)} for ids in workload.prompts])
    parts = {"reward_funcs": no_reward, "train_dataset": rows, "processing_class": word_tokenizer()}
    return trainer_class(model=steered, args=arguments, **parts)


def as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def build_rollout(name: str, model: Any, workload: Workload) -> Rollout:
    """Returns a trainer as a contender, which generates so many prompts at a time as fill the slots.

    Continuous batching gets all prompts at once, which suits it best.
    """
    trainer = build_trainer(name, model, workload)
    trainer.model.train()
    num_candidates = workload.size.num_candidates
    width = max(1, workload.size.slots // num_candidates)

    def generate(work: Workload) -> Lengths:
        step = len(work.prompts) if name == "trl_continuous" else width
        counted: Lengths = []
        for start in range(0, len(work.prompts), step):
            prompts, lengths = work.prompts[start : start + step], work.lengths[start : start + step]
            trainer.model.row_lengths = [length for row in lengths for length in row]
            rows = [{"prompt": as_text(ids)} for ids in prompts for _ in range(num_candidates)]
            batch = trainer._generate_and_score_completions(rows)
            counts = batch["completion_mask"].sum(1).tolist()
            counted += [counts[at : at + num_candidates] for at in range(0, len(counts), num_candidates)]
        return counted

    return Rollout(trainer.model, generate)
