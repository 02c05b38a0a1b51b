"""Tasks: several tasks in one run, each with its share of an epoch, and with weights and envelope of its own."""

from collections.abc import Sequence
from typing import Any

import torch

from rsft_hf.rejection import sample_parts
from rsft_hf.weighted.labels import as_list


class Tasks:
    """Tasks of the rows of a training set: each keeps its share of the draws, with weights and envelope of its own.

    Args:
        names: Task of each row, a string or a number; None and NaN are one task more.

    Raises:
        ValueError: If the task of a row is a list or a mapping.

    Example:
        >>> tasks = Tasks(["a", "b", "a", "a"])
        >>> [rows.tolist() for rows in tasks.rows], tasks.counts(8, torch.Generator())
        ([[0, 2, 3], [1]], [6, 2])
        >>> tasks.balanced(torch.tensor([1.0, 8.0, 2.0, 3.0])).tolist()  # (1, 2, 3) / 6 of 3 / 4, and 1 / 4
        [0.125, 0.25, 0.25, 0.375]
    """

    def __init__(self, names: Sequence[Any]) -> None:
        places: dict[Any, list[int]] = {}
        for row, name in enumerate(map(as_list, names)):
            if isinstance(name, (list, dict)):
                raise ValueError(f"The task of row {row} is {name!r}. Name one task per row, by a string or a number.")
            places.setdefault(None if name != name else name, []).append(row)  # NaN is no name, as None
        self.names, self.rows = list(places), [torch.tensor(rows) for rows in places.values()]
        self.num_rows = len(names)

    def counts(self, num_draws: int, generator: torch.Generator) -> list[int]:
        """Returns the draws of each task in an epoch, which sum to `num_draws`: its share of them.

        Of a share with a fraction, one more as often as the fraction says (systematic sampling): rounded alike in every
        epoch, a small task might never be read.

        Args:
            num_draws: Draws of the epoch.
            generator: CPU generator, advanced where a share has a fraction.
        """
        ends = torch.tensor([len(rows) for rows in self.rows]).cumsum(0) * num_draws
        start = 0.0
        if bool((ends % self.num_rows).any()):
            start = float(torch.rand((), dtype=torch.float64, generator=generator))
        reached = (ends.double() / self.num_rows + start).floor().long()
        reached[-1] = num_draws  # whatever rounding says
        return reached.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()

    def labelled(self, losses: torch.Tensor) -> list[torch.Tensor]:
        """Returns the rows of each task that have a loss.

        Raises:
            ValueError: If a task has none, so that its share cannot be drawn.
        """
        found = [rows[~losses[rows].isnan()] for rows in self.rows]
        for name, rows in zip(self.names, found):
            if not len(rows):
                raise ValueError(f"No row of the task {name!r} has a loss, so its share cannot be drawn. Leave it out.")
        return found

    def balanced(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns the weights, scaled so that those of each task sum to its share of the rows, shape (N,)."""
        scaled = torch.zeros_like(weights)
        for rows in self.rows:
            scaled[rows] = weights[rows] / weights[rows].sum() * (len(rows) / self.num_rows)
        return scaled

    def draw(self, weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
        """Returns rows drawn within each task, shuffled, shape (num_draws,), int64."""
        counts = self.counts(num_draws, generator)
        return sample_parts([(rows, weights[rows], count) for rows, count in zip(self.rows, counts)], generator)
