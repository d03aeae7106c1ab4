"""Places for the nodes of a small graph, in layers from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grass_fx.inspect.findings import GraphNode

WIDTH, HEIGHT = 172, 40
"""Of a node, in pixels."""
GAP, RISE = 16, 30
"""Between nodes beside and above each other."""
LANE = 14
"""Width of an edge that passes a layer."""
LETTERS = 23
"""That fit into a node."""

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "selected_mm"}
SELECTING = {"select", "selected_mm"}


def roles(nodes: Sequence[GraphNode]) -> list[str]:
    """What each node is: "full" or "compact" for gradients of the weight, else its kind.

    Gradients are the products and what is made of them; compact ones are selected from others.
    """
    found: dict[str, str] = {}
    for node in nodes:
        made_of = {found.get(name) for name in node.inputs}
        if node.kind != "op":
            found[node.name] = node.kind
        elif node.label in SELECTING or "compact" in made_of:
            found[node.name] = "compact"
        elif node.label in PRODUCTS or "full" in made_of:
            found[node.name] = "full"
        else:
            found[node.name] = "op"
    return [found[node.name] for node in nodes]


def shown(nodes: Sequence[GraphNode]) -> list[GraphNode]:
    """Without the sizes that a graph of symbolic shapes computes with."""
    return [node for node in nodes if node.shape or node.kind == "op"]


def place(nodes: Sequence[GraphNode]) -> dict[str, Any]:
    """A drawing as plain data: its size, the nodes' left upper corners, the edges' points.

    ``nodes`` are in the order of execution; inputs that are not among them are left out. Each
    node is as low as what uses it allows, so that factors stand right above their product.
    """
    number = {node.name: k for k, node in enumerate(nodes)}
    edges = [(number[i], number[n.name]) for n in nodes for i in n.inputs if i in number]
    layer = _layers(len(nodes), edges)
    chains = []  # each edge as the nodes, and the lanes between them, that it runs through
    for start, end in edges:
        lanes = range(len(layer), len(layer) + layer[end] - layer[start] - 1)
        layer += range(layer[start] + 1, layer[end])
        chains.append([start, *lanes, end])
    rows = _ordered(layer, chains)
    widths = [WIDTH if k < len(nodes) else LANE for k in range(len(layer))]
    spans = [sum(widths[k] for k in row) + GAP * (len(row) - 1) for row in rows]
    across, middle = max(spans, default=0), [0.0] * len(layer)
    for row, span in zip(rows, spans, strict=True):
        left = (across - span) / 2
        for k in row:
            middle[k] = left + widths[k] / 2
            left += widths[k] + GAP
    top = [level * (HEIGHT + RISE) for level in layer]
    drawn = [
        [round(middle[k] - WIDTH / 2), top[k], role, *map(_short, (node.label, node.shape))]
        + ([1] if node.label in PRODUCTS else [0])
        for k, (node, role) in enumerate(zip(nodes, roles(nodes), strict=True))
    ]
    lines = [_line([(middle[k], top[k]) for k in chain]) for chain in chains]
    return {"size": [across, len(rows) * (HEIGHT + RISE) - RISE], "nodes": drawn, "edges": lines}


def _layers(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """0 at the top; each node one above the highest of its users, or at the bottom."""
    depth = [0] * count  # from the bottom
    for start, end in sorted(edges, reverse=True):  # users come later, and are done
        depth[start] = max(depth[start], depth[end] + 1)
    return [max(depth, default=0) - each for each in depth]


def _ordered(layer: Sequence[int], chains: Sequence[Sequence[int]]) -> list[list[int]]:
    """Nodes and lanes of each layer from left to right, near what they are connected to."""
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for k, level in enumerate(layer):
        rows[level].append(k)
    near: dict[int, dict[int, list[int]]] = {-1: {}, 1: {}}
    for chain in chains:
        for a, b in zip(chain, chain[1:], strict=False):
            near[1].setdefault(a, []).append(b)
            near[-1].setdefault(b, []).append(a)
    for side in (1, -1, 1, -1, 1):  # the bottom is one product: look down first
        at = {k: (i + 0.5) / len(row) for row in rows for i, k in enumerate(row)}
        for row in rows if side < 0 else reversed(rows):
            mean = {
                k: sum(at[n] for n in found) / len(found) if (found := near[side].get(k)) else at[k]
                for k in row
            }
            row.sort(key=lambda k: mean[k])
            at.update({k: (i + 0.5) / len(row) for i, k in enumerate(row)})
    return rows


def _line(points: Sequence[tuple[float, float]]) -> list[list[int]]:
    """From the lower edge of the first node to the upper edge of the last."""
    (x, y), *between, (end, bottom) = points
    line = [(x, y + HEIGHT), *((a, b + h) for a, b in between for h in (0, HEIGHT)), (end, bottom)]
    return [[round(a), round(b)] for a, b in line]


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
