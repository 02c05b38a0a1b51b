"""Fine-tune a chatbot on its own best answers: each round samples answers, scores them, and trains on the best.

    python recipes/chatbot.py --output_dir outputs/chatbot              # UltraChat, SmolLM2 135M: wants a GPU
    python recipes/chatbot.py --output_dir outputs/mine --train_file train.jsonl --validation_file test.jsonl

    python recipes/chatbot.py --output_dir outputs/demo/chatbot --reward_model outputs/demo/reward_model \\
        --model_name_or_path recipes/data/dialogues/chat_model --train_file recipes/data/dialogues/train.jsonl \\
        --validation_file recipes/data/dialogues/test.jsonl --num_train_epochs 4 --learning_rate 1e-3 \\
        --max_new_tokens 24 --lora_r 0

The third line needs no download and no GPU, but the reward model of reward_model.py: half a minute on one CPU core. A
row has `prompt`: a conversation that ends with the user's turn, or a text. The reward is the reward model's (relevance,
consistency) less what the answer repeats of itself and of the conversation (novelty). The output folder holds the model
and its tokenizer, where `pipeline("text-generation", folder)` finds them, candidates/ with every answer, its rewards
and verdict, and accepted.jsonl and preferences.jsonl, which TRL's SFTTrainer and DPOTrainer read.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model

from rsft_hf import CandidateResampler, RejectionSamplingTrainer, TopKPerPrompt, export_dpo, export_sft
from rsft_hf.rewards import CopyPenalty, DistinctReward, RepetitionPenalty


@dataclass
class ScriptArguments:
    """Data, model, rewards and candidates."""

    dataset_name: str = field(default="HuggingFaceH4/ultrachat_200k", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train_sft", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test_sft", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "JSONL or Parquet file of prompts."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Causal language model with a chat template."}
    )
    reward_model: str = field(
        default="OpenAssistant/reward-model-deberta-v3-large-v2",
        metadata={"help": "Reward model with one logit: hub name, or the folder of reward_model.py."},
    )
    max_train_samples: int = field(default=1000, metadata={"help": "Number of prompts of a round."})
    max_eval_samples: int = field(default=200, metadata={"help": "Number of held-out prompts."})
    max_prompt_length: int = field(default=512, metadata={"help": "Prompts of more tokens are left out."})
    num_candidates: int = field(default=8, metadata={"help": "Answers per prompt and round."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the answers."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of an answer in tokens."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter; 0 trains all weights."})


def load_prompts(script: ScriptArguments, split: str, file: str | None, num_rows: int, seed: int) -> Dataset:
    """Returns rows with `prompt`: a conversation that ends with the user's turn."""
    kind = "parquet" if file is not None and file.endswith(".parquet") else "json"
    name, config = (kind, None) if file else (script.dataset_name, script.dataset_config)
    dataset = load_dataset(name, config, data_files=file, split="train" if file else split)

    def as_messages(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row[script.prompt_column]
        return {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}

    dataset = dataset.shuffle(seed).select(range(min(num_rows, len(dataset))))
    return dataset.map(as_messages, remove_columns=dataset.column_names)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=1e-4, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set: prompts
    tokenizer = hf.AutoTokenizer.from_pretrained(script.model_name_or_path)
    train_dataset = load_prompts(script, script.train_split, script.train_file, script.max_train_samples, args.seed)
    eval_dataset = load_prompts(script, script.validation_split, script.validation_file, script.max_eval_samples, 0)

    def is_short(row: dict[str, Any]) -> bool:
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        return len(tokenizer(text)["input_ids"]) <= script.max_prompt_length

    train_dataset, eval_dataset = train_dataset.filter(is_short), eval_dataset.filter(is_short)

    # 2. Model
    model = hf.AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)
    if script.lora_r > 0:
        model = get_peft_model(
            model, LoraConfig(r=script.lora_r, lora_alpha=2 * script.lora_r, target_modules="all-linear")
        )

    # 3. Train: an epoch is a round, which trains on the best answer to each prompt
    sampling = hf.GenerationConfig(
        do_sample=True, temperature=script.temperature, top_k=0, max_new_tokens=script.max_new_tokens
    )
    resampler = CandidateResampler(
        reward_funcs=[script.reward_model, RepetitionPenalty(), CopyPenalty()],
        acceptance=TopKPerPrompt(1),
        num_candidates=script.num_candidates,
        generation_config=sampling,
        eval_generation_config=sampling,
        eval_reward_funcs=[DistinctReward()],
        on_nothing_accepted="skip",
    )
    trainer = RejectionSamplingTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        resampler=resampler,
    )
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 4. Evaluate and save: an adapter is merged, so that the folder needs no other
    after = trainer.evaluate(metric_key_prefix="after")
    if script.lora_r > 0:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        export_sft(output / "candidates").to_json(str(output / "accepted.jsonl"))
        export_dpo(output / "candidates").to_json(str(output / "preferences.jsonl"))
        print(f"\n{'':36}{'before':>8}{'after':>8}")
        for key in sorted(key.removeprefix("before_") for key in before if "reward" in key or "distinct" in key):
            print(f"{key:36}{before[f'before_{key}']:8.3f}{after[f'after_{key}']:8.3f}")
        print(f"The model, candidates, accepted.jsonl and preferences.jsonl are in {output.resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
