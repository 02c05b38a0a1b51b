"""Fine-tune an extractive question answerer on SQuAD's format; long contexts are read in overlapping windows.

    python recipes/question_answering.py --output_dir outputs/squad                    # SQuAD, DistilBERT: wants a GPU
    python recipes/question_answering.py --output_dir outputs/mine --train_file train.jsonl --validation_file test.jsonl

    python recipes/question_answering.py --output_dir outputs/demo/facts --config_name recipes/data/facts/model \\
        --train_file recipes/data/facts/train.jsonl --validation_file recipes/data/facts/test.jsonl \\
        --max_length 40 --doc_stride 16 --num_train_epochs 30 --learning_rate 2e-3

The third line needs no download and no GPU. Rows hold `context`, `question` and `answers` with `text` and
`answer_start` (characters), empty for a question without an answer. The output folder holds model and tokenizer.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from datasets import DatasetDict, load_dataset

from rsft_hf import RejectionSamplingTrainer
from rsft_hf.rewards import ExactMatch, TokenF1


@dataclass
class ScriptArguments:
    """Data, model and windows."""

    dataset_name: str = field(default="rajpurkar/squad", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    question_column: str = field(default="question", metadata={"help": "Column of the questions."})
    context_column: str = field(default="context", metadata={"help": "Column of the contexts."})
    answers_column: str = field(default="answers", metadata={"help": "Column of the answers."})
    model_name_or_path: str = field(
        default="distilbert/distilbert-base-uncased", metadata={"help": "Pretrained encoder with a fast tokenizer."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    max_length: int = field(default=384, metadata={"help": "Tokens of a window, question included."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two windows share."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of questions, chosen at random."})


def load_splits(script: ScriptArguments) -> DatasetDict:
    """Returns the splits "train" and "test" with `question`, `context` and `answers`."""
    if script.train_file is None:
        names = {"train": script.train_split, "test": script.validation_split}
        splits = DatasetDict(load_dataset(script.dataset_name, script.dataset_config, split=names))
    else:
        splits = DatasetDict()
        for name, file in (("train", script.train_file), ("test", script.validation_file)):  # each by its own schema
            splits[name] = load_dataset("parquet" if file.endswith(".parquet") else "json", data_files=file)["train"]
    columns = {script.question_column: "question", script.context_column: "context", script.answers_column: "answers"}
    return splits.select_columns(list(columns)).rename_columns(columns)


def best_answer(context: str, windows: list[dict[str, Any]], may_be_empty: bool, most: int = 30) -> str:
    """Returns the span of at most so many tokens with the largest sum of logits; "" where no answer beats it in all."""
    best, none, text = -np.inf, np.inf, ""
    for window in windows:
        allowed = np.array([span is not None for span in window["offsets"]])
        scores = window["starts"][:, None] + window["ends"][None]
        none = min(none, scores[0, 0])  # the first token stands for no answer; windows beside the answer are sure of it
        # A span lies in the context, ends after it starts, and is short.
        is_span = np.triu(np.outer(allowed, allowed)) & ~np.triu(np.ones_like(scores, dtype=bool), most)
        scores = np.where(is_span, scores, -np.inf)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        if scores[first, last] > best:
            best, text = scores[first, last], context[window["offsets"][first][0] : window["offsets"][last][1]]
    return "" if may_be_empty and none > best else text


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=2, learning_rate=3e-5, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set: a row per window, whose label is the place of the answer, or the first token if it is not there
    splits = load_splits(script)
    if script.max_train_samples is not None and script.max_train_samples < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(args.seed).select(range(script.max_train_samples))
    may_be_empty = any(not any(answers["text"]) for answers in splits["train"]["answers"])
    tokenizer = hf.AutoTokenizer.from_pretrained(script.config_name or script.model_name_or_path)

    def windows_of(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            [question.strip() for question in batch["question"]], batch["context"], truncation="only_second",
            max_length=min(script.max_length, tokenizer.model_max_length), stride=script.doc_stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length",
        )  # fmt: skip
        made = []
        for window, question in enumerate(encoded["overflow_to_sample_mapping"]):
            answers, parts, start, end = batch["answers"][question], encoded.sequence_ids(window), 0, 0
            spans = [
                span if part == 1 else None for span, part in zip(encoded["offset_mapping"][window], parts, strict=True)
            ]
            if any(answers["text"]):  # some data sets have "" where there is none
                first, last = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
                covered = [token for token, span in enumerate(spans) if span and span[0] < last and span[1] > first]
                if covered and spans[covered[0]][0] <= first and spans[covered[-1]][1] >= last:
                    start, end = covered[0], covered[-1]
            made.append({"start_positions": start, "end_positions": end, "row": numbers[question], "offsets": spans})
        return {name: encoded[name] for name in tokenizer.model_input_names} | {
            name: [row[name] for row in made] for name in made[0]
        }

    with args.main_process_first():
        rows = splits.map(windows_of, with_indices=True, batched=True, remove_columns=splits["train"].column_names)

    # 2. Model and trainer
    path, load = script.config_name or script.model_name_or_path, hf.AutoModelForQuestionAnswering
    model = load.from_config(hf.AutoConfig.from_pretrained(path)) if script.config_name else load.from_pretrained(path)
    trainer = RejectionSamplingTrainer(model, args, None, rows["train"], processing_class=tokenizer)  # the safe rule

    def evaluate(prefix: str) -> dict[str, float]:
        starts, ends = trainer.predict(rows["test"]).predictions[:2]
        found = defaultdict(list)
        for window, start, end in zip(rows["test"], starts, ends, strict=True):
            found[window["row"]].append({**window, "starts": start, "ends": end})
        pairs = [(best_answer(row["context"], found[number], may_be_empty), row["answers"]["text"] or [""])
                 for number, row in enumerate(splits["test"])]  # fmt: skip
        scores = {f"{prefix}_exact_match": ExactMatch().score, f"{prefix}_f1": TokenF1().score}
        return {name: 100 * float(np.mean([score(*pair) for pair in pairs])) for name, score in scores.items()}

    # 3. Train, evaluate and save
    before = evaluate("before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = evaluate("after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{'':12}{'before':>8}{'after':>8}")
        for name in ("exact_match", "f1"):
            print(f"{name:12}{before[f'before_{name}']:8.1f}{after[f'after_{name}']:8.1f}")
        print(f"The model is in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
