"""The curve of a run, readable on a light page and on a dark one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from gpt2_multi.app.train.report.metrics import Point

INK = "#808080"  # of words and axes: between black and white
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
COLOURS = {"training": "#3b82f6", "held out": "#ea7317"}


def draw(points: Sequence[Point]) -> str:
    """The two losses over the steps, as an SVG; ModuleNotFoundError where Matplotlib is missing."""
    import matplotlib
    from matplotlib.figure import Figure

    inks: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    options: Any = {**inks, "svg.fonttype": "none", "svg.hashsalt": "gpt2-multi", "font.size": 11}
    with matplotlib.rc_context(options):
        figure = Figure((7, 4), layout="constrained")
        axes = figure.subplots()
        for name, colour in COLOURS.items():
            found = [(step, held if name == "held out" else train) for step, train, held in points]
            found = [place for place in found if place[1] is not None]
            if found:
                steps, losses = zip(*found, strict=True)
                axes.plot(steps, losses, color=colour, marker="o", markersize=3, label=name)
        axes.set(xlabel="step", ylabel="loss per token")
        axes.grid(color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
