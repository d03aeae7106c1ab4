"""A weight of the reference implementation: its selection, its P and its moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Weight:
    """The subspace of one weight, selected along ``dim``; matrices are turned to make ``dim`` 0."""

    w: Tensor
    dim: int
    key: int
    rank: int
    block: int
    rows: list[int] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)
    age: list[int] = field(default_factory=list)
    moments: list[Tensor] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    period: int = 0
    retry: bool = False
    frozen: bool = False
    compact: Tensor | None = None
    scores: Tensor | None = None
    pending: float = 1.0
    signs: Tensor | None = None
    """With rest="sign": over the losses of a step, the sum of the signs of G."""

    def turned(self, matrix: Tensor) -> Tensor:
        """``matrix``, or its transpose if ``dim`` is 1; turning twice gives the original."""
        return matrix if self.dim == 0 else matrix.T

    def p(self) -> Tensor:
        """P (m, r): Pᵀ = ρB (equation 1)."""
        p = self.w.new_zeros(self.w.shape[self.dim], self.rank)
        for j, (row, rho) in enumerate(zip(self.rows, self.rho, strict=True)):
            p[row, j] = rho
        return p

    def move_rest(self, rate: float) -> None:
        """W[rest] ← W[rest] − rate · the sign of most gradients; not where they are all 0."""
        assert self.signs is not None
        w = self.turned(self.w)
        for row in range(len(w)):
            if row not in self.rows:
                w[row] -= rate * self.signs[row].sign()

    def carry(
        self, rows: list[int], rho: list[float], age: list[int], old: list[Tensor], keep: bool
    ) -> None:
        """A row that stays keeps its age and its moments, × ρ′/ρ and × (ρ′/ρ)²."""
        self.age, self.moments = [0] * self.rank, [torch.zeros_like(m) for m in old]
        for j, row in enumerate(self.rows):
            if old and row in rows and keep:
                i = rows.index(row)
                self.age[j] = age[i]
                for power, (new, was) in enumerate(zip(self.moments, old, strict=True), start=1):
                    new[j] = (self.rho[j] / rho[i]) ** power * was[i]
