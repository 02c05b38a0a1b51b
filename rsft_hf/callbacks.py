"""What happens at the edges of an epoch: the clock that has it resampled, and a look at a round's candidates."""

import importlib
from typing import Any

import pandas
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rsft_hf.checks import check_integer
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.resampler import CandidateResampler


class CandidateTableCallback(TrainerCallback):
    """Shows a few candidates of every round with their rewards and verdicts: on the terminal, and to the trackers.

    The table goes to those of `report_to` that take tables, wandb and trackio. It wants the package `rich`
    (`pip install rsft-hf[recipes]`).

    Args:
        resampler: Whose candidates to show.
        num_candidates: How many, at least 1: those of the round's first prompts.

    Raises:
        ValueError: If `num_candidates` is below 1.
    """

    TABLE_TRACKERS = ("wandb", "trackio")

    def __init__(self, resampler: CandidateResampler, num_candidates: int = 8) -> None:
        check_integer("num_candidates", num_candidates, minimum=1)
        self._resampler, self._num_candidates = resampler, num_candidates
        self._shown: int | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the round once, when its first step begins: by then its verdicts are there."""
        number = self._resampler.round_number
        if number is None or number == self._shown or not state.is_world_process_zero:
            return
        self._shown = number
        candidates = self._resampler.first_candidates(self._num_candidates)
        show_table(candidates, f"Round {number}")
        rows = _table_rows(candidates)
        for tracker in self.TABLE_TRACKERS:
            if tracker in (args.report_to or []):
                module: Any = importlib.import_module(tracker)
                module.log(
                    {f"candidates/round_{number}": module.Table(dataframe=pandas.DataFrame(rows, columns=HEADER))}
                )


HEADER = ("prompt", "candidate", "reward", "verdict")


def show_table(candidates: list[Candidate], title: str) -> None:
    """Prints candidates as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, title=title, show_lines=True)
    for row in _table_rows(candidates):
        table.add_row(*(_escaped(cell) for cell in row))
    Console().print(table)


def _table_rows(candidates: list[Candidate]) -> list[tuple[str, str, str, str]]:
    return [
        (
            one.prompt if isinstance(one.prompt, str) else one.prompt[-1]["content"],
            one.text,
            "-" if one.reward is None else f"{one.reward:.3f}",
            str(one.verdict) if one.verdict != "filtered" else f"filtered: {one.rule}",
        )
        for one in candidates
    ]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
