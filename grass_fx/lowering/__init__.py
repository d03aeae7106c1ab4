"""How Inductor lowers the operators of ``grass_fx.ops``: gather, then its own matmul.

The gather is an ordinary indexing node, which Inductor may fuse with whatever makes its input; the
product goes wherever Inductor sends products of its shape.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from grass_fx._torch_compat import register_inductor_lowering
from grass_fx.ops import SELECT, SELECTED_MM

aten, prims = torch.ops.aten, torch.ops.prims


@cache
def register() -> None:
    """Register the lowerings, once per process; called before the first compilation."""
    register_inductor_lowering(SELECT, _select)
    register_inductor_lowering(SELECTED_MM, _selected_mm)


def _select(call: Any, g: Any, indices: Any, scale: Any, dim: int) -> Any:
    index = [None] * len(g.get_size())
    index[dim] = indices
    return _scaled(call, call(aten.index.Tensor, g, index), scale, dim)


def _selected_mm(call: Any, a: Any, b: Any, indices: Any, scale: Any, dim: int) -> Any:
    if dim == 0:
        # Gathered through the transposed view: each run of D is read where it lies.
        columns = call(aten.index.Tensor, call(aten.permute.default, a, [1, 0]), [None, indices])
        a = call(aten.permute.default, columns, [1, 0])
    else:
        b = call(aten.index.Tensor, b, [None, indices])
    return _scaled(call, call(aten.mm.default, a, b), scale, dim)


def _scaled(call: Any, compact: Any, scale: Any, dim: int) -> Any:
    if scale is None:
        return compact
    for axis in range(len(compact.get_size())):
        if axis != dim:
            scale = call(aten.unsqueeze.default, scale, axis)
    product = call(aten.mul.Tensor, compact, scale)
    return call(prims.convert_element_type.default, product, compact.get_dtype())
