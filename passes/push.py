"""The plan by which a selection moves down; the rules of ``push_rules`` use it.

A rule changes no graph. It returns a :class:`Planned` node, whose inputs are planned or existing
nodes. :func:`emit` then adds the nodes that the finished plan needs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from grass_fx.ops import SELECT

aten = torch.ops.aten

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
PRODUCTS = (
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
)  # fmt: skip
ADDED_PRODUCTS = (aten.addmm.default, aten.baddbmm.default)
"""Products that are added to something, their first argument."""
MASKED_ADDITION = aten._unsafe_masked_index_put_accumulate.default
ROW_ADDITIONS: dict[Any, int] = {
    aten.embedding_dense_backward.default: 0, MASKED_ADDITION: 3,
    aten.index_put.default: 2, aten._unsafe_index_put.default: 2,
}  # fmt: skip
"""What adds up rows by index, the gradient of a lookup, and the places of the rows. They are added
to the first argument, unless that is the rows."""
ALL_PRODUCTS = (*PRODUCTS, aten._grouped_mm.default, aten._scaled_mm.default)
MAKERS = (*ALL_PRODUCTS, *ROW_ADDITIONS)
"""What makes a gradient: products, and additions of rows that were looked up."""
FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


class Stop(Exception):
    """Raised by a rule with the reason why a selection cannot go below a node."""


def make_early(node: fx.Node) -> None:
    """Move ``node``, which selects from a gradient or scores it, right behind that gradient.

    Autograd differentiates taps last and puts ``node`` at the end of the graph. If it stayed
    there, every layer's factors would stay in memory until then.
    """
    g = node.args[0]
    if isinstance(g, fx.Node) and g.op == "call_function":
        g.append(node)


class Planned:
    """A node that is not in the graph yet, with the attributes it will have."""

    op = "call_function"

    def __init__(
        self, target: Any, args: Any, kwargs: Any, value: Any, stop: str | None = None
    ) -> None:
        self.target, self.args, self.kwargs, self.meta = target, args, kwargs, {"val": value}
        self.stop = stop
        """For a selection that stays above its input: the reason. Otherwise None."""


Value = fx.Node | Planned


def values(arguments: Any) -> Any:
    """The arguments of a call, with each node replaced by its fake value."""
    return fx.node.map_aggregate(
        arguments, lambda x: x.meta["val"] if isinstance(x, (fx.Node, Planned)) else x
    )


def planned_in(arguments: Any) -> Iterator[Planned]:
    """The planned nodes among the arguments of a call."""
    found: list[Planned] = []
    fx.node.map_aggregate(arguments, lambda x: found.append(x) if isinstance(x, Planned) else None)
    yield from found


def insert(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a node before another one; it gets its own value and the other node's origin."""
    with tree_leaves(before.meta["val"])[0].fake_mode:  # an operator may return several
        value = target(*values(args), **values(kwargs))
    return _insert(before, target, args, kwargs, value)


def _insert(before: fx.Node, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        name = getattr(target, "overloadpacket", target).__name__
        new = before.graph.create_node("call_function", target, args, kwargs, name)
    new.meta["val"] = value
    # Do not copy all of meta: entries for the old operator's signature would mislead Inductor.
    for key in ("stack_trace", "nn_module_stack", "partitioner_tag", "autograd_backward"):
        if key in before.meta:
            new.meta[key] = before.meta[key]
    return new


def emit(plan: Planned, push: Push) -> fx.Node:
    """Add the nodes that ``plan`` needs to the graph, before the selection that was pushed."""
    nodes: dict[Planned, fx.Node] = {}

    def node_of(argument: Any) -> Any:
        return nodes[argument] if isinstance(argument, Planned) else argument

    for planned in push.needed(plan):
        args, kwargs = fx.node.map_aggregate((planned.args, planned.kwargs), node_of)
        nodes[planned] = _insert(push.select, planned.target, args, kwargs, planned.meta["val"])
    return nodes[plan]


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` and all nodes that only it used."""
    waiting, gone = [node], set()
    while waiting:
        node = waiting.pop()
        parts = [user for user in node.users if user.target is operator.getitem and not user.users]
        for part in parts:
            graph.erase_node(part)
        if node in gone or node.users or node.op != "call_function":
            continue
        gone.add(node)
        waiting += node.all_input_nodes
        graph.erase_node(node)


class Push:
    """A selection that moves down."""

    def __init__(
        self,
        rules: Mapping[Any, Rule],
        graph: fx.Graph,
        select: fx.Node,
        indices: Any,
        scale: Any,
        block: list[Any],
    ) -> None:
        self.rules = rules
        self.graph, self.select, self.indices, self.scale = graph, select, indices, scale
        self.block = block  # empty, or the argument of the operators after ``dim``
        self.planned: list[Planned] = []  # in the order in which rules planned them
        self.made: dict[Any, Value] = {}  # so that a node reached by two paths is selected once
        self.reports = True  # whether to report a selection that stays above something

    @property
    def rank(self) -> int:
        """r."""
        return int(self.indices.meta["val"].shape[-1])

    def of(self, node: Any, dim: int, user: Any) -> Value:
        """The selection of ``node``, which ``user`` uses, pushed down as far as possible."""
        key = node, dim, self.indices, self.scale
        if key not in self.made:
            try:
                self.made[key] = self._below(node, dim, user)
            except Stop as reason:
                self.made[key] = self.selected(node, dim, str(reason) if self.reports else None)
        return self.made[key]

    def _below(self, node: Any, dim: int, user: fx.Node) -> Value:
        """The selection of ``node``, computed from selections of its inputs."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            raise Stop("its gradient is an input of the graph")
        self.check(node, user)
        rule = self.rules.get(node.target)
        if rule is None:
            made_by = node.args[0] if node.target is operator.getitem else node
            raise Stop(f"no rule for {cast(fx.Node, made_by).target}")
        return rule(self, node, dim % node.meta["val"].dim())

    def selected(self, node: Any, dim: int, stop: str | None = None) -> Planned:
        """A selection that stays above ``node``; ``stop`` is the reason, if it is reported."""
        selection = self.call(SELECT, node, self.indices, self.scale, dim, *self.block)
        selection.stop = stop
        return selection

    def needed(self, plan: Value) -> list[Planned]:
        """``plan`` and all planned nodes that it needs, inputs before their users."""
        found: set[Planned] = set()
        ahead = [plan]
        while ahead:
            value = ahead.pop()
            if isinstance(value, Planned) and value not in found:
                found.add(value)
                ahead += planned_in((value.args, value.kwargs))
        return [planned for planned in self.planned if planned in found]

    def is_whole(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether something besides selections needs ``node``, so that it is in memory anyway."""
        return self._needs_whole(node, user) is not None

    def check(self, node: fx.Node, user: fx.Node) -> None:
        """Raise Stop if something besides selections needs ``node``."""
        if (whole := self._needs_whole(node, user)) is not None:
            raise Stop(f"{node.name} is needed whole by {whole.name}")

    def _needs_whole(self, node: fx.Node, user: fx.Node) -> fx.Node | None:
        """Another use of ``node``, direct or through later nodes, that needs its full value.

        None if only ``user`` and selections need it.

        A sum may use a gradient twice, and parts of a gradient may each be selected, as with
        concatenated weights. These do not count: once all selections are pushed, nothing forms the
        whole gradient.
        """
        seen: set[tuple[fx.Node, fx.Node]] = set()
        ahead = [(node, other) for other in node.users if other is not user]
        while ahead:
            used, other = ahead.pop()
            if (used, other) in seen or other.target is SELECT:
                continue
            seen.add((used, other))
            if not self._hands_on(other, used):
                return other
            ahead += [(other, next_one) for next_one in other.users]
        return None

    def _hands_on(self, node: fx.Node, used: fx.Node) -> bool:
        """Whether a selection of ``node`` needs only the same selection of what it uses."""
        if node.target in ADDED_PRODUCTS and used not in node.args[1:]:
            return True  # a product is added to it
        known = node.target in self.rules and node.target not in (*PRODUCTS, *FACTORS)
        return node.target in SPLITS or known

    def spans(self, x: fx.Node, node: fx.Node, dim: int) -> bool:
        """Whether ``x`` has the selected dimension of ``node``, and is not broadcast along it."""
        shape, full = x.meta["val"].shape, node.meta["val"].shape
        own = dim - len(full) + len(shape)
        return own >= 0 and bool(shape[own] == full[dim])

    def broadcast(self, x: fx.Node, node: fx.Node, dim: int) -> Value:
        """The selection of ``x``, which ``node`` broadcasts to its own shape."""
        if self.spans(x, node, dim):
            return self.of(x, dim - node.meta["val"].dim() + x.meta["val"].dim(), node)
        if self.scale is None:
            return x
        raise Stop(f"{node.name} broadcasts along the selected dimension")

    def unscaled(self) -> Push:
        """The same rows without ρ."""
        return self if self.scale is None else self.other(self.indices, None, self.block)

    def moved(self, start: int) -> Push:
        """The selection of the same rows in a larger tensor, where they begin at ``start``."""
        if start == 0:
            return self
        indices = self.call(aten.add.Tensor, self.indices, start)
        return self.other(indices, self.scale, self.aligned(start))

    def inside(
        self, x: fx.Node, start: int, size: int, dim: int, user: fx.Node, other: Value | None
    ) -> Value:
        """``x`` holds rows ``start`` to ``start + size``. Take selected rows in that range from
        ``x``, and the rest from ``other``.

        To keep the shape, all r rows are computed from ``x``; for a row outside of ``x`` any of its
        rows is taken.
        """
        value = x.meta["val"]
        if value.shape[dim] == 0:
            shape = [self.rank if d == dim else size for d, size in enumerate(value.shape)]
            kind = {"dtype": value.dtype, "device": value.device}
            return self.call(aten.full.default, shape, 0, **kind) if other is None else other
        shifted = self.call(aten.sub.Tensor, self.indices, start) if start else self.indices
        place = self.call(aten.remainder.Scalar, shifted, size)
        within = self.other(place, self.scale, self.aligned(start, size))
        below = within.of(x, dim, user)
        if other is None:
            return below
        mask = self.call(aten.eq.Tensor, place, shifted)
        along = [-1 if d == dim else 1 for d in range(value.dim())]
        mask = self.call(aten.reshape.default, mask, along)
        return self.call(aten.where.self, mask, below, other)

    def aligned(self, *offsets: int) -> list[Any]:
        """The block, if runs moved by ``offsets`` still begin at multiples of it; else empty."""
        kept = self.block and all(offset % self.block[0] == 0 for offset in offsets)
        return self.block if kept else []

    def other(
        self, indices: Any, scale: Any, block: list[Any], rules: Mapping[Any, Rule] | None = None
    ) -> Push:
        """The same rows, renumbered for a tensor in which they have other positions."""
        push = Push(rules or self.rules, self.graph, self.select, indices, scale, block)
        push.planned, push.made, push.reports = self.planned, self.made, self.reports
        return push

    def quiet(self) -> Push:
        """The same selection without reports, for values that are no full gradient."""
        push = self.other(self.indices, self.scale, self.block)
        push.reports = False
        return push

    def contiguous(self, x: Value) -> Value:
        """``x``, copied if it is not contiguous; collectives need contiguous tensors."""
        if x.meta["val"].is_contiguous():
            return x
        return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Planned:
        """A planned call of ``target``."""
        args = fx.node.map_aggregate(args, self._known)
        with self.select.meta["val"].fake_mode:
            value = target(*values(args), **values(kwargs))
        planned = Planned(target, args, kwargs, value)
        self.planned.append(planned)
        return planned

    def _known(self, value: Any) -> Any:
        """The node that holds a symbolic size, because a graph's code cannot name a symbol."""
        if not isinstance(value, torch.SymInt):
            return value
        for node in self.graph.nodes:
            if node is self.select:
                break
            known = node.meta.get("val")
            if isinstance(known, torch.SymInt) and known.node.expr == value.node.expr:
                return node
            if node.op == "placeholder" and isinstance(known, torch.Tensor):
                for d, size in enumerate(known.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                        return self.call(aten.sym_size.int, node, d)
        return value  # Inductor reads graphs node by node, and knows the symbol


Rule = Callable[[Push, fx.Node, int], Value]
