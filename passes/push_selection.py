"""Push each selection of a joint graph down to the matmul that makes the weight gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import SELECT, SELECTED_MM

aten, prims = torch.ops.aten, torch.ops.prims

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
CONVERSIONS = (prims.convert_element_type.default, aten._to_copy.default)
COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


@dataclass
class PushResult:
    """What became of a joint graph's selections."""

    pushed: list[fx.Node] = field(default_factory=list)
    """The ``indices`` nodes of the selections that reached every matmul below them."""
    stopped: dict[fx.Node, str] = field(default_factory=dict)
    """``indices`` node -> why a selection stayed above something: slower, and still right."""

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return bool(self.pushed)


class _Stop(Exception):
    """Why a selection cannot go below a node."""


def push_selection_pass(graph: fx.Graph) -> PushResult:
    """Replace ``select`` of a full weight gradient by the product of what it selects.

    Before::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm = torch.ops.aten.mm.default(permute, x)                 # G = DᵀX, (m, n)
        select = torch.ops.grass.select.default(mm, indices, scale, 0)

    After::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        selected_mm = torch.ops.grass.selected_mm.default(permute, x, indices, scale, 0)

    ``select`` is linear and moves through the operations of ``RULES`` (equations 2 and 3 of
    docs/method.md). It stops, and is left there with its reason, at a node of another kind and at
    one whose full value is needed anyway (the scores of a scoring step). Graphs without a
    selection, inference graphs among them, stay as they are.
    """
    result = PushResult()
    for select in graph.find_nodes(op="call_function", target=SELECT):
        g, indices, scale, dim, *block = select.args
        push = _Push(graph, select, indices, scale, block)
        new = push.below(g, dim, select)
        if push.stops:
            result.stopped[indices] = "; ".join(push.stops)
        else:
            result.pushed.append(indices)
        if new is not None:
            select.replace_all_uses_with(new)
            _erase_unused(graph, select)
    return result


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` and what only it used."""
    if node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for other in inputs:
        _erase_unused(graph, other)


class _Push:
    """One selection on its way down."""

    def __init__(
        self, graph: fx.Graph, select: fx.Node, indices: Any, scale: Any, block: list[Any]
    ) -> None:
        self.graph, self.select, self.indices, self.scale = graph, select, indices, scale
        self.block = block  # empty, or the one argument after ``dim``
        self.stops: list[str] = []

    def below(self, node: Any, dim: int, user: fx.Node) -> fx.Node | None:
        """The selection of ``node`` along ``dim``, made below it; None if it stays above it."""
        try:
            if not isinstance(node, fx.Node) or node.op != "call_function":
                raise _Stop("its gradient is an input of the graph")
            others = [u for u in node.users if u is not user]
            if others:
                raise _Stop(f"{node.name} is needed whole by {others[0].name}")
            rule = RULES.get(node.target)
            if rule is None:
                raise _Stop(f"no rule for {node.target}")
            return rule(self, node, dim % node.meta["val"].dim())
        except _Stop as reason:
            self.stops.append(str(reason))
            return None

    def of(self, node: Any, dim: int, user: fx.Node) -> fx.Node:
        """The selection of ``node``, made as deep as it goes."""
        below = self.below(node, dim, user)
        if below is not None:
            return below
        return self.call(SELECT, node, self.indices, self.scale, dim, *self.block)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the selection, with its value and the old one's origin."""
        with self.graph.inserting_before(self.select):
            name = target.overloadpacket.__name__
            new = self.graph.create_node("call_function", target, args, kwargs, name)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.select.meta["val"].fake_mode:
            new.meta["val"] = target(*values[0], **values[1])
        # Not all of meta: what belongs to the old operator's signature would mislead Inductor.
        for key in ("stack_trace", "nn_module_stack", "partitioner_tag", "autograd_backward"):
            if key in self.select.meta:
                new.meta[key] = self.select.meta[key]
        return new


Rule = Callable[[_Push, fx.Node, int], fx.Node]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(aten.mm.default)
def _mm(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    """select(a @ b) = selected_mm(a, b): what all of this is for."""
    return push.call(SELECTED_MM, *node.args, push.indices, push.scale, dim, *push.block)


@_rule(aten.bmm.default)
def _bmm_of_one(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    """A batch of one matrix, as einsum makes it."""
    a, b = node.args
    if node.meta["val"].shape[0] != 1 or dim == 0:
        raise _Stop("bmm over a batch")
    a, b = push.call(aten.squeeze.dim, a, 0), push.call(aten.squeeze.dim, b, 0)
    compact = push.call(SELECTED_MM, a, b, push.indices, push.scale, dim - 1, *push.block)
    return push.call(aten.unsqueeze.default, compact, 0)


@_rule(aten.permute.default)
def _permute(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    x, dims = cast("tuple[fx.Node, list[int]]", node.args)
    below = push.of(x, dims[dim], node)
    if below.target is aten.permute.default:
        inner, first = cast("tuple[fx.Node, list[int]]", below.args)
        if [first[d] for d in dims] == list(range(len(dims))):
            push.graph.erase_node(below)  # AOTAutograd transposes a linear's gradient twice
            return inner
    return push.call(aten.permute.default, below, dims)


@_rule(aten.t.default)
def _t(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    return push.call(aten.t.default, push.of(node.args[0], 1 - dim, node))


@_rule(aten.transpose.int)
def _transpose(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    x, first, second = cast("tuple[fx.Node, int, int]", node.args)
    ndim = node.meta["val"].dim()
    swap = {first % ndim: second % ndim, second % ndim: first % ndim}
    return push.call(aten.transpose.int, push.of(x, swap.get(dim, dim), node), first, second)


@_rule(*RESHAPES)
def _view(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    """Where the selected dimension is one dimension on both sides of the view."""
    x = cast(fx.Node, node.args[0])
    new = list(node.meta["val"].shape)
    below = dim_below_reshape(x.meta["val"].shape, new, dim)
    if below is None:
        raise _Stop(f"{node.name} splits or merges the selected dimension")
    new[dim] = push.indices.meta["val"].shape[0]
    return push.call(aten.reshape.default, push.of(x, below, node), new)


def dim_below_reshape(old: Sequence[int], new: Sequence[int], dim: int) -> int | None:
    """The dimension of the shape ``old`` that is ``dim`` of its view ``new``; None if none is."""
    for below in range(len(old)):
        if old[below] == new[dim] and math.prod(old[:below]) == math.prod(new[:dim]):
            return below
    return None


@_rule(*CONVERSIONS)
def _convert(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    x, *rest = node.args
    return push.call(node.target, push.of(x, dim, node), *rest, **node.kwargs)


@_rule(*COPIES)
def _same(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    return push.of(node.args[0], dim, node)


@_rule(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _times_a_number(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    x, factor = node.args
    if node.target is aten.mul.Tensor and not _is_number(factor):
        x, factor = factor, x
    if not _is_number(factor) or not isinstance(x, fx.Node):
        raise _Stop(f"{node.name} multiplies by a tensor")
    return push.call(node.target, push.of(x, dim, node), factor)


def _is_number(value: Any) -> bool:
    return not isinstance(value, fx.Node) or value.meta["val"].dim() == 0


@_rule(aten.neg.default)
def _neg(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    return push.call(aten.neg.default, push.of(node.args[0], dim, node))


@_rule(aten.add.Tensor)
def _add(push: _Push, node: fx.Node, dim: int) -> fx.Node:
    """Several uses of one weight: select(G + G′) = select(G) + select(G′)."""
    shape = node.meta["val"].shape
    for x in node.args:
        if not isinstance(x, fx.Node) or x.meta["val"].shape != shape:
            raise _Stop(f"{node.name} broadcasts")
    x, y = (push.of(x, dim, node) for x in node.args)
    return push.call(aten.add.Tensor, x, y, **node.kwargs)
