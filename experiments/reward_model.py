"""A reward model for dialogue: does this response belong to this context?

    python -m experiments.reward_model                            # OpenRL/daily_dialog, DeBERTa v3 small: wants a GPU
    python -m experiments.reward_model --dataset $RSFT_DATA/dailydialog_pp --train_split train+dev --half a \\
        --architecture two_towers --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --max_length 80 \\
        --responses_per_context 2 --max_train_contexts 2800 --learning_rate 5e-5 --num_train_epochs 1 --bf16 --use_cpu

The second takes ten to twenty minutes on one CPU core and separates good responses of the test split from random ones
with an AUC of .917, from adversarial ones of .824 (300 contexts, seed 1). Both train one logit by binary cross-entropy
on positive responses against adversarial and random ones. `--half a` and `--half b` split the contexts in two, so that
a model which selects and a model which only judges share no data.

`experiments/chatbot.py` and AutoModelForSequenceClassification load the saved folder (two towers after
`import experiments.two_towers`). Its chat template renders a pair as in training, so that a path among `reward_funcs`
is asked as it was trained. Every option of TrainingArguments is an option here; `--config my.yaml` reads them from a
file, the command line wins.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from experiments.chat_data import half_of, judged_responses, load_dialogues, sample_rows
from experiments.harness.arguments import ExperimentError, option, parse_arguments
from experiments.harness.runs import RunFolder, training_configuration
from experiments.two_towers import TwoTowerConfig, TwoTowerForSequenceClassification
from rsft_hf.rewards.model_rewards import RewardModel

NEGATIVE_KINDS = ("adversarial", "random")


@dataclass
class RewardModelArguments:
    """Which dialogues and which encoder."""

    dataset: str = option("OpenRL/daily_dialog", "Hub name, file, or folder of files named by split.")
    model_name_or_path: str = option("microsoft/deberta-v3-small", "Hub name or folder of an encoder.")
    architecture: Literal["cross", "two_towers"] = option(
        "cross", "Read a pair at once, or apart: the second learns in far fewer steps, from a sentence encoder."
    )
    train_split: str = option("train", "Split to train on, or several as train+validation.")
    eval_split: str = option("test", "Split to evaluate on.")
    half: Literal["a", "b", "all"] = option("all", "Half of the training contexts that the model may see.")
    max_train_contexts: int | None = option(None, "Train on so many contexts, chosen by the seed.")
    max_eval_contexts: int | None = option(None, "Evaluate on so many contexts, the same for every seed.")
    responses_per_context: int | None = option(None, "Train on so many responses of each kind and context.")
    max_turns: int = option(4, "Turns that are read, the response included.")
    max_length: int = option(128, "Longer pairs are left out of training.")
    num_hidden_layers: int | None = option(None, "Keep the first so many layers; all where not given.")
    overwrite_output_dir: bool = option(False, "Delete an earlier run, and begin anew.")

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_length"):
            if vars(self)[name] < 2:
                raise ExperimentError(f"`--{name}` {vars(self)[name]} must be at least 2: a turn and its response.")


@dataclass
class RewardTrainingArguments(TrainingArguments):
    """Every option of TrainingArguments, with the defaults of this experiment."""

    output_dir: str = option("outputs/reward_model", "Folder of the model and its figures.")
    per_device_train_batch_size: int = option(16, "Pairs per step and device.")
    per_device_eval_batch_size: int = option(64, "Pairs per evaluation step and device.")
    learning_rate: float = option(2e-5, "Peak of the learning rate.")
    num_train_epochs: float = option(2.0, "Epochs.")
    warmup_steps: float = option(0.1, "Steps of rising learning rate; below 1 a share of all steps.")
    train_sampling_strategy: str = option("group_by_length", "Pairs of like length share a batch.")
    logging_steps: float = option(0.1, "Steps between logs; below 1 a share of all steps.")
    save_strategy: str = option("no", "When to save; a killed run goes on from its last checkpoint.")


def load_tokenizer(name: str, max_turns: int) -> Any:
    """Returns the tokenizer; one without a chat template gets one that joins the last turns by its own separators."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"`--model_name_or_path` {name!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name."
        ) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (
            f"{tokenizer.cls_token or ''}{{% for message in messages[-{max_turns}:] %}}"
            f"{{{{ message['content'] }}}}{tokenizer.sep_token or tokenizer.eos_token}{{% endfor %}}"
        )
    return tokenizer


def encode(rows: list[dict[str, Any]], tokenizer: Any) -> Dataset:
    """Returns the rows as token ids, exactly as a reward model is asked: template first, no further special tokens."""
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False)
    # A label of shape (1,) and floats: binary cross-entropy over one logit.
    return Dataset.from_dict({**encoded, "labels": [[row["label"]] for row in rows]})


def load_model(options: RewardModelArguments, seed: int, tokenizer: Any) -> PreTrainedModel:
    """Returns the encoder with a new head of one logit."""
    name, layers = options.model_name_or_path, options.num_hidden_layers
    config = AutoConfig.from_pretrained(name, num_labels=1)
    if options.architecture == "two_towers":
        if config.model_type not in ("bert", TwoTowerConfig.model_type):
            raise ExperimentError(
                f"`--architecture two_towers` needs a BERT, and {name!r} is a {config.model_type}. Name another "
                "encoder, or use `--architecture cross`."
            )
        config = TwoTowerConfig.from_pretrained(name, num_labels=1)
        config.cls_token_id, config.sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    # One label alone would mean regression by squared error.
    config.problem_type, config.pad_token_id = "multi_label_classification", tokenizer.pad_token_id
    if layers is not None:
        config.num_hidden_layers = layers
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config)
    if isinstance(model, TwoTowerForSequenceClassification):
        model.start_from_cosine()
    return model


def area_under_curve(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Returns the probability that a positive response is rated above a negative one, ties counted half.

    Example:
        >>> area_under_curve(np.array([1.0, 3.0]), np.array([0.0, 1.0]))  # 3 of 4 pairs above, 1 equal
        0.875
    """
    ordered = np.sort(negatives)
    below, up_to = np.searchsorted(ordered, positives, "left"), np.searchsorted(ordered, positives, "right")
    return float((below + up_to).mean() / 2 / len(negatives))


def figures_of(logits: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns for each kind of negative: AUC over all pairs, AUC within a context, and accuracy, kinds weighing alike.

    Args:
        logits: Shape (rows,).
        rows: What `judged_responses` returned.
    """
    kinds = np.array([row["kind"] for row in rows])
    contexts = np.array([row["context_id"] for row in rows])
    positives = logits[kinds == "positive"]
    figures = {}
    for kind in (kind for kind in NEGATIVE_KINDS if (kinds == kind).any()):
        negatives = logits[kinds == kind]
        figures[f"auc_{kind}"] = area_under_curve(positives, negatives)
        figures[f"auc_within_context_{kind}"] = float(np.mean([
            area_under_curve(logits[(contexts == number) & (kinds == "positive")],
                             logits[(contexts == number) & (kinds == kind)])
            for number in np.unique(contexts[kinds == kind])
        ]))  # fmt: skip
        figures[f"accuracy_{kind}"] = float(((positives > 0).mean() + (negatives <= 0).mean()) / 2)
    return figures


def main(argv: list[str]) -> dict[str, Any]:
    """Trains the reward model, saves it with its tokenizer, and returns its figures on the evaluation split."""
    types = (RewardModelArguments, RewardTrainingArguments)
    options, training = parse_arguments(types, argv, description=__doc__.splitlines()[0])
    training.dataloader_pin_memory &= training.device.type != "cpu"
    configuration = asdict(options) | training_configuration(training) | {"seed": training.seed}
    del configuration["overwrite_output_dir"]

    # 1. Data: one row per context and response; the response stands last in its chat.
    contexts = half_of(load_dialogues(options.dataset, options.train_split), options.half)
    held_out = load_dialogues(options.dataset, options.eval_split, "eval_split")
    contexts = sample_rows(contexts, options.max_train_contexts, training.seed)
    rows = judged_responses(contexts, training.seed, options.responses_per_context)
    eval_rows = judged_responses(sample_rows(held_out, options.max_eval_contexts, seed=0), seed=0)
    tokenizer = load_tokenizer(options.model_name_or_path, options.max_turns)
    train_dataset = encode(rows, tokenizer).filter(lambda row: len(row["input_ids"]) <= options.max_length)
    print(f"{len(train_dataset)} of {len(rows)} pairs have at most {options.max_length} tokens and are trained on.")
    folder = RunFolder(Path(training.output_dir), configuration)
    folder.open(options.overwrite_output_dir)
    if folder.result() is not None:
        print(folder.status())
        return folder.result()

    # 2. Model: one logit over the whole pair.
    model = load_model(options, training.seed, tokenizer)
    # 3. Trainer: the plain one.
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=encode(eval_rows, tokenizer),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train(resume_from_checkpoint=folder.checkpoint())

    # 4. Metric: how often a positive response is rated above a negative one, each kind of negative by itself.
    rate = RewardModel(trainer.model, tokenizer, training.per_device_eval_batch_size)
    prompts = [row["messages"][:-1] for row in eval_rows]
    with trainer.accelerator.autocast():
        logits = rate(prompts=prompts, completions=[row["messages"][-1:] for row in eval_rows])
    result = {"pairs": len(train_dataset), "eval_pairs": len(eval_rows), **figures_of(np.array(logits), eval_rows)}

    # 5. Report, and the model where `from_pretrained` finds it.
    trainer.save_model()
    folder.finish(result, is_writer=training.process_index == 0)
    print(*(f"{name.replace('_', ' ')}: {value:,.4g}" for name, value in result.items()), sep="\n")
    print(f"The reward model is in {training.output_dir}")
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ExperimentError as error:
        sys.exit(f"error: {error}")
