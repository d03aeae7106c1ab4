"""Which matrix products of a joint graph belong to which weight, and what they cost.

A joint graph holds the forward, the products with output gradients, and the gradients of all
inputs. From a weight, views and conversions lead to the products that use it; from its gradient (or
its proxy's, if it is taken) similar operations lead back to the products that make it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from grass_fx import _torch_compat as compat
from grass_fx.inspect.sizes import size_expression
from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.passes.push import SPLITS
from grass_fx.passes.push_rules import CONVERSIONS, RESHAPES
from grass_fx.passes.push_rules import COPIES as SAME

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

# product -> the positions of its two factors
PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2), aten._grouped_mm.default: (0, 1), SELECTED_MM: (0, 1),
    aten.mul.Tensor: (0, 1),
}  # fmt: skip
VIEWS = {
    *RESHAPES, *SPLITS, aten.permute.default, aten.t.default, aten.transpose.int,
    aten.squeeze.default, aten.expand.default, aten.select.int, aten.slice.Tensor,
    operator.getitem,
}  # fmt: skip
COPIES = {
    *SAME, *CONVERSIONS, aten.index.Tensor, aten.index_select.default, aten.cat.default,
}  # fmt: skip
LINEAR = {
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.mul.Tensor, aten.mul.Scalar,
    aten.div.Tensor, aten.div.Scalar, aten.sum.dim_IntList, aten.slice_scatter.default,
    aten.select_scatter.default, aten.index_put.default, SELECT, c10d.all_reduce.default,
    c10d.wait_tensor.default, c10d.reduce_scatter_tensor.default,
}  # fmt: skip
# operations with indices -> the positions of what is not one
INDEXED = {
    aten.index.Tensor: (0,), aten.index_select.default: (0,), SELECT: (0,),
    aten.index_put.default: (0, 2), aten.where.self: (1, 2),
}  # fmt: skip
PARTS = {
    aten.select.int,
    aten.slice.Tensor,
    operator.getitem,
}


@dataclass(frozen=True)
class Product:
    """A product, and what part of it is a weight's: concatenated weights share theirs."""

    node: fx.Node
    share: float = 1.0

    @property
    def flops(self) -> Any:
        """Two for each multiplication and addition."""
        a, _ = self.factors
        # Of grouped tokens, (m, b) x (b, n), each goes into one of the products only.
        grouped = self.node.target == aten._grouped_mm.default and self.output.dim() == 3
        sizes = self.output.shape[1:] if grouped else self.output.shape
        inner = 1 if self.node.target == aten.mul.Tensor else a.shape[-1]
        return self._of(2 * _numel([*sizes, inner]))

    @property
    def bytes(self) -> Any:
        """Factors read and result written, once; of a selected product only what it selects."""
        a, b = self.factors
        sizes = [_nbytes(a), _nbytes(b)]
        if self.node.target == SELECTED_MM:
            dim = cast(int, self.node.args[4])
            kept, other = self.output.shape[dim], (a, b)[dim].shape[1 - dim]
            sizes[dim] = _numel((kept, other)) * a.element_size()
        return self._of(sum(sizes) + _nbytes(self.output))

    @property
    def output(self) -> Any:
        """The fake result."""
        return self.node.meta["val"]

    @property
    def factors(self) -> tuple[Any, Any]:
        """The fake factors."""
        first, second = (cast(fx.Node, self.node.args[k]) for k in PRODUCTS[self.node.target])
        return first.meta["val"], second.meta["val"]

    def _of(self, amount: Any) -> Any:
        if self.share == 1:
            return amount
        return round(amount * self.share) if isinstance(amount, int) else amount * self.share


def is_product(node: fx.Node) -> bool:
    """Also of an outer product, as which a product over one token is traced."""
    if node.target != aten.mul.Tensor:
        return node.target in PRODUCTS
    values = [getattr(each, "meta", {}).get("val") for each in node.args]
    sizes = [_numel(value.shape) for value in values if isinstance(value, Tensor)]
    return len(sizes) == 2 and _numel(node.meta["val"].shape) not in sizes


def _numel(shape: Iterable[Any]) -> Any:
    return math.prod(size_expression(size) for size in shape)


def _nbytes(value: Any) -> Any:
    return _numel(value.shape) * value.element_size()


def _part(node: fx.Node, whole: fx.Node) -> Any:
    """What part of ``whole`` the elements of ``node`` are."""
    return _numel(node.meta["val"].shape) / _numel(whole.meta["val"].shape)


@dataclass
class WeightProducts:
    """A weight's products in one joint graph."""

    forward: list[Product]
    input_gradient: list[Product]
    weight_gradient: list[Product]
    path: list[fx.Node]
    """What is done with the products of the gradient, up to the graph's output."""


def weight_products(graph: fx.Graph, weight: int, proxy: int | None) -> WeightProducts | None:
    """The products of the weight that is input ``weight``; None if it is not in the graph.

    ``proxy``: the input that receives its compact gradient, if it is taken.
    """
    places = {compat.input_position(node): node for node in graph.find_nodes(op="placeholder")}
    if weight not in places:
        return None
    uses = list(_uses(places[weight], 1.0))
    if not uses and proxy is None:
        # Looked up in or added, say: what leads to its gradient is no product of its own.
        return WeightProducts([], [], [], [])
    backward = _backward_nodes(graph)
    forward = [use for use in uses if use.node not in backward]
    input_gradient = [use for use in uses if use.node in backward]
    gradient = compat.gradient_of_input(graph, weight if proxy is None else proxy)
    path: dict[fx.Node, None] = {}
    # Selected rows are masked where a use reads a part of the weight. Behind the mask of a dense
    # gradient, an embedding's, are products of others.
    through = LINEAR if proxy is None else {*LINEAR, aten.where.self}
    made = {} if gradient is None else {p.node: p for p in _makers(gradient, 1.0, path, through)}
    return WeightProducts(forward, input_gradient, list(made.values()), list(path))


def _backward_nodes(graph: fx.Graph) -> Collection[fx.Node]:
    """All that depends on an output's gradient."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        tangent = node.op == "placeholder" and compat.is_tangent(node)
        if tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _uses(node: fx.Node, share: float) -> Iterator[Product]:
    """The products below ``node``; each once, however often it uses it."""
    for user in node.users:
        if is_product(user):
            if node in [user.args[k] for k in PRODUCTS[user.target]]:  # and not added to it
                yield Product(user, share)
        elif user.target == aten.cat.default:
            yield from _uses(user, share * _part(node, user))
        elif user.target in VIEWS or user.target in COPIES:
            yield from _uses(user, share)


def _makers(
    node: fx.Node, share: float, path: dict[fx.Node, None], through: Collection[Any]
) -> Iterator[Product]:
    """The products that ``node`` is made of by operations of ``through``, and those on the way."""
    if is_product(node):
        path[node] = None
        yield Product(node, share)
    elif node.target in VIEWS or node.target in COPIES or node.target in through:
        inputs = node.all_input_nodes
        if node.target in INDEXED:
            inputs = [cast(fx.Node, node.args[k]) for k in INDEXED[node.target]]
        elif node.target in PARTS:
            inputs = [_whole(node)]
            share *= _part(node, inputs[0])
        for each in inputs:
            if each.op == "call_function":
                yield from _makers(each, share, path, through)
        path[node] = None


def _whole(part: fx.Node) -> fx.Node:
    """What a node takes a part of; ``getitem`` takes it of a split."""
    whole = part.all_input_nodes[0]
    return whole.all_input_nodes[0] if part.target is operator.getitem else whole
