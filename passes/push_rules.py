"""The rules by which a selection moves below operations, a small function for each.

A rule gets the push, a node and the selected dimension of the node. It returns the planned
selection of ``node``, computed from selections of the node's inputs; the graph stays as it is. With
P from equation 1 of docs/method.md: PᵀF(x) = F′(Pᵀx), for all F that are linear along the selected
dimension. A rule that does not apply raises :class:`Stop` with the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import SELECTED_MM
from grass_fx.passes.push import FACTORS, MAKERS, SPLITS, Planned, Push, Rule, Stop, Value

aten, prims, c10d = torch.ops.aten, torch.ops.prims, torch.ops._c10d_functional

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
CONVERSIONS = (prims.convert_element_type.default, aten._to_copy.default)
COLLECTIVES = (c10d.all_reduce.default, c10d.reduce_scatter_tensor.default)
COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)

RULES: dict[Any, Rule] = {}


def registers_in(table: dict[Any, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator that enters a function into ``table`` as the rule of some operators."""

    def rule(*targets: Any) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            table.update(dict.fromkeys(targets, function))
            return function

        return register

    return rule


rule = registers_in(RULES)


# --- products -------------------------------------------------------------------------------------


@rule(aten.mm.default)
def _mm(push: Push, node: fx.Node, dim: int) -> Value:
    """select(a @ b) = selected_mm(a, b): the purpose of all rules."""
    return push.call(SELECTED_MM, *node.args, push.indices, push.scale, dim, *push.block)


@rule(aten.bmm.default)
def _bmm(push: Push, node: fx.Node, dim: int) -> Value:
    """A batch of products: select from the factor that has the selected dimension."""
    a, b = cast("tuple[Value, Value]", node.args)
    if node.meta["val"].shape[0] == 1 and dim > 0:  # einsum makes such batches
        a, b = push.call(aten.squeeze.dim, a, 0), push.call(aten.squeeze.dim, b, 0)
        compact = push.call(SELECTED_MM, a, b, push.indices, push.scale, dim - 1, *push.block)
        return push.call(aten.unsqueeze.default, compact, 0)
    if dim < 2:
        a = push.selected(a, dim)
    if dim != 1:
        b = (push if dim == 2 else push.unscaled()).selected(b, dim)  # apply ρ once
    return push.call(aten.bmm.default, a, b)


@rule(aten.addmm.default, aten.baddbmm.default)
def _add_product(push: Push, node: fx.Node, dim: int) -> Value:
    """select(β c + α a @ b) = β select(c) + α select(a @ b)."""
    c, a, b = cast("tuple[Any, ...]", node.args)
    product = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
    plain = Planned(product, (a, b), {}, node.meta["val"])
    below = RULES[product](push, cast(fx.Node, plain), dim)
    c = push.broadcast(c, node, dim)
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    c = c if beta == 1 else push.call(aten.mul.Tensor, c, beta)
    below = below if alpha == 1 else push.call(aten.mul.Tensor, below, alpha)
    return push.call(aten.add.Tensor, below, c)


# --- sums and factors -----------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.sub.Tensor)
def _sum(push: Push, node: fx.Node, dim: int) -> Value:
    """Several uses of one weight: select(G ± G′) = select(G) ± select(G′)."""
    if not all(isinstance(x, fx.Node) for x in node.args):
        raise Stop(f"{node.name} adds a number")
    sums = [node]  # ((G ± G′) ± G″) ± ...: an unrolled loop can have more than calls can nest
    while (inner := _inner_sum(sums[-1])) is not None:
        sums.append(inner)
    below = push.broadcast(cast(fx.Node, sums[-1].args[0]), sums[-1], dim)
    for step in reversed(sums):
        y = push.broadcast(cast(fx.Node, step.args[1]), step, dim)
        below = push.call(step.target, below, y, **step.kwargs)
    return below


def _inner_sum(node: fx.Node) -> fx.Node | None:
    """The sum of two gradients to which ``node`` adds another, if nothing else needs that sum."""
    inner = cast(fx.Node, node.args[0])
    if inner.target not in (aten.add.Tensor, aten.sub.Tensor) or len(inner.users) > 1:
        return None
    shape = node.meta["val"].shape
    terms = [x for x in inner.args if isinstance(x, fx.Node) and x.meta["val"].shape == shape]
    return inner if len(terms) == 2 else None


@rule(*FACTORS)
def _product_with(push: Push, node: fx.Node, dim: int) -> Value:
    """select(s ∘ t) = select(s) ∘ select(t), with ρ applied once.

    A factor that is constant along the selected dimension stays as it is.
    """
    spanning = [x for x in node.all_input_nodes if push.spans(x, node, dim)]
    dividing = node.target in (aten.div.Tensor, aten.div.Scalar) and node.args[0] not in spanning
    if not spanning or dividing or node.args[0] is node.args[-1]:
        raise Stop(f"{node.name} is no product with something that is selected")
    new: dict[Any, Value] = {}
    for k, x in enumerate(spanning):
        along = dim - node.meta["val"].dim() + x.meta["val"].dim()
        by = push if k == 0 else push.unscaled()
        full = x.meta["val"].shape == node.meta["val"].shape
        # Without a product below, or if others need a smaller factor, x is in memory anyway.
        deeper = (has_product(x) and (full or not push.is_whole(x, node))) or is_outer(x)
        by = by if full else by.quiet()  # a stop below a smaller factor forms no full gradient
        new[x] = by.of(x, along, node) if deeper else by.selected(x, along)
    args = cast("tuple[Any, ...]", node.args)
    return push.call(node.target, *(new.get(x, x) for x in args))


def has_product(node: Any) -> bool:
    """Whether a product or a lookup is below ``node``, behind what a selection can pass."""
    seen, ahead = set[fx.Node](), [node]  # very many paths may lead to a node
    while ahead:
        below = ahead.pop()
        if below in seen or not isinstance(below, fx.Node):
            continue
        if below.target in MAKERS:
            return True
        seen.add(below)
        if below.target in RULES or below.target in SPLITS:
            ahead += below.all_input_nodes
    return False


def is_outer(x: fx.Node) -> bool:
    """Whether ``x`` is a product of smaller factors, such as of scales of rows and of columns."""
    size = x.meta["val"].numel()
    return x.target in FACTORS and all(y.meta["val"].numel() < size for y in x.all_input_nodes)


@rule(aten.neg.default)
def _neg(push: Push, node: fx.Node, dim: int) -> Value:
    return push.call(aten.neg.default, push.of(node.args[0], dim, node))


@rule(aten.sum.dim_IntList)
def _sum_over(push: Push, node: fx.Node, dim: int) -> Value:
    """A sum over other dimensions, such as a batch to which the weight was expanded."""
    x, dims, *keepdim = cast("tuple[Any, ...]", node.args)
    ndim = x.meta["val"].dim()
    gone = {d % ndim for d in dims or range(ndim)}
    kept = range(ndim) if keepdim == [True] else [d for d in range(ndim) if d not in gone]
    if kept[dim] in gone:
        raise Stop(f"{node.name} sums over the selected dimension")
    below = push.of(x, kept[dim], node)
    return push.call(node.target, below, dims, *keepdim, **node.kwargs)


# --- the same numbers in another shape, dtype or place --------------------------------------------


@rule(aten.permute.default)
def _permute(push: Push, node: fx.Node, dim: int) -> Value:
    x, dims = cast("tuple[fx.Node, list[int]]", node.args)
    below = push.of(x, dims[dim], node)
    if below.target is aten.permute.default:
        inner, first = cast("tuple[Value, list[int]]", below.args)
        if [first[d] for d in dims] == list(range(len(dims))):
            return inner  # AOTAutograd transposes the gradient of a linear layer twice
    return push.call(aten.permute.default, below, dims)


@rule(aten.t.default)
def _t(push: Push, node: fx.Node, dim: int) -> Value:
    return push.call(aten.t.default, push.of(node.args[0], 1 - dim, node))


@rule(aten.transpose.int)
def _transpose(push: Push, node: fx.Node, dim: int) -> Value:
    x, first, second = cast("tuple[fx.Node, int, int]", node.args)
    ndim = node.meta["val"].dim()
    swap = {first % ndim: second % ndim, second % ndim: first % ndim}
    return push.call(aten.transpose.int, push.of(x, swap.get(dim, dim), node), first, second)


@rule(*RESHAPES)
def _reshape(push: Push, node: fx.Node, dim: int) -> Value:
    """Passes if the selected dimension is a single dimension before and after."""
    x = cast(fx.Node, node.args[0])
    new = list(node.meta["val"].shape)
    below = dim_below_reshape(x.meta["val"].shape, new, dim)
    if below is None:
        raise Stop(f"{node.name} splits or merges the selected dimension")
    new[dim] = push.rank
    return push.call(aten.reshape.default, push.of(x, below, node), new)


def dim_below_reshape(old: Sequence[int], new: Sequence[int], dim: int) -> int | None:
    """The dimension of shape ``old`` that becomes ``dim`` of its view ``new``, or None."""
    for below in range(len(old)):
        if old[below] == new[dim] and math.prod(old[:below]) == math.prod(new[:dim]):
            return below
    return None


@rule(aten.expand.default)
def _expand(push: Push, node: fx.Node, dim: int) -> Value:
    """The input is repeated along other dimensions, or along the selected one."""
    x = cast(fx.Node, node.args[0])
    shape = list(node.meta["val"].shape)
    shape[dim] = push.rank
    return push.call(aten.expand.default, push.broadcast(x, node, dim), shape)


@rule(*CONVERSIONS)
def _convert(push: Push, node: fx.Node, dim: int) -> Value:
    x, *rest = node.args
    return push.call(node.target, push.of(x, dim, node), *rest, **node.kwargs)


@rule(*COPIES)
def _same(push: Push, node: fx.Node, dim: int) -> Value:
    return push.of(node.args[0], dim, node)


# --- parts ----------------------------------------------------------------------------------------


@rule(aten.slice.Tensor)
def _slice(push: Push, node: fx.Node, dim: int) -> Value:
    """A part of a larger gradient, because the weight was concatenated with others."""
    x, over, start, end, step = _slice_of(node, 1, dim)
    if over != dim:
        return push.call(node.target, push.of(x, dim, node), over, start, end, step)
    if step != 1:
        raise Stop(f"{node.name} has a step along the selected dimension")
    return push.moved(start).of(x, dim, node)


@rule(operator.getitem)
def _part(push: Push, node: fx.Node, dim: int) -> Value:
    """One part of a split."""
    parts, k = cast("tuple[fx.Node, int]", node.args)
    if parts.target not in SPLITS:
        raise Stop(f"no rule for {parts.target}")
    push.check(parts, node)
    x, _, *over = cast("tuple[Any, ...]", parts.args)
    across = (over or [0])[0] % x.meta["val"].dim()
    start = sum(part.shape[across] for part in parts.meta["val"][:k])
    if across == dim:
        return push.moved(start).of(x, dim, parts)
    end = start + node.meta["val"].shape[across]
    return push.call(aten.slice.Tensor, push.of(x, dim, parts), across, start, end)


@rule(aten.cat.default)
def _cat(push: Push, node: fx.Node, dim: int) -> Value:
    """Parts of the weight were used separately.

    If the parts lie along the selected dimension, r rows are computed for each of them.
    """
    parts, *over = cast("tuple[Any, ...]", node.args)
    across = (over or [0])[0] % node.meta["val"].dim()
    if across != dim:
        return push.call(node.target, [push.of(x, dim, node) for x in parts], across)
    size = node.meta["val"].shape[dim]
    if len(parts) * push.rank > size:
        raise Stop(f"{node.name} has {len(parts)} parts, too many for {push.rank} rows of {size}")
    start, below = 0, cast("Value | None", None)
    for x in parts:
        length = x.meta["val"].shape[dim]
        below = push.inside(x, start, length, dim, node, below)
        start += length
    assert below is not None
    return below


@rule(aten.slice_scatter.default)
def _slice_scatter(push: Push, node: fx.Node, dim: int) -> Value:
    """The gradient of a weight of which only a part was used."""
    base, x = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    _, over, start, end, step = _slice_of(node, 2, dim)
    below = push.of(base, dim, node)
    if over != dim:
        return push.call(node.target, below, push.of(x, dim, node), over, start, end, step)
    if step != 1:
        raise Stop(f"{node.name} has a step along the selected dimension")
    return push.inside(x, start, end - start, dim, node, below)


@rule(aten.select_scatter.default)
def _select_scatter(push: Push, node: fx.Node, dim: int) -> Value:
    """The gradient of a batch of which only one matrix was used."""
    base, x, over, index = cast("tuple[Any, ...]", node.args)
    over %= node.meta["val"].dim()
    if over == dim:
        raise Stop(f"{node.name} writes one row of the selected dimension")
    below = push.of(base, dim, node), push.of(x, dim - (over < dim), node)
    return push.call(node.target, *below, over, index)


@rule(aten.select.int)
def _select_int(push: Push, node: fx.Node, dim: int) -> Value:
    """The gradient of one matrix, out of a batch of gradients."""
    x, over, index = cast("tuple[Any, ...]", node.args)
    over %= x.meta["val"].dim()
    return push.call(node.target, push.of(x, dim + (over <= dim), node), over, index)


@rule(aten.full.default)
def _constant(push: Push, node: fx.Node, dim: int) -> Value:
    """Zeros, into which parts of a gradient are written."""
    shape, value = cast("tuple[list[int], Any]", node.args)
    if value != 0:
        raise Stop(f"{node.name} is no gradient")
    shape = [*shape]
    shape[dim] = push.rank
    return push.call(node.target, shape, value, **node.kwargs)


def _slice_of(node: fx.Node, before: int, dim: int) -> tuple[fx.Node, int, Any, Any, Any]:
    """(input, dimension, start, end, step) of a slice, with its defaults filled in.

    Along the selected dimension these are numbers; along others they may be symbolic.
    """
    x = cast(fx.Node, node.args[0])
    defaults = (0, None, None, 1)
    positional = cast("tuple[Any, ...]", node.args[before:])
    named = cast("dict[str, Any]", node.kwargs)
    names = ("dim", "start", "end", "step")
    over, start, end, step = (
        positional[k] if k < len(positional) else named.get(names[k], defaults[k]) for k in range(4)
    )
    over = cast(int, over) % x.meta["val"].dim()
    size = x.meta["val"].shape[over]
    if all(isinstance(number, int | None) for number in (start, end, step, size)):
        start, end, step = slice(start, end, step).indices(size)
    elif over == dim:
        raise Stop(f"{node.name} ends where only a call tells, along the selected dimension")
    return x, over, start, end, step


# --- collectives ----------------------------------------------------------------------------------


@rule(c10d.wait_tensor.default)
def _wait(push: Push, node: fx.Node, dim: int) -> Value:
    return push.call(node.target, push.of(node.args[0], dim, node))


@rule(c10d.all_reduce.default)
def _all_reduce(push: Push, node: fx.Node, dim: int) -> Value:
    """All ranks have the same sum and select the same rows, so only selected rows are sent."""
    x, op, group = node.args
    if op not in ("sum", "avg"):
        raise Stop(f"{node.name} is no sum")
    return push.call(node.target, push.contiguous(push.of(x, dim, node)), op, group)


@rule(c10d.reduce_scatter_tensor.default)
def _reduce_scatter(push: Push, node: fx.Node, dim: int) -> Value:
    """Each rank selects r rows of its own part, so the rows that all ranks select are summed."""
    x, op, ranks, group = cast("tuple[fx.Node, str, int, str]", node.args)
    if op not in ("sum", "avg"):
        raise Stop(f"{node.name} is no sum")
    if dim != 0:
        raise Stop(f"{node.name}: ranks may select different columns")
    part = node.meta["val"].shape[0]
    indices, scale = (
        t and push.call(c10d.wait_tensor.default,
                        push.call(c10d.all_gather_into_tensor.default, t, ranks, group))
        for t in (push.indices, push.scale)
    )  # fmt: skip
    starts = push.call(prims.iota.default, ranks, start=0, step=part, dtype=torch.int64,
                       device=node.meta["val"].device, requires_grad=False)  # fmt: skip
    rows = push.call(aten.reshape.default, indices, [ranks, push.rank])
    rows = push.call(aten.add.Tensor, rows, push.call(aten.unsqueeze.default, starts, 1))
    everyones = push.call(aten.reshape.default, rows, [-1])
    below = push.other(everyones, scale, push.aligned(part)).of(x, 0, node)
    return push.call(node.target, push.contiguous(below), op, ranks, group)
