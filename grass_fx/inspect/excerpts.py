"""Cut out the part of a graph that computes a weight's gradient, small enough to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from grass_fx import _torch_compat as compat
from grass_fx.inspect.findings import GraphNode
from grass_fx.inspect.products import COPIES, VIEWS
from grass_fx.inspect.sizes import size_expression
from grass_fx.ops import SELECT

MOST = 40
"""The largest number of nodes in a picture."""


def draw(path: Sequence[fx.Node], labels: Mapping[int, str]) -> tuple[GraphNode, ...]:
    """The nodes that compute a weight's gradient, in execution order, with some of their inputs.

    ``path`` has the products that make the gradient and the operations after them. ``labels``
    names graph inputs by their position.
    """
    shown: dict[fx.Node, bool] = dict.fromkeys(path, True)  # node -> whether its inputs are shown
    waiting = [used for node in path for used in node.all_input_nodes]
    while waiting and len(shown) < MOST:
        node = waiting.pop(0)
        if node in shown:
            continue
        shown[node] = node.target in VIEWS or node.target in COPIES or node.target is SELECT
        if shown[node]:
            waiting += node.all_input_nodes
    ordered = sorted(shown)  # nodes compare by their place in the graph
    return tuple(_drawn(node, shown, labels) for node in ordered)


def _drawn(node: fx.Node, shown: Mapping[fx.Node, bool], labels: Mapping[int, str]) -> GraphNode:
    value = node.meta.get("val")
    shape = "" if not isinstance(value, Tensor) else _shape(value)
    if node.op == "placeholder":
        place = compat.input_position(node)
        label = node.name if place is None else labels.get(place, node.name)
        return GraphNode(node.name, "input", label, shape, ())
    op = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    whole = shown[node]
    inputs = [used.name for used in node.all_input_nodes if used in shown] if whole else []
    return GraphNode(node.name, "op" if whole else "rest", op, shape, (*inputs,))


def _shape(value: Tensor) -> str:
    return "(" + ", ".join(str(size_expression(size)) for size in value.shape) + ")"
