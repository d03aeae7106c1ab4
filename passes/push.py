"""A selection on its way down: what the rules of ``push_rules`` make their nodes with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import SELECT

aten = torch.ops.aten

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
PRODUCTS = (
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
)  # fmt: skip
FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


class Stop(Exception):
    """Why a selection cannot go below a node."""


def make_early(node: fx.Node) -> None:
    """Move a selection or its norms up to the gradient they are of.

    Taps are differentiated last: at the end of the graph, where autograd has put it, ``node`` would
    keep the gradient's factors alive until then, those of all layers.
    """
    g = node.args[0]
    if isinstance(g, fx.Node) and g.op == "call_function":
        g.append(node)


class Push:
    """One selection on its way down."""

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
        self.block = block  # empty, or the one argument after ``dim``
        self.stops: list[str] = []
        self.made: dict[Any, fx.Node] = {}  # nodes reached on two ways are selected once

    @property
    def rank(self) -> int:
        """r."""
        return int(self.indices.meta["val"].shape[-1])

    def below(self, node: Any, dim: int, user: fx.Node) -> fx.Node | None:
        """The selection of ``node`` along ``dim``, made below it; None if it stays above it."""
        try:
            if not isinstance(node, fx.Node) or node.op != "call_function":
                raise Stop("its gradient is an input of the graph")
            self.check(node, user)
            rule = self.rules.get(node.target)
            if rule is None:
                made_by = node.args[0] if node.target is operator.getitem else node
                raise Stop(f"no rule for {cast(fx.Node, made_by).target}")
            return rule(self, node, dim % node.meta["val"].dim())
        except Stop as reason:
            self.stops.append(str(reason))
            return None

    def is_whole(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether more of ``node`` is needed than selections, so that it is in memory anyway."""
        return self._needs_whole(node, user) is not None

    def check(self, node: fx.Node, user: fx.Node) -> None:
        """Stop if more of ``node`` is needed than selections."""
        if (whole := self._needs_whole(node, user)) is not None:
            raise Stop(f"{node.name} is needed whole by {whole.name}")

    def _needs_whole(self, node: fx.Node, user: fx.Node) -> fx.Node | None:
        """A user of ``node``, besides ``user``, that leads to more than selections; None if none.

        A sum may use a gradient twice, and parts of one may each be selected, as those of
        concatenated weights are: the whole will be gone when all of them are pushed.
        """
        seen: set[fx.Node] = set()
        ahead = [other for other in node.users if other is not user]
        while ahead:
            other = ahead.pop()
            if other in seen or other.target is SELECT:
                continue
            seen.add(other)
            hands_on = other.target in SPLITS or (
                other.target in self.rules and other.target not in (*PRODUCTS, *FACTORS)
            )
            if not hands_on:
                return other
            ahead += other.users
        return None

    def of(self, node: Any, dim: int, user: fx.Node) -> fx.Node:
        """The selection of ``node``, made as deep as it goes."""
        key = node, dim, self.indices, self.scale
        if key not in self.made:
            below = self.below(node, dim, user)
            self.made[key] = self.selected(node, dim) if below is None else below
        return self.made[key]

    def selected(self, node: fx.Node, dim: int) -> fx.Node:
        """The selection of ``node``, made above it."""
        return self.call(SELECT, node, self.indices, self.scale, dim, *self.block)

    def spans(self, x: fx.Node, node: fx.Node, dim: int) -> bool:
        """Whether ``x`` has the selected dimension of ``node``, and is not broadcast along it."""
        shape, full = x.meta["val"].shape, node.meta["val"].shape
        own = dim - len(full) + len(shape)
        return own >= 0 and bool(shape[own] == full[dim])

    def broadcast(self, x: fx.Node, node: fx.Node, dim: int) -> fx.Node:
        """The selection of ``x`` as it stands in the shape of ``node``, its user."""
        if self.spans(x, node, dim):
            return self.of(x, dim - node.meta["val"].dim() + x.meta["val"].dim(), node)
        if self.scale is None:
            return x
        raise Stop(f"{node.name} broadcasts along the selected dimension")

    def unscaled(self) -> Push:
        """The same rows without ρ."""
        return self if self.scale is None else self.other(self.indices, None, self.block)

    def moved(self, start: int) -> Push:
        """The same rows of a tensor in which they begin at ``start``."""
        if start == 0:
            return self
        indices = self.call(aten.add.Tensor, self.indices, start)
        return self.other(indices, self.scale, self.aligned(start))

    def inside(
        self, x: fx.Node, start: int, size: int, dim: int, user: fx.Node, other: fx.Node | None
    ) -> fx.Node:
        """The selected rows that lie in ``x``, which is rows [start, start + size); else ``other``.

        All r rows of ``x`` are made, those outside from some row of it, so that shapes stay.
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
        """The block, if runs that move by ``offsets`` still begin at a multiple of it."""
        kept = self.block and all(offset % self.block[0] == 0 for offset in offsets)
        return self.block if kept else []

    def other(
        self, indices: Any, scale: Any, block: list[Any], rules: Mapping[Any, Rule] | None = None
    ) -> Push:
        """The same selection by other indices, as they count rows below some operation."""
        push = Push(rules or self.rules, self.graph, self.select, indices, scale, block)
        push.stops, push.made = self.stops, self.made
        return push

    def contiguous(self, x: fx.Node) -> fx.Node:
        """``x``, copied where it does not lie so; what a collective sends has to."""
        if x.meta["val"].is_contiguous():
            return x
        return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the selection, with its value and the old one's origin."""
        args = fx.node.map_aggregate(args, self._known)
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

    def _known(self, value: Any) -> Any:
        """A symbolic size as the node that is it: in the code of a graph a symbol has no value."""
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
        return value  # Inductor, which reads graphs node by node, knows what it is


Rule = Callable[[Push, fx.Node, int], fx.Node]
