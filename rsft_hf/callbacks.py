"""CandidateTableCallback: a table of each round's candidates, on the terminal and in the experiment trackers."""

import importlib
from typing import Any

import pandas
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rsft_hf.checks import check_integer
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.prompts import message_text
from rsft_hf.generative.resampler import CandidateResampler

_COLUMNS = ("prompt", "candidate", "reward", "verdict")


class CandidateTableCallback(TrainerCallback):
    """Callback that logs a table of each round's first candidates, with rewards and verdicts.

    The table is printed on the terminal and sent to the trackers of `report_to` that support tables, wandb and trackio.
    Needs the package `rich` (`pip install rsft-hf[recipes]`).

    Args:
        resampler: Resampler whose candidates are shown.
        num_candidates: Number of candidates, at least 1: those of the round's first prompts.

    Raises:
        TypeError: If `num_candidates` is not an integer.
        ValueError: If `num_candidates` is below 1.

    Example:
        >>> resampler = CandidateResampler(lambda completions, **columns: [0.0] * len(completions))
        >>> callback = CandidateTableCallback(resampler, num_candidates=4)  # Trainer(..., callbacks=[callback])
    """

    TABLE_TRACKERS = ("wandb", "trackio")

    def __init__(self, resampler: CandidateResampler, num_candidates: int = 8) -> None:
        check_integer("num_candidates", num_candidates, minimum=1)
        self._resampler, self._num_candidates = resampler, num_candidates
        self._last_round: int | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the round once, at its first step, when all verdicts are known."""
        number = self._resampler.round_number
        if number is None or number == self._last_round or not state.is_world_process_zero:
            return
        self._last_round = number
        candidates = self._resampler.first_candidates(self._num_candidates)
        show_table(candidates, f"Round {number}")
        rows = _table_rows(candidates)
        for tracker in self.TABLE_TRACKERS:
            if tracker in (args.report_to or []):
                module: Any = importlib.import_module(tracker)
                module.log(
                    {f"candidates/round_{number}": module.Table(dataframe=pandas.DataFrame(rows, columns=_COLUMNS))}
                )


def show_table(candidates: list[Candidate], title: str) -> None:
    """Prints candidates as a table on the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*_COLUMNS, title=title, show_lines=True)
    for row in _table_rows(candidates):
        table.add_row(*(escape(printable(value)) for value in row))
    Console().print(table)


def printable(text: str) -> str:
    r"""Returns text that a terminal shows and does not obey: control characters and the like are written as escapes.

    Example:
        >>> print(printable("\x1b[2Jgone"))
        \x1b[2Jgone
    """
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


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
