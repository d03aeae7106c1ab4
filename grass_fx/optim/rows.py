"""Reads and writes some rows of a matrix, or columns, by the kernel that is fastest for them.

A CPU copies columns of a bfloat16 matrix by index_select several times more slowly than by gather
over integers of the same width, and columns of any matrix by index_copy_ more slowly than by
scatter_. Both only move bits, so the results are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grass_fx.ops import DROPPED, along
from grass_fx.optim.rounding import round_stochastically

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers as wide as a floating-point number of so many bytes."""


def per_row(w: Tensor, dim: int, selected: Tensor, own: float, others: float) -> Tensor:
    """Return ``own`` for the ``selected`` rows of W (m, n) along ``dim`` and ``others`` for all
    others: (1, n) or (m, 1), in the dtype in which steps of W are computed.
    """
    dtype = torch.float32 if w.dtype in DROPPED else w.dtype
    values = torch.full((w.shape[dim],), others, dtype=dtype, device=w.device)
    return along(values.index_fill_(0, selected, own), dim, 2)


def rows_of(matrix: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Return a copy of the rows ``indices`` (r,) along ``dim``."""
    if not _is_slow(matrix, dim):
        return matrix.index_select(dim, indices)
    places = indices.expand(matrix.shape[0], -1)
    return matrix.view(torch.int16).gather(1, places).view(matrix.dtype)


def put_rows_(
    matrix: Tensor, indices: Tensor, rows: Tensor, dim: int, seed: Tensor | None = None
) -> None:
    """Replace the rows ``indices`` (r,) along ``dim``, of which none repeats.

    ``rows`` may have a wider dtype; they are rounded to nearest, or stochastically with the noise
    of ``seed``.
    """
    if seed is not None:
        rows = round_stochastically(rows.float(), seed, matrix.dtype)
    rows = rows.to(matrix.dtype)
    if dim == 0 or matrix.device.type != "cpu" or matrix.element_size() not in INTEGERS:
        matrix.index_copy_(dim, indices, rows)
        return
    integers = INTEGERS[matrix.element_size()]
    places = indices.expand(matrix.shape[0], -1)
    matrix.view(integers).scatter_(1, places, rows.view(integers))


def add_to_rows_(
    matrix: Tensor,
    indices: Tensor,
    change: Tensor,
    dim: int,
    decay: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Multiply the rows ``indices`` (r,) along ``dim`` by 1 − ``decay``, and add ``change``.

    No row repeats. The sums have the wider dtype of the two, and are rounded once, as
    :func:`put_rows_` does.
    """
    if change.dtype != matrix.dtype or _is_slow(matrix, dim) or seed is not None:
        wide = torch.promote_types(matrix.dtype, torch.float32)
        rows = rows_of(matrix, indices, dim).to(wide)
        put_rows_(matrix, indices, torch.add(change, rows, alpha=1 - decay), dim, seed)
        return
    if decay:
        change = rows_of(matrix, indices, dim).mul_(-decay).add_(change)
    matrix.index_add_(dim, indices, change)  # not with alpha: along columns that is slow


def _is_slow(matrix: Tensor, dim: int) -> bool:
    """Whether torch has no fast kernel for these rows: columns of 16-bit numbers on a CPU."""
    return dim == 1 and matrix.device.type == "cpu" and matrix.element_size() == 2
