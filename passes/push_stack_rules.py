"""The rules for a stack of matrices (e, m, n), where each matrix has its own selection: (e, r).

On every operation that a selection passes, the first dimension counts the matrices. For operations
that treat all matrices alike the rules of ``push_rules`` are used.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import SELECT
from grass_fx.passes import push_rules
from grass_fx.passes.push import FACTORS, Push, Rule, Stop, Value
from grass_fx.passes.push_rules import CONVERSIONS, COPIES, RESHAPES, RULES, dim_below_reshape

aten, prims = torch.ops.aten, torch.ops.prims

ALIKE = (
    *CONVERSIONS, *COPIES, aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.full.default,
)  # fmt: skip
STACK_RULES: dict[Any, Rule] = {target: RULES[target] for target in ALIKE}

rule = push_rules.registers_in(STACK_RULES)


@rule(aten.bmm.default)
def _bmm(push: Push, node: fx.Node, dim: int) -> Value:
    """Select from the factor that has the selected dimension, matrix by matrix."""
    a, b = cast("tuple[Value, Value]", node.args)
    if dim == 1:
        a = push.selected(a, 1)
    else:
        b = push.selected(b, 2)
    return push.call(node.target, a, b)


@rule(aten._grouped_mm.default)
def _grouped_mm(push: Push, node: fx.Node, dim: int) -> Value:
    """Tokens are sorted by matrix, and ``offs`` has the end of each matrix's tokens.

    Each token is selected by the σ of its matrix.
    """
    a, b, offs, *rest = cast("tuple[Any, ...]", node.args)
    if a.meta["val"].dim() != 2 or b.meta["val"].dim() != 2:
        raise Stop(f"{node.name} is no gradient of a stack")
    itemsize = node.meta["val"].dtype.itemsize
    if push.rank * itemsize % 16:
        raise Stop(f"{node.name} takes no {push.rank} rows: make r a multiple of {16 // itemsize}")
    tokens = push.call(aten.permute.default, a, [1, 0]) if dim == 1 else b
    count = push.call(aten.sym_size.int, tokens, 0)
    device = node.meta["val"].device
    place = push.call(prims.iota.default, count, start=0, step=1, dtype=torch.int64,
                      device=device, requires_grad=False)  # fmt: skip
    group = push.call(aten.searchsorted.Tensor, offs, place, right=True)
    # Tokens behind the last end are in no product, so they may use the σ of any matrix.
    group = push.call(aten.remainder.Scalar, group, node.meta["val"].shape[0])
    rows = push.call(SELECT, tokens, *_of_tokens(push, group), 1)
    if dim == 1:
        return push.call(node.target, push.call(aten.permute.default, rows, [1, 0]), b, offs, *rest)
    return push.call(node.target, a, rows, offs, *rest)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(push: Push, node: fx.Node, dim: int) -> Value:
    """Each token was multiplied by one matrix; this adds up the tokens' gradients per matrix."""
    base, where, values, *accumulate = cast("tuple[Any, ...]", node.args)
    if len(where) != 1 or where[0].meta["val"].dim() != 1:
        raise Stop(f"{node.name} indexes more than the matrices of a stack")
    by_token = push.other(*_of_tokens(push, where[0]), push.block)
    below = push.of(base, dim, node), by_token.of(values, dim, node)
    return push.call(node.target, below[0], where, below[1], *accumulate)


def _of_tokens(push: Push, group: Value) -> tuple[Value, Value | None]:
    """σ and ρ of each token's matrix: (tokens, r)."""
    indices = push.call(aten.index.Tensor, push.indices, [group])
    scale = push.scale and push.call(aten.index.Tensor, push.scale, [group])
    return indices, scale


@rule(aten.permute.default)
def _permute(push: Push, node: fx.Node, dim: int) -> Value:
    """Also passes two in a row, as einsum makes them, if together they keep the first dimension."""
    x, dims = cast("tuple[fx.Node, list[int]]", node.args)
    if dims[0] == 0:
        return RULES[aten.permute.default](push, node, dim)
    if x.target is aten.permute.default:
        first, inner = cast("tuple[fx.Node, list[int]]", x.args)
        both = [inner[d] for d in dims]
        if both[0] == 0:
            push.check(x, node)
            return push.call(aten.permute.default, push.of(first, both[dim], x), both)
    raise Stop(f"{node.name} moves the dimension of a stack")


@rule(aten.transpose.int)
def _transpose(push: Push, node: fx.Node, dim: int) -> Value:
    if any(cast(int, d) % node.meta["val"].dim() == 0 for d in node.args[1:]):
        raise Stop(f"{node.name} moves the dimension of a stack")
    return RULES[aten.transpose.int](push, node, dim)


@rule(*RESHAPES)
def _reshape(push: Push, node: fx.Node, dim: int) -> Value:
    """Passes if both dimensions stay, or if concatenated matrices become their stack."""
    x, shape = cast(fx.Node, node.args[0]), list(node.meta["val"].shape)
    old = list(x.meta["val"].shape)
    compact = [push.rank if d == dim else size for d, size in enumerate(shape)]
    if x.target is aten.cat.default and x.args[1:] in ((), (0,)):
        parts = cast("list[fx.Node]", x.args[0])
        if len(parts) == shape[0] and all(list(p.meta["val"].shape) == shape[1:] for p in parts):
            push.check(x, node)
            below = [one_of(push, k).of(part, dim - 1, x) for k, part in enumerate(parts)]
            joined = push.call(aten.cat.default, below)
            return push.call(aten.reshape.default, joined, compact)
    if old == shape[1:] and shape[0] == 1:
        return push.call(aten.reshape.default, one_of(push, 0).of(x, dim - 1, node), compact)
    place = dim_below_reshape(old, shape, dim)
    if old[0] != shape[0] or not place:
        raise Stop(f"{node.name} splits or merges a stack")
    return push.call(aten.reshape.default, push.of(x, place, node), compact)


@rule(*FACTORS)
def _product_with(push: Push, node: fx.Node, dim: int) -> Value:
    """Passes numbers, and elementwise products in which every selected factor is itself a stack."""
    shape = node.meta["val"].shape
    for x in node.all_input_nodes:
        own = x.meta["val"].shape
        if push.spans(x, node, dim) and (len(own) != len(shape) or own[0] != shape[0]):
            raise Stop(f"{node.name} broadcasts over a stack")
    return RULES[node.target](push, node, dim)


@rule(aten.select_scatter.default)
def _select_scatter(push: Push, node: fx.Node, dim: int) -> Value:
    """The gradient of a matrix that was used by itself."""
    base, x, over, index = cast("tuple[Any, ...]", node.args)
    if over % node.meta["val"].dim() != 0:
        raise Stop(f"{node.name} writes into every matrix of a stack")
    below = push.of(base, dim, node), one_of(push, index).of(x, dim - 1, node)
    return push.call(node.target, *below, over, index)


@rule(aten.cat.default)
def _cat(push: Push, node: fx.Node, dim: int) -> Value:
    """Parts of the stack were used separately."""
    parts, *over = cast("tuple[Any, ...]", node.args)
    if (over or [0])[0] % node.meta["val"].dim() != 0:
        raise Stop(f"{node.name} is along a matrix dimension of a stack")
    start, below = 0, []
    for x in parts:
        end = start + x.meta["val"].shape[0]
        between = [
            t and push.call(aten.slice.Tensor, t, 0, start, end) for t in (push.indices, push.scale)
        ]
        below.append(push.other(between[0], between[1], push.block).of(x, dim, node))
        start = end
    return push.call(node.target, below)


def one_of(push: Push, index: int) -> Push:
    """The selection of one matrix of the stack."""
    indices, scale = (
        t and push.call(aten.select.int, t, 0, index) for t in (push.indices, push.scale)
    )
    return push.other(indices, scale, push.block, RULES)
