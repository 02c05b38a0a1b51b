"""Small training runs shared by the tests of the trainer: rows, model, arguments, and comparison of two runs.

The model is a BERT classifier with dropout, so that a change of the RNG state by a scoring pass would show.
"""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from packaging.version import Version

# Before, Trainer could not load what several processes on a CPU had saved.
RESUMES_PROCESSES = Version(hf.__version__) >= Version("5.18")

NUM_ROWS = 26  # neither a multiple of the batch nor of two processes times the batch
SEED = 7


def rows(num_rows: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Returns classification rows of lengths 3 to 9 with words 5 to 49; the label is whether the first word is even."""
    generator = torch.Generator().manual_seed(SEED)
    examples = []
    for number in range(num_rows):
        ids = torch.randint(5, 50, (3 + number % 7,), generator=generator).tolist()
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids[0] % 2})
    return examples


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads on the right with 0."""
    width = max(len(example["input_ids"]) for example in examples)

    def padded(name: str) -> torch.Tensor:
        return torch.tensor([example[name] + [0] * (width - len(example[name])) for example in examples])

    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask"), "labels": labels}


def pad_tokens(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads `input_ids` and labels of tokens on the right, with 0 and -100."""
    values = {"input_ids": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(one[name]) for one in examples], True, value)
        for name, value in values.items()
    }


def bert(dropout: float = 0.1, initializer_range: float = 0.02) -> hf.BertForSequenceClassification:
    """Returns a two-layer BERT of width 16, equal at every call; a wide range spreads its first losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                initializer_range=initializer_range,
                num_labels=2,
            )
        )


def arguments(output_dir: Path | str, **overrides: Any) -> hf.TrainingArguments:
    """Returns three epochs of batches of four, logged at every step."""
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return hf.TrainingArguments(str(output_dir), **{**defaults, **overrides})


def trained(trainer_class: type, output_dir: Path, resume: str | None = None, **keywords: Any) -> hf.Trainer:
    """Returns a trainer after training; `args` holds overrides of `arguments`, other keywords go to the trainer."""
    overrides = keywords.pop("args", {})
    defaults = {"train_dataset": rows(), "data_collator": collate}
    if "model" not in keywords:
        defaults["model"] = bert()
    args = arguments(output_dir, **overrides) if isinstance(overrides, dict) else overrides
    trainer = trainer_class(args=args, **{**defaults, **keywords})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StepCounter(hf.TrainerCallback):
    """Counts the optimizer steps that a run begins."""

    def __init__(self) -> None:
        self.num_steps = 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.num_steps += 1


def losses(trainer: hf.Trainer) -> list[float]:
    """Returns the logged training losses, in order."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def largest_difference(left: hf.Trainer, right: hf.Trainer) -> float:
    """Returns the largest absolute difference between two models' parameters."""
    ours, theirs = left.model.state_dict(), right.model.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)
