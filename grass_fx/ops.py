"""The two operators of the rewritten graphs, ``grass::select`` and ``grass::selected_mm``.

In the notation of docs/method.md: ``select`` takes PᵀG of a full gradient G; ``selected_mm`` makes
the same numbers from the two factors of G, without G. Neither is differentiable: both only stand
in backward graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "grass::select", "(Tensor g, Tensor indices, Tensor? scale, int dim, int block=1) -> Tensor"
)
torch.library.define(
    "grass::selected_mm",
    "(Tensor a, Tensor b, Tensor indices, Tensor? scale, int dim, int block=1) -> Tensor",
)


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector as a tensor of ``ndim`` dimensions, ready to broadcast along ``dim``."""
    shape = [1] * ndim
    shape[dim] = -1
    return values.view(shape)


def _scaled(compact: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    if scale is None:
        return compact
    return (compact * along(scale, dim, compact.dim())).to(compact.dtype)


def select(g: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1) -> Tensor:
    """PᵀG (``dim`` 0) or GP (``dim`` 1): the rows σ of G along ``dim``, times ρ.

    ``g``: (..., size, ...); ``indices`` σ: (r,) int64; ``scale`` ρ: (r,) or None. ``block``
    B promises that σ comes in runs of B, each beginning at a multiple of B; it changes no number.
    Equations 2 and 3 of docs/method.md.
    """
    return _scaled(g.index_select(dim, indices), scale, dim)


def selected_mm(
    a: Tensor, b: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> Tensor:
    """``select(a @ b, indices, scale, dim)`` in 2brn FLOPs: only the selected part is multiplied.

    ``a``: (m, b), ``b``: (b, n). For a weight gradient DᵀX, ``a`` is the transposed view of D: the
    gather then reads D row by row. Equations 2 (``dim`` 0) and 3 (``dim`` 1) of docs/method.md.
    """
    if dim not in (0, 1):
        raise ValueError(f"grass::selected_mm: dim={dim} must be 0 or 1")
    if dim == 0:
        a = a.t().index_select(1, indices).t()
    else:
        b = b.index_select(1, indices)
    return _scaled(a @ b, scale, dim)


torch.library.impl("grass::select", "CompositeExplicitAutograd", func=select)
torch.library.impl("grass::selected_mm", "CompositeExplicitAutograd", func=selected_mm)


def _fake_select(
    g: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> Tensor:
    shape = list(g.shape)
    shape[dim] = indices.shape[0]
    return g.new_empty(shape)


def _fake_selected_mm(
    a: Tensor, b: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> Tensor:
    torch._check(
        a.dim() == 2 and b.dim() == 2 and dim in (0, 1),
        lambda: "grass::selected_mm takes two matrices and dim 0 or 1",
    )
    r = indices.shape[0]
    return a.new_empty((r, b.shape[1]) if dim == 0 else (a.shape[0], r))


torch.library.register_fake("grass::select", _fake_select)
torch.library.register_fake("grass::selected_mm", _fake_selected_mm)

SELECT = torch.ops.grass.select.default
SELECTED_MM = torch.ops.grass.selected_mm.default
