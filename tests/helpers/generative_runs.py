"""Small runs of rounds shared by the tests of `CandidateResampler`: what to train, what to count, what to compare.

In: nothing, everything comes from `generators.py`. Out: trainers after training, and the candidates they left on disk.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import transformers as hf

import generators
from rsft_hf import CandidateResampler, RejectionSamplingTrainer
from rsft_hf.engines import Engine, GenerateEngine

NUM_PROMPTS = 9  # shards of 2 prompts: neither a multiple of the shard nor of two processes
SHARDS = 5


class Killed(Exception):
    """Stands for a killed process: nothing of the trainer is used again."""


class CountingEngine(Engine):
    """Generates as the library does, notes the prompts of every call and may be killed before one of them."""

    def __init__(self, kill_before: int | None = None) -> None:
        self.calls: list[list[tuple[int, ...]]] = []
        self.seeds: list[int] = []
        self._kill_before, self._engine = kill_before, GenerateEngine()

    def __call__(self, model: Any, request: Any) -> Any:
        if len(self.calls) == self._kill_before:
            raise Killed
        self.calls.append([tuple(ids) for ids in request.prompts])
        self.seeds += [seed for seeds in request.seeds for seed in seeds]
        assert not model.training
        return self._engine(model, request)

    def prompts(self) -> list[str]:
        """The texts asked for, in the order of the calls."""
        words = generators.WORDS
        return [" ".join(words[token] for token in ids) for call in self.calls for ids in call]


def resampler(reward_funcs: Any = generators.share_of_wanted, acceptance: Any = None, **options: Any) -> Any:
    """Returns a resampler of four candidates of up to eight tokens, which filters nothing and accepts the best."""
    settings = {"num_candidates": 4, "generation_config": generators.sampling(), "filters": ()}
    return CandidateResampler(reward_funcs, acceptance, **{**settings, **options})


def trainer(output_dir: Path, made: Any = None, **keywords: Any) -> hf.Trainer:
    """Returns a trainer that has not trained; `args` holds overrides of `generators.arguments`."""
    args = generators.arguments(output_dir, **keywords.pop("args", {}))
    trainer_class = keywords.pop("trainer_class", RejectionSamplingTrainer)
    defaults = {"train_dataset": generators.prompts(NUM_PROMPTS), "processing_class": generators.tokenizer()}
    if "model" not in keywords:
        defaults["model"] = generators.tiny_model()
    return trainer_class(args=args, resampler=made or resampler(), **{**defaults, **keywords})


def trained(output_dir: Path, made: Any = None, resume: Any = None, **keywords: Any) -> hf.Trainer:
    """Returns a trainer after training."""
    ours = trainer(output_dir, made, **keywords)
    ours.train(resume_from_checkpoint=resume)
    return ours


def round_dir(output_dir: Path, number: int = 0) -> Path:
    """Returns the folder of a round."""
    return output_dir / "candidates" / f"round-{number:03d}"


def stored(output_dir: Path, number: int = 0) -> list[dict]:
    """Returns every candidate of a round as stored, in the order of the shards."""
    return [row for path in shards(output_dir, number) for row in pq.read_table(path).to_pylist()]


def shards(output_dir: Path, number: int = 0) -> list[Path]:
    """Returns the shards of a round."""
    return sorted(round_dir(output_dir, number).glob("*.parquet"))


def logged(ours: hf.Trainer, key: str) -> list[float]:
    """Returns the values logged under a key, in order."""
    return [line[key] for line in ours.state.log_history if key in line]
