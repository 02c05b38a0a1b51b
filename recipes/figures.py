"""Two pictures of a recipe's runs: what the resampling did, and what it cost and gained.

In: the results of runs, as `reporting.py` has them. Out: PNG files. It draws and computes nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from recipes.reporting import Result

COLOURS = {"plain": "tab:gray", "rejection": "tab:blue", "control": "tab:orange"}
SMALLEST_WEIGHT = 1e-4  # where a logarithmic axis ends, for the rows that are never drawn


def draw_resampling(results: Sequence[Result], path: Path) -> None:
    """Writes the weights of the first resampled run, epoch by epoch, beside the acceptance rate of every run.

    A weight of 1 is that of uniform sampling; the acceptance rate is 1 / M = mean weight / largest weight.
    """
    resampled = [result for result in results if result["resampling"]]
    if not resampled:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    first = resampled[0]
    curves = first["weight_percentiles"]
    for epoch, curve in enumerate(curves):
        left.plot(
            np.arange(len(curve)),
            np.maximum(curve, SMALLEST_WEIGHT),
            color=plt.cm.viridis(epoch / max(1, len(curves) - 1)),
        )
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set(xlabel="percentile of the rows", ylabel="weight, 1 = uniform", yscale="log",
             title=f"weights, {first['arm']}, seed {first['seed']} (dark = first epoch)")  # fmt: skip
    for result in resampled:
        rates = [figures["acceptance_rate"] for figures in result["resampling"]]
        is_first_of_arm = result is next(other for other in resampled if other["arm"] == result["arm"])
        right.plot(range(1, len(rates) + 1), rates, marker="o", markersize=3, alpha=0.8,
                   color=COLOURS.get(result["arm"]), label=result["arm"] if is_first_of_arm else None)  # fmt: skip
    right.set(xlabel="epoch", ylabel="acceptance rate", title="one line per seed", ylim=(0, 1.05))
    right.legend()
    _save(figure, path)


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """Writes accuracy against the training rows seen: a thin line for each seed, a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for arm in dict.fromkeys(result["arm"] for result in results):
        colour = COLOURS.get(arm)
        points: dict[float, list[float]] = {}
        for result in (result for result in results if result["arm"] == arm):
            axes.plot(*zip(*result["curve"], strict=True), color=colour, linewidth=0.7, alpha=0.5)
            for rows_seen, accuracy in result["curve"]:
                points.setdefault(rows_seen, []).append(accuracy)
        means = [(rows_seen, float(np.mean(values))) for rows_seen, values in sorted(points.items())]
        axes.plot(*zip(*means, strict=True), color=colour, linewidth=2.2, label=arm)
    axes.set(xlabel="training rows seen", ylabel="accuracy", title="evaluation during training")
    axes.legend()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=140)
    plt.close(figure)
