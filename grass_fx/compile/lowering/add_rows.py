"""Lowers ``grass::add_rows_`` to one loop for each weight: gather, sum, rounding and scatter.

The loop reads the rows of W that it writes. This is correct because no row repeats: the same thread
first reads and then writes each element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grass_fx import _torch_compat as compat

aten, prims = torch.ops.aten, torch.ops.prims


def lower_add_rows(
    call: Any,
    ws: Sequence[Any],
    indices: Sequence[Any],
    changes: Sequence[Any],
    noise: Sequence[Any],
    dims: Sequence[int],
    runs: Sequence[int],
    kept: Any,
) -> None:
    """The lowering of ``grass_fx.ops.add_rows_``; ``call`` lowers an aten operator."""
    convert = prims.convert_element_type.default
    each = zip(ws, indices, changes, dims, runs, strict=True)
    for k, (w, index, change, dim, run) in enumerate(each):
        if w.get_device().type != "cuda":
            run = 1  # a run is too short for a loop of a CPU's vectors
        size = compat.in_runs(change.get_size(), dim, run)
        change = call(aten.view.default, change, size)
        rows = call(convert, compat.get_rows(w, index, dim, run), change.get_dtype())
        rows = call(aten.add.Tensor, call(aten.mul.Tensor, rows, kept), change)
        if noise:
            rows = _rounded(call, rows, call(aten.view.default, noise[k], size))
        compat.put_rows(w, index, call(convert, rows, w.get_dtype()), dim, run)


def _rounded(call: Any, values: Any, noise: Any) -> Any:
    """The same as ``grass_fx.ops.rounded`` to bfloat16, for IR values."""
    both, either = aten.bitwise_and.Tensor, aten.bitwise_or.Tensor
    bits = call(aten.view.dtype, values, torch.int32)
    size = call(aten.clamp_max.default, call(both, bits, 0x7FFFFFFF), 0x7FFF0000)
    size = call(both, call(aten.add.Tensor, size, noise), -(1 << 16))
    return call(aten.view.dtype, call(either, size, call(both, bits, -(1 << 31))), torch.float32)
