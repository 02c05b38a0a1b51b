"""Fine-tune a topic classifier: an epoch's rows are drawn by the safe rule, or so that rare classes count as others.

    python recipes/topic_classification.py --output_dir outputs/topics              # AG News, DistilBERT: wants a GPU
    python recipes/topic_classification.py --output_dir outputs/mine --train_file train.csv --validation_file test.csv

    python recipes/topic_classification.py --output_dir outputs/demo/topics --config_name recipes/data/commands/model \\
        --train_file recipes/data/commands/train.jsonl --validation_file recipes/data/commands/test.jsonl \\
        --label_column intent --num_train_epochs 10 --learning_rate 1e-3 --class_balanced True

The third line needs no download and no GPU. Files are CSV, JSONL or Parquet. The output folder holds the model and its
tokenizer, where `pipeline("text-classification", folder)` finds them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from sklearn.metrics import accuracy_score, f1_score, recall_score

from rsft_hf import ClassBalanced, LossResampler, RejectionSamplingTrainer


@dataclass
class ScriptArguments:
    """Data, model and weighting."""

    dataset_name: str = field(default="fancyzhx/ag_news", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or integers."})
    model_name_or_path: str = field(
        default="distilbert/distilbert-base-uncased", metadata={"help": "Pretrained encoder."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    max_length: int = field(default=128, metadata={"help": "Tokens read of a text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training rows, chosen at random."})
    class_balanced: bool = field(default=False, metadata={"help": "Draw each class as often as the others."})


def load_splits(script: ScriptArguments) -> DatasetDict:
    """Returns the splits "train" and "test" with the columns `text` and `labels` (class ids)."""
    if script.train_file is None:
        names = {"train": script.train_split, "test": script.validation_split}
        splits = DatasetDict(load_dataset(script.dataset_name, script.dataset_config, split=names))
    else:
        kinds, splits = {".csv": "csv", ".parquet": "parquet"}, DatasetDict()
        for name, file in (("train", script.train_file), ("test", script.validation_file)):  # each by its own schema
            splits[name] = load_dataset(kinds.get(Path(file).suffix, "json"), data_files=file, split="train")
    splits = splits.select_columns([script.text_column, script.label_column])
    splits = splits.rename_columns({script.text_column: "text", script.label_column: "labels"})
    splits = splits.cast_column("text", Value("string"))
    for name, rows in splits.items():
        no_label = (None, "", -1) if isinstance(rows.features["labels"], ClassLabel) else (None, "")
        splits[name] = rows.filter(lambda row, no_label=no_label: row["text"] and row["labels"] not in no_label)
        if dropped := len(rows) - len(splits[name]):
            print(f"{dropped} of {len(rows)} rows of {name} have no text or no label, and are left out.")
    if not isinstance(splits["train"].features["labels"], ClassLabel):
        splits = splits.cast_column("labels", Value("string"))
        splits["train"] = splits["train"].class_encode_column("labels")
    if not isinstance(splits["test"].features["labels"], ClassLabel):
        splits["test"] = splits["test"].cast_column("labels", splits["train"].features["labels"])
    elif (names := splits["train"].features["labels"].names) != splits["test"].features["labels"].names:
        splits["test"] = splits["test"].align_labels_with_mapping({one: k for k, one in enumerate(names)}, "labels")
    return splits


def compute_metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
    """Returns accuracy, macro F1, and the recall of the worst class."""
    classes, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, classes)),
        "macro_f1": float(f1_score(labels, classes, average="macro")),
        "worst_class": float(min(recall_score(labels, classes, average=None, labels=sorted(set(labels.tolist()))))),
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=2e-5, per_device_train_batch_size=32)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    hf.set_seed(args.seed)

    # 1. Data set
    splits = load_splits(script)
    if script.max_train_samples is not None and script.max_train_samples < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(args.seed).select(range(script.max_train_samples))
    tokenizer = hf.AutoTokenizer.from_pretrained(script.config_name or script.model_name_or_path)

    def encode(batch: dict[str, list[str]]) -> Dataset:
        return tokenizer(batch["text"], truncation=True, max_length=min(script.max_length, tokenizer.model_max_length))

    with args.main_process_first(desc="tokenizing"):
        splits = splits.map(encode, batched=True, remove_columns="text")

    # 2. Model
    names = splits["train"].features["labels"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config = hf.AutoConfig.from_pretrained(
        script.config_name or script.model_name_or_path, num_labels=len(names), **labels
    )
    load = hf.AutoModelForSequenceClassification
    pretrained = script.model_name_or_path
    options = {"config": config, "ignore_mismatched_sizes": True}  # the head of another task
    model = load.from_config(config) if script.config_name else load.from_pretrained(pretrained, **options)

    # 3. Train: the safe rule, which learns rare classes no better; or weights of the losses, balanced over the classes
    resampler = LossResampler()
    if script.class_balanced:
        resampler = LossResampler(ClassBalanced(), losses="training", warmup_epochs=1)
    trainer = RejectionSamplingTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        resampler=resampler,
    )
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 4. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{'':12}{'before':>8}{'after':>8}")
        for name in ("accuracy", "macro_f1", "worst_class"):
            print(f"{name:12}{before[f'before_{name}']:8.3f}{after[f'after_{name}']:8.3f}")
        print(f"The model is in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
