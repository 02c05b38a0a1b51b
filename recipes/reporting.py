"""From the results of runs to what a reader looks at: means over seeds, tables, JSON, CSV, a short text.

In: one dict per run with `arm`, `seed` and `metrics`. Out: strings and files. It knows no task.
"""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def format_value(mean: float | None, deviation: float | None) -> str:
    """Returns "0.912 +- 0.004"; counts and seconds, from ten on, without decimals."""
    if mean is None:
        return "-"
    digits = 0 if abs(mean) >= 10 else 3
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" +- {deviation:,.{digits}f}")


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


def difference_table(results: Sequence[Result], arm: str, others: Sequence[str], metrics: Sequence[str]) -> str:
    """Returns `arm` less every other arm in points, with the spread over seeds and the seeds on which it is higher."""
    rows = []
    for metric in metrics:
        row = [metric.replace("_", " ")]
        for other in others:
            points = [100 * value for value in paired_difference(results, arm, other, metric)]
            mean, deviation = mean_and_deviation(points)
            spread = "" if deviation is None else f" +- {deviation:.1f}"
            num_higher = sum(value > 0 for value in points)
            row.append("-" if mean is None else f"{mean:+.1f}{spread} ({num_higher}/{len(points)})")
        rows.append(row)
    return format_table(["points", *(f"less {other}" for other in others)], rows)


def write_results(results: Sequence[Result], folder: Path) -> None:
    """Writes `results.json` (every run, whole) and `results.csv` (one line per run) into the folder."""
    (folder / "results.json").write_text(json.dumps(list(results), indent=2) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["arm", "seed", *names])
        writer.writeheader()
        for result in results:
            writer.writerow({"arm": result["arm"], "seed": result["seed"], **result["metrics"]})
