"""Figure of the law for docs/concepts.md, drawn by rejection sampling itself: `python docs/law.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    """Draws proposals under the envelope M q, and which of them are accepted."""
    plt.rcParams.update({"svg.hashsalt": "law", "font.size": 11, "svg.fonttype": "none"})
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 400)
    target = lambda x: 6 * x * (1 - x) * (1 + 0.6 * np.sin(5 * x))  # noqa: E731 - a formula
    envelope = target(grid).max()  # M, for the uniform proposal q = 1
    proposals = rng.random(700)
    heights = rng.random(700) * envelope
    accepted = heights < target(proposals)
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axes.scatter(proposals[~accepted], heights[~accepted], s=9, color="#9aa3ad", label="rejected proposals")
    axes.scatter(proposals[accepted], heights[accepted], s=9, color="#1f77b4", label="accepted: they follow p")
    axes.plot(grid, target(grid), color="#1f77b4", linewidth=2)
    axes.axhline(envelope, color="#c25b12", linewidth=2)
    axes.annotate("M q", (0.02, envelope), xytext=(0, -15), textcoords="offset points", color="#c25b12")
    axes.annotate("p", (0.14, target(0.14)), xytext=(-14, 2), textcoords="offset points", color="#1f77b4")
    axes.set(xlim=(0, 1), ylim=(0, envelope * 1.08), xlabel="x", yticks=[])
    axes.legend(loc="upper right", framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("law.svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
