"""The models that the translation recipe starts from: a pretrained one, or the builtin one after its first lessons.

In: options and labelled pairs. Out: a model, its tokenizer, token ids. It knows no reward and no arm.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianMTModel,
    PrinterCallback,
    Seq2SeqTrainer,
)

from recipes import builtin_translator
from recipes.common import RecipeError
from recipes.generative_arms import arguments_of_run
from recipes.runs import RunFolder
from recipes.translation_data import TranslationTask


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
            tokenizer = builtin_translator.build_tokenizer(task.labelled["prompt"][:] + task.labelled["reference"][:])
            return MarianMTModel.from_pretrained(start.path / "model"), tokenizer
        return AutoModelForSeq2SeqLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(
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
        tokenizer = builtin_translator.build_tokenizer(task.labelled["prompt"][:] + task.labelled["reference"][:])
        model = builtin_translator.build_model(tokenizer, seed)
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
