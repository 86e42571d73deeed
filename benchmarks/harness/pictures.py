"""Rows as pictures: a panel of bars for each thing measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.reports import compared, explanation, figure
from benchmarks.harness.rows import FLOOR, OURS, Row

STRONG = ("#d1495b", "#00798c", "#edae49", "#7a4988")  # of ours
PALE = ("#8d99ae", "#adb5bd", "#c5ccd6", "#9aa5b1", "#b7b7a4", "#cbc0d3")
COLUMNS = 3
FAR = 1.6  # times the longest bar, from which on the floor is left out: with many rows of a batch it is far from all
STYLE: dict[Any, Any] = {
    "svg.hashsalt": OURS,
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
}


def bars(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Draw the rows as bars into an SVG, PNG or PDF file; each `what` has a panel with a scale of its own."""
    keys = dict.fromkeys((row.what, row.unit) for row in rows)
    groups = [[row for row in rows if (row.what, row.unit) == key] for key in keys]
    colours, columns, most = _colours(rows), min(COLUMNS, len(groups)), max(map(len, groups))
    lines = -(-len(groups) // columns)
    drawn, panels = _figure(4.1 * columns, lines * (0.17 * most + 0.45) + 0.4, lines, columns)
    for panel, group in zip(panels, groups, strict=False):
        _bars(panel, group, rows, colours)
        panel.set_ylim(most - 0.4, -0.6)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    _save(drawn, path, f"{explanation(rows)}\n{note}")


def _bars(panel: Any, group: Sequence[Row], rows: Sequence[Row], colours: dict[str, str]) -> None:
    longest = max((abs(row.value) for row in group if row.who != FLOOR), default=0) or 1
    shown = [row for row in group if row.who != FLOOR or row.value <= FAR * longest]
    longest = max(longest, *(abs(row.value) for row in shown))
    names, filled = [row.who.removeprefix(f"{OURS}, ") for row in shown], [colours[row.who] for row in shown]
    drawn = panel.barh(range(len(shown)), [max(row.value, 0) for row in shown], 0.8, color=filled)
    panel.bar_label(drawn, [figure(row, rows) for row in shown], padding=2, fontsize=6.5)
    panel.set_yticks(range(len(shown)), names)
    panel.set(xlim=(0, 1.75 * longest), xticks=[])
    panel.set_title(f"{group[0].what}, {group[0].unit}", loc="left")
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(axis="y", left=False)


def _figure(width: float, height: float, lines: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(lines, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return drawn, list(panels.flat)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Ours in strong colours, peers in pale ones, the floor in black."""
    ours, strong, pale = compared(rows), iter(STRONG), iter(PALE)
    names = dict.fromkeys(row.who for row in rows)
    return {who: "#333333" if who == FLOOR else next(strong if who in ours else pale, "#bbbbbb") for who in names}


def _save(drawn: Any, path: Path, note: str) -> None:
    from matplotlib import pyplot

    drawn.supxlabel(note.strip(), fontsize=6, color="#555555", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    pyplot.close(drawn)
