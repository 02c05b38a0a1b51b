"""What `chatbot.py` shows beside the common report: responses to read side by side, and the figures round by round.

In: responses, and the results of runs. Out: rows and notes for the common report, samples.md and rounds.png.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset

from recipes.chat_measures import REFERENCES, ResponseMeter, Responses
from recipes.generative_report import COLOURS, GenerativeReport
from recipes.reporting import Result

NUM_SAMPLES = 12
COMPARED = ("held_out_reward", "selecting_reward", "chrf", "distinct_1", "distinct_2",
            "unique_responses", "words", "greedy_held_out_reward", "greedy_distinct_2")  # fmt: skip
# What a round is drawn by: the reward that selects may rise while the one that only judges does not.
PANELS = {
    "held_out_reward": "held-out reward",
    "selecting_reward": "selecting reward",
    "distinct_2": "distinct-2",
    "words": "words per response",
}


def samples_of(prompts: Dataset, responses: Responses) -> list[dict[str, Any]]:
    """Returns responses to a few contexts, spread over all and the same for every arm."""
    step = max(1, len(prompts) // NUM_SAMPLES)
    return [
        {
            "turns": [message["content"] for message in prompts[row]["prompt"]],
            "prompt": prompts[row]["prompt"][-1]["content"],
            "reference": prompts[row][REFERENCES][0],
            "output": responses.texts[row],
            "held_out_reward": responses.judged[row],
        }
        for row in range(0, len(prompts), step)[:NUM_SAMPLES]
    ]


def describe(options: Any, meter: ResponseMeter) -> GenerativeReport:
    """Returns what the report says beside the figures, among it what the judge makes of human responses."""
    references = meter.prompts[REFERENCES]
    human = meter.rate([texts[0] for texts in references]).metrics
    strangers = meter.rate([references[row - 1][0] for row in range(len(references))]).metrics
    return GenerativeReport(
        title=f"{Path(options.dataset).name}, {Path(options.model_name_or_path).name}",
        compared=COMPARED,
        curve_label=f"held-out reward, {options.eval_split}",
        notes=(
            f"Responses to {len(references)} contexts of `{options.test_split}`, one each, sampled at temperature "
            f"{options.measured_temperature:g} from the same random streams for every arm. The held-out reward selects "
            f"nothing. It gives people's own responses {human['held_out_reward']:.3f} and those to another context "
            f"{strangers['held_out_reward']:.3f}; people's distinct-2 is {human['distinct_2']:.3f}, their length "
            f"{human['words']:.1f} words.",
            "`seconds` is the time of training with generation and with the curve. rounds.png has the figures of every "
            f"round on `{options.eval_split}`, samples.md responses to read.",
        ),
    )


def write_samples(results: Sequence[Result], path: Path, title: str) -> None:
    """Writes the responses of every arm of the first seed to the same contexts, with what the judge says of each."""
    seed = results[0]["seed"]
    runs = [result for result in results if result["seed"] == seed]
    lines = [f"# {title}", "", f"Held-out contexts, sampled responses, seed {seed}; in brackets the held-out reward."]
    for number, sample in enumerate(runs[0]["dialogues"]):
        lines += ["", f"## Context {number + 1}", "", *(f"- {turn}" for turn in sample["turns"]), ""]
        lines += ["| | response | |", "|---|---|---|", _row("human", sample["reference"], None)]
        for run in runs:
            found = run["dialogues"][number]
            lines.append(_row(run["arm"], found["output"], found["held_out_reward"]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, text: str, reward: float | None) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return f"| {name} | {shown} | {'' if reward is None else f'[{reward:.2f}]'} |"


def draw_rounds(results: Sequence[Result], path: Path) -> None:
    """Writes one panel per figure over the rounds: a thin line for each seed, a thick one for their mean."""
    figure, all_axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.8), constrained_layout=True)
    for axes, (name, label) in zip(all_axes, PANELS.items(), strict=True):
        for arm in dict.fromkeys(result["arm"] for result in results):
            curves = [[entry[name] for entry in result["by_round"]] for result in results if result["arm"] == arm]
            mean = np.mean(curves, axis=0)
            if len(mean) == 1:
                axes.axhline(mean[0], color=COLOURS[arm], linestyle=":", label=arm)
                continue
            for values in curves:
                axes.plot(range(len(values)), values, color=COLOURS[arm], linewidth=0.7, alpha=0.5)
            axes.plot(range(len(mean)), mean, color=COLOURS[arm], linewidth=2.2, label=arm)
        axes.set(xlabel="round", title=label)
    all_axes[0].legend()
    figure.savefig(path, dpi=140)
    plt.close(figure)
