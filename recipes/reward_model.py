"""Train a reward model on preference pairs, whose training set is resampled each epoch by the losses of its pairs.

    python recipes/reward_model.py --output_dir outputs/reward_model     # UltraFeedback, DeBERTa v3 small: wants a GPU
    python recipes/reward_model.py --output_dir outputs/mine --train_file train.jsonl --validation_file test.jsonl

    python recipes/reward_model.py --output_dir outputs/demo/reward_model \\
        --config_name recipes/data/dialogues/reward_model --train_file recipes/data/dialogues/train.jsonl \\
        --validation_file recipes/data/dialogues/test.jsonl --num_train_epochs 30 --learning_rate 2e-3

The third line needs no download and no GPU: half a minute on one CPU core. Rows have `chosen` and `rejected`:
conversations or texts, or answers to what is in `prompt`. The output folder holds the model and its tokenizer. It is
what `reward_funcs=[folder]` of CandidateResampler takes (see chatbot.py) and `pipeline("text-classification", folder,
function_to_apply="none")` loads; suspects.csv has the pairs whose loss stays high, which often are the wrong way round.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset, load_dataset

from rsft_hf import LossResampler, RejectionSamplingMixin, Tempered


@dataclass
class ScriptArguments:
    """Data, model and weighting."""

    dataset_name: str = field(default="trl-lib/ultrafeedback_binarized", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "JSONL or Parquet file of pairs."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out pairs."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of what they answer, if there is one."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the better answers."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the worse answers."})
    model_name_or_path: str = field(default="microsoft/deberta-v3-small", metadata={"help": "Pretrained encoder."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    max_length: int = field(default=1024, metadata={"help": "Longer pairs are left out."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of a pair = loss ** alpha; 0 is uniform, 1 the loss."})
    warmup_epochs: int = field(default=1, metadata={"help": "Epochs at the start that read every pair once."})
    num_suspects: int = field(default=100, metadata={"help": "Pairs in suspects.csv."})


class PairwiseTrainer(RejectionSamplingMixin, hf.Trainer):
    """Trainer of the Bradley-Terry loss, -log sigmoid(reward of chosen - reward of rejected), one per pair."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs.pop("labels")
        chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
        margins = chosen - rejected
        loss = F.binary_cross_entropy_with_logits(margins, torch.ones_like(margins))
        return (loss, {"margins": margins}) if return_outputs else loss


def load_pairs(script: ScriptArguments, split: str, file: str | None, tokenizer: Any) -> Dataset:
    """Returns pairs with their texts, and as `chosen_ids` and `rejected_ids`."""
    kind = "parquet" if file is not None and file.endswith(".parquet") else "json"
    name, config = (kind, None) if file else (script.dataset_name, script.dataset_config)
    dataset = load_dataset(name, config, data_files=file, split="train" if file else split)

    def turns(part: Any, role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": part}] if isinstance(part, str) else part or []

    def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
        texts = {"row": number}
        for name, column in (("chosen", script.chosen_column), ("rejected", script.rejected_column)):
            messages = turns(row[column], "assistant")
            if messages[0]["role"] == "assistant":  # and not the whole conversation, beside its prompt
                messages = turns(row.get(script.prompt_column), "user") + messages
            texts[f"{name}_text"] = tokenizer.apply_chat_template(messages, tokenize=False)
            texts[f"{name}_ids"] = tokenizer(texts[f"{name}_text"], add_special_tokens=False)["input_ids"]
        return texts

    pairs = dataset.map(encode, with_indices=True, remove_columns=dataset.column_names)
    limit = min(script.max_length, tokenizer.model_max_length)  # cut off, both answers might be the same
    kept = pairs.filter(lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit)
    print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are longer than {limit} tokens, and left out.")
    return kept


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=2, learning_rate=2e-5, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    args.remove_unused_columns = False  # the collator reads columns that the model does not
    hf.set_seed(args.seed)

    # 1. Data set: an encoder's tokenizer gets a chat template of its own separators
    tokenizer = hf.AutoTokenizer.from_pretrained(script.config_name or script.model_name_or_path)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (
            tokenizer.cls_token
            + "{% for message in messages %}{{ message['content'] }}"
            + tokenizer.sep_token
            + "{% endfor %}"
        )
    pairs = load_pairs(script, script.train_split, script.train_file, tokenizer)
    held_out = load_pairs(script, script.validation_split, script.validation_file, tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row[f"{name}_ids"] for name in ("chosen", "rejected") for row in rows]
        return {**tokenizer.pad({"input_ids": ids}, return_tensors="pt"), "labels": torch.ones(len(rows))}

    # 2. Model: one logit, the reward
    path, load = script.config_name or script.model_name_or_path, hf.AutoModelForSequenceClassification
    config = hf.AutoConfig.from_pretrained(path, num_labels=1)
    model = load.from_config(config) if script.config_name else load.from_pretrained(path, config=config)

    # 3. Train: the weights of an epoch's pairs are their losses to the power of alpha
    trainer = PairwiseTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        eval_dataset=held_out,
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {"accuracy": float((prediction.predictions > 0).mean())},
        resampler=LossResampler(Tempered(script.alpha), warmup_epochs=script.warmup_epochs),
    )
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 4. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero() and trainer.resampler.measured():  # an epoch after warm-up
        suspects = trainer.resampler.suspects(script.num_suspects)
        texts = pairs.select(suspects["row"]).select_columns(["chosen_text", "rejected_text", "row"])
        texts = texts.add_column("excess_loss", suspects["excess_loss"][:])
        texts.to_csv(str(Path(args.output_dir) / "suspects.csv"))
    if trainer.is_world_process_zero():
        print(f"\n{'':10}{'before':>8}{'after':>8}")
        print(f"{'accuracy':10}{before['before_accuracy']:8.3f}{after['after_accuracy']:8.3f}")
        print(f"The model, and suspects.csv if an epoch was measured, are in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
