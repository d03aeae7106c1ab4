"""Units: the runs of rows among which a draw selects (docs/method.md, "Blocks")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

SIXTEEN_BYTES = 16
"""The most that one access of a GPU thread can move."""


def run_length(block: int, stride: int | None, itemsize: int) -> int:
    """How many consecutive elements of a run a kernel may access at once: a power of two.

    ``block``: the length of the runs, which begin at multiples of it. ``stride``: how far apart in
    memory two elements lie, None if that is not known.
    """
    run = block & -block
    return min(run, SIXTEEN_BYTES // itemsize) if stride == 1 else 1


@dataclass(frozen=True)
class Units:
    """``size`` rows in units of ``block`` consecutive rows; the last unit may be shorter.

    A selected unit has ``block`` places in a selection, also the last one. Without ``replacement``
    the rows before fill up its places: if it is selected, it and the selected units that touch it
    move back so far that they end with the last row. With replacement the last unit is the last
    ``block`` rows, and each row that lies in two units counts half in each.
    """

    size: int
    block: int
    replacement: bool = False

    @property
    def count(self) -> int:
        """The number of units."""
        return -(-self.size // self.block)

    @property
    def uneven(self) -> bool:
        """Whether the last unit is shorter than the others."""
        return self.size % self.block != 0

    @property
    def _doubled(self) -> slice:
        """With replacement: the rows that lie in two units."""
        return slice(self.size - self.block, (self.count - 1) * self.block)

    def rows(self, units: Tensor) -> Tensor:
        """The rows of a selection, (k B,), for its units in ascending order, (k,)."""
        if self.block == 1:
            return units
        first = units * self.block
        if self.uneven and self.replacement:
            first = first.clamp(max=self.size - self.block)
        elif self.uneven:
            # A unit and those selected after it need their places up to the last row.
            after = torch.arange(units.numel(), 0, -1, device=units.device)
            first = torch.minimum(first, self.size - self.block * after)
        return (first.unsqueeze(1) + torch.arange(self.block, device=units.device)).flatten()

    def of(self, rows: Tensor) -> Tensor:
        """The units of a selection, (..., k), for its rows, (..., k B)."""
        first = rows[..., :: self.block]
        return (first + (self.block - 1)) // self.block

    def shares(self, rows: Tensor) -> Tensor:
        """The factor of ρ for each of these rows: 1/√2 where the row lies in two units, else 1."""
        if not (self.uneven and self.replacement):
            return torch.ones_like(rows, dtype=torch.float64)
        doubled = (rows >= self._doubled.start) & (rows < self._doubled.stop)
        return torch.where(doubled, 0.5, 1.0).double().sqrt()

    def norms(self, scores: Tensor) -> Tensor:
        """Norms of the units, float64, from the rows' squared norms s: (..., m) -> (..., units)."""
        scores = scores.double().cpu()
        if self.block == 1:
            return scores.sqrt()
        if self.uneven and self.replacement:
            scores = scores.clone()
            scores[..., self._doubled] /= 4  # the square of a half
            last = scores[..., -self.block :].sum(-1, keepdim=True)
            scores = scores[..., : self._doubled.stop]
            squares = scores.view(*scores.shape[:-1], -1, self.block).sum(-1)
            return torch.cat([squares, last], -1).sqrt()
        if self.uneven:
            scores = pad(scores, (0, self.count * self.block - self.size))
        return scores.view(*scores.shape[:-1], -1, self.block).sum(-1).sqrt()
