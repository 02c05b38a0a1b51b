"""CandidateTableCallback and ReportCallback: candidates on the terminal and in trackers, and the report of a run."""

import importlib
from pathlib import Path
from typing import Any

import pandas
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from rsft_hf.checks import check_integer
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.prompts import message_text
from rsft_hf.generative.resampler import CandidateResampler
from rsft_hf.markdown import markdown_table, printable
from rsft_hf.report.page import REPORT, write_report
from rsft_hf.report.run import Run

logger = logging.get_logger(__name__)

_COLUMNS = ("prompt", "candidate", "reward", "verdict")


class ResamplerCallback(TrainerCallback):
    """Base class of callbacks that read the trainer's resampler.

    Attributes:
        trainer: The trainer, set by `RejectionSamplingMixin` before training begins.
    """

    trainer: Any = None

    def bound_trainer(self) -> Any:
        """Returns the trainer.

        Raises:
            RuntimeError: If the trainer has no resampler.
        """
        if self.trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} needs a trainer with a resampler, such as RejectionSamplingTrainer."
            )
        return self.trainer


class CandidateTableCallback(ResamplerCallback):
    """Callback that logs a table of each round's first candidates, with rewards and verdicts.

    The table is printed on the terminal and sent to the trackers of `report_to` that show tables or text: wandb,
    trackio, mlflow and tensorboard. Needs the package `rich` (`pip install rsft-hf[recipes]`).

    Args:
        num_candidates: Number of candidates, at least 1: those of the round's first prompts.

    Raises:
        TypeError: If `num_candidates` is not an integer.
        ValueError: If `num_candidates` is below 1.

    Example:
        >>> callback = CandidateTableCallback(num_candidates=4)  # RejectionSamplingTrainer(..., callbacks=[callback])
    """

    TABLE_TRACKERS = ("wandb", "trackio")

    def __init__(self, num_candidates: int = 8) -> None:
        check_integer("num_candidates", num_candidates, minimum=1)
        self._num_candidates = num_candidates
        self._last_round: int | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the round once, at its first step, when all verdicts are known."""
        resampler = self.bound_trainer().resampler
        if not isinstance(resampler, CandidateResampler):
            raise ValueError(
                f"CandidateTableCallback shows candidates, and {type(resampler).__name__} generates none. Remove it, "
                "or use ReportCallback."
            )
        number = resampler.round_number
        if number is None or number == self._last_round or not state.is_world_process_zero:
            return
        self._last_round = number
        candidates = resampler.first_candidates(self._num_candidates)
        show_table(candidates, f"Round {number}")
        frame = pandas.DataFrame(_table_rows(candidates), columns=_COLUMNS)
        self._send(frame, f"candidates/round_{number}", args.report_to or [], state.global_step)

    def _send(self, frame: pandas.DataFrame, name: str, trackers: Any, step: int) -> None:
        for tracker in self.TABLE_TRACKERS:
            if tracker in trackers:
                module: Any = importlib.import_module(tracker)
                module.log({name: module.Table(dataframe=frame)})
        if "mlflow" in trackers:
            importlib.import_module("mlflow").log_table(frame, f"{name}.json")
        for callback in self.bound_trainer().callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(name, markdown_table(frame), step)


class ReportCallback(ResamplerCallback):
    """Callback that writes the report of the run when training ends: see `rsft_hf.report.write_report`.

    Args:
        path: File to write; `report.html` in the output folder by default.

    Raises:
        ImportError: If plotly is not installed (`pip install rsft-hf[report]`).

    Example:
        >>> callback = ReportCallback()  # RejectionSamplingTrainer(..., callbacks=[callback])
    """

    def __init__(self, path: Path | str | None = None) -> None:
        importlib.import_module("plotly")  # not after hours of training
        self._path = path

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the report on the main process."""
        trainer = self.bound_trainer()
        if state.is_world_process_zero:
            path = write_report(Run.from_trainer(trainer), self._path or Path(args.output_dir) / REPORT)
            logger.info(f"The report of the run is in {path}.")


def show_table(candidates: list[Candidate], title: str) -> None:
    """Prints candidates as a table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*_COLUMNS, title=title, show_lines=True)
    for row in _table_rows(candidates):
        table.add_row(*(escape(printable(value)) for value in row))
    Console().print(table)


def _table_rows(candidates: list[Candidate]) -> list[tuple[str, str, str, str]]:
    return [
        (
            one.prompt if isinstance(one.prompt, str) else message_text(one.prompt[-1].get("content")),
            one.text,
            "-" if one.reward is None else f"{one.reward:.3f}",
            str(one.verdict) if one.verdict != "filtered" else f"filtered: {one.rule}",
        )
        for one in candidates
    ]
