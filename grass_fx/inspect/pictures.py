"""Writes pictures of a training run to files; needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from grass_fx.errors import MissingPackageError, OptionError
from grass_fx.optim.base import SubspaceOptimizer
from grass_fx.optim.telemetry import taken
from grass_fx.state.subspace import Subspace

PANELS = 9
"""How many weights a picture shows if no patterns are given."""

TITLE = 30
"""How many letters of a name fit above a panel."""


def coverage_plot(
    optimizer: Optimizer,
    path: str | os.PathLike[str],
    weights: str | Iterable[str] | None = None,
) -> None:
    """Draw a PNG that shows which rows were selected over time, with one panel for each weight.

    Args:
        optimizer: a ``grass_fx.AdamW`` or an optimizer made by ``grass_fx.subspace(X)``.
        path: the file to write; its folder is created.
        weights: patterns like those of ``include``, for the names that ``optimizer.stats()`` shows.
            None or an empty list draws up to nine weights, evenly spread over those in a subspace.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OptionError: the optimizer is of another kind, it has no weight in a subspace yet, or a
            pattern matches no weight.
    """
    new_figure = figure_class("coverage_plot")
    if not isinstance(optimizer, SubspaceOptimizer):
        raise OptionError(
            f"coverage_plot({type(optimizer).__name__}): it takes an optimizer that steps in the "
            "subspace, grass_fx.AdamW or a class made by grass_fx.subspace."
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    patterns = [weights] if isinstance(weights, str) else weights
    chosen = _chosen(taken(params), None if patterns is None else list(patterns))
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    size = (3.6 * columns + 1.0, 2.6 * rows + 0.4)
    figure = new_figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[len(chosen) :]:
        axis.remove()
    axes = axes[: len(chosen)]
    for axis, (name, (_, subspace)) in zip(axes, chosen.items(), strict=True):
        image = _draw(axis, name, subspace)
    for axis in axes[-columns:]:
        axis.set_xlabel("optimizer step", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8 if rows == 1 else 0.4, aspect=15, pad=0.02)
    bar.set_label("share selected", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png")


def figure_class(what: str) -> Any:
    """Matplotlib's ``Figure``; ``what`` is the function that the error names.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingPackageError(
            f"{what} draws with matplotlib, which is not installed: pip install matplotlib."
        ) from missing
    return Figure


def _chosen(
    known: dict[str, tuple[Tensor, Subspace]], patterns: list[str] | None
) -> dict[str, tuple[Tensor, Subspace]]:
    names = list(known)
    if not names:
        raise OptionError(
            "coverage_plot: no weight of this optimizer is in a subspace yet. Run a training step "
            "of the compiled model first."
        )
    if not patterns:
        count = min(PANELS, len(names))
        last = max(1, count - 1)
        return {
            names[k]: known[names[k]] for k in (i * (len(names) - 1) // last for i in range(count))
        }
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(
                f"coverage_plot: weights={pattern!r} matches none of {', '.join(names)}."
            )
    return {n: known[n] for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)}


def _draw(axis: Any, name: str, subspace: Subspace) -> Any:
    """Draw one panel, with steps to the right and rows downwards."""
    bins, begin, width = subspace.history.picture(subspace.step)
    rows = subspace.spec.rows
    image = axis.imshow(
        bins.T.tolist(),
        extent=(begin, begin + len(bins) * width, rows, 0),
        aspect="auto",
        interpolation="nearest",
        cmap="Greens",
        vmin=0,
        vmax=1,
    )
    axis.set_xlim(begin, max(subspace.step, begin + 1))
    short = name if len(name) <= TITLE else "…" + name[1 - TITLE :]
    axis.set_title(f"{short}\n{subspace.history.coverage:.0%} ever selected", fontsize=8)
    axis.set_ylabel("column" if subspace.spec.side == "in" else "row", fontsize=8)
    axis.tick_params(labelsize=7)
    return image
