"""Add the gradient of a lookup into that of the product to which its weight is tied."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import SELECT
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import MASKED_ADDITION, ROW_ADDITIONS, erase_unused, insert
from grass_fx.passes.push_rules import CONVERSIONS

aten, prims = torch.ops.aten, torch.ops.prims

HALVES = (torch.float16, torch.bfloat16)


def accumulate_lookups_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Add rows by index into another gradient of the weight, instead of into zeros of their own.

    Before::

        selected_mm = torch.ops.grass.selected_mm.default(d_t, x, indices, None, 1)
        full = torch.ops.aten.full.default([V, r], 0)
        index_put = torch.ops.aten.index_put.default(full, [tokens], rows, True)
        add = torch.ops.aten.add.Tensor(selected_mm, index_put)

    After::

        selected_mm = torch.ops.grass.selected_mm.default(d_t, x, indices, None, 1)
        index_put = torch.ops.aten._unsafe_index_put.default(selected_mm, [tokens], rows, True)

    Inductor adds into the memory of the product, which only this sum may need. Rows of 16 bits are
    added in float32, and the sum of all is rounded once. What a mask leaves out becomes zero, as in
    Inductor's own code. Gradients of weights that are left dense stay as they are. Rewritten: the
    new additions.
    """
    result = Result()
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if add.kwargs or not all(isinstance(x, fx.Node) for x in add.args):
            continue
        for x, y in (add.args, add.args[::-1]):
            rows = _rows_into_zeros(y, add)
            if rows is not None and _is_spare(x, add):
                result.rewritten.append(_add_into(x, rows, add))
                break
    result.note = f"{result.count} accumulated"
    return result


def _rows_into_zeros(y: fx.Node, add: fx.Node) -> fx.Node | None:
    """The addition of selected rows into zeros that ``y`` is, or is converted from; None if it is
    no such, or if anything but ``add`` needs it."""
    shape = add.meta["val"].shape
    while y.target in CONVERSIONS and len(y.users) == 1:
        y = y.all_input_nodes[0]
    if y.target not in ROW_ADDITIONS or len(y.users) != 1 or y.meta["val"].shape != shape:
        return None
    zeros, rows = cast("tuple[fx.Node, fx.Node]", (y.args[0], y.args[ROW_ADDITIONS[y.target]]))
    accumulates = y.target is MASKED_ADDITION or y.args[3:] == (True,)
    is_zero = zeros.target is aten.full.default and zeros.args[1] == 0
    return y if accumulates and is_zero and rows.target is SELECT else None


def _is_spare(x: fx.Node, add: fx.Node) -> bool:
    """Whether ``x`` is computed for ``add`` alone, and has its shape."""
    whole = x.meta["val"].shape == add.meta["val"].shape
    return x.op == "call_function" and whole and [*x.users] == [add]


def _add_into(x: fx.Node, rows: fx.Node, add: fx.Node) -> fx.Node:
    dtype = rows.meta["val"].dtype
    dtype = torch.float32 if dtype in HALVES else dtype
    if x.target in CONVERSIONS and x.all_input_nodes[0].meta["val"].dtype == dtype:
        x = x.all_input_nodes[0]  # the sum so far, before it is rounded
    *_, where, d = cast("tuple[Any, ...]", rows.args[: ROW_ADDITIONS[rows.target] + 1])
    x, d = _converted(x, dtype, add), _converted(d, dtype, add)
    if rows.target is MASKED_ADDITION:
        mask, kind = rows.args[1], {"dtype": dtype, "device": d.meta["val"].device}
        d = insert(add, aten.where.self, mask, d, insert(add, aten.full.default, [], 0, **kind))
        where = [
            indices and _within(indices, size, add)
            for indices, size in zip(where, rows.meta["val"].shape, strict=False)
        ]
    new = insert(add, aten._unsafe_index_put.default, x, where, d, True)
    new = _converted(new, add.meta["val"].dtype, add)
    add.replace_all_uses_with(new)
    erase_unused(add.graph, add)
    return new


def _converted(x: fx.Node, dtype: torch.dtype, add: fx.Node) -> fx.Node:
    if x.meta["val"].dtype == dtype:
        return x
    return insert(add, prims.convert_element_type.default, x, dtype)


def _within(indices: fx.Node, size: int, add: fx.Node) -> fx.Node:
    """The indices, those of rows that do not exist replaced by some that do."""
    value = indices.meta["val"]
    kind = {"dtype": value.dtype, "device": value.device}
    first, last = (insert(add, aten.full.default, [], end, **kind) for end in (0, size - 1))
    indices = insert(add, aten.maximum.default, indices, first)
    return insert(add, aten.minimum.default, indices, last)
