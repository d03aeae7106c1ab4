"""Memory and FLOPs of a report as stacked bars: their parts, and their picture."""

from __future__ import annotations

from typing import Any, NamedTuple

from grass_fx.inspect.findings import Amount, Findings
from grass_fx.inspect.pictures import figure_class
from grass_fx.inspect.text import readable

MEMORY = ("weights", "gradients", "optimizer state", "activations")
PRODUCTS = ("forward products", "input gradient products", "weight gradient products")
COLOURS = ("#8a94a6", "#d9822b", "#3f8f6b", "#5a7fc0")
"""Colours of the parts from left to right, in the picture and on the HTML page."""


class Bars(NamedTuple):
    """Two bars with the same parts, to compare."""

    title: str
    unit: str
    parts: list[tuple[str, Amount, Amount]]
    """(name, before, after) of each part."""

    def values(self, report: Findings) -> tuple[list[float], list[float]] | None:
        """The parts' numbers before and after; None if a symbol in them has no value."""
        both = [[report.evaluated(part[k]) for part in self.parts] for k in (1, 2)]
        before, after = ([value for value in bar if value is not None] for bar in both)
        return (before, after) if [before, after] == both else None


def bars(report: Findings) -> list[Bars]:
    """The bars of the picture and the HTML page: memory, and FLOPs of products."""
    rows = {name: (before, after) for name, before, after, _ in report.rows()}
    return [
        Bars(title, unit, [(name, *rows[name]) for name in names])
        for title, unit, names in (
            ("memory", "bytes", MEMORY),
            ("products with weights, a step", "FLOPs", PRODUCTS),
        )
    ]


def as_figure(report: Findings) -> Any:
    """A matplotlib ``Figure`` that compares memory and FLOPs at full rank and with grass.

    Symbolic amounts are drawn with their values in the given inputs (``report.symbols``).

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = figure_class("report.plot")(figsize=(10, 3.1), layout="constrained")
    for axis, panel in zip(figure.subplots(1, 2), bars(report), strict=True):
        _draw(axis, panel, panel.values(report))
    return figure


def _draw(axis: Any, of: Bars, values: tuple[list[float], list[float]] | None) -> None:
    """Draw one panel: two stacked bars, with their sums at their ends."""
    axis.set_title(of.title, loc="left", fontsize=11)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if values is None:
        axis.set_axis_off()
        axis.text(0, 0.5, "sizes without values", transform=axis.transAxes)
        return
    totals = [sum(bar) for bar in values]
    left = [0.0, 0.0]
    for (name, *_), colour, *pair in zip(of.parts, COLOURS, *values, strict=False):
        axis.barh([0, 1], pair, left=left, height=0.55, color=colour, label=name)
        left = [a + b for a, b in zip(left, pair, strict=True)]
    for place, total in enumerate(totals):
        text = readable(total, of.unit)
        if place and totals[0]:
            text += f"\n{total / totals[0]:.0%}"
        axis.annotate(text, (total, place), (5, 0), textcoords="offset points", va="center")
    axis.set_yticks([0, 1], ["full rank", "grass"])
    axis.tick_params(length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(*totals, 1))
    axis.xaxis.set_major_locator(_ticks())
    axis.xaxis.set_major_formatter(lambda value, _: readable(value, of.unit))
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2, frameon=False, fontsize=9)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)
