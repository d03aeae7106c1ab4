"""The result of ``grass_fx.explain``: which weights are rewritten, why others are not, savings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grass_fx.inspect.findings import Findings
from grass_fx.inspect.text import as_text


class Report(Findings):
    """The result of :func:`grass_fx.explain`. ``print`` shows tables."""

    def __str__(self) -> str:
        return as_text(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with sortable tables, bars and drawings of graphs."""
        from grass_fx.inspect.html import as_html

        _write(path, lambda file: file.write_text(as_html(self), encoding="utf-8"))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a picture of memory and FLOPs before and after; needs matplotlib.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from grass_fx.inspect.plot import as_figure

        figure = as_figure(self)
        _write(path, lambda file: figure.savefig(file, dpi=150))


def _write(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file)
