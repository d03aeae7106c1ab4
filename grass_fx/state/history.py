"""Records which rows of a weight were selected and when, in bounded memory however long the run.

All data is on the CPU, where selections are drawn, so that recording never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

BINS = 256
"""The largest number of bins, both for rows and for steps."""

Norms = Sequence[tuple[Tensor, Tensor]]
"""For each matrix: the norms of the selected units and the norms of all units, float64."""


class SelectionHistory:
    """The selections of one weight with ``rows`` rows (or columns; for a stack, of all matrices).

    ``ever`` (rows,) bool: whether each row was selected at some time. ``drawn``: the step at which
    the current selection was drawn. ``overlap``: the share of its rows that were also in the
    selection before it, None for the first. ``captured``: the share of the gradient's norm that the
    selected rows hold, None if it is unknown.

    :meth:`change` only notes a selection and :meth:`settle` records it, so that the caller can
    record at a moment when it costs no time. Call :meth:`settle` before reading an attribute.

    The picture divides rows and steps into bins of equal width. Each bin holds the share of its
    row-steps that were selected. When the bins of steps are full, neighbours are merged.
    """

    def __init__(self, rows: int, begin: int = 0) -> None:
        self.ever = torch.zeros(rows, dtype=torch.bool, device="cpu")
        self.begin = self.drawn = begin
        self.overlap: float | None = None
        self.captured: float | None = None
        self._now: Tensor | None = None
        self._noted: tuple[Tensor, int, Norms] | None = None
        bins = min(rows, BINS)
        self._density = torch.zeros(bins, device="cpu")  # of the current selection
        self._width, self._until = 1, begin
        # Complete bins in 255ths, and density × steps for the bin that is being filled.
        self._closed = torch.zeros(0, bins, dtype=torch.uint8, device="cpu")
        self._open = torch.zeros(bins, device="cpu")

    def change(self, indices: Tensor, step: int, norms: Norms = ()) -> None:
        """Note that the rows ``indices``, (r,) int64, are selected from ``step`` on.

        Rows may repeat. ``norms``: the norms of the gradient, if they are known.
        """
        self.settle()
        self._noted = indices, step, norms

    def settle(self) -> None:
        """Record the selection that :meth:`change` has noted."""
        if self._noted is None:
            return
        (indices, step, norms), self._noted = self._noted, None
        if norms:
            squares = [(float(held.dot(held)), float(every.dot(every))) for held, every in norms]
            held, whole = map(sum, zip(*squares, strict=True))
            self.captured = math.sqrt(held / whole)
        self.advance(step)
        now = torch.zeros_like(self.ever)
        now[indices] = True
        rows = now.nonzero().flatten()
        if self._now is not None:
            self.overlap = int(self._now[rows].count_nonzero()) / rows.numel()
        self.ever[rows] = True
        self.drawn, self._now = step, now
        bins, widths = _bins(now.numel(), self._density.numel())
        self._density = torch.bincount(bins[rows], minlength=widths.numel()) / widths

    @property
    def coverage(self) -> float:
        """The share of rows that were selected at some time."""
        self.settle()
        return int(self.ever.sum()) / self.ever.numel()

    def advance(self, step: int) -> None:
        """Fill the bins up to ``step`` with the current selection."""
        while step - self.begin > BINS * self._width:
            self._merge()
        start = self.begin + len(self._closed) * self._width
        complete = (step - start) // self._width
        if complete > 0:
            self._open += self._density * (start + self._width - self._until)
            first = (self._open / self._width).unsqueeze(0)
            rest = self._density.expand(complete - 1, -1)
            self._closed = torch.cat([self._closed, _in_255ths(torch.cat([first, rest]))])
            self._open.zero_()
            self._until = start + complete * self._width
        if step > self._until:
            self._open += self._density * (step - self._until)
            self._until = step

    def _merge(self) -> None:
        """Merge pairs of neighbouring bins of steps; reopen a last bin that has no neighbour."""
        count = len(self._closed)
        if count % 2:
            self._open += self._closed[-1] * (self._width / 255)
        pairs = self._closed[: count - count % 2].view(-1, 2, self._open.numel())
        self._closed = _in_255ths(pairs.float().mean(1) / 255)
        self._width *= 2

    def picture(self, step: int) -> tuple[Tensor, int, int]:
        """Return the picture up to ``step``, the step at which it begins, and the width of a bin.

        The picture has the shape (bins of steps, bins of rows) and values from 0 to 1. The last bin
        of steps may be incomplete. Before the first step there is one bin of steps, which shows the
        selection that the first step will use.
        """
        self.settle()
        self.advance(step)
        bins = self._closed / 255
        started = self._until - self.begin - len(bins) * self._width
        if started:
            bins = torch.cat([bins, self._open.unsqueeze(0) / started])
        if not len(bins):
            bins = self._density.unsqueeze(0)
        return bins, self.begin, self._width

    def state(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs to go on recording, as plain tensors."""
        self.settle()
        shares = (-1.0 if x is None else x for x in (self.overlap, self.captured))
        numbers = (self.begin, self.drawn, self._width, self._until, *shares)
        return {
            "history_numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu"),
            "history_ever": self.ever.clone(),
            "history_closed": self._closed.clone(),
            "history_open": self._open.clone(),
        }

    @classmethod
    def resumed(
        cls, rows: int, indices: Tensor, step: int, state: Mapping[str, Tensor]
    ) -> SelectionHistory:
        """Continue from :meth:`state`, or start a new history at ``step`` if ``state`` has none.

        ``indices``: the current selection, (r,).
        """
        history = cls(rows, step)
        history.change(indices, step)
        history.settle()
        ever = state.get("history_ever")
        if ever is None or ever.numel() != rows:
            return history
        *counts, overlap, captured = state["history_numbers"].tolist()
        history.begin, history.drawn, history._width, history._until = (
            int(count) for count in counts
        )
        history.overlap = None if overlap < 0 else overlap
        history.captured = None if captured < 0 else captured
        history.ever = ever.to("cpu", copy=True)
        history._closed = state["history_closed"].to("cpu", copy=True)
        history._open = state["history_open"].to("cpu", copy=True)
        return history


@lru_cache(maxsize=64)
def _bins(rows: int, bins: int) -> tuple[Tensor, Tensor]:
    """Return the bin of each row, (rows,), and the number of rows in each bin, (bins,)."""
    bin_of = torch.arange(rows, device="cpu") * bins // rows
    return bin_of, torch.bincount(bin_of, minlength=bins)


def _in_255ths(shares: Tensor) -> Tensor:
    return (shares * 255).round().to(torch.uint8)
