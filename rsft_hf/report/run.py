"""Run: records of a finished or interrupted run, read from its output folder or from its trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch

from rsft_hf.checkpointing import load_state, logged_lines, state_directory
from rsft_hf.generative.exports import round_folders
from rsft_hf.generative.resampler import CandidateResampler
from rsft_hf.weighted.history import EpochHistory
from rsft_hf.weighted.label_report import LabelReport
from rsft_hf.weighted.resampler import LossResampler


@dataclass
class Run:
    """Records of a run; of each half only what the run has.

    Attributes:
        name: Title of the report.
        log_history: Lines that the trainer logged.
        history: Losses, weights and counts of every epoch; None without `LossResampler`.
        measured: Losses and margins of the measured epochs, as `LossResampler.measured()` returns them.
        label_report: Suspected label errors; None without margins of labels.
        dataset: Rows of the training set, for texts and labels in tables; None shows row numbers alone.
        processing_class: Tokenizer that decodes `input_ids` where the rows have no text.
        rounds: Folders of the rounds of candidates, in order.
    """

    name: str
    log_history: Sequence[dict[str, Any]] = ()
    history: EpochHistory | None = None
    measured: dict[str, torch.Tensor] = field(default_factory=dict)
    label_report: LabelReport | None = None
    dataset: datasets.Dataset | None = None
    processing_class: Any = None
    rounds: Sequence[Path] = ()

    def __post_init__(self) -> None:
        num_rows = None if self.history is None else self.history.num_rows
        if self.dataset is not None and num_rows is not None and len(self.dataset) != num_rows:
            raise ValueError(
                f"`dataset` has {len(self.dataset)} rows and the run was trained on {num_rows}. Pass its training set, "
                "in the same order."
            )
        if self.dataset is not None and self.label_report is not None:
            self.label_report.validate(self.dataset)

    @classmethod
    def from_trainer(cls, trainer: Any) -> "Run":
        """Returns the records of a Trainer with a resampler, after `train()`."""
        resampler = trainer.resampler
        output_dir = Path(trainer.args.output_dir)
        run = cls(output_dir.resolve().name, list(trainer.state.log_history))
        if isinstance(resampler, CandidateResampler) and resampler.round_number is not None:
            run.rounds = _rounds(output_dir)[: resampler.round_number + 1]
        if not isinstance(resampler, LossResampler):
            return run
        if isinstance(trainer.train_dataset, datasets.Dataset):
            run.dataset = trainer.train_dataset
        run.processing_class = trainer.processing_class
        run.history, run.measured = resampler.history, resampler.measured()
        if resampler.has_label_report:
            run.label_report = resampler.label_report()
        return run


def read_run(output_dir: Path | str, dataset: datasets.Dataset | None = None) -> Run:
    """Returns the records of a run from its output folder: its last complete checkpoint and its candidates.

    Args:
        output_dir: Output folder, a checkpoint, or a folder of candidates.
        dataset: The training set, for texts and labels in tables.

    Raises:
        FileNotFoundError: If the folder holds neither a checkpoint nor candidates.
        ValueError: If `dataset` has another number of rows than the run.
    """
    folder = Path(output_dir)
    run = Run(folder.resolve().name, rounds=_rounds(folder))
    try:
        state = state_directory(folder)
    except ValueError as error:
        if not run.rounds:
            raise FileNotFoundError(
                f"{folder} holds neither candidates nor a complete checkpoint of a trainer with a resampler. Give the "
                "`output_dir` of a run with `save_strategy` on, or a folder of candidates."
            ) from error
        return run
    run.log_history = logged_lines(folder) or logged_lines(state.parent)
    if not (state / "weighted.json").is_file():
        return run
    numbers, tensors = load_state(state, "weighted")
    history = EpochHistory()
    history.load(numbers["history_epochs"], tensors)
    report = LabelReport.from_checkpoint(folder) if "label_classes" in tensors else None
    measured = history.measured(*_interrupted_epoch(tensors))
    return Run(run.name, run.log_history, history, measured, report, dataset, rounds=run.rounds)


def _rounds(folder: Path) -> list[Path]:
    try:
        return round_folders(folder)
    except FileNotFoundError:
        return []


def _interrupted_epoch(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Losses and margins of the training steps of the epoch under way, which a checkpoint holds as sums."""
    counts = tensors["ledger_counts"]
    if not bool(counts.any()):
        return ()
    losses, margins = (tensors[f"ledger_{name}_sums"] / counts for name in ("loss", "margin"))
    return losses, margins, counts > 0
