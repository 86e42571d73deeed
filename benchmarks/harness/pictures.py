"""Rows as pictures: bars, and curves over the length of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import Row


def bars(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Draw the rows as bars, a group for each `what` and a panel for each unit, into an SVG, PNG or PDF file."""
    units = list(dict.fromkeys(row.unit for row in rows))
    height = {unit: len([row for row in rows if row.unit == unit]) * 0.24 + 0.8 for unit in units}
    figure, panels = _figure(9, [*height.values()])
    colours = _colours(rows)
    for panel, unit in zip(panels, units, strict=True):
        _panel(panel, [row for row in rows if row.unit == unit], colours)
        panel.set_xlabel(unit)
    _save(figure, path, note)


def curves(rows: Sequence[Row], path: Path, note: str = "") -> None:
    """Draw a line for each `who` over the number that ends `what`."""
    figure, (panel,) = _figure(9, [4.5])
    for who, colour in _colours(rows).items():
        points = [(int(row.what.rsplit(" ", 1)[1]), row.value) for row in rows if row.who == who]
        panel.plot(*zip(*points, strict=True), marker="o", color=colour, label=who)
    panel.set(xlabel="tokens before it", ylabel=rows[0].unit, ylim=(0, None))
    panel.legend(frameon=False, fontsize=8)
    _save(figure, path, note)


def _figure(width: float, heights: Sequence[float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "gpt2_multi", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot

    size = (width, sum(heights) + 0.3)
    figure, panels = pyplot.subplots(
        len(heights), figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    for panel in panels[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels[:, 0]


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """Ours in full colours, peers in pale ones."""
    import matplotlib

    names = list(dict.fromkeys(row.who for row in rows))
    ours = {our for row in rows for our in row.ratios}
    strong, pale = iter(matplotlib.colormaps["tab10"].colors), iter(matplotlib.colormaps["Set3"].colors)
    return {who: next(strong if who in ours else pale, "grey") for who in names}


def _panel(panel: Any, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    place, ticks = 0.0, []
    for what in dict.fromkeys(row.what for row in rows):
        group = [row for row in rows if row.what == what]
        ticks.append((place + (len(group) - 1) / 2, what))
        for row in group:
            bar = panel.barh(place, row.value, 0.92, color=colours[row.who])
            panel.bar_label(bar, [f" {row.value:.3g}  {row.who}"], fontsize=7)
            place += 1
        place += 0.6
    panel.set_yticks(*zip(*ticks, strict=True))
    panel.invert_yaxis()
    panel.margins(x=0.3, y=0.01)


def _save(figure: Any, path: Path, note: str) -> None:
    from matplotlib import pyplot

    figure.supxlabel(note, fontsize=6, color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
