"""The report of a generative comparison: printed, and written as report.md, results.json, results.csv and curve.png.

In: one dict per run with `arm`, `seed`, `metrics` (name -> figure), `curve` ([optimizer steps, figure] pairs), `rounds`
(what each round logged) and `samples` (dicts of `prompt`, `reference`, `output`). Out: files. It states figures and
their spread, and leaves "better" to three seeds and more. It knows no task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from recipes.generative_arms import ARMS
from recipes.reporting import (
    FEWEST_SEEDS,
    Result,
    aggregate,
    format_table,
    mean_and_deviation,
    paired_difference,
    write_results,
)

COLOURS = {"base": "tab:gray", "supervised": "tab:green", "rejection": "tab:blue", "control": "tab:orange"}
# What a round logged -> its heading in the report; a figure that no round has is left out.
ROUND_FIGURES = {
    "candidates/reward": "reward, candidates",
    "accepted/reward": "reward, accepted",
    "round/acceptance_rate": "accepted",
    "round/prompts_without_accepted": "prompts without",
    "accepted/length": "length, accepted",
    "candidates/distinct_2": "distinct 2",
}


@dataclass(frozen=True)
class GenerativeReport:
    """What a report says beside the figures.

    Attributes:
        title: Heading.
        compared: Metrics by which rejection is set against the other arms.
        curve_label: What the curve measures.
        notes: Lines under the heading, such as the signatures of the metrics.
    """

    title: str
    compared: tuple[str, ...]
    curve_label: str
    notes: tuple[str, ...] = field(default=())


def collect_rounds(log_history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Returns what a trainer logged of each round, in order; empty if it ran none.

    Example:
        >>> collect_rounds([{"loss": 1.0}, {"round/acceptance_rate": 0.5, "loss": 0.9, "step": 4}])
        [{'round/acceptance_rate': 0.5}]
    """
    entries = [entry for entry in log_history if "round/acceptance_rate" in entry]
    return [{name: entry[name] for name in ROUND_FIGURES if name in entry} for entry in entries]


def collect_curve(log_history: Sequence[dict[str, float]], metric: str) -> list[list[float]]:
    """Returns [optimizer steps, metric] of every evaluation that a trainer logged; a resumed run repeats one.

    Example:
        >>> collect_curve([{"eval_bleu": 30.0, "step": 0}, {"loss": 1.0, "step": 5}], "bleu")
        [[0, 30.0]]
    """
    points = {entry["step"]: entry[f"eval_{metric}"] for entry in log_history if f"eval_{metric}" in entry}
    return [[steps, value] for steps, value in points.items()]


def write_report(results: Sequence[Result], folder: Path, report: GenerativeReport) -> None:
    """Prints the tables and writes every file of the report into `folder`."""
    sections = [("Results", metric_table(results))]
    others = [arm for arm in ARMS if arm != "rejection" and any(result["arm"] == arm for result in results)]
    if others and any(result["arm"] == "rejection" for result in results):
        num_seeds = len({result["seed"] for result in results})
        verdict = "" if num_seeds >= FEWEST_SEEDS else f"\n{num_seeds} seed(s): too few to call an arm better."
        heading = "Rejection less the others, paired by seed (on how many seeds it is higher)"
        sections.append((heading, paired_table(results, others, report.compared) + verdict))
    if any(result["rounds"] for result in results):
        sections.append(("Rounds, means over seeds", round_table(results)))
    if results[0]["samples"]:
        sections.append((f"Samples, seed {results[0]['seed']}", sample_text(results)))
    write_results(results, folder)
    draw_curves(results, folder / "curve.png", report.curve_label)
    note = "\n".join(["Mean +- sample standard deviation over seeds. The curve is curve.png.", *report.notes])
    body = "\n\n".join(f"## {heading}\n\n```\n{text}\n```" for heading, text in sections)
    (folder / "report.md").write_text(f"# {report.title}\n\n{note}\n\n{body}\n", encoding="utf-8")
    print("\n" + "\n\n".join(f"{heading}\n{text}" for heading, text in sections))
    print(f"\nreport.md, results.json, results.csv and curve.png are in {folder}")


def format_figure(mean: float | None, deviation: float | None) -> str:
    """Returns "37.02 +- 0.13", with as many decimals as four digits leave, three at most; "-" where unknown.

    Example:
        >>> format_figure(37.0184, 0.131), format_figure(0.5, None), format_figure(1234.5, 10.0)
        ('37.02 +- 0.13', '0.500', '1,234 +- 10')
    """
    if mean is None:
        return "-"
    digits = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1 if abs(mean) < 1000 else 0
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" +- {deviation:,.{digits}f}")


def metric_table(results: Sequence[Result]) -> str:
    """Returns one line per arm with every metric as mean and spread over the seeds."""
    table = aggregate(results)
    names = list(dict.fromkeys(name for metrics in table.values() for name in metrics))
    rows = [
        [arm, str(sum(result["arm"] == arm for result in results))]
        + [format_figure(*metrics[name]) if name in metrics else "-" for name in names]
        for arm, metrics in table.items()
    ]
    return format_table(["arm", "seeds", *(name.replace("_", " ") for name in names)], rows)


def paired_table(results: Sequence[Result], others: Sequence[str], metrics: Sequence[str]) -> str:
    """Returns rejection less every other arm, with the spread over seeds and the seeds on which it is higher."""
    rows = []
    for metric in metrics:
        row = [metric.replace("_", " ")]
        for other in others:
            differences = paired_difference(results, "rejection", other, metric)
            mean, deviation = mean_and_deviation(differences)
            num_higher = sum(value > 0 for value in differences)
            sign = "+" if mean is not None and mean > 0 else ""
            row.append(
                "-" if mean is None else f"{sign}{format_figure(mean, deviation)} ({num_higher}/{len(differences)})"
            )
        rows.append(row)
    return format_table(["metric", *(f"less {other}" for other in others)], rows)


def round_table(results: Sequence[Result]) -> str:
    """Returns one line per arm and round with what the round logged, averaged over seeds."""
    logged = [figures for result in results for figures in result["rounds"]]
    names = [name for name in ROUND_FIGURES if all(name in figures for figures in logged)]
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results if result["rounds"]):
        runs = [result["rounds"] for result in results if result["arm"] == arm]
        for number in range(min(map(len, runs))):
            means = [mean_and_deviation([run[number][name] for run in runs])[0] for name in names]
            rows.append([arm, str(number + 1), *(format_figure(mean, None) for mean in means)])
    return format_table(["arm", "round", *(ROUND_FIGURES[name] for name in names)], rows)


def sample_text(results: Sequence[Result]) -> str:
    """Returns for the samples of the first seed the prompt, the reference and what every arm wrote."""
    runs = [result for result in results if result["seed"] == results[0]["seed"]]
    width = max(len("reference"), *(len(result["arm"]) for result in runs))
    blocks = []
    for number, sample in enumerate(runs[0]["samples"]):
        lines = {name: sample[name] for name in ("prompt", "reference") if sample.get(name)}
        lines |= {result["arm"]: result["samples"][number]["output"] for result in runs}
        blocks.append("\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items()))
    return "\n\n".join(blocks)


def draw_curves(results: Sequence[Result], path: Path, label: str) -> None:
    """Writes the curve of every arm: a thin line for each seed, a thick one for their mean, a level for the base."""
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for arm in dict.fromkeys(result["arm"] for result in results if result["curve"]):
        points: dict[float, list[float]] = {}
        for result in (result for result in results if result["arm"] == arm and result["curve"]):
            axes.plot(*zip(*result["curve"], strict=True), color=COLOURS[arm], linewidth=0.7, alpha=0.5)
            for steps, value in result["curve"]:
                points.setdefault(steps, []).append(value)
        means = [(steps, float(np.mean(values))) for steps, values in sorted(points.items())]
        if len(means) == 1:
            axes.axhline(means[0][1], color=COLOURS[arm], linewidth=1.5, linestyle=":", label=arm)
        else:
            axes.plot(*zip(*means, strict=True), color=COLOURS[arm], linewidth=2.2, marker="o", markersize=4, label=arm)
    axes.set(xlabel="optimizer steps", ylabel=label, title="held-out rows, greedy")
    axes.legend()
    figure.savefig(path, dpi=140)
    plt.close(figure)
