"""A translator that learns from its own translations, four ways: base, supervised, rejection, and a random control.

    python -m experiments.translation                          # Helsinki-NLP/opus-mt-en-de, multi30k: wants a GPU
    python -m experiments.translation --dataset builtin        # no download

    python -m experiments.translation --dataset $RSFT_DATA/multi30k --model_name_or_path $RSFT_MODELS/multi30k-en-de \\
        --val_split val --test_splits test_2016_flickr test_2017_mscoco --max_new_tokens 64

The second line translates English number words into German ones, judged by a verifier that reads German. It needs no
download, no GPU and two to three minutes on one CPU core. Every option of Seq2SeqTrainingArguments is an option here,
whose epochs are rounds; `--config my.yaml` reads them from a file, the command line wins.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments

from experiments.harness.arguments import ExperimentError, Preset, option, parse_arguments
from experiments.harness.arms import GenerativeArmArguments, make_candidate_resampler, supervised_schedule
from experiments.harness.reporting import GenerativeReport, collect_curve, collect_rounds, write_generative_report
from experiments.harness.runs import ProgressLine, RunFolder, arguments_of_run, evaluation_seconds, open_folders
from experiments.translation_data import (
    REWARDS,
    Measure,
    TranslationSource,
    TranslationTask,
    corpus_scores,
    corpus_signatures,
    encode_pairs,
    exact_match,
    load_translator,
    make_rewards,
    make_start,
    text_metric,
    token_metric,
    translate,
)
from rsft_hf import RejectionSamplingSeq2SeqTrainer

NUM_SAMPLES = 4


@dataclass
class TranslationArguments:
    """Which sentences, which model and which reward."""

    dataset: str = option("bentrevett/multi30k", "Hub name, file, folder of files named by split, or 'builtin'.")
    model_name_or_path: str = option("Helsinki-NLP/opus-mt-en-de", "Hub name, folder, or 'builtin'.")
    reward: str = option("chrf", f"What judges a translation: {', '.join(REWARDS)}.")
    reverse_model: str | None = option(None, "Translator of the way back, for `--reward free`.")
    similarity_model: str | None = option(None, "Sentence encoder that knows both languages, for `--reward free`.")
    source_column: str = option("en", "Column with the sentence.")
    target_column: str = option("de", "Column with its translation.")
    train_split: str = option("train", "Split to train on.")
    val_split: str = option("validation", "Split for the curves.")
    test_splits: list[str] = field(
        default_factory=lambda: ["test"], metadata={"help": "Splits measured once, at the end."}
    )
    max_train_samples: int | None = option(2000, "Prompts to train on, chosen by the seed.")
    max_val_samples: int | None = option(500, "Rows of the validation split.")
    max_test_samples: int | None = option(None, "Rows of each test split.")
    num_labelled: int = option(60, "Labelled pairs of the builtin task, on which its model starts.")
    start_epochs: int = option(100, "Epochs on them that give the builtin model its start.")
    start_learning_rate: float = option(2e-3, "Peak of the learning rate of that start.")

    def __post_init__(self) -> None:
        if self.model_name_or_path == "builtin" and self.dataset != "builtin":
            raise ExperimentError("`--model_name_or_path builtin` knows number words only. Name a translator.")
        for name in ("max_train_samples", "max_val_samples", "max_test_samples", "num_labelled", "start_epochs"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
                raise ExperimentError(f"`--{name}` {vars(self)[name]} must be at least 1.")


@dataclass
class TranslationArmArguments(GenerativeArmArguments):
    """What is compared, with the defaults of this experiment."""

    # On 200 training rows of Multi30k the best of 8 by chrF had 36.1 BLEU at 1.0 and 45.1 at 0.7; greedy had 36.8.
    temperature: float = option(0.6, "Temperature of the sampled candidates; measuring is greedy.")


@dataclass
class TranslationTrainingArguments(Seq2SeqTrainingArguments):
    """Every option of Seq2SeqTrainingArguments, with the defaults of this experiment."""

    output_dir: str = option("outputs/translation", "Folder of the runs, tables and pictures.")
    per_device_train_batch_size: int = option(32, "Rows per step and device.")
    per_device_eval_batch_size: int = option(64, "Rows per evaluation or scoring step and device.")
    learning_rate: float = option(5e-5, "Peak of the learning rate.")
    num_train_epochs: float = option(3.0, "Rounds.")
    eval_on_start: bool = option(True, "Begin the curve before the first step.")
    eval_strategy: str = option("epoch", "When to evaluate.")
    logging_strategy: str = option("epoch", "When to log.")
    save_strategy: str = option("epoch", "When to save; a killed run goes on from its last checkpoint.")
    save_total_limit: int | None = option(1, "Checkpoints that are kept.")
    predict_with_generate: bool = option(True, "Evaluate translations instead of the loss.")
    disable_tqdm: bool | None = option(True, "Print a line for each evaluation instead of bars and logs.")


BUILTIN = {"model_name_or_path": "builtin", "reward": "verifier", "max_train_samples": 1500, "max_val_samples": 300,
           "max_test_samples": 500}  # fmt: skip

# One correct candidate of each prompt that has any. Chosen on the validation numbers.
BUILTIN_ARMS = {"seeds": [1], "acceptance": "threshold:0.5+cap:1", "max_new_tokens": 24, "temperature": 1.0}

BUILTIN_TRAINING = {"learning_rate": 2e-3, "num_train_epochs": 5.0, "save_strategy": "no"}

PRESETS = (Preset("dataset", "builtin", BUILTIN | BUILTIN_ARMS | BUILTIN_TRAINING),)


def make_trainer(
    arm: str, model: Any, tokenizer: Any, task: TranslationTask, arms: GenerativeArmArguments, rewards: Any, common: Any
) -> Seq2SeqTrainer:
    """Returns the trainer of an arm; they differ in the rows that they train on."""
    common |= {"model": model, "processing_class": tokenizer, "data_collator": DataCollatorForSeq2Seq(tokenizer, model)}
    measure = common.pop("measure")
    common["args"].generation_max_length, common["args"].generation_num_beams = arms.max_new_tokens + 1, 1
    if arm == "supervised":
        common["args"] = supervised_schedule(common["args"], arms.num_draws or len(task.prompts))
        return Seq2SeqTrainer(
            **common,
            train_dataset=encode_pairs(task.labelled, tokenizer),
            eval_dataset=encode_pairs(task.val, tokenizer),
            compute_metrics=token_metric(measure, tokenizer, task.val["reference"][:]),
        )
    labelled = task.labelled.select_columns(["prompt", "reference"]).rename_column("reference", "completion")
    return RejectionSamplingSeq2SeqTrainer(
        **common,
        train_dataset=task.prompts,
        eval_dataset=task.val,
        compute_metrics=text_metric(measure),
        resampler=make_candidate_resampler(arms, arm, rewards, supervised_dataset=labelled),
    )


def run_arm(trainer: Seq2SeqTrainer, folder: RunFolder, metric: str) -> dict[str, Any]:
    """Returns what there is to report of a run but its test figures, after training it."""
    checkpoint = folder.checkpoint()
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - began - evaluation_seconds(trainer)
    trainer.save_model(str(folder.path / "model"))
    history = trainer.state.log_history
    # The clock of a resumed run has seen its last part only.
    costs = {"steps": trainer.state.global_step, "seconds": None if checkpoint else seconds}
    return {"costs": costs, "curve": collect_curve(history, metric), "rounds": collect_rounds(history)}


def measure_arm(
    result: dict[str, Any], model: Any, tokenizer: Any, task: TranslationTask, measure: Measure, max_new_tokens: int
) -> dict[str, Any]:
    """Returns the test figures and samples of a model, and for the base its curve, which is a single point."""
    outputs = {
        name: translate(model, tokenizer, rows["prompt"][:], max_new_tokens)
        for name, rows in {"val": task.val, **task.tests}.items()
    }
    scores = {
        name: measure(texts, ({"val": task.val} | task.tests)[name]["reference"][:]) for name, texts in outputs.items()
    }
    first = next(iter(task.tests))
    samples = [
        {**task.tests[first][row], "output": outputs[first][row]}
        for row in range(min(NUM_SAMPLES, len(outputs[first])))
    ]
    figures = {f"{name}_{figure}": value for name, found in scores.items() for figure, value in found.items()}
    return {
        "metrics": figures | result["costs"],
        "curve": result["curve"] or [[0, next(iter(scores["val"].values()))]],
        "samples": samples,
    }


def describe(options: TranslationArguments, metric: str, results: list[dict[str, Any]]) -> GenerativeReport:
    """Returns what the report says beside the figures."""
    costs = ("steps", "seconds")
    notes = [] if metric == "exact_match" else [f"{name}: {text}" for name, text in corpus_signatures().items()]
    return GenerativeReport(
        title=f"{options.dataset}, {options.model_name_or_path}, reward {options.reward}",
        compared=tuple(name for name in results[0]["metrics"] if name not in costs),
        curve_label=f"{metric.replace('_', ' ')}, validation",
        notes=("Greedy translations; `seconds` is training with generation, without evaluations.", *notes),
    )


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Runs every arm with every seed, writes the report, and returns the results."""
    types = (TranslationArguments, TranslationArmArguments, TranslationTrainingArguments)
    options, arms, training = parse_arguments(types, argv, PRESETS, description=__doc__.splitlines()[0])
    rewards = make_rewards(options)
    for arm in arms.arms:
        make_candidate_resampler(
            arms, arm, rewards, supervised_dataset=[{}]
        )  # wrong options fail here, not after other arms

    # 1. Data: the prompts of a seed are the same for all its arms, the held-out rows for all seeds.
    source = TranslationSource(options)
    tasks = {seed: source.task(seed) for seed in arms.seeds}
    # 2. Measures: corpus figures of greedy translations.
    is_builtin = options.dataset == "builtin"
    measure, metric = (exact_match, "exact_match") if is_builtin else (corpus_scores, "bleu")
    folders = open_folders(options, arms, training)

    results = []
    for (arm, seed), folder in folders.items():
        name, task, result = f"{arm}, seed {seed}", tasks[seed], folder.result()
        print(f"{name}: {folder.status()}", flush=True)
        if result is None:
            # 3. Model: the arms of a seed start from the same weights.
            start = make_start(options, task, training, seed, arms.overwrite_output_dir and arm == arms.arms[0])
            model, tokenizer = load_translator(options, task, start)
            model.to(training.device)
            # 4. Trainer: base is none, supervised a plain one, the other two differ in their rule of acceptance.
            result = {"arm": arm, "seed": seed, "costs": {"steps": 0, "seconds": 0.0}, "curve": [], "rounds": []}
            if arm != "base":
                common = {"args": arguments_of_run(training, folder.path, seed), "measure": measure}
                common["callbacks"] = [ProgressLine(name, metric)]
                trainer = make_trainer(arm, model, tokenizer, task, arms, rewards, common)
                result |= run_arm(trainer, folder, metric)
            # 5. Measurement: the same for every arm.
            result |= measure_arm(result, model, tokenizer, task, measure, arms.max_new_tokens)
            folder.finish(result, is_writer=training.process_index == 0)
        results.append(result)

    # 6. Report: tables, pictures, and what the seeds allow one to say.
    if training.process_index == 0:
        write_generative_report(results, Path(training.output_dir), describe(options, metric, results))
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ExperimentError as error:
        sys.exit(f"error: {error}")
