"""Rows as pictures: bars, and curves over the length of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.floor import FLOOR
from benchmarks.harness.rows import Row

LIGHT = range(7, 20, 2)  # of "tab20", after those that belong to ours


def bars(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Draw the rows as bars into an SVG, PNG or PDF file; each `what` is a group with a scale of its own.

    The floor is left out: with many rows of a batch it is far from all.
    """
    shown = [row for row in rows if row.who != FLOOR]
    groups = list(dict.fromkeys(row.what for row in shown))
    figure, panel = _figure(0.2 * (len(shown) + len(groups)) + 0.6)
    colours, place, ticks = _colours(shown), 0.0, []
    for what in groups:
        group = [row for row in shown if row.what == what]
        ticks.append((place + (len(group) - 1) / 2, what))
        most = max(abs(row.value) for row in group) or 1
        for row in group:
            bar = panel.barh(place, max(row.value, 0) / most, 0.9, color=colours[row.who])
            panel.bar_label(bar, [f" {row.value:.3g} {row.unit}  {row.who}"], fontsize=7)
            place += 1
        place += 1
    panel.set_yticks(*zip(*ticks, strict=True))
    panel.set(xlim=(0, 1.5), ylim=(place - 1, -1), xticks=[])
    panel.spines["bottom"].set_visible(False)
    _save(figure, path, note)


def curves(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Draw a line for each `who` over the number that ends `what`."""
    figure, panel = _figure(4.5)
    for who, colour in _colours(rows).items():
        points = [(int(row.what.rsplit(" ", 1)[1]), row.value) for row in rows if row.who == who]
        panel.plot(*zip(*points, strict=True), marker="o", color=colour, label=who, ls=":" if who == FLOOR else "-")
    panel.set(xlabel="tokens before it", ylabel=rows[0].unit, ylim=(0, None))
    panel.legend(frameon=False, fontsize=8)
    _save(figure, path, note)


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "gpt2_multi", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, height), layout="constrained")
    panel.spines[["top", "right"]].set_visible(False)
    return figure, panel


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """Ours in full colours, peers in light ones, the floor in black."""
    import matplotlib

    names = list(dict.fromkeys(row.who for row in rows))
    ours = {our for row in rows for our in row.ratios}
    full, light = matplotlib.colormaps["tab10"].colors, matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    strong, pale = iter(full), (light[at] for at in LIGHT)
    return {who: "black" if who == FLOOR else next(strong if who in ours else pale, "grey") for who in names}


def _save(figure: Any, path: Path, note: str) -> None:
    from matplotlib import pyplot

    figure.supxlabel(note, fontsize=5, color="grey", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
