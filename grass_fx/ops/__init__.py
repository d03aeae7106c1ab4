"""The operators of the rewritten graphs, all of them linear algebra on a weight gradient G.

In the notation of docs/method.md: ``select`` computes PᵀG from a full G, and ``selected_mm``
computes the same numbers from the two factors of G, without G. ``squared_norms`` computes the
scores from a full G, and ``mm_squared_norms`` from its factors; ``signs`` and ``mm_signs`` do the
same for the signs. None is differentiable, because they occur only in backward graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grass_fx.ops.bits import pack, packed_shape, put_signs, rows_of_block

torch.library.define(
    "grass::select", "(Tensor g, Tensor indices, Tensor? scale, int dim, int block=1) -> Tensor"
)
torch.library.define(
    "grass::selected_mm",
    "(Tensor a, Tensor b, Tensor indices, Tensor? scale, int dim, int block=1) -> Tensor",
)
torch.library.define("grass::squared_norms", "(Tensor g, int dim, str scoring='auto') -> Tensor")
torch.library.define("grass::mm_squared_norms", "(Tensor a, Tensor b, int dim) -> Tensor")
torch.library.define("grass::signs", "(Tensor g, int dim=1) -> Tensor")
torch.library.define(
    "grass::mm_signs",
    "(Tensor a, Tensor b, Tensor indices, Tensor? scale, int dim, int block=1) -> (Tensor, Tensor)",
)

PART = 1 << 18
"""How many elements of G ``mm_squared_norms`` holds at a time outside its GPU kernel."""

SIGNS_PART = 1 << 22
"""The same for ``mm_signs``, in every step: smaller products would be slower."""


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """A view of a vector with ``ndim`` dimensions that broadcasts along ``dim``.

    ``values`` with a vector for each matrix of a stack, (e, r), keep their first dimension.
    """
    shape = [*values.shape[:-1], *[1] * (ndim - values.dim() + 1)]
    shape[dim] = values.shape[-1]
    return values.view(shape)


def _scaled(compact: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    if scale is None:
        return compact
    return (compact * along(scale, dim, compact.dim())).to(compact.dtype)


def select(g: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1) -> Tensor:
    """PᵀG (``dim`` 0) or GP (``dim`` 1): the rows σ of G along ``dim``, times ρ.

    ``g``: (..., size, ...); ``indices`` σ: (r,) int64; ``scale`` ρ: (r,) or None. ``block``
    B promises that σ comes in runs of B, each beginning at a multiple of B; it changes no number.
    Equations 2 and 3 of docs/method.md. In a stack of matrices, (e, m, n) with ``dim`` 1 or 2, each
    matrix has its own σ and ρ; both are then (e, r).
    """
    if indices.dim() == 2:
        shape = list(g.shape)
        shape[dim] = indices.shape[1]
        picked = g.gather(dim, along(indices, dim, g.dim()).expand(shape))
    else:
        picked = g.index_select(dim, indices)
    return _scaled(picked, scale, dim)


def selected_mm(
    a: Tensor, b: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> Tensor:
    """``select(a @ b, indices, scale, dim)`` in 2brn FLOPs, by multiplying only the selected part.

    ``a``: (m, b), ``b``: (b, n). For a weight gradient DᵀX, ``a`` is the transposed view of D, so
    that the gather reads D row by row. Equations 2 (``dim`` 0) and 3 (``dim`` 1) of docs/method.md.
    """
    if dim not in (0, 1):
        raise ValueError(f"grass::selected_mm: dim={dim} must be 0 or 1")
    if dim == 0:
        a = a.t().index_select(1, indices).t()
    else:
        b = b.index_select(1, indices)
    return _scaled(a @ b, scale, dim)


def squared_norms(g: Tensor, dim: int, scoring: str = "auto") -> Tensor:
    """s: the squared norm of each row of G along ``dim``, float32, summed in float32 or float64.

    ``g``: (..., size, ...); returns (size,). ``scoring`` says whether a pass may compute it tile by
    tile from the factors of G (``GrassConfig.scoring``); it changes numbers only by rounding. With
    "input" a pass takes the norms of one factor of G instead.
    """
    exact = torch.float64 if g.dtype == torch.float64 else torch.float32
    others = [d for d in range(g.dim()) if d != dim % g.dim()]
    # Unlike square and sum, a norm needs no second tensor of G's size.
    return torch.linalg.vector_norm(g, dim=others, dtype=exact).square().float()


def mm_squared_norms(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """``squared_norms(a @ b, dim)`` with only a part of the product in memory at any time.

    ``a``: (m, b), ``b``: (b, n); returns (m,) for ``dim`` 0, (n,) for ``dim`` 1.
    """
    if dim == 0:
        size = max(1, PART // max(1, b.shape[1]))
        parts = [squared_norms(part @ b, 0) for part in a.split(size)]
    else:
        size = max(1, PART // max(1, a.shape[0]))
        parts = [squared_norms(a @ part, 1) for part in b.split(size, dim=1)]
    return torch.cat(parts)


def signs(g: Tensor, dim: int = 1) -> Tensor:
    """The signs of a full G, (m, n), as packed bits (``grass_fx.ops.bits``), if columns are
    selected (``dim`` 1), else those of Gᵀ.
    """
    return pack(g if dim == 1 else g.t())


def mm_signs(
    a: Tensor, b: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> tuple[Tensor, Tensor]:
    """``select(a @ b, ...)`` and ``signs(a @ b)``, with only a part of the product in memory.

    ``a``: (m, b), ``b``: (b, n); the others as for :func:`select`, (r,). On a CPU both are taken
    from one product, some rows of G at a time (columns, for ``dim`` 0).
    """
    if dim == 0:
        compact, bits = mm_signs(b.t(), a.t(), indices, scale, 1, block)
        return compact.t().contiguous(), bits
    m, n = a.shape[0], b.shape[1]
    words = torch.zeros(packed_shape(m, n), dtype=torch.int32, device=a.device)
    height = rows_of_block(m)
    blocks = -(-m // max(1, height))
    most = max(1, min(SIGNS_PART // max(1, n * height), -(-blocks // 2)))  # never all of G
    step = -(-blocks // max(1, -(-blocks // most))) * height  # parts of about one size
    compact = a.new_empty(_compact_shape(m, n, indices, dim))
    for start in range(0, m, max(1, step)):
        part = a[start : start + step] @ b
        put_signs(words, start // height, part)
        torch.index_select(part, 1, indices, out=compact[start : start + step])
    return _scaled(compact, scale, dim), words.view(torch.float32)


def _compact_shape(m: Any, n: Any, indices: Tensor, dim: int) -> tuple[Any, Any]:
    return (indices.shape[0], n) if dim == 0 else (m, indices.shape[0])


torch.library.impl("grass::select", "CompositeExplicitAutograd", func=select)
torch.library.impl("grass::selected_mm", "CompositeExplicitAutograd", func=selected_mm)
torch.library.impl("grass::squared_norms", "CompositeExplicitAutograd", func=squared_norms)
torch.library.impl("grass::mm_squared_norms", "CompositeExplicitAutograd", func=mm_squared_norms)
torch.library.impl("grass::signs", "CompositeExplicitAutograd", func=signs)
torch.library.impl("grass::mm_signs", "CompositeExplicitAutograd", func=mm_signs)


def _fake_select(
    g: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> Tensor:
    shape = list(g.shape)
    shape[dim] = indices.shape[-1]
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


def _fake_squared_norms(g: Tensor, dim: int, scoring: str = "auto") -> Tensor:
    return g.new_empty((g.shape[dim],), dtype=torch.float32)


def _fake_mm_squared_norms(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return a.new_empty((a.shape[0] if dim == 0 else b.shape[1],), dtype=torch.float32)


def _fake_signs(g: Tensor, dim: int = 1) -> Tensor:
    m, n = g.shape if dim == 1 else reversed(g.shape)
    return g.new_empty(packed_shape(m, n), dtype=torch.float32)


def _fake_mm_signs(
    a: Tensor, b: Tensor, indices: Tensor, scale: Tensor | None, dim: int, block: int = 1
) -> tuple[Tensor, Tensor]:
    m, n = a.shape[0], b.shape[1]
    shape = packed_shape(m, n) if dim == 1 else packed_shape(n, m)
    words = a.new_empty(shape, dtype=torch.float32)
    return a.new_empty(_compact_shape(m, n, indices, dim)), words


torch.library.register_fake("grass::select", _fake_select)
torch.library.register_fake("grass::selected_mm", _fake_selected_mm)
torch.library.register_fake("grass::squared_norms", _fake_squared_norms)
torch.library.register_fake("grass::mm_squared_norms", _fake_mm_squared_norms)
torch.library.register_fake("grass::signs", _fake_signs)
torch.library.register_fake("grass::mm_signs", _fake_mm_signs)

SELECT = torch.ops.grass.select.default
SELECTED_MM = torch.ops.grass.selected_mm.default
SQUARED_NORMS = torch.ops.grass.squared_norms.default
MM_SQUARED_NORMS = torch.ops.grass.mm_squared_norms.default
SIGNS = torch.ops.grass.signs.default
MM_SIGNS = torch.ops.grass.mm_signs.default

# --- the optimizers' operator ---------------------------------------------------------------------

torch.library.define(
    "grass::add_rows_",
    "(Tensor(a!)[] ws, Tensor[] indices, Tensor[] changes, Tensor[] noise, int[] dims, int[] runs, "
    "Tensor kept) -> ()",
)

DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""How many of a float32's lower bits a number of 16 bits lacks."""


def rounded(values: Tensor, noise: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Float32 ``values`` rounded to 16 bits, up or down depending on 16 random bits.

    A bfloat16 is a float32 without its lower 16 bits. Adding 16 random bits carries into the upper
    ones with the probability that the lower bits give. Infinities and NaN stay such.
    """
    dropped = DROPPED[dtype]
    bits = values.view(torch.int32)
    # Without the sign, which no carry may reach: only a NaN can be larger than this maximum.
    size = (bits & 0x7FFFFFFF).clamp_(max=0x7FFF0000)
    size += noise if dropped == 16 else noise >> (16 - dropped)
    size &= -(1 << dropped)
    size |= bits & -(1 << 31)
    return size.view(torch.float32)


def add_rows_(
    ws: Sequence[Tensor],
    indices: Sequence[Tensor],
    changes: Sequence[Tensor],
    noise: Sequence[Tensor],
    dims: Sequence[int],
    runs: Sequence[int],
    kept: Tensor,
) -> None:
    """W[σ] = ``kept`` · W[σ] + Δ for each weight, in place; the sum has the dtype of Δ.

    No row may repeat. Each of ``runs`` is to σ what ``block`` is in :func:`select`. The sum is
    rounded once: by :func:`rounded` if ``noise`` holds 16 random bits for each element of Δ, else
    to nearest. Inductor makes one kernel of gather, sum and scatter, and of the computation of Δ.
    """
    for k, (w, index, change, dim) in enumerate(zip(ws, indices, changes, dims, strict=True)):
        rows = w.index_select(dim, index).to(change.dtype) * kept + change
        if noise:
            rows = rounded(rows, noise[k])
        w.index_copy_(dim, index, rows.to(w.dtype))


torch.library.impl("grass::add_rows_", "CompositeExplicitAutograd", func=add_rows_)
torch.library.register_fake("grass::add_rows_", lambda *arguments: None)

ADD_ROWS = torch.ops.grass.add_rows_.default
