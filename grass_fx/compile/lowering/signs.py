"""Lowers the operators that take the signs of a full gradient, or of its factors.

On a GPU ``mm_signs`` is one Triton kernel (mm_signs.py.jinja): each program makes one tile of G in
registers, 128 x 128, and writes 128 x 4 words of 32 bits, and 4 words more that tell which of its
columns have signs. On other devices, in float64 and for symbolic sizes it is torch's operator,
which computes G part by part.
"""

from __future__ import annotations

from typing import Any

import torch

from grass_fx import _torch_compat as compat
from grass_fx.compile.lowering.selected_mm import SIGNING_TILE, options_of
from grass_fx.compile.lowering.squared_norms import known_size, of_tiles
from grass_fx.ops import MM_SIGNS, SELECTED_MM, SIGNS
from grass_fx.ops.bits import ROWS, WORD, packed_shape


def lower_signs(call: Any, g: Any, dim: int = 1) -> Any:
    """Lower ``signs`` to torch's operator: a full gradient is in memory."""
    return compat.library_call(SIGNS, g, dim)


def lower_mm_signs(
    call: Any, a: Any, b: Any, indices: Any, scale: Any, dim: int, block: int = 1
) -> Any:
    """Lower ``mm_signs`` to a kernel and a selected product on a GPU, else to torch's operator."""
    dtype = a.get_dtype()
    m, n = known_size(a, 0), known_size(b, 1)
    m, n = (m, n) if dim == 1 else (n, m)  # of the matrix whose signs are packed
    if a.get_device().type != "cuda" or dtype.itemsize > 4 or m is None or n is None or m < ROWS:
        return compat.library_call(MM_SIGNS, a, b, indices, scale, dim, block)
    compact = call(SELECTED_MM, a, b, indices, scale, dim, block)
    if dim == 0:
        a, b = (call(torch.ops.aten.permute.default, x, [1, 0]) for x in (b, a))
    inputs = compat.realized(a, b)
    tile = SIGNING_TILE
    options = options_of(
        tile,
        dtype.itemsize,
        SPLIT_K=1,
        EVEN_M=m % tile.m == 0,
        EVEN_N=n % tile.n == 0,
        EVEN_K=compat.is_multiple(a.get_size()[1], tile.k(dtype.itemsize)),
        WORDS=-(-n // WORD),
    )
    template = compat.triton_template("grass_mm_signs", of_tiles("mm_signs"))
    shape = packed_shape(m, n)
    signs = compat.choose_kernel(
        "grass_mm_signs", inputs, shape, torch.float32, [(template, options)], grid=(m, n)
    )
    return compact, signs
