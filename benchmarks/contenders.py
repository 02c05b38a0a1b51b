"""The contenders of `overhead.py`: plain Trainer and the two ways of measuring losses, over two small models.

In: names. Out: a trainer ready to train, and the seconds of its epochs. Every loss is measured and every epoch drawn,
but the weights are equal: all contenders then read the same batches, and what is left between them is the overhead.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from rsft_hf import LossResampler, RejectionSamplingTrainer
from rsft_hf.weighted import ExampleStatistics

IGNORED = -100
NUM_EPOCHS = 3

# Two threads that wait for each other spin, and on a busy machine their waiting is most of the processor time.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Task:
    """A model and its rows: texts of `longest` words at most, in batches of `batch_size`."""

    build: Callable[[], hf.PreTrainedModel]
    num_rows: int
    longest: int
    batch_size: int
    vocab_size: int
    is_generative: bool


@dataclass(frozen=True)
class Equal:
    """w = 1 whatever the losses: with equal weights the draws are those of plain Trainer, row for row."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: Tensor, statistics: ExampleStatistics | None = None) -> Tensor:
        return torch.ones_like(scores)


def bert() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 768}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=2000, **sizes, max_position_embeddings=128))


def llama() -> hf.PreTrainedModel:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=8192, **sizes, max_position_embeddings=64))


TASKS = {
    "bert": Task(bert, num_rows=192, longest=128, batch_size=16, vocab_size=2000, is_generative=False),
    "llama": Task(llama, num_rows=256, longest=64, batch_size=8, vocab_size=8192, is_generative=True),
}
# "plain again" is plain once more: how far its ratio is from 1 is what this machine cannot tell apart.
CONTENDERS = ("plain", "plain again", "training losses", "forward losses")


def random_rows(task: Task, num_rows: int) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for _ in range(num_rows):
        words = [rng.randrange(3, task.vocab_size) for _ in range(rng.randint(task.longest // 8, task.longest))]
        rows.append({"input_ids": words, "labels": list(words) if task.is_generative else rng.randrange(2)})
    return rows


def pad_and_stack(rows: list[dict]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def stack(columns: list[list[int]], filler: int) -> Tensor:
        return torch.stack([F.pad(torch.tensor(ids), (0, longest - len(ids)), value=filler) for ids in columns])

    is_generative = isinstance(rows[0]["labels"], list)
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": stack([row["input_ids"] for row in rows], 0),
        "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": stack(labels, IGNORED) if is_generative else torch.tensor(labels),
    }


class EpochClock(hf.TrainerCallback):
    """Notes processor and wall seconds from one epoch's end to the next: resampling included, start-up left out."""

    def __init__(self):
        self.ends: list[tuple[float, float]] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append((time.process_time(), time.perf_counter()))

    def epochs(self) -> list[tuple[float, float]]:
        pairs = zip(self.ends[:-1], self.ends[1:], strict=True)
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def build_trainer(task: Task, contender: str, num_rows: int) -> hf.Trainer:
    """Returns the contender's trainer; model, rows, order of rows and arguments are the same for all."""
    torch.manual_seed(0)
    arguments = hf.TrainingArguments(
        output_dir="outputs/benchmark",
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=task.batch_size,
        learning_rate=1e-5,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    parts = {"model": task.build(), "args": arguments, "data_collator": pad_and_stack}
    parts["train_dataset"] = random_rows(task, num_rows)
    if contender.startswith("plain"):
        return hf.Trainer(**parts)
    resampler = LossResampler(Equal(), losses=contender.removesuffix(" losses"))
    return RejectionSamplingTrainer(**parts, resampler=resampler)


def time_epochs(task: Task, contender: str, num_rows: int) -> list[tuple[float, float]]:
    """Returns (processor, wall) seconds of every epoch but the first, which warms up and has no losses yet."""
    trainer = build_trainer(task, contender, num_rows)
    clock = EpochClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.epochs()
