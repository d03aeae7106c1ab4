"""Selection: which rows of a weight a gradient holds, and conversion to and from dense tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grass_fx.ops import along, select
from grass_fx.state.transfers import send


def matrix(tensor: Tensor) -> Tensor:
    """Return a matrix as it is; view a stack (e, m, n) as one matrix of e·m rows."""
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


@dataclass(frozen=True, eq=False)
class Selection:
    """One selection of a weight. It is immutable, so a gradient that is kept for later stays valid.

    ``indices`` σ: (r,) int64 in ascending blocks; a block that was drawn twice follows itself.
    ``scale`` ρ: (r,), or None for all ones. ``dim``: the tensor dimension that σ indexes.
    ``generation``: a number that no other selection of this process has. ``draw``: counts the
    weight's selections, and is saved in checkpoints. ``run``: σ comes in runs of this length, which
    begin at multiples of it. For a stack of e matrices σ indexes rows of :func:`matrix`: (e·r,), r
    of each matrix, ``dim`` 0.
    """

    indices: Tensor
    scale: Tensor | None
    dim: int
    generation: int
    name: str = "a weight"
    draw: int = 0
    run: int = 1

    def to(self, device: torch.device) -> Selection:
        """Return the same selection on another device."""
        if self.indices.device == device:
            return self
        return self.moved(self.indices.to(device))

    def moved(self, indices: Tensor) -> Selection:
        """Return the same selection with ``indices``, its σ on another device."""
        scale = None if self.scale is None else send(self.scale, indices.device)
        return replace(self, indices=indices, scale=scale)

    def same_as(self, other: Selection) -> bool:
        """Whether both are one selection; compares values only if identity does not decide."""
        if self is other or self.indices is other.indices:
            return True
        return self.generation == other.generation and torch.equal(self.indices, other.indices)

    def same_rows(self, other: Selection) -> bool:
        """Whether both select the same rows with the same ρ, compared by value."""
        if not torch.equal(self.indices, other.indices):
            return False
        if self.scale is None or other.scale is None:
            return self.scale is other.scale
        return bool((self.scale == other.scale).all())

    def part(self, rows: Tensor) -> Selection:
        """Return a part of the selection: ``rows`` (k,) are ascending places in σ."""
        scale = None if self.scale is None else self.scale[rows]
        return replace(self, indices=self.indices[rows], scale=scale, run=1)

    def project(self, dense: Tensor) -> Tensor:
        """C = PᵀG (equation 2 or 3)."""
        rows = dense.reshape(
            -1, dense.shape[-1]
        )  # as `matrix`, but also for tensors that cannot be viewed so
        compact = select(rows, self.indices, self.scale, self.dim)
        return compact if dense.dim() == 2 else compact.view(dense.shape[0], -1, dense.shape[-1])

    def embed(self, compact: Tensor, shape: torch.Size) -> Tensor:
        """P C: each selected row times ρ at its place, repeated rows adding, and 0 elsewhere."""
        compact = matrix(compact)
        if self.scale is not None:
            compact = (compact * along(self.scale, self.dim, 2)).to(compact.dtype)
        return self._placed(compact, shape)

    def _placed(self, rows: Tensor, shape: torch.Size) -> Tensor:
        dense = rows.new_zeros(shape)
        matrix(dense).index_add_(self.dim, self.indices, rows)
        return dense

    def lift(self, compact: Tensor, shape: torch.Size) -> Tensor:
        """A dense tensor whose projection is C: C_j / ρ_j at row σ_j, once per distinct row."""
        first = torch.ones_like(self.indices, dtype=compact.dtype)
        if self.scale is not None:  # rows repeat only with replacement
            rows, order = self.indices.sort(stable=True)
            first[order[1:]] = (rows[1:] != rows[:-1]).to(compact.dtype)
            first = first / self.scale
        rows = (matrix(compact) * along(first, self.dim, 2)).to(compact.dtype)
        return self._placed(rows, shape)
