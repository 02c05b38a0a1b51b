"""HTML page of a report: one file that opens from disk and loads nothing from elsewhere."""

import base64
import gzip
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import jinja2
import torch

from rsft_hf.checks import check_integer
from rsft_hf.report.figures import Figure, curves, generative_figures, weighted_figures
from rsft_hf.report.rounds import browsed_candidates, summarize_round
from rsft_hf.report.run import Run, read_run

REPORT = "report.html"
_MAX_ROWS = 100  # of a table
_MAX_COLUMNS = 8
_MAX_TEXT = 600  # characters of a cell
_PREFIXES = ("loss", "eval_", "resampling/", "round/", "candidates/", "accepted/", "rewards/")


def write_report(
    run: Run | Path | str,
    path: Path | str | None = None,
    *,
    dataset: datasets.Dataset | None = None,
    max_candidates: int = 50_000,
) -> Path:
    """Writes the report of a run to one HTML file, and returns its path.

    Weighted half: curves, losses and weights by epoch, data map, most drawn rows, suspected label errors. Generative
    half: curves, rewards, acceptance by difficulty, lengths, and a browser of the candidates. Needs the package
    `plotly` (`pip install rsft-hf[report]`).

    Args:
        run: Output folder of a run (see `read_run`), or the records of one.
        path: File to write; `report.html` in the output folder by default.
        dataset: Training set, for texts and labels in tables.
        max_candidates: Largest number of candidates in the browser; of more, every k-th prompt is shown.

    Raises:
        FileNotFoundError: If the folder holds neither a checkpoint nor candidates.
        ImportError: If plotly is not installed.
        ValueError: If `max_candidates` is below 1, or `dataset` has another number of rows than the run.

    Example:
        >>> run = Run("tiny", [{"epoch": 1.0, "loss": 2.0}, {"epoch": 2.0, "loss": 1.0}])
        >>> import tempfile
        >>> write_report(run, Path(tempfile.mkdtemp()) / "report.html").name
        'report.html'
    """
    check_integer("max_candidates", max_candidates, minimum=1)
    if not isinstance(run, Run):
        path = Path(run) / REPORT if path is None else path
        run = read_run(run, dataset)
    if path is None:
        raise ValueError("`path` is missing: records of a run have no output folder. Give the file to write.")
    page = _page(run, max_candidates)
    draft = Path(f"{path}.incomplete")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return Path(path)


def _page(run: Run, max_candidates: int) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template, style, script = (
        resources.files("rsft_hf.report").joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    rounds = [summarize_round(folder) for folder in run.rounds]
    figures = [
        *curves(run.log_history, ("loss", "eval_"), "Training and evaluation", "Logged by the trainer, by epoch."),
        *weighted_figures(run),
        *generative_figures(rounds),
        *curves(run.log_history, ("resampling/",), "Resampling", "Logged when the rows of an epoch were drawn."),
        *curves(run.log_history, ("pseudo_labels/",), "Drawn labels", "Logged for each round of proposed labels."),
        *curves(run.log_history, _PREFIXES[3:], "Rounds", "Logged for each round of candidates."),
    ]
    facts = _weighted_facts(run)
    candidates = ""
    if rounds:
        browsed = browsed_candidates(run.rounds, max_candidates)
        num_accepted = sum(int(one.is_accepted.sum()) for one in rounds)
        facts |= {"rounds": len(rounds), "candidates": f"{browsed['total']:,}", "accepted": f"{num_accepted:,}"}
        candidates = base64.b64encode(gzip.compress(json.dumps(browsed).encode())).decode()
    return environment.from_string(template).render(
        name=run.name,
        facts=facts,
        figures=figures,
        tables=[*_numbers(run.log_history), *_row_tables(run)],
        candidates=candidates,
        style=style,
        script=script,
        plotly=_plotly(figures),
        as_script_data=lambda text: text.replace("<", "\\u003c"),
    )


def _plotly(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _weighted_facts(run: Run) -> dict[str, Any]:
    if run.history is None:
        return {}
    facts: dict[str, Any] = {"rows": f"{run.history.num_rows or 0:,}", "epochs": len(run.history.epochs)}
    if run.label_report is not None:
        facts["labels probably wrong"] = f"about {run.label_report.num_errors:,.0f}"
    return facts


def _numbers(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of what was logged, one column per epoch: what the curves show, for screen readers and for copying."""
    by_epoch: dict[float, dict[str, Any]] = {}
    for line in log_history:
        numbers = {name: value for name, value in line.items() if name.startswith(_PREFIXES)}
        if numbers and "epoch" in line:
            by_epoch.setdefault(round(float(line["epoch"]), 2), {}).update(numbers)
    if not by_epoch:
        return []
    epochs = sorted(by_epoch)
    stride = -(-len(epochs) // _MAX_COLUMNS)
    epochs = epochs[::-stride][::-1]
    places = {prefix: place for place, prefix in enumerate(_PREFIXES)}
    place = lambda name: next(places[prefix] for prefix in _PREFIXES if name.startswith(prefix))  # noqa: E731
    names = sorted({name for line in by_epoch.values() for name in line}, key=lambda name: (place(name), name))
    rows = [[name, *(_cell(by_epoch[epoch].get(name)) for epoch in epochs)] for name in names]
    heads = ["logged", *(f"epoch {epoch:g}" for epoch in epochs)]
    return [{"title": "Logged numbers", "caption": "", "heads": heads, "rows": rows}]


def _row_tables(run: Run) -> list[dict[str, Any]]:
    if run.history is None or not run.history.epochs:
        return []
    counts = run.history.epochs_of("count").sum(0)
    rows = counts.argsort(descending=True, stable=True)[:_MAX_ROWS].tolist()
    losses = run.measured["loss_history"].nanmean(0) if run.measured else torch.full((len(counts),), float("nan"))
    drawn = [[row, int(counts[row]), _cell(float(losses[row]))] for row in rows]
    caption = f"Draws over {len(run.history.epochs)} epochs."
    tables = [_row_table(run, "Most drawn rows", caption, ["row", "draws", "mean loss"], drawn, rows)]
    if run.label_report is not None:
        suspects = run.label_report.table(num_labels=_MAX_ROWS)
        lines = [[_cell(value) for value in line.values()] for line in suspects]
        caption = (
            "Labels by the probability that they are wrong, and the label that the model prefers; all of them: "
            "`rsft-hf suspects`."
        )
        heads = [name.replace("_", " ") for name in suspects.column_names]
        tables.append(_row_table(run, "Suspected label errors", caption, heads, lines, suspects["row"][:]))
    elif run.measured:
        found = run.history.suspects(_MAX_ROWS)
        lines = [[row, _cell(excess)] for row, excess in zip(found["row"], found["excess_loss"], strict=True)]
        caption = "Rows whose loss stays above the epoch's median: hard or mislabelled."
        tables.append(_row_table(run, "Suspects", caption, ["row", "excess loss"], lines, found["row"][:]))
    return tables


def _row_table(
    run: Run, title: str, caption: str, heads: list[str], lines: list[list[Any]], rows: Sequence[int]
) -> dict[str, Any]:
    """A table of rows of the training set, with their columns of text and labels where there are any."""
    table = {"title": title, "caption": caption, "heads": list(heads), "rows": lines}
    if run.dataset is None:
        return table
    dataset = run.dataset.with_format(None)
    shown = [name for name, feature in dataset.features.items() if _is_shown(feature)]
    has_text = any(_is_text(dataset.features[name]) for name in shown)
    for line, row in zip(lines, rows, strict=True):
        values = dataset[row]
        line += [_described(dataset.features[name], values[name]) for name in shown]
        if not has_text and run.processing_class is not None and "input_ids" in values:
            line.append(_cell(run.processing_class.decode(values["input_ids"], skip_special_tokens=True)))
            table["heads"] = [*heads, *shown, "text"]
            continue
        table["heads"] = [*heads, *shown]
    return table


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_shown(feature: Any) -> bool:
    return _is_text(feature) or isinstance(feature, datasets.ClassLabel)


def _described(feature: Any, value: Any) -> str:
    if isinstance(feature, datasets.ClassLabel) and value is not None and value >= 0:
        return _cell(feature.int2str(value))
    return _cell(value)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} …"
