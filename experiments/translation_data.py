"""Translation experiment: data, metrics, rewards, and the models it starts from.

Every seed takes its own prompts from the data set; the held-out rows are the same for all. The starting model is a
pretrained translator, or the built-in one after supervised training on a few labelled pairs.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from sacrebleu.metrics import BLEU, CHRF
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianMTModel,
    PrinterCallback,
    Seq2SeqTrainer,
)

from experiments.builtin.numbers import build_model, build_tokenizer, make_numbers, names_the_number
from experiments.harness.arguments import ExperimentError
from experiments.harness.data import load_splits
from experiments.harness.runs import RunFolder, arguments_of_run
from rsft_hf.rewards import ChrfReward, CopyPenalty, RepetitionPenalty, RoundTripReward, SimilarityReward

BUILTIN_TEST = "numbers"


@dataclass(frozen=True)
class TranslationTask:
    """The rows of one seed.

    Attributes:
        prompts: What candidates are generated for: `prompt`, and what the rewards need of it.
        labelled: What the supervised arm trains on: `prompt`, `reference`.
        val: Held out, for the curves and every choice.
        tests: Held out, for the last measurement: name -> rows.
    """

    prompts: Dataset
    labelled: Dataset
    val: Dataset
    tests: dict[str, Dataset]


class TranslationSource:
    """A data set from which every seed takes its own prompts; what is held out is the same for all.

    Args:
        options: Has `dataset`, `source_column`, `target_column`, `train_split`, `val_split`, `test_splits`,
            `max_train_samples`, `max_val_samples`, `max_test_samples` and `num_labelled`.

    Raises:
        ExperimentError: If the data set, a split or a column is not what the options say.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        self._splits = None if options.dataset == "builtin" else load_splits(options.dataset)
        if self._splits is not None:
            wanted = {"train_split": [options.train_split], "val_split": [options.val_split],
                      "test_splits": options.test_splits}  # fmt: skip
            for option, names in wanted.items():
                _check_splits(self._splits, option, names)
            self._pairs = {name: self._read(name) for names in wanted.values() for name in names}

    def task(self, seed: int) -> TranslationTask:
        """Returns the rows of a seed.

        Raises:
            ExperimentError: If there are fewer rows than the options ask for.
        """
        options = self.options
        if self._splits is None:
            return self._numbers(seed)
        train = self._pairs[options.train_split]
        chosen = sorted(random.Random(seed).sample(range(len(train)), _at_most(options.max_train_samples, len(train))))
        prompts = train.select(chosen)
        return TranslationTask(
            prompts=prompts,
            labelled=prompts,
            val=_first(self._pairs[options.val_split], options.max_val_samples),
            tests={name: _first(self._pairs[name], options.max_test_samples) for name in options.test_splits},
        )

    def _numbers(self, seed: int) -> TranslationTask:
        options = self.options
        sizes = {"num_prompts": options.max_train_samples, "num_val": options.max_val_samples,
                 "num_test": options.max_test_samples}  # fmt: skip
        try:
            rows = make_numbers(seed, options.num_labelled, **{key: size for key, size in sizes.items() if size})
        except ValueError as error:
            raise ExperimentError(str(error)) from error
        splits = {
            name: Dataset.from_list(
                [{"prompt": row["en"], "reference": row["de"], "number": row["number"]} for row in found]
            )
            for name, found in rows.items()
        }
        # The numbers to train on come without their translation: the verifier is all that judges them.
        prompts = splits["train"].remove_columns("reference")
        return TranslationTask(prompts, splits["labelled"], splits["val"], {BUILTIN_TEST: splits["test"]})

    def _read(self, split: str) -> Dataset:
        dataset, options = self._splits[split], self.options
        for option in ("source_column", "target_column"):
            if vars(options)[option] not in dataset.column_names:
                raise ExperimentError(
                    f"`--{option}` {vars(options)[option]!r} is not a column of {split}. Use one of "
                    f"{', '.join(dataset.column_names)}."
                )
        columns = {options.source_column: "prompt", options.target_column: "reference"}
        dataset = dataset.select_columns(list(columns)).rename_columns(columns)
        dataset = dataset.filter(lambda row: all(isinstance(text, str) and text.strip() for text in row.values()))
        if len(dataset) == 0:
            raise ExperimentError(f"The split {split!r} has no row with a text and its translation.")
        return dataset


def _check_splits(splits: DatasetDict, option: str, wanted: list[str]) -> None:
    for name in wanted:
        if name not in splits:
            raise ExperimentError(f"`--{option}` {name!r} is not in the data set. Use one of {', '.join(splits)}.")


def _at_most(wanted: int | None, available: int) -> int:
    return available if wanted is None else min(wanted, available)


def _first(dataset: Dataset, wanted: int | None) -> Dataset:
    return dataset.select(range(_at_most(wanted, len(dataset))))


Measure = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def corpus_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns BLEU and chrF of the whole corpus (not means over sentences), from 0 to 100.

    Example:
        >>> corpus_scores(["ein Hund rennt im Park"], ["ein Hund rennt im Park"])
        {'bleu': 100.0, 'chrf': 100.0}
    """
    scores = {"bleu": BLEU(), "chrf": CHRF()}
    return {
        name: round(metric.corpus_score(list(translations), [list(references)]).score, 6)
        for name, metric in scores.items()
    }


def corpus_signatures() -> dict[str, str]:
    """Returns how sacrebleu computes each figure, in its own short form, so that others can compare."""
    signatures = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        metric.corpus_score(["a"], [["a"]])  # the number of references is part of the signature
        signatures[name] = str(metric.get_signature())
    return signatures


def exact_match(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns the share of translations that equal their reference, from 0 to 100.

    Example:
        >>> exact_match(["zwei", "drei "], ["zwei", "vier"])
        {'exact_match': 50.0}
    """
    hits = [text.strip() == expected for text, expected in zip(translations, references, strict=True)]
    return {"exact_match": 100 * sum(hits) / len(hits)}


def text_metric(measure: Measure) -> Callable[[Any], dict[str, float]]:
    """Returns the `compute_metrics` of a trainer whose resampler generates: texts against texts."""
    return lambda prediction: measure(prediction.predictions, prediction.label_ids)


def token_metric(measure: Measure, tokenizer: Any, references: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """Returns the `compute_metrics` of a plain Seq2SeqTrainer: it gets token ids, -100 where there is none."""

    def compute(prediction: Any) -> dict[str, float]:
        token_ids = np.where(prediction.predictions >= 0, prediction.predictions, tokenizer.pad_token_id)
        return measure(tokenizer.batch_decode(token_ids, skip_special_tokens=True), references)

    return compute


@torch.no_grad()
def translate(
    model: Any, tokenizer: Any, sentences: Sequence[str], max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """Returns the greedy translation of every sentence, in their order; the model is left as it was."""
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))
    translations = [""] * len(sentences)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([sentences[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
        token_ids = model.generate(
            **batch.to(model.device), do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, max_length=None
        )
        for row, text in zip(rows, tokenizer.batch_decode(token_ids, skip_special_tokens=True), strict=True):
            translations[row] = text
    model.train(was_training)
    return translations


def encode_pairs(dataset: Dataset, tokenizer: Any) -> Dataset:
    """Returns the token ids of sentences and of their references."""
    return dataset.map(
        lambda batch: tokenizer(batch["prompt"], text_target=batch["reference"], truncation=True),
        batched=True,
        remove_columns=dataset.column_names,
        desc="tokenizing",
    )


def load_translator(options: Any, task: TranslationTask, start: RunFolder) -> tuple[Any, Any]:
    """Returns the model that all arms of a seed start from, and its tokenizer."""
    name = options.model_name_or_path
    try:
        if name == "builtin":
            tokenizer = build_tokenizer(task.labelled["prompt"][:] + task.labelled["reference"][:])
            return MarianMTModel.from_pretrained(start.path / "model"), tokenizer
        return AutoModelForSeq2SeqLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"`--model_name_or_path` {name!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name, or `--dataset builtin`, which needs no network."
        ) from error


def make_start(options: Any, task: TranslationTask, training: Any, seed: int, anew: bool) -> RunFolder:
    """Returns the folder with the builtin model of a seed, trained on the labelled pairs; empty for other models."""
    names = ("dataset", "model_name_or_path", "num_labelled", "start_epochs", "start_learning_rate")
    folder = RunFolder(
        Path(training.output_dir) / "start" / f"seed_{seed}", {name: vars(options)[name] for name in names}
    )
    if options.model_name_or_path != "builtin":
        return folder
    with training.main_process_first(desc="looking for an earlier start"):
        if training.process_index == 0:
            folder.open(anew)
    if folder.result() is None:
        tokenizer = build_tokenizer(task.labelled["prompt"][:] + task.labelled["reference"][:])
        model = build_model(tokenizer, seed)
        arguments = arguments_of_run(training, folder.path, seed)
        arguments.num_train_epochs, arguments.learning_rate = options.start_epochs, options.start_learning_rate
        arguments.eval_strategy = arguments.save_strategy = "no"
        arguments.eval_on_start, arguments.logging_strategy = False, "no"
        collator = DataCollatorForSeq2Seq(tokenizer, model)
        trainer = Seq2SeqTrainer(model, arguments, collator, encode_pairs(task.labelled, tokenizer))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if training.process_index == 0:
            model.save_pretrained(folder.path / "model")
            folder.finish({"steps": trainer.state.global_step})
        trainer.accelerator.wait_for_everyone()  # the others read what the first one writes
    return folder


REWARDS = ("chrf", "free", "verifier")


def make_rewards(options: Any) -> list[Any]:
    """Returns the reward functions; their sum judges a translation.

    "chrf" is the sentence's chrF against its reference. "free" reads no reference: how well a model of the way back
    recovers the sentence (nats per token), how near an encoder of both languages puts the two, less what is repeated
    or copied. "verifier" reads the number words of the builtin task.

    Args:
        options: Has `reward`, `dataset`, `reverse_model` and `similarity_model`.

    Raises:
        ExperimentError: If the reward is unknown, does not fit the data set, or lacks its models.
    """
    if options.reward not in REWARDS:
        raise ExperimentError(f"`--reward` {options.reward!r} is unknown. Use one of {', '.join(REWARDS)}.")
    is_builtin = options.dataset == "builtin"
    if options.reward == "verifier":
        if not is_builtin:
            raise ExperimentError(
                "`--reward verifier` reads the number words of `--dataset builtin`. Use chrf or free."
            )
        return [names_the_number]
    if options.reward == "chrf":
        if is_builtin:
            raise ExperimentError(
                "`--reward chrf` needs references, which the builtin prompts lack. Use verifier or free."
            )
        return [ChrfReward()]
    if options.reverse_model is None and options.similarity_model is None:
        raise ExperimentError("`--reward free` needs `--reverse_model`, `--similarity_model`, or both.")
    functions: list[Any] = [RepetitionPenalty(), CopyPenalty()]
    if options.reverse_model is not None:
        functions.append(RoundTripReward(*_load(AutoModelForSeq2SeqLM, "reverse_model", options.reverse_model)))
    if options.similarity_model is not None:
        functions.append(SimilarityReward(*_load(AutoModel, "similarity_model", options.similarity_model)))
    return functions


def _load(kind: Any, option: str, name: str) -> tuple[Any, Any]:
    try:
        return kind.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(
            f"`--{option}` {name!r} could not be loaded ({reason}). Give a folder or hub name."
        ) from error
