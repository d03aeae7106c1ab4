"""Lowers the operators that compute scores from a full gradient or from its factors.

On a GPU ``mm_squared_norms`` is one Triton kernel (mm_squared_norms.py.jinja). Each program makes
one tile of G in registers and writes the sum of squares of each of its rows. These are
(n / BLOCK_N, m) numbers, which are added afterwards. There are no atomics, so equal inputs give
equal scores. On other devices, in float64 and for symbolic sizes it is torch's operator, which
computes G part by part.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from grass_fx import _torch_compat as compat
from grass_fx.compile.lowering.selected_mm import best_tile, options_of
from grass_fx.ops import MM_SQUARED_NORMS

aten, prims = torch.ops.aten, torch.ops.prims


def lower_squared_norms(call: Any, g: Any, dim: int, scoring: str = "auto") -> Any:
    """Lower ``squared_norms`` to a reduction that Inductor may fuse."""
    exact = torch.float64 if g.get_dtype() == torch.float64 else torch.float32
    g = call(prims.convert_element_type.default, g, exact)
    others = [d for d in range(len(g.get_size())) if d != dim]
    total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, g, g), others)
    return call(prims.convert_element_type.default, total, torch.float32)


def lower_mm_squared_norms(call: Any, a: Any, b: Any, dim: int) -> Any:
    """Lower ``mm_squared_norms`` to the kernel on a GPU, and to torch's operator elsewhere."""
    dtype = a.get_dtype()
    m, n = (known_size(x, d) for x, d in ((a, 0), (b, 1)))
    if a.get_device().type != "cuda" or dtype.itemsize > 4 or m is None or n is None:
        return compat.library_call(MM_SQUARED_NORMS, a, b, dim)
    inputs = compat.realized(a, b)
    k = a.get_size()[1]
    tile = best_tile(m, n)
    options = options_of(
        tile,
        dtype.itemsize,
        DIM=dim,
        SPLIT_K=1,
        EVEN_M=m % tile.m == 0,
        EVEN_N=n % tile.n == 0,
        EVEN_K=compat.is_multiple(k, tile.k(dtype.itemsize)),
    )
    template = compat.triton_template("grass_mm_squared_norms", of_tiles("mm_squared_norms"))
    shape = [-(-n // tile.n), m] if dim == 0 else [-(-m // tile.m), n]
    sums = compat.choose_kernel(
        "grass_mm_squared_norms", inputs, shape, torch.float32, [(template, options)], grid=(m, n)
    )
    return call(aten.sum.dim_IntList, sums, [0])


@cache
def of_tiles(name: str) -> str:
    """The source of a template that makes tiles of a product, and keeps something else of them."""
    files = (Path(__file__).with_name(f"{each}.py.jinja") for each in ("product_tile", name))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def known_size(value: Any, dim: int) -> int | None:
    """A size of an IR value; None if it depends on a symbol."""
    try:
        return int(value.get_size()[dim])
    except (TypeError, ValueError):
        return None
