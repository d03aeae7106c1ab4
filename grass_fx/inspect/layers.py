"""Lays out the nodes of a small graph in layers from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grass_fx.inspect.findings import GraphNode

WIDTH, HEIGHT = 172, 40
"""Size of a node, in pixels."""
GAP, RISE = 16, 30
"""Horizontal and vertical distance between nodes."""
LANE = 14
"""Width reserved for an edge that passes through a layer."""
LETTERS = 23
"""How many letters fit into a node."""

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "selected_mm"}
SELECTING = {"select", "selected_mm"}


def roles(nodes: Sequence[GraphNode]) -> list[str]:
    """The role of each node: "full" or "compact" for gradients of the weight, else its kind.

    Products and all nodes computed from them are gradients. They are compact from the node on that
    selects columns or rows.
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
    """The nodes without the size inputs of a graph with symbolic shapes."""
    return [node for node in nodes if node.shape or node.kind == "op"]


def place(nodes: Sequence[GraphNode]) -> dict[str, Any]:
    """A drawing as plain data: its size, the nodes' upper left corners, the edges' points.

    ``nodes`` are in execution order; inputs that are not among them are left out. Each node stands
    as low as its users allow, so that factors are right above their product.
    """
    number = {node.name: k for k, node in enumerate(nodes)}
    edges = [(number[i], number[n.name]) for n in nodes for i in n.inputs if i in number]
    layer = _layers(len(nodes), edges)
    chains = []  # each edge as its first node, the lanes it runs through, and its last node
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
    """Each node's layer, 0 at the top: one above its highest user, or the bottom without users."""
    depth = [0] * count  # counted from the bottom
    for start, end in sorted(edges, reverse=True):  # users have higher numbers, so theirs is final
        depth[start] = max(depth[start], depth[end] + 1)
    return [max(depth, default=0) - level for level in depth]


def _ordered(layer: Sequence[int], chains: Sequence[Sequence[int]]) -> list[list[int]]:
    """The nodes and lanes of each layer from left to right, near the ones they connect to."""
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for k, level in enumerate(layer):
        rows[level].append(k)
    near: dict[int, dict[int, list[int]]] = {-1: {}, 1: {}}
    for chain in chains:
        for a, b in zip(chain, chain[1:], strict=False):
            near[1].setdefault(a, []).append(b)
            near[-1].setdefault(b, []).append(a)
    for side in (1, -1, 1, -1, 1):  # start with users below, since the bottom is one product
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
    """The points of an edge, from the first node's lower side to the last node's upper side."""
    (x, y), *between, (end, bottom) = points
    line = [(x, y + HEIGHT), *((a, b + h) for a, b in between for h in (0, HEIGHT)), (end, bottom)]
    return [[round(a), round(b)] for a, b in line]


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
