"""Sentiment of reviews, trained three ways: plainly, by rejection sampling on the loss, with a matched random control.

    python -m experiments.sentiment                          # stanfordnlp/imdb, BERT base, three seeds: wants a GPU
    python -m experiments.sentiment --dataset builtin        # no download

The second line needs no download, no GPU and about three minutes on two CPU cores; it is what `make demo` runs. Every
option of TrainingArguments is an option here; `--config my.yaml` reads them from a file, the command line wins. The
numbers of real runs, with their commands, stand in the README.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from experiments.builtin.reviews import build_model, build_tokenizer
from experiments.harness.arguments import ExperimentError, Preset, load_metric, option, parse_arguments
from experiments.harness.arms import WeightedArmArguments, make_loss_resampler
from experiments.harness.data import TextTask, TrainingRows, choose_training_rows, load_task
from experiments.harness.reporting import (
    Result,
    arm_table,
    comparison_section,
    draw_curves,
    draw_resampling,
    format_table,
    format_value,
    group_table,
    mean_and_deviation,
    paired_table,
    write_files,
)
from experiments.harness.runs import (
    ProgressLine,
    accuracy_by_group,
    arguments_of_run,
    evaluation_seconds,
    flipped_share,
    open_folders,
    resampling_figures,
    rows_trained_on,
    training_curve,
    weight_percentiles,
)
from rsft_hf import RejectionSamplingTrainer


@dataclass
class SentimentArguments:
    """Which rows and which model."""

    dataset: str = option("stanfordnlp/imdb", "Hub name, file, folder of files named by split, or 'builtin'.")
    model_name_or_path: str = option("google-bert/bert-base-uncased", "Hub name, folder, or 'builtin'.")
    text_column: str = option("text", "Column with the text.")
    label_column: str = option("label", "Column with the class.")
    group_column: str | None = option(None, "Column of the evaluation rows to break the accuracy down by.")
    train_split: str = option("train", "Split to train on.")
    eval_split: str = option("test", "Split to evaluate on; 'holdout' holds out a fifth of the training rows.")
    max_train_samples: int | None = option(None, "Train on so many rows, chosen by the seed, classes in proportion.")
    max_eval_samples: int | None = option(None, "Evaluate on so many rows, the same for every seed.")
    positive_fraction: float | None = option(None, "Share of class 1 among the training rows; the others stay.")
    label_noise: float = option(0.0, "Share of the training rows whose label is changed, chosen by the seed.")
    max_length: int = option(256, "Tokens of a text that are read.")

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise < 1:
            raise ExperimentError(f"`--label_noise` {self.label_noise} must lie in [0, 1): it is a share of the rows.")
        if self.positive_fraction is not None and not 0 < self.positive_fraction < 1:
            raise ExperimentError(f"`--positive_fraction` {self.positive_fraction} must lie in (0, 1).")
        for name in ("max_train_samples", "max_eval_samples", "max_length"):
            if vars(self)[name] is not None and vars(self)[name] < 2:
                raise ExperimentError(f"`--{name}` {vars(self)[name]} must be at least 2.")


@dataclass
class SentimentTrainingArguments(TrainingArguments):
    """Every option of TrainingArguments, with the defaults of this experiment."""

    output_dir: str = option("outputs/imdb_sentiment", "Folder of the runs, tables and pictures.")
    per_device_train_batch_size: int = option(16, "Rows per step and device.")
    per_device_eval_batch_size: int = option(32, "Rows per evaluation or scoring step and device.")
    learning_rate: float = option(2e-5, "Peak of the learning rate.")
    num_train_epochs: float = option(3.0, "Epochs; the rows of each are drawn anew.")
    warmup_steps: float = option(0.1, "Steps of rising learning rate; below 1 a share of all steps.")
    eval_strategy: str = option("steps", "When to evaluate.")
    eval_steps: float | None = option(0.1, "Steps between evaluations; below 1 a share of all steps.")
    logging_strategy: str = option("epoch", "When to log.")
    disable_tqdm: bool | None = option(True, "Print a line for each evaluation instead of bars and logs.")
    save_strategy: str = option("no", "When to save; a killed run goes on from its last checkpoint.")


BUILTIN_TRAINING = {"learning_rate": 5e-4, "num_train_epochs": 10.0, "per_device_train_batch_size": 32}

# A model that knows nothing yet errs on one class at a time, and w = L then swings from class to class: a uniform start
# and the softer rule prevent it. Chosen on rows held out of train.
BUILTIN_DATA = {"group_column": "phenomenon", "seeds": [1], "weighting": "tempered:0.5", "warmup_epochs": 3}

PRESETS = (
    Preset("dataset", "builtin", BUILTIN_DATA | {"model_name_or_path": "builtin"}),
    Preset("model_name_or_path", "builtin", BUILTIN_TRAINING | {"per_device_eval_batch_size": 128}),
)


def load_tokenizer(name: str, task: TextTask) -> Any:
    """Returns the tokenizer of a model, or one whose vocabulary is that of the training texts."""
    if name == "builtin":
        return build_tokenizer(task.train["text"])
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"`--model_name_or_path` {name!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name, or 'builtin', which needs no network."
        ) from error


def encode(dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Returns the data set with token ids in place of its texts."""
    return dataset.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns=["text"],
        desc="tokenizing",
    )


def load_model(name: str, tokenizer: Any, class_names: list[str], seed: int) -> PreTrainedModel:
    """Returns the model with a new head; the same seed gives the same head to every arm."""
    if name == "builtin":
        return build_model(tokenizer, len(class_names), seed)
    set_seed(seed)
    labels = dict(enumerate(class_names))
    return AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(labels), id2label=labels, label2id={label: number for number, label in labels.items()}
    )


def make_metric(minority_label: int) -> Callable[..., dict[str, float]]:
    """Returns what `compute_metrics` takes: accuracy, macro-F1 and the recall of the class with the fewest rows."""
    metric = load_metric("classification_report")

    def compute(prediction: Any) -> dict[str, float]:
        return metric.compute(
            predictions=prediction.predictions.argmax(-1),
            references=prediction.label_ids,
            minority_label=minority_label,
        )

    return compute


def train_arm(trainer: Trainer, rows: TrainingRows, groups: list[str] | None, checkpoint: str | None) -> dict[str, Any]:
    """Returns what there is to report of a run, after training it."""
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - began - evaluation_seconds(trainer)
    prediction = trainer.predict(trainer.eval_dataset, metric_key_prefix="final")
    predictions, references = prediction.predictions.argmax(-1).tolist(), prediction.label_ids.tolist()
    scores = {name: prediction.metrics[f"final_{name}"] for name in ("accuracy", "macro_f1", "minority_recall")}
    draws = rows_trained_on(trainer)
    # The clock of a resumed run has seen its last part only.
    scores |= {"draws": draws, "seconds": None if checkpoint else seconds}
    curve = training_curve(trainer, "accuracy")
    return {
        "metrics": scores,
        "curve": curve if curve and curve[-1][0] == draws else [*curve, [draws, scores["accuracy"]]],
        "resampling": resampling_figures(trainer),
        "weight_percentiles": weight_percentiles(trainer),
        "flipped": flipped_share(trainer, rows.is_flipped),
        "groups": accuracy_by_group(predictions, references, groups) if groups else {},
    }


COMPARED = ("accuracy", "macro_f1", "minority_recall")


def noise_table(results: Sequence[Result]) -> str:
    """Returns the share of rows with a changed label among all rows and among those drawn, first and last epoch."""
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        shares = [result["flipped"] for result in results if result["arm"] == arm]
        columns = [
            [share["of_rows"] for share in shares],
            [share["of_draws"] for share in shares],
            [share["by_epoch"][0] for share in shares],
            [share["by_epoch"][-1] for share in shares],
        ]
        rows.append([arm, *(format_value(*mean_and_deviation(values)) for values in columns)])
    return format_table(["arm", "of the rows", "of the draws", "first epoch", "last epoch"], rows)


def resampling_table(results: Sequence[Result]) -> str:
    """Returns the range over epochs and seeds of what the resampler logged, one line per arm."""
    names = ("acceptance_rate", "effective_sample_size", "unique_fraction", "max_repeats")
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results if result["resampling"]):
        figures = [epoch for result in results if result["arm"] == arm for epoch in result["resampling"]]
        ranges = [[epoch[name] for epoch in figures] for name in names]
        rows.append([arm, *(f"{format_value(min(v), None)} to {format_value(max(v), None)}" for v in ranges)])
    return format_table(["arm", *(name.replace("_", " ") for name in names)], rows)


def write_report(results: Sequence[Result], folder: Path, title: str) -> None:
    """Prints the tables and writes every file of the report into `folder`."""
    arms = list(dict.fromkeys(result["arm"] for result in results))
    sections = [("Results", arm_table(results))]
    others = [arm for arm in ("plain", "control") if arm in arms]
    if "rejection" in arms and others:
        sections.append(comparison_section(results, paired_table(results, "rejection", others, COMPARED, "points")))
    if any(result["resampling"] for result in results):
        sections.append(("Resampling, lowest to highest epoch", resampling_table(results)))
    if any(result["flipped"]["of_rows"] for result in results):
        sections.append(("Share of rows with a changed label", noise_table(results)))
    if results[0]["groups"]:
        sections.append(("Accuracy by group", group_table(results)))
    draw_resampling(results, folder / "resampling.png")
    draw_curves(results, folder / "accuracy.png", "training rows seen", "accuracy", "evaluation during training")
    note = (
        "Mean +- sample standard deviation over seeds. `draws` counts the rows trained on, with repeats; `seconds` is "
        "the time of training with resampling and without evaluations. The pictures are accuracy.png and "
        "resampling.png."
    )
    write_files(results, folder, title, note, sections)
    print(f"\nreport.md, results.json, results.csv, accuracy.png and resampling.png are in {folder}")


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Trains every arm with every seed, writes the report, and returns the results."""
    types = (SentimentArguments, WeightedArmArguments, SentimentTrainingArguments)
    options, arms, training = parse_arguments(types, argv, PRESETS, description=__doc__.splitlines()[0])
    arms.check_epochs(training.num_train_epochs)

    # 1. Data: the rows of a seed are the same for all its arms, the evaluation rows for all seeds.
    task = load_task(options)
    tokenizer = load_tokenizer(options.model_name_or_path, task)

    rows = {seed: choose_training_rows(task.train, len(task.class_names), options, seed) for seed in arms.seeds}
    training_sets = {seed: encode(chosen.dataset, tokenizer, options.max_length) for seed, chosen in rows.items()}
    evaluation = encode(task.evaluation, tokenizer, options.max_length)
    folders = open_folders(options, arms, training)

    results = []
    for (arm, seed), folder in folders.items():
        name, checkpoint, result = f"{arm}, seed {seed}", folder.checkpoint(), folder.result()
        print(f"{name}: {folder.status()}")
        if result is not None:
            results.append(result)
            continue

        # 2. Model: the arms of a seed start from the same weights.
        model = load_model(options.model_name_or_path, tokenizer, task.class_names, seed)
        # 3. Metric: a file beside this one, so that no hub is needed.
        compute_metrics = make_metric(rows[seed].minority_label)
        # 4. Resampler: decides which rows each epoch reads; None is a plain Trainer.
        resampler = make_loss_resampler(arms, arm, seed)
        # 5. Trainer: the resampler is the only difference between the arms.
        common = {
            "model": model,
            "args": arguments_of_run(training, folder.path, seed),
            "train_dataset": training_sets[seed],
            "eval_dataset": evaluation,
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": compute_metrics,
            "callbacks": [ProgressLine(name, "accuracy")],
        }
        trainer = Trainer(**common) if resampler is None else RejectionSamplingTrainer(**common, resampler=resampler)
        trainer.remove_callback(PrinterCallback)
        result = {"arm": arm, "seed": seed} | train_arm(trainer, rows[seed], task.groups, checkpoint)
        folder.finish(result, is_writer=training.process_index == 0)
        results.append(result)

    # 6. Report: tables, pictures, and what the seeds allow one to say.
    if training.process_index == 0:
        write_report(results, Path(training.output_dir), title=f"{options.dataset}, {options.model_name_or_path}")
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ExperimentError as error:
        sys.exit(f"error: {error}")
