"""Teach a language model to parse commands into JSON: a few labelled ones first, then its own right parses.

    python recipes/voice_assistant.py --output_dir outputs/voice                     # SNIPS, SmolLM2-135M: wants a GPU

    python recipes/voice_assistant.py --output_dir outputs/demo/voice --config_name recipes/data/commands/parser \\
        --train_file recipes/data/commands/train.jsonl --validation_file recipes/data/commands/test.jsonl \\
        --token_column tokens --tag_column tags --num_supervised 250 --supervised_epochs 40 --num_train_epochs 3 \\
        --learning_rate 3e-3 --per_device_train_batch_size 16 --max_new_tokens 48

The second line needs no download and no GPU. Rows hold words and their BIO tags, as lists or one text, and an intent.
The weighted half trains on `num_supervised` parses, drawn by their losses; then, in rounds, the model parses others, a
verifier reads what it wrote, and right parses are trained on. The output folder holds the model and candidates/.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from datasets import Dataset, load_dataset

from rsft_hf import CandidateResampler, RejectionSamplingTrainer, Threshold


@dataclass
class ScriptArguments:
    """Data, model and candidates."""

    dataset_name: str = field(default="bkonkle/snips-joint-intent", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    token_column: str = field(default="input", metadata={"help": "Column of the words."})
    tag_column: str = field(default="slots", metadata={"help": "Column of their BIO tags."})
    intent_column: str = field(default="intent", metadata={"help": "Column of the intents."})
    model_name_or_path: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Chat model."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    num_supervised: int = field(default=500, metadata={"help": "Labelled commands of the first stage."})
    supervised_epochs: int = field(default=3, metadata={"help": "Epochs of the first stage."})
    max_train_samples: int = field(default=2000, metadata={"help": "Commands of a round."})
    max_eval_samples: int = field(default=500, metadata={"help": "Held-out commands."})
    num_candidates: int = field(default=8, metadata={"help": "Parses per command and round."})
    max_new_tokens: int = field(default=96, metadata={"help": "Maximum length of a parse."})


def load_commands(script: ScriptArguments, split: str, file: str | None, num_rows: int, seed: int) -> Dataset:
    """Returns rows with `prompt` (a conversation) and `parse` (JSON)."""
    kind = "parquet" if file is not None and file.endswith(".parquet") else "json"
    name, config = (kind, None) if file else (script.dataset_name, script.dataset_config)
    rows = load_dataset(name, config, data_files=file, split="train" if file else split).shuffle(seed)
    columns = {name: rows.features[name] for name in (script.token_column, script.tag_column, script.intent_column)}
    decode = {name: getattr(getattr(one, "feature", one), "int2str", lambda one: one) for name, one in columns.items()}

    def as_prompt(row: dict[str, Any]) -> dict[str, Any]:
        *both, intent = (decode[name](row[name]) for name in columns)
        words, tags = (one.split() if isinstance(one, str) else one for one in both)
        slots, name = {}, None
        for word, tag in zip(words, tags, strict=True):
            kind, dash, slot = str(tag).partition("-")
            if kind.upper() not in tuple("OBIESLU") or bool(dash) == (kind.upper() == "O"):
                raise ValueError(f"The tag {tag!r} is none of O, B-slot and I-slot. Name the column by `--tag_column`.")
            is_inside = kind.upper() in ("I", "E", "L") and slot == name
            name = slot or None
            if name is not None:
                slots[name] = slots.get(name, "") + (" " if is_inside else ", " if name in slots else "") + word
        parse = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)
        return {"prompt": [{"role": "user", "content": " ".join(words)}], "parse": parse}

    return rows.select(range(min(num_rows, len(rows)))).map(as_prompt, remove_columns=rows.column_names)


def read(text: str) -> dict[str, Any]:
    """Returns a parse; an empty one for a text that is none."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def is_right(completions: list[Any], parse: list[str], **columns: Any) -> list[float]:
    """Returns 1 for the right intent with exactly the right slots, in any order."""
    return [float(read(one[0]["content"]) == read(true)) for one, true in zip(completions, parse, strict=True)]


def has_intent(completions: list[Any], parse: list[str], **columns: Any) -> list[float]:
    """Returns 1 for the right intent."""
    pairs = zip(completions, parse, strict=True)
    return [float(read(one[0]["content"]).get("intent") == read(true)["intent"]) for one, true in pairs]


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=32)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set and model
    num_few, num_rows = script.num_supervised, script.num_supervised + script.max_train_samples
    commands = load_commands(script, script.train_split, script.train_file, num_rows, args.seed)
    if len(commands) <= num_few:
        raise ValueError(f"`--num_supervised`={num_few} of {len(commands)} commands leaves none for the rounds.")
    few, others = commands.take(num_few), commands.skip(num_few)
    test = load_commands(script, script.validation_split, script.validation_file, script.max_eval_samples, seed=0)
    path, load = script.config_name or script.model_name_or_path, hf.AutoModelForCausalLM
    tokenizer, config = hf.AutoTokenizer.from_pretrained(path), hf.AutoConfig.from_pretrained(path)
    model = load.from_config(config) if script.config_name else load.from_pretrained(path, dtype=torch.float32)

    # 2. Supervised: the safe rule over the losses of the rows
    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        answer = [{"role": "assistant", "content": row["parse"]}]
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + answer)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(start) + ids[len(start) :]}

    rows, first = few.map(encode, remove_columns=few.column_names), f"{args.output_dir}/supervised"
    alone = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
    first_args = dataclasses.replace(args, output_dir=first, num_train_epochs=script.supervised_epochs, **alone)
    RejectionSamplingTrainer(model, first_args, hf.DataCollatorForSeq2Seq(tokenizer), rows, None, tokenizer).train()

    # 3. Rounds: right parses of the other commands
    resampler = CandidateResampler(
        is_right, Threshold(minimum=0.5), num_candidates=script.num_candidates, supervised_dataset=rows,
        generation_config=hf.GenerationConfig(do_sample=True, top_k=0, max_new_tokens=script.max_new_tokens),
        supervised_fraction=0.3, eval_reward_funcs=has_intent, on_nothing_accepted="skip",
    )  # fmt: skip
    trainer = RejectionSamplingTrainer(model, args, None, others, test, tokenizer, resampler=resampler)
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{'':16}{'before':>8}{'after':>8}")
        for name, key in (("frame accuracy", "rewards/is_right/mean"), ("intent accuracy", "rewards/has_intent/mean")):
            print(f"{name:16}{before[f'before_{key}']:8.3f}{after[f'after_{key}']:8.3f}")
        print(f"The model and candidates are in {args.output_dir}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
