"""Fine-tune a sentiment classifier whose training set is resampled each epoch by the losses of its rows.

    python recipes/imdb_sentiment.py --output_dir outputs/imdb               # stanfordnlp/imdb, DistilBERT: wants a GPU
    python recipes/imdb_sentiment.py --output_dir outputs/mine --train_file train.csv --validation_file test.csv

    python recipes/imdb_sentiment.py --output_dir outputs/demo/sentiment --config_name recipes/data/reviews/model \\
        --train_file recipes/data/reviews/train.csv --validation_file recipes/data/reviews/test.csv \\
        --num_train_epochs 10 --warmup_epochs 3 --learning_rate 5e-4 --per_device_train_batch_size 32

The third line needs no download and no GPU: about a minute on one CPU core. Files are CSV, JSONL or Parquet with the
columns `text` and `label`. The output folder holds the model and its tokenizer, where
`pipeline("text-classification", folder)` finds them, and suspects.csv: the rows whose label is probably wrong, with
the label that the model prefers.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from sklearn.metrics import accuracy_score, f1_score

from rsft_hf import LossResampler, RejectionSamplingTrainer, Tempered


@dataclass
class ScriptArguments:
    """Data, model and weighting."""

    dataset_name: str = field(default="stanfordnlp/imdb", metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="test", metadata={"help": "Held-out split."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSONL or Parquet file of rows."})
    validation_file: str | None = field(default=None, metadata={"help": "Such a file of held-out rows."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, names or integers."})
    model_name_or_path: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "Encoder."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration and tokenizer, for random weights."})
    max_length: int = field(default=256, metadata={"help": "Tokens read of a text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Number of training rows, chosen at random."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of a row = loss ** alpha; 0 is uniform, 1 the loss."})
    warmup_epochs: int = field(default=1, metadata={"help": "Epochs at the start that read every row once."})
    clean_labels: bool = field(default=False, metadata={"help": "Train twice: without the rows found mislabelled."})
    num_suspects: int = field(default=100, metadata={"help": "Rows in suspects.csv."})


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
    splits["train"] = splits["train"].add_column("source_row", list(range(len(splits["train"]))))  # of suspects.csv
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
    """Returns accuracy and macro F1."""
    classes, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {"accuracy": accuracy_score(labels, classes), "macro_f1": f1_score(labels, classes, average="macro")}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = hf.HfArgumentParser((ScriptArguments, hf.TrainingArguments))
    parser.set_defaults(num_train_epochs=3, learning_rate=2e-5, per_device_train_batch_size=16)
    parser.set_defaults(logging_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_file is None) != (script.validation_file is None):
        raise ValueError("`--train_file` and `--validation_file` go together: give both, or none for `--dataset_name`.")

    # 1. Data set
    splits = load_splits(script)
    if script.max_train_samples is not None and script.max_train_samples < len(splits["train"]):
        splits["train"] = splits["train"].shuffle(args.seed).select(range(script.max_train_samples))
    tokenizer = hf.AutoTokenizer.from_pretrained(script.config_name or script.model_name_or_path)
    length = min(script.max_length, tokenizer.model_max_length)
    with args.main_process_first(desc="tokenizing"):
        encoded = splits.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=length), batched=True)

    # 2. Model
    names, path = splits["train"].features["labels"].names, script.config_name or script.model_name_or_path
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config = hf.AutoConfig.from_pretrained(path, num_labels=len(names), **labels)

    def build_trainer(args: hf.TrainingArguments, rows: Dataset, resampler: LossResampler) -> RejectionSamplingTrainer:
        hf.set_seed(args.seed)
        load, options = hf.AutoModelForSequenceClassification, {"config": config, "ignore_mismatched_sizes": True}
        model = load.from_config(config) if script.config_name else load.from_pretrained(path, **options)
        data = {"train_dataset": rows, "eval_dataset": encoded["test"], "processing_class": tokenizer}
        return RejectionSamplingTrainer(model, args, compute_metrics=compute_metrics, resampler=resampler, **data)

    # 3. Clean: a plain run is observed, and the rows whose label it finds wrong are left out
    rows, report = encoded["train"], None
    if script.clean_labels:
        observer = LossResampler(losses="training", warmup_epochs=math.ceil(args.num_train_epochs))
        alone = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        first_args = dataclasses.replace(args, output_dir=f"{args.output_dir}/observed", **alone)
        build_trainer(first_args, rows, observer).train()
        report = observer.label_report()
        rows = report.drop(rows)

    # 4. Train: the weights of an epoch's rows are their losses to the power of alpha
    resampler = LossResampler(Tempered(script.alpha), losses="training", warmup_epochs=script.warmup_epochs)
    trainer = build_trainer(args, rows, resampler)
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 5. Evaluate and save
    after = trainer.evaluate(metric_key_prefix="after")
    trainer.save_model()
    if trainer.is_world_process_zero():
        report = report or resampler.label_report()
        report.table(splits["train"], script.num_suspects).to_csv(str(Path(args.output_dir) / "suspects.csv"))
        print(f"\n{'':10}{'before':>8}{'after':>8}")
        for name in ("accuracy", "macro_f1"):
            print(f"{name:10}{before[f'before_{name}']:8.3f}{after[f'after_{name}']:8.3f}")
        print(f"{report}; the model and suspects.csv are in {Path(args.output_dir).resolve()}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
