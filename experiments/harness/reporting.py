"""Reports of a comparison: means over seeds, tables, JSON, CSV, report.md and pictures.

Input: one dict per run with `arm`, `seed`, `metrics` (name -> figure) and `curve` ([training done, figure] pairs);
runs of the generative half also have `rounds` (what each round logged) and `samples` (dicts of `prompt`, `reference`
and `output`). Output: strings and files. The report states figures and their spread, and names no arm better with
fewer than three seeds.
"""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.arms import GENERATIVE_ARMS

Result = dict[str, Any]

# With fewer seeds no arm is called better than another.
FEWEST_SEEDS = 3


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Returns the mean and the sample standard deviation (n - 1); None where unknown, as the deviation of one value is.

    Example:
        >>> mean_and_deviation([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def aggregate(results: Sequence[Result]) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """Returns arm -> metric -> (mean, sample standard deviation) over the seeds, arms in order of appearance.

    Example:
        >>> runs = [{"arm": "plain", "seed": s, "metrics": {"accuracy": a}} for s, a in ((1, 0.5), (2, 0.7))]
        >>> [round(value, 4) for value in aggregate(runs)["plain"]["accuracy"]]  # sqrt(2 * .1 ** 2 / 1)
        [0.6, 0.1414]
    """
    arms = list(dict.fromkeys(result["arm"] for result in results))
    table = {}
    for arm in arms:
        runs = [result["metrics"] for result in results if result["arm"] == arm]
        table[arm] = {name: mean_and_deviation([run[name] for run in runs]) for name in runs[0]}
    return table


def paired_difference(results: Sequence[Result], arm: str, other: str, metric: str) -> list[float]:
    """Returns `arm` less `other` for each seed that both have: seeds share their data, so pairs are compared."""
    by_run = {(result["arm"], result["seed"]): result["metrics"][metric] for result in results}
    seeds = sorted(seed for name, seed in by_run if name == arm and (other, seed) in by_run)
    return [by_run[arm, seed] - by_run[other, seed] for seed in seeds]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned plain text: the first column to the left, the others to the right.

    Example:
        >>> print(format_table(["arm", "accuracy"], [["plain", "0.9"]]))
        arm    accuracy
        -----  --------
        plain       0.9
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip


def arm_table(results: Sequence[Result]) -> str:
    """Returns one line per arm with every metric as mean and spread over the seeds."""
    table = aggregate(results)
    names = list(dict.fromkeys(name for metrics in table.values() for name in metrics))
    rows = [
        [arm, str(sum(result["arm"] == arm for result in results))]
        + [format_value(*metrics[name]) if name in metrics else "-" for name in names]
        for arm, metrics in table.items()
    ]
    return format_table(["arm", "seeds", *(name.replace("_", " ") for name in names)], rows)


def group_table(results: Sequence[Result]) -> str:
    """Returns one line per group of rows with the accuracy of every arm, averaged over seeds."""
    arms = list(dict.fromkeys(result["arm"] for result in results))
    groups = list(results[0]["groups"])
    rows = []
    for group in groups:
        shares = {arm: [run["groups"][group]["accuracy"] for run in results if run["arm"] == arm] for arm in arms}
        rows.append([group, str(results[0]["groups"][group]["rows"])]
                    + [format_value(*mean_and_deviation(shares[arm])) for arm in arms])  # fmt: skip
    return format_table(["group", "rows", *arms], rows)


def write_results(results: Sequence[Result], folder: Path) -> None:
    """Writes `results.json` (every run, whole) and `results.csv` (one line per run) into the folder."""
    (folder / "results.json").write_text(json.dumps(list(results), indent=2) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["arm", "seed", *names])
        writer.writeheader()
        for result in results:
            writer.writerow({"arm": result["arm"], "seed": result["seed"], **result["metrics"]})


COLOURS = {
    "plain": "tab:gray",
    "base": "tab:gray",
    "supervised": "tab:green",
    "rejection": "tab:blue",
    "control": "tab:orange",
}

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


def comparison_section(results: Sequence[Result], table: str) -> tuple[str, str]:
    """Returns the heading and the text of rejection less the other arms."""
    num_seeds = len({result["seed"] for result in results})
    verdict = "" if num_seeds >= FEWEST_SEEDS else f"\n{num_seeds} seed(s): too few to call an arm better."
    return "Rejection less the others, paired by seed (number of seeds on which it is higher)", table + verdict


def write_generative_report(results: Sequence[Result], folder: Path, report: GenerativeReport) -> None:
    """Prints the tables and writes every file of the report into `folder`."""
    sections = [("Results", arm_table(results))]
    others = [arm for arm in GENERATIVE_ARMS if arm != "rejection" and any(run["arm"] == arm for run in results)]
    if others and any(result["arm"] == "rejection" for result in results):
        table = paired_table(results, "rejection", others, report.compared)
        sections.append(comparison_section(results, table))
    if any(result["rounds"] for result in results):
        sections.append(("Rounds, means over seeds", round_table(results)))
    if results[0]["samples"]:
        sections.append((f"Samples, seed {results[0]['seed']}", sample_text(results)))
    draw_curves(results, folder / "curve.png", "optimizer steps", report.curve_label, "held-out rows, greedy")
    note = "\n".join(["Mean +- sample standard deviation over seeds. The curve is curve.png.", *report.notes])
    write_files(results, folder, report.title, note, sections)
    print(f"\nreport.md, results.json, results.csv and curve.png are in {folder}")


def write_files(
    results: Sequence[Result], folder: Path, title: str, note: str, sections: Sequence[tuple[str, str]]
) -> None:
    """Prints the sections, and writes report.md, results.json and results.csv into `folder`."""
    write_results(results, folder)
    body = "\n\n".join(f"## {heading}\n\n```\n{text}\n```" for heading, text in sections)
    (folder / "report.md").write_text(f"# {title}\n\n{note}\n\n{body}\n", encoding="utf-8")
    print("\n" + "\n\n".join(f"{heading}\n{text}" for heading, text in sections))


def format_value(mean: float | None, deviation: float | None, digits: int | None = None) -> str:
    """Returns "37.02 +- 0.13", with as many decimals as four digits leave, three at most; "-" where unknown.

    Example:
        >>> format_value(37.0184, 0.131), format_value(0.5, None), format_value(1234.5, 10.0)
        ('37.02 +- 0.13', '0.500', '1,234 +- 10')
    """
    if mean is None:
        return "-"
    if digits is None:
        digits = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1 if abs(mean) < 1000 else 0
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" +- {deviation:,.{digits}f}")


def paired_table(
    results: Sequence[Result], arm: str, others: Sequence[str], metrics: Sequence[str], unit: str = "metric"
) -> str:
    """Returns `arm` less every other arm, with the spread over seeds and the number of seeds on which it is higher.

    Args:
        results: One dict per run.
        arm: The arm that is compared.
        others: The arms it is compared with.
        metrics: Names of the figures.
        unit: "metric" for the figures as they are, "points" for shares times 100.
    """
    scale, digits = (100, 1) if unit == "points" else (1, None)
    rows = []
    for metric in metrics:
        row = [metric.replace("_", " ")]
        for other in others:
            differences = [scale * value for value in paired_difference(results, arm, other, metric)]
            mean, deviation = mean_and_deviation(differences)
            num_higher = sum(value > 0 for value in differences)
            sign = "+" if mean is not None and mean > 0 else ""
            row.append(
                "-"
                if mean is None
                else f"{sign}{format_value(mean, deviation, digits)} ({num_higher}/{len(differences)})"
            )
        rows.append(row)
    return format_table([unit, *(f"less {other}" for other in others)], rows)


def round_table(results: Sequence[Result]) -> str:
    """Returns one line per arm and round with what the round logged, averaged over seeds."""
    logged = [figures for result in results for figures in result["rounds"]]
    names = [name for name in ROUND_FIGURES if all(name in figures for figures in logged)]
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results if result["rounds"]):
        runs = [result["rounds"] for result in results if result["arm"] == arm]
        for number in range(min(map(len, runs))):
            means = [mean_and_deviation([run[number][name] for run in runs])[0] for name in names]
            rows.append([arm, str(number + 1), *(format_value(mean, None) for mean in means)])
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


def draw_curves(results: Sequence[Result], path: Path, xlabel: str, ylabel: str, title: str) -> None:
    """Writes the curve of every arm: a thin line for each seed, a thick one for their mean, a level for one point."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(result["arm"] for result in results if result["curve"]):
        points: dict[float, list[float]] = {}
        for result in (result for result in results if result["arm"] == arm and result["curve"]):
            axes.plot(*zip(*result["curve"], strict=True), color=COLOURS[arm], linewidth=0.7, alpha=0.5)
            for position, value in result["curve"]:
                points.setdefault(position, []).append(value)
        means = [(position, float(np.mean(values))) for position, values in sorted(points.items())]
        if len(means) == 1:
            axes.axhline(means[0][1], color=COLOURS[arm], linewidth=1.5, linestyle=":", label=arm)
        else:
            axes.plot(*zip(*means, strict=True), color=COLOURS[arm], linewidth=2.2, marker="o", markersize=4, label=arm)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend()
    figure.savefig(path, dpi=140)


SMALLEST_WEIGHT = 1e-4  # where a logarithmic axis ends, for the rows that are never drawn


def draw_resampling(results: Sequence[Result], path: Path) -> None:
    """Writes the weights of the first resampled run, epoch by epoch, beside the acceptance rate of every run.

    A weight of 1 is that of uniform sampling; the acceptance rate is 1 / M = mean weight / largest weight.
    """
    resampled = [result for result in results if result["resampling"]]
    if not resampled:
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = resampled[0]
    curves = first["weight_percentiles"]
    for epoch, curve in enumerate(curves):
        left.plot(
            np.arange(len(curve)),
            np.maximum(curve, SMALLEST_WEIGHT),
            color=matplotlib.colormaps["viridis"](epoch / max(1, len(curves) - 1)),
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
    figure.savefig(path, dpi=140)
