"""Fine-tune a classifier on few labelled texts and many unlabelled ones, whose labels it draws and accepts itself.

    python recipes/self_training.py --output_dir outputs/few      # AG News, 20 labels a class, DistilBERT: wants a GPU
    python recipes/self_training.py --output_dir outputs/mine --train_file labelled.csv --unlabelled_file texts.csv \\
        --validation_file test.csv

    python recipes/self_training.py --output_dir outputs/demo/self_training --config_name recipes/data/commands/model \\
        --train_file recipes/data/commands/train.jsonl --validation_file recipes/data/commands/test.jsonl \\
        --label_column intent --num_per_class 8 --num_train_epochs 30 --warmup_epochs 10 --learning_rate 1e-3

The last line needs no download and no GPU. Files are CSV, JSONL or Parquet. Without `--unlabelled_file`, only
`num_per_class` labels of each class are kept, and the others are used to count wrong labels alone. The output folder
holds the model and its tokenizer, and pseudo_labels/ with every proposed label (`load_pseudo_labels`).
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from sklearn.metrics import accuracy_score, f1_score

from rsft_hf import PredictionResampler, RejectionSamplingTrainer
from rsft_hf.predictive import Sharpened


@dataclass
class ScriptArguments:
    """Data, model and pseudo-labels."""

    dataset_name: str = field(default="fancyzhx/ag_news", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of labelled rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    unlabelled_file: str | None = field(default=None, metadata={"help": "Such a file of texts without labels."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or integers."})
    num_per_class: int = field(default=20, metadata={"help": "Labels kept of each class without `unlabelled_file`."})
    max_unlabelled: int = field(default=10_000, metadata={"help": "Number of unlabelled rows, chosen at random."})
    model_name_or_path: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "Encoder."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    max_length: int = field(default=128, metadata={"help": "Tokens read of a text."})
    warmup_epochs: int = field(default=5, metadata={"help": "Epochs at the start that read labelled rows only."})
    pseudo_fraction: float = field(default=0.5, metadata={"help": "Share of an epoch's rows with drawn labels."})
    confidence_quantile: float = field(default=0.5, metadata={"help": "Share of each class left out as unsure."})
    temperature: float = field(default=0.5, metadata={"help": "Of the target: 1 is the prediction, 0 its best class."})


def load_file(path: str) -> Dataset:
    """Returns the rows of a CSV, JSONL or Parquet file."""
    return load_dataset({".csv": "csv", ".parquet": "parquet"}.get(Path(path).suffix, "json"), data_files=path)["train"]


def load_splits(script: ScriptArguments, seed: int) -> DatasetDict:
    """Returns the splits "train", "unlabelled" and "test" with the columns `text` and `labels` (class ids)."""
    if script.train_file is None:
        names = {"train": script.train_split, "test": script.validation_split}
        splits = DatasetDict(load_dataset(script.dataset_name, script.dataset_config, split=names))
    else:
        splits = DatasetDict(train=load_file(script.train_file), test=load_file(script.validation_file))
    names = {script.text_column: "text", script.label_column: "labels"}
    splits = splits.select_columns(list(names)).rename_columns(names).cast_column("text", Value("string"))
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
    if script.unlabelled_file is not None:
        rows = load_file(script.unlabelled_file).select_columns(script.text_column)
        rows = rows.rename_columns({script.text_column: "text"}).cast_column("text", Value("string"))
        splits["unlabelled"] = rows.filter(lambda row: row["text"])
    else:
        rows, counts = splits["train"].shuffle(seed), Counter()
        few = [counts.update([label]) or counts[label] <= script.num_per_class for label in rows["labels"]]
        splits["train"] = rows.select([row for row, is_kept in enumerate(few) if is_kept])
        splits["unlabelled"] = rows.select([row for row, is_kept in enumerate(few) if not is_kept])
    rows = splits["unlabelled"].shuffle(seed)
    splits["unlabelled"] = rows.select(range(min(script.max_unlabelled, len(rows))))
    return splits


def compute_metrics(prediction: hf.EvalPrediction) -> dict[str, float]:
    """Returns accuracy and macro F1."""
    classes, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {"accuracy": accuracy_score(labels, classes), "macro_f1": f1_score(labels, classes, average="macro")}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=30, learning_rate=5e-5, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")
    if args.max_steps < 0 and script.warmup_epochs >= args.num_train_epochs:
        raise ValueError(f"`--warmup_epochs`={script.warmup_epochs} is no less than {args.num_train_epochs} epochs.")
    hf.set_seed(args.seed)

    # 1. Data set and model
    splits = load_splits(script, args.seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(script.config_name or script.model_name_or_path)
    length = min(script.max_length, tokenizer.model_max_length)
    with args.main_process_first(desc="tokenizing"):
        encoded = splits.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=length), batched=True)
    names, load = splits["train"].features["labels"].names, hf.AutoModelForSequenceClassification
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    path = script.config_name or script.model_name_or_path
    config = hf.AutoConfig.from_pretrained(path, num_labels=len(names), **labels)
    options = {"config": config, "ignore_mismatched_sizes": True}  # the head of another task
    model = load.from_config(config) if script.config_name else load.from_pretrained(path, **options)

    # 2. Train: each epoch the surer half of each class is proposed a label, y ~ q, which is accepted with p / (M q)
    resampler = PredictionResampler(
        encoded["unlabelled"],
        Sharpened(script.temperature),
        confidence_quantile=script.confidence_quantile,
        pseudo_fraction=script.pseudo_fraction,
        warmup_epochs=script.warmup_epochs,
        reference_column=None if script.unlabelled_file else "labels",
    )
    data = {"train_dataset": encoded["train"], "eval_dataset": encoded["test"], "processing_class": tokenizer}
    trainer = RejectionSamplingTrainer(model, args, compute_metrics=compute_metrics, resampler=resampler, **data)
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 3. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"\n{'':10}{'before':>8}{'after':>8}")
        for name in ("accuracy", "macro_f1"):
            print(f"{name:10}{before[f'before_{name}']:8.3f}{after[f'after_{name}']:8.3f}")
        print(f"The model and pseudo_labels are in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
