"""The report of a comparison of arms: printed, and written as report.md, results.json, results.csv and two pictures.

In: the results of runs. Out: files. It states figures and their spread, and leaves "better" to three seeds and more.
"""

from collections.abc import Sequence
from pathlib import Path

from recipes.figures import draw_curves, draw_resampling
from recipes.reporting import (
    FEWEST_SEEDS,
    Result,
    arm_table,
    difference_table,
    format_table,
    format_value,
    group_table,
    mean_and_deviation,
    write_results,
)

COMPARED = ("accuracy", "macro_f1", "minority_recall")


def noise_table(results: Sequence[Result]) -> str:
    """Returns the share of rows with a changed label among all rows and among those drawn, first and last epoch."""
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        shares = [result["flipped"] for result in results if result["arm"] == arm]
        columns = [
            [share["of_rows"] for share in shares],
            [share["of_draws"] for share in shares],
            [share["by_epoch"][0] for share in shares],
            [share["by_epoch"][-1] for share in shares],
        ]
        rows.append([arm, *(format_value(*mean_and_deviation(values)) for values in columns)])
    return format_table(["arm", "of the rows", "of the draws", "first epoch", "last epoch"], rows)


def resampling_table(results: Sequence[Result]) -> str:
    """Returns the range over epochs and seeds of what the resampler logged, one line per arm."""
    names = ("acceptance_rate", "effective_sample_size", "unique_fraction", "max_repeats")
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results if result["resampling"]):
        figures = [epoch for result in results if result["arm"] == arm for epoch in result["resampling"]]
        ranges = [[epoch[name] for epoch in figures] for name in names]
        rows.append([arm, *(f"{format_value(min(v), None)} to {format_value(max(v), None)}" for v in ranges)])
    return format_table(["arm", *(name.replace("_", " ") for name in names)], rows)


def write_report(results: Sequence[Result], folder: Path, title: str) -> None:
    """Prints the tables and writes every file of the report into `folder`."""
    arms = list(dict.fromkeys(result["arm"] for result in results))
    sections = [("Results", arm_table(results))]
    others = [arm for arm in ("plain", "control") if arm in arms]
    if "rejection" in arms and others:
        heading = "Rejection less the others, paired by seed (on how many seeds it is higher)"
        num_seeds = len({result["seed"] for result in results})
        verdict = "" if num_seeds >= FEWEST_SEEDS else f"\n{num_seeds} seed(s): too few to call an arm better."
        sections.append((heading, difference_table(results, "rejection", others, COMPARED) + verdict))
    if any(result["resampling"] for result in results):
        sections.append(("Resampling, lowest to highest epoch", resampling_table(results)))
    if any(result["flipped"]["of_rows"] for result in results):
        sections.append(("Share of rows with a changed label", noise_table(results)))
    if results[0]["groups"]:
        sections.append(("Accuracy by group", group_table(results)))
    write_results(results, folder)
    draw_resampling(results, folder / "resampling.png")
    draw_curves(results, folder / "accuracy.png")
    body = "\n\n".join(f"## {heading}\n\n```\n{text}\n```" for heading, text in sections)
    note = (
        "Mean +- sample standard deviation over seeds. `draws` counts the rows trained on, with repeats; `seconds` is "
        "the time of training with resampling and without evaluations. The pictures are accuracy.png and "
        "resampling.png."
    )
    (folder / "report.md").write_text(f"# {title}\n\n{note}\n\n{body}\n", encoding="utf-8")
    print("\n" + "\n\n".join(f"{heading}\n{text}" for heading, text in sections))
    print(f"\nreport.md, results.json, results.csv, accuracy.png and resampling.png are in {folder}")
