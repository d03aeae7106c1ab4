"""Finds the matrix products and lookups of each weight in a joint graph, and their costs.

A joint graph holds the forward, the products with output gradients, and the gradients of all
inputs. To find the products that use a weight, the search follows views and conversions from the
weight. To find those that make its gradient, it goes back from the gradient through similar
operations; for a taken weight it starts at the gradient of its proxy.
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
from grass_fx.ops import MM_SIGNS, SELECT, SELECTED_MM
from grass_fx.passes.push import ROW_ADDITIONS, SPLITS
from grass_fx.passes.push_rules import CONVERSIONS, RESHAPES
from grass_fx.passes.push_rules import COPIES as SAME

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

# product -> the positions of its two factors
PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2), aten._grouped_mm.default: (0, 1), SELECTED_MM: (0, 1),
    aten.mul.Tensor: (0, 1), MM_SIGNS: (0, 1), aten._scaled_mm.default: (0, 1),
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
# operations with indices -> the positions of the arguments that are no indices
INDEXED = {
    aten.index.Tensor: (0,), aten.index_select.default: (0,), SELECT: (0,),
    aten.index_put.default: (0, 2), aten.where.self: (1, 2),
}  # fmt: skip
PARTS = {
    aten.select.int,
    aten.slice.Tensor,
    operator.getitem,
}
LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}


@dataclass(frozen=True)
class Product:
    """A product, and the share of it that belongs to a weight: concatenated weights share one."""

    node: fx.Node
    share: float = 1.0

    @property
    def flops(self) -> Any:
        """FLOPs; a multiplication and its addition count as two."""
        a, b = self.factors
        if self.node.target == MM_SIGNS:  # a GPU computes C beside the signs
            beside = _numel(self.output[0].shape) if a.device.type == "cuda" else 0
            return self._of(2 * _numel([a.shape[1]]) * (_numel([a.shape[0], b.shape[1]]) + beside))
        # In a grouped product (m, b) x (b, n), each token takes part in only one of the products.
        grouped = self.node.target == aten._grouped_mm.default and self.output.dim() == 3
        sizes = self.output.shape[1:] if grouped else self.output.shape
        inner = 1 if self.node.target == aten.mul.Tensor else a.shape[-1]
        return self._of(2 * _numel([*sizes, inner]))

    @property
    def bytes(self) -> Any:
        """Bytes to read the factors and write the result, each once.

        A selected product reads only the selected part of its factor.
        """
        a, b = self.factors
        sizes = [_nbytes(a), _nbytes(b)]
        if self.node.target == SELECTED_MM:
            dim = cast(int, self.node.args[4])
            kept, other = self.output.shape[dim], (a, b)[dim].shape[1 - dim]
            sizes[dim] = _numel((kept, other)) * a.element_size()
        written = self.output if isinstance(self.output, tuple) else (self.output,)
        return self._of(sum(sizes) + sum(map(_nbytes, written)))

    @property
    def output(self) -> Any:
        """The result, as a fake tensor; C and the signs of a product that yields both."""
        return self.node.meta["val"]

    @property
    def factors(self) -> tuple[Any, Any]:
        """The two factors, as fake tensors."""
        first, second = (cast(fx.Node, self.node.args[k]) for k in PRODUCTS[self.node.target])
        return first.meta["val"], second.meta["val"]

    def _of(self, amount: Any) -> Any:
        if self.share == 1:
            return amount
        return round(amount * self.share) if isinstance(amount, int) else amount * self.share


class Lookup(Product):
    """A lookup of rows, or the addition of rows of D that is its gradient."""

    @property
    def flops(self) -> Any:
        """FLOPs: one for each number of D."""
        return self._of(0 if self.node.target in LOOKUPS else _numel(self._rows.shape))

    @property
    def bytes(self) -> Any:
        """Bytes to read and write the rows; of a gradient, to read D and write the result."""
        return self._of(_nbytes(self._rows) + _nbytes(self.output))

    @property
    def _rows(self) -> Any:
        if self.node.target in LOOKUPS:
            return self.output
        return cast(fx.Node, self.node.args[ROW_ADDITIONS[self.node.target]]).meta["val"]


def is_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product, or the outer product that stands for one of one token."""
    if node.target != aten.mul.Tensor:
        return node.target in PRODUCTS
    values = [getattr(arg, "meta", {}).get("val") for arg in node.args]
    sizes = [_numel(value.shape) for value in values if isinstance(value, Tensor)]
    return len(sizes) == 2 and _numel(node.meta["val"].shape) not in sizes


def _numel(shape: Iterable[Any]) -> Any:
    return math.prod(size_expression(size) for size in shape)


def _nbytes(value: Any) -> Any:
    return _numel(value.shape) * value.element_size()


def _part(node: fx.Node, whole: fx.Node) -> Any:
    """The number of elements of ``node``, as a fraction of those of ``whole``."""
    return _numel(node.meta["val"].shape) / _numel(whole.meta["val"].shape)


@dataclass
class WeightProducts:
    """A weight's products in one joint graph."""

    forward: list[Product]
    input_gradient: list[Product]
    weight_gradient: list[Product]
    path: list[fx.Node]
    """The products that make the gradient, and the operations from them to the graph's output."""


def weight_products(graph: fx.Graph, weight: int, proxy: int | None) -> WeightProducts | None:
    """The products of the weight at input position ``weight``; None if the graph does not have it.

    ``proxy`` is the position of the input that receives its compact gradient, if it is taken.
    """
    places = {compat.input_position(node): node for node in graph.find_nodes(op="placeholder")}
    if weight not in places:
        return None
    uses = list(_uses(places[weight], 1.0))
    if not uses and proxy is None:
        # It may be added to something: then no product in its gradient belongs to it.
        return WeightProducts([], [], [], [])
    backward = compat.backward_nodes(graph)
    forward = [use for use in uses if use.node not in backward]
    input_gradient = [use for use in uses if use.node in backward]
    gradient = compat.gradient_of_input(graph, weight if proxy is None else proxy)
    path: dict[fx.Node, None] = {}
    # Where a use reads a part of a taken weight, a mask is put on its selected rows: look behind
    # it. Behind the mask in a dense gradient, as of an embedding, are products of other weights.
    through = LINEAR if proxy is None else {*LINEAR, aten.where.self}
    makers = {} if gradient is None else {p.node: p for p in _makers(gradient, 1.0, path, through)}
    return WeightProducts(forward, input_gradient, list(makers.values()), list(path))


def _uses(node: fx.Node, share: float) -> Iterator[Product]:
    """The products and lookups that use ``node``, each once, even if it uses the node twice."""
    for user in node.users:
        if user.target in LOOKUPS and _is_matrix(node):
            yield Lookup(user, share)
        elif is_product(user):
            if node in [user.args[k] for k in PRODUCTS[user.target]]:  # a factor, not a summand
                yield Product(user, share)
        elif user.target == aten.cat.default:
            yield from _uses(user, share * _part(node, user))
        elif user.target in VIEWS or user.target in COPIES:
            yield from _uses(user, share)


def _makers(
    node: fx.Node, share: float, path: dict[fx.Node, None], through: Collection[Any]
) -> Iterator[Product]:
    """The products and lookups from which ``node`` is computed by views, copies and operations of
    ``through``. Every node on the way is added to ``path``.
    """
    if node.target is operator.getitem and is_product(node.all_input_nodes[0]):
        path[node] = None
        node = node.all_input_nodes[0]  # a product with two results
    if is_product(node):
        path[node] = None
        yield Product(node, share)
    elif node.target in ROW_ADDITIONS and _is_matrix(node):
        yield Lookup(node, share)
        base = node.args[0]
        if ROW_ADDITIONS[node.target] and isinstance(base, fx.Node) and base.all_input_nodes:
            yield from _makers(base, share, path, through)  # it adds to another gradient
        path[node] = None
    elif node.target in VIEWS or node.target in COPIES or node.target in through:
        inputs = node.all_input_nodes
        if node.target in INDEXED:
            inputs = [cast(fx.Node, node.args[k]) for k in INDEXED[node.target]]
        elif node.target in PARTS:
            inputs = [_whole(node)]
            share *= _part(node, inputs[0])
        for source in inputs:
            if source.op == "call_function":
                yield from _makers(source, share, path, through)
        path[node] = None


def _is_matrix(node: fx.Node) -> bool:
    """Stacks of matrices are indexed, too, but by the matrix of each token."""
    return bool(node.meta["val"].dim() == 2)


def _whole(part: fx.Node) -> fx.Node:
    """The node of which ``part`` takes a part; for ``getitem`` the input of its split."""
    whole = part.all_input_nodes[0]
    return whole.all_input_nodes[0] if part.target is operator.getitem else whole
