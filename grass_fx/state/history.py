"""Which rows a weight has had selected, and when, in bounded memory however long the run.

Everything is on the CPU, where selections are drawn, so that recording never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

BINS = 256
"""At most so many bins of rows, and of steps."""

Norms = Sequence[tuple[Tensor, Tensor]]
"""Of each matrix, the norms of the selected units and those of all, float64."""


class SelectionHistory:
    """The selections of one weight with ``rows`` rows (or columns; of a stack, those of all).

    ``ever`` (rows,) bool: selected at some time. ``drawn``: the step at which the current selection
    was drawn. ``overlap``: the share of its rows that were in the one before, None for the first.
    ``captured``: the share of the gradient's norm that it holds, None where that is unknown.

    :meth:`change` only notes a selection; :meth:`settle` records it, so that recording can wait for
    a moment in which it costs no time. It has to come before an attribute is read.

    The picture has rows and steps in bins of equal width. Each bin has the share of its row-steps
    that were selected. When the bins of steps are full, neighbours are merged.
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
        # Complete bins, in 255ths; and of the bin that is filled now: density × steps.
        self._closed = torch.zeros(0, bins, dtype=torch.uint8, device="cpu")
        self._open = torch.zeros(bins, device="cpu")

    def change(self, indices: Tensor, step: int, norms: Norms = ()) -> None:
        """From ``step`` on the rows ``indices`` are selected, (r,) int64; they may repeat.

        ``norms``: the gradient's, where they are known.
        """
        self.settle()
        self._noted = indices, step, norms

    def settle(self) -> None:
        """Record what :meth:`change` has noted."""
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
        """The share of rows selected at some time."""
        self.settle()
        return int(self.ever.sum()) / self.ever.numel()

    def advance(self, step: int) -> None:
        """Fill the bins with the current selection up to ``step``."""
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
        """Bins of twice as many steps; a last one without a neighbour is opened again."""
        count = len(self._closed)
        if count % 2:
            self._open += self._closed[-1] * (self._width / 255)
        pairs = self._closed[: count - count % 2].view(-1, 2, self._open.numel())
        self._closed = _in_255ths(pairs.float().mean(1) / 255)
        self._width *= 2

    def picture(self, step: int) -> tuple[Tensor, int, int]:
        """Up to ``step``: (bins of steps, bins of rows) from 0 to 1; where it begins; bin width.

        The last bin may be incomplete. Before the first step there is one, of the selection that is
        going to be used.
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
        """Everything that is needed to go on recording, as plain tensors."""
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
        """As :meth:`state` has it; a new one that begins at ``step`` if ``state`` has none.

        ``indices``: the current selection, (r,).
        """
        made = cls(rows, step)
        made.change(indices, step)
        made.settle()
        ever = state.get("history_ever")
        if ever is None or ever.numel() != rows:
            return made
        *counts, overlap, captured = state["history_numbers"].tolist()
        made.begin, made.drawn, made._width, made._until = (int(count) for count in counts)
        made.overlap = None if overlap < 0 else overlap
        made.captured = None if captured < 0 else captured
        made.ever = ever.to("cpu", copy=True)
        made._closed = state["history_closed"].to("cpu", copy=True)
        made._open = state["history_open"].to("cpu", copy=True)
        return made


@lru_cache(maxsize=64)
def _bins(rows: int, bins: int) -> tuple[Tensor, Tensor]:
    """The bin of each row, (rows,), and the rows of each bin, (bins,)."""
    of = torch.arange(rows, device="cpu") * bins // rows
    return of, torch.bincount(of, minlength=bins)


def _in_255ths(shares: Tensor) -> Tensor:
    return (shares * 255).round().to(torch.uint8)
