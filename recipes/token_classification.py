"""Tag tokens: named entities (entity F1 by seqeval), or parts of speech and other tags (accuracy, macro F1).

    python recipes/token_classification.py --output_dir outputs/ner                # CoNLL-2003, DistilBERT: wants a GPU
    python recipes/token_classification.py --output_dir outputs/mine --train_file train.jsonl \\
        --validation_file test.jsonl --token_column words --label_column pos

    python recipes/token_classification.py --output_dir outputs/demo/slots --config_name recipes/data/commands/model \\
        --train_file recipes/data/commands/train.jsonl --validation_file recipes/data/commands/test.jsonl \\
        --label_column tags --num_train_epochs 10 --learning_rate 1e-3

The last line needs no download and no GPU. Rows hold a list of words and one of their tags, names or integers; tags
named B-, I- and O are entities. The output folder holds model and tokenizer for `pipeline("token-classification")`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from datasets import ClassLabel, DatasetDict, load_dataset
from seqeval.metrics import f1_score as entity_f1_score
from sklearn.metrics import accuracy_score, f1_score

from rsft_hf import LossResampler, RejectionSamplingTrainer, Tempered


@dataclass
class ScriptArguments:
    """Data, model and weighting."""

    dataset_name: str = field(default="eriktks/conll2003", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    token_column: str = field(default="tokens", metadata={"help": "Column of the words."})
    label_column: str = field(default="ner_tags", metadata={"help": "Column of their tags."})
    model_name_or_path: str = field(
        default="distilbert/distilbert-base-cased", metadata={"help": "Pretrained encoder with a fast tokenizer."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a row; a longer sentence is several."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training rows, chosen at random."})
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of a row = loss ** alpha; the safe rule if not."}
    )


def load_splits(script: ScriptArguments) -> tuple[DatasetDict, list[str]]:
    """Returns the splits "train" and "test" with `tokens` and `tags` (integers), and the names of the tags."""
    if script.train_file is None:
        names = {"train": script.train_split, "test": script.validation_split}
        splits = DatasetDict(load_dataset(script.dataset_name, script.dataset_config, split=names))
    else:
        splits = DatasetDict()
        for name, file in (("train", script.train_file), ("test", script.validation_file)):  # each by its own schema
            splits[name] = load_dataset("parquet" if file.endswith(".parquet") else "json", data_files=file)["train"]
    columns = {script.token_column: "tokens", script.label_column: "tags"}
    splits = splits.select_columns(list(columns)).rename_columns(columns)
    is_named = isinstance(splits["train"].features["tags"].feature, ClassLabel)
    names = sorted({str(tag) for tags in splits["train"]["tags"] for tag in tags if tag is not None} - {"-100"})
    names = splits["train"].features["tags"].feature.names if is_named else names
    numbers = {"-100": -100} | {name: number for number, name in enumerate(names)}
    for split, rows in splits.items():  # by names: those of held-out rows may have another order; an unknown one raises
        known = dict(enumerate(getattr(rows.features["tags"].feature, "names", names if is_named else [])))
        texts = [["-100" if tag is None else str(known.get(tag, tag)) for tag in tags] for tags in rows["tags"]]
        if other := sorted({text for row in texts for text in row} - set(numbers)):
            raise ValueError(f"The split {split!r} has the tags {other}, which no training row has.")
        tags = [[numbers[text] for text in row] for row in texts]
        splits[split] = rows.remove_columns("tags").add_column("tags", tags)
    return splits, names


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=32)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set: the first token of a word has its tag, the others none; a long sentence is several rows
    splits, names = load_splits(script)
    if script.max_train_samples is not None and script.max_train_samples < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(args.seed).select(range(script.max_train_samples))
    # Byte-level tokenizers (RoBERTa) read words without a space before them as parts of the ones before.
    tokenizer = hf.AutoTokenizer.from_pretrained(script.config_name or script.model_name_or_path, add_prefix_space=True)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        options = {"truncation": True, "max_length": script.max_length, "return_overflowing_tokens": True}
        encoded, labels, seen = tokenizer(batch["tokens"], is_split_into_words=True, **options), [], set()
        for window, row in enumerate(encoded.pop("overflow_to_sample_mapping")):
            labels.append([])
            for word in encoded.word_ids(window):
                is_first = word is not None and (row, word) not in seen
                seen.add((row, word))
                labels[-1].append(batch["tags"][row][word] if is_first else -100)
        return {**encoded, "labels": labels}

    with args.main_process_first(desc="tokenizing"):
        splits = splits.map(encode, batched=True, remove_columns=["tokens", "tags"])

    # 2. Model
    path, load = script.config_name or script.model_name_or_path, hf.AutoModelForTokenClassification
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config = hf.AutoConfig.from_pretrained(path, num_labels=len(names), **labels)
    model = load.from_config(config) if script.config_name else load.from_pretrained(path, config=config)

    def compute_metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
        is_tagged = prediction.label_ids != -100
        found, true = prediction.predictions.argmax(-1), prediction.label_ids
        metrics = {"accuracy": accuracy_score(true[is_tagged], found[is_tagged])}
        metrics["macro_f1"] = f1_score(true[is_tagged], found[is_tagged], average="macro")
        if {name[:2] for name in names} <= {"B-", "I-", "O"}:
            rows = [[np.array(names)[tags[kept]].tolist() for tags, kept in zip(each, is_tagged, strict=True)]
                    for each in (true, found)]  # fmt: skip
            metrics["entity_f1"] = entity_f1_score(*rows)
        return {name: float(value) for name, value in metrics.items()}

    # 3. Train: the loss of a row is the mean over its tags
    is_safe = script.alpha is None
    resampler = (
        LossResampler() if is_safe else LossResampler(Tempered(script.alpha), losses="training", warmup_epochs=1)
    )
    data = {"train_dataset": splits["train"], "eval_dataset": splits["test"], "processing_class": tokenizer}
    collator = hf.DataCollatorForTokenClassification(tokenizer)
    trainer = RejectionSamplingTrainer(
        model, args, collator, compute_metrics=compute_metrics, resampler=resampler, **data
    )
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 4. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{'':10}{'before':>8}{'after':>8}")
        for name in ("accuracy", "macro_f1", "entity_f1"):
            if f"after_{name}" in after:
                print(f"{name:10}{before[f'before_{name}']:8.3f}{after[f'after_{name}']:8.3f}")
        print(f"The model is in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
