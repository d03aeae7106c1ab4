"""How Inductor lowers the operators of ``grass_fx.ops``.

    selected_mm.py        which kernel computes a selected product, and its configurations
    selected_mm.py.jinja  the Triton kernel: gather, product and any work Inductor fuses after it
    add_rows.py           the optimizers' update of rows: gather, sum, round and scatter in one loop
    squared_norms.py      the scores of a scoring step
    product_tile.py.jinja  the beginning of the two below: a tile of a product in registers
    mm_squared_norms.py.jinja  the Triton kernel that computes scores without a full gradient
    signs.py              the signs of gradients, for rows that are not selected
    mm_signs.py.jinja     the Triton kernel that makes them without a full gradient

``select`` becomes an ordinary indexing node, which Inductor may fuse with its input.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_fx import _torch_compat as compat
from grass_fx.compile.lowering import selected_mm as rule
from grass_fx.compile.lowering.add_rows import lower_add_rows
from grass_fx.compile.lowering.signs import lower_mm_signs, lower_signs
from grass_fx.compile.lowering.squared_norms import lower_mm_squared_norms, lower_squared_norms
from grass_fx.ops import (
    ADD_ROWS,
    MM_SIGNS,
    MM_SQUARED_NORMS,
    SELECT,
    SELECTED_MM,
    SIGNS,
    SQUARED_NORMS,
)
from grass_fx.state.units import run_length

aten, prims = torch.ops.aten, torch.ops.prims


@cache
def register() -> None:
    """Register the lowerings, once per process; called before the first compilation."""
    compat.register_inductor_lowering(SELECT, _select)
    compat.register_inductor_lowering(SELECTED_MM, _selected_mm)
    compat.register_inductor_lowering(ADD_ROWS, lower_add_rows)
    compat.register_inductor_lowering(SQUARED_NORMS, lower_squared_norms)
    compat.register_inductor_lowering(MM_SQUARED_NORMS, lower_mm_squared_norms)
    compat.register_inductor_lowering(SIGNS, lower_signs)
    compat.register_inductor_lowering(MM_SIGNS, lower_mm_signs)
    compat.extern_kernel(gather_then_mm)  # code from the cache calls it by name


def _select(call: Any, g: Any, indices: Any, scale: Any, dim: int, block: int = 1) -> Any:
    size = list(g.get_size())
    if len(indices.get_size()) == 2:  # a stack, where each matrix has its own rows
        size[dim] = indices.get_size()[1]
        rows = call(aten.expand.default, _along(call, indices, dim, len(size)), size)
        return _scaled(call, call(aten.gather.default, g, dim, rows), scale, dim)
    if len(size) == 2 and dim == 1 and _known_stride(g, 0) is not None:
        return _scaled(call, _columns(call, g, indices, block), scale, dim)
    return _scaled(call, _rows(call, g, indices, dim, block), scale, dim)


def _selected_mm(
    call: Any, a: Any, b: Any, indices: Any, scale: Any, dim: int, block: int = 1
) -> Any:
    product = None
    if a.get_device().type == "cuda":
        product = _by_kernel(call, a, b, indices, dim, block)
    if product is None:
        product = _gathered(call, a, b, indices, dim, block)
    return _scaled(call, product, scale, dim)


def _gathered(call: Any, a: Any, b: Any, indices: Any, dim: int, block: int) -> Any:
    """Gather, then use Inductor's own matmul."""
    if dim == 0:
        # Gather through the transposed view, so that D is read row by row.
        columns = _columns(call, call(aten.permute.default, a, [1, 0]), indices, block)
        a = call(aten.permute.default, columns, [1, 0])
    else:
        b = _columns(call, b, indices, block)
    return call(aten.mm.default, a, b)


def _columns(call: Any, x: Any, indices: Any, block: int) -> Any:
    """Gather columns of x. On a GPU the gather fuses with the computation of x."""
    if x.get_device().type == "cpu":
        # Inductor's loop reads element by element. Torch's kernel cannot be fused, but is faster.
        return compat.library_call(aten.index_select.default, x, 1, indices)
    return _rows(call, x, indices, 1, block)


def _rows(call: Any, x: Any, indices: Any, dim: int, block: int) -> Any:
    """Gather along ``dim`` in a loop. On a GPU the loop loads vectors if runs lie in memory so."""
    stride, last = _known_stride(x, dim), dim == len(x.get_size()) - 1
    if stride is None and last:
        stride = 1  # not in memory yet: its inputs are most likely contiguous
    run = run_length(block, stride, x.get_dtype().itemsize)
    if run == 1 or x.get_device().type != "cuda":
        index = [None] * len(x.get_size())
        index[dim] = indices
        return call(aten.index.Tensor, x, index)
    size = [*x.get_size()]
    size[dim] = indices.get_size()[0]
    return call(aten.view.default, compat.get_rows(x, indices, dim, run), size)


def _by_kernel(call: Any, a: Any, b: Any, indices: Any, dim: int, block: int) -> Any:
    """The product by the Triton kernel, or by the fastest way if Inductor measures.

    None if the product should be computed by a gather and a matmul.
    """
    dtype = a.get_dtype()
    tunes = compat.tuning_everything()
    # A stride may be unknown for two reasons. If the matrix is not in memory yet, a gather fuses
    # with its computation. If the stride is symbolic, the kernel would load single elements.
    factor = a if dim == 0 else b
    strides = _known_stride(factor, dim), _known_stride(factor, 1 - dim)
    if rule.way("cuda", dtype, strides, tunes) == rule.GATHER:
        return None
    inputs = compat.realized(a, b, indices)
    a, b, indices = inputs
    laid_out = _known_stride(a if dim == 0 else b, dim)
    r, k = indices.get_size()[0], a.get_size()[1]
    size = [r, b.get_size()[1]] if dim == 0 else [a.get_size()[0], r]
    m, n, length = (compat.size_hint(extent) for extent in (*size, k))
    tiles = rule.TILES if tunes else [rule.best_tile(m, n)]
    steps = length // tiles[0].k(dtype.itemsize)
    processors = torch.cuda.get_device_properties(a.get_device()).multi_processor_count
    split = rule.split_of(m, n, steps, tiles[0], processors)
    run = run_length(block, laid_out, dtype.itemsize)
    template = compat.triton_template("grass_selected_mm", _source())
    choices = []
    for tile in tiles:
        even = {
            "EVEN_M": compat.is_multiple(size[0], tile.m),
            "EVEN_N": compat.is_multiple(size[1], tile.n),
            "EVEN_K": compat.is_multiple(k, tile.k(dtype.itemsize)),
        }  # dimensions that need no mask
        settings = {"DIM": dim, "RUN": run, "SPLIT_K": split, **even}
        choices.append((template, rule.options_of(tile, dtype.itemsize, **settings)))

    def spread() -> Tensor:
        """σ for measuring. With Inductor's zeros all tiles would read the same row."""
        total = a.get_size()[0] if dim == 0 else b.get_size()[1]
        size, count = compat.size_hint(total), compat.size_hint(r)
        return rule.spread(size, count, block, a.get_device())

    examples = {2: spread} if tunes else None
    if split > 1:
        parts = compat.choose_kernel(
            "grass_selected_mm",
            inputs,
            [split, *size],
            torch.float32,
            choices,
            examples=examples,
        )
        total = call(aten.sum.dim_IntList, parts, [0])
        return call(prims.convert_element_type.default, total, dtype)
    extern = [(compat.extern_kernel(gather_then_mm), {"dim": dim})] if tunes else []
    return compat.choose_kernel(
        "grass_selected_mm", inputs, size, dtype, choices, extern, examples=examples
    )


def _known_stride(value: Any, dim: int) -> int | None:
    """A stride of an IR value; None if it depends on a symbol, or the value has no memory yet."""
    strides = value.maybe_get_stride()
    try:
        return None if strides is None else int(strides[dim])
    except (TypeError, ValueError):
        return None


def gather_then_mm(a: Tensor, b: Tensor, indices: Tensor, *, dim: int, out: Tensor) -> Tensor:
    """The alternative to the Triton kernel when Inductor measures: gather, then vendor's GEMM."""
    if dim == 0:
        return torch.mm(a.t().index_select(1, indices).t(), b, out=out)
    return torch.mm(a, b.index_select(1, indices), out=out)


@cache
def _source() -> str:
    return Path(__file__).with_name("selected_mm.py.jinja").read_text(encoding="utf-8")


def _scaled(call: Any, compact: Any, scale: Any, dim: int) -> Any:
    if scale is None:
        return compact
    scale = _along(call, scale, dim, len(compact.get_size()))
    product = call(aten.mul.Tensor, compact, scale)
    return call(prims.convert_element_type.default, product, compact.get_dtype())


def _along(call: Any, values: Any, dim: int, ndim: int) -> Any:
    """The same as ``grass_fx.ops.along``, for IR values."""
    for axis in range(len(values.get_size()) - 1, ndim):
        if axis != dim:
            values = call(aten.unsqueeze.default, values, axis)
    return values
