"""Figures of a report, made with plotly from the records of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsft_hf.report.rounds import RoundSummary
from rsft_hf.report.run import Run

# Okabe & Ito's palette, told apart by colour-blind readers, on light and dark grounds.
_BLUE, _ORANGE = "#3a87c8", "#e08e0b"
_MAX_POINTS = 3_000
_UNSHOWN = ("runtime", "per_second", "seconds")
_NUM_BINS = 10
Groups = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        title: Heading.
        caption: What it shows and how to read it.
        json: Data and layout for plotly.js.
    """

    title: str
    caption: str
    json: str


def curves(lines: Iterable[Mapping[str, Any]], prefixes: tuple[str, ...], title: str, caption: str) -> list[Figure]:
    """Returns small multiples, one curve over the epochs for each logged number that changes.

    Args:
        lines: Lines that the trainer logged.
        prefixes: Beginnings of the names to draw.
        title: Heading.
        caption: Of the figure.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name.startswith(prefixes) and is_number and "epoch" in line and not name.endswith(_UNSHOWN):
                series.setdefault(name, []).append((float(line["epoch"]), float(value)))
    # A saved state has lost the order in which the numbers were logged.
    names = sorted(series, key=lambda name: (not name.startswith(prefixes[0]), name))
    series = {name: series[name] for name in names if len({value for _, value in series[name]}) > 1}
    return [Figure(title, caption, _small_multiples(series))] if series else []


def weighted_figures(run: Run) -> list[Figure]:
    """Returns the distributions of losses and weights by epoch, and the data map."""
    if run.history is None or not run.history.epochs:
        return []
    figures, losses = [], run.measured.get("loss_history")
    if losses is not None:
        groups = {"loss": {str(number): line.numpy() for number, line in enumerate(losses)}}
        caption = "Losses of the rows by measured epoch. Rows that stay high while others fall are hard or wrong."
        figures.append(Figure("Losses", caption, _boxes(groups, "measured epoch", "loss")))
    weights = run.history.epochs_of("weight").numpy() * run.history.epochs_of("count").numpy().sum(1, keepdims=True)
    if (weights.std(1) > 1e-6).any():
        groups = {"weight": dict(zip(map(str, run.history.epochs), weights, strict=True))}
        caption = "Expected draws of a row by epoch. Wide boxes repeat some rows and leave others unread."
        figures.append(Figure("Weights", caption, _boxes(groups, "epoch", "expected draws")))
    if losses is not None and len(losses) > 1:
        figures.append(_data_map(run, losses.numpy()))
    return figures


def generative_figures(rounds: Sequence[RoundSummary]) -> list[Figure]:
    """Returns rewards, acceptance by difficulty and lengths of all candidates against the accepted ones."""
    figures, parts = [], {"all": slice(None), "accepted": None}
    by_part = lambda values: {  # noqa: E731 - used twice, below
        part: {one.name: values(one)[one.is_accepted if chosen is None else chosen] for one in rounds}
        for part, chosen in parts.items()
    }
    if any(np.isfinite(one.rewards).any() for one in rounds):
        caption = "Rewards of all candidates and of the accepted ones, by round."
        figures.append(Figure("Rewards", caption, _boxes(by_part(lambda one: one.rewards), "round", "reward")))
        caption = (
            "Share of candidates accepted, by the mean reward of their prompt: tenths of the prompts from the hardest "
            "to the easiest. A rule that reads only easy prompts rises steeply."
        )
        figures.append(Figure("Acceptance by difficulty", caption, _difficulty(rounds)))
    if any(one.lengths.any() for one in rounds):
        caption = "Lengths of all candidates and of the accepted ones, by round: a drift shows a reward for length."
        figures.append(Figure("Lengths", caption, _boxes(by_part(lambda one: one.lengths), "round", "tokens")))
    return figures


def _small_multiples(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    num_columns = min(3, len(series))
    num_rows = -(-len(series) // num_columns)
    figure = make_subplots(
        num_rows, num_columns, subplot_titles=list(series), vertical_spacing=0.4 / num_rows, horizontal_spacing=0.08
    )
    for place, points in enumerate(series.values()):
        epochs, values = zip(*points, strict=True)
        trace = graph_objects.Scatter(x=epochs, y=values, mode="lines+markers", marker={"size": 5, "color": _BLUE})
        figure.add_trace(trace, place // num_columns + 1, place % num_columns + 1)
    figure.update_layout(showlegend=False, height=70 + 170 * num_rows)
    figure.update_annotations(font_size=12)
    return _json(figure)


def _boxes(groups: Groups, x_title: str, y_title: str) -> str:
    """Boxes from quantiles, so that the page does not hold every value: whiskers at the 5th and 95th percentiles."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for (series, by_label), colour in zip(groups.items(), (_BLUE, _ORANGE), strict=False):
        finite = {label: values[np.isfinite(values)] for label, values in by_label.items()}
        finite = {label: values for label, values in finite.items() if len(values)}
        quantiles = [np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() for values in finite.values()]
        names = ("lowerfence", "q1", "median", "q3", "upperfence")
        columns = dict(zip(names, zip(*quantiles, strict=True), strict=True)) if quantiles else {}
        means = [float(values.mean()) for values in finite.values()]
        box = graph_objects.Box(x=list(finite), mean=means, name=series, marker_color=colour, **columns)
        figure.add_trace(box)
    figure.update_layout(boxmode="group", showlegend=len(groups) > 1, height=340)
    figure.update_xaxes(title=x_title, type="category")
    figure.update_yaxes(title=y_title)
    return _json(figure)


def _data_map(run: Run, losses: np.ndarray) -> Figure:
    """Swayamdipta et al. 2020, arXiv:2009.10795, with exp(-loss) for the probability of the label."""
    from plotly import graph_objects

    probabilities = np.exp(-losses.astype(np.float64))
    rows = np.flatnonzero(np.isfinite(probabilities).sum(0) > 1)
    if len(rows) > _MAX_POINTS:
        rows = rows[np.linspace(0, len(rows) - 1, _MAX_POINTS).astype(int)]
    mean, deviation = np.nanmean(probabilities[:, rows], 0), np.nanstd(probabilities[:, rows], 0)
    errors = np.zeros(len(rows))
    if run.label_report is not None and run.label_report.kind == "class":
        errors = np.nan_to_num(run.label_report.probabilities.numpy())[rows]
    figure = graph_objects.Figure()
    for name, chosen, colour in (("rows", errors <= 0.5, _BLUE), ("label probably wrong", errors > 0.5, _ORANGE)):
        points = {"x": deviation[chosen], "y": mean[chosen], "text": [f"row {row}" for row in rows[chosen]]}
        marker = {"size": 5, "color": colour, "opacity": 0.6}
        figure.add_trace(graph_objects.Scatter(**points, mode="markers", name=name, marker=marker))
    figure.update_layout(showlegend=bool((errors > 0.5).any()), height=420)
    figure.update_xaxes(title="variability: its standard deviation over epochs")
    figure.update_yaxes(title="confidence: mean exp(-loss)")
    caption = (
        f"{len(rows):,} rows: easy ones at the top left, ambiguous ones at the right, hard or mislabelled ones at the "
        "bottom left (Swayamdipta et al. 2020)."
    )
    return Figure("Data map", caption, _json(figure))


def _difficulty(rounds: Sequence[RoundSummary]) -> str:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    first_and_last = [rounds[0], rounds[-1]] if len(rounds) > 1 else rounds
    for one, colour in zip(first_and_last, (_BLUE, _ORANGE), strict=False):
        _, prompts = np.unique(one.prompt_ids, return_inverse=True)
        judged = np.isfinite(one.rewards)
        num_judged = np.bincount(prompts[judged], minlength=prompts.max() + 1)
        sums = np.bincount(prompts[judged], one.rewards[judged], minlength=prompts.max() + 1)
        order = np.argsort(sums[num_judged > 0] / num_judged[num_judged > 0], kind="stable")
        rates = np.bincount(prompts, one.is_accepted) / np.bincount(prompts)
        tenths = [part for part in np.array_split(rates[num_judged > 0][order], _NUM_BINS) if len(part)]
        means = [float(part.mean()) for part in tenths]
        figure.add_trace(
            graph_objects.Bar(x=list(range(1, len(means) + 1)), y=means, name=one.name, marker_color=colour)
        )
    figure.update_layout(showlegend=len(rounds) > 1, height=340)
    figure.update_xaxes(title="tenth of the prompts, hardest first", dtick=1)
    figure.update_yaxes(title="share accepted", rangemode="tozero")
    return _json(figure)


def _json(figure: Any) -> str:
    # The page sets the colours of text, grid and ground by its theme.
    figure.update_layout(template="none", margin={"l": 60, "r": 20, "t": 40, "b": 50})
    return str(figure.to_json())
