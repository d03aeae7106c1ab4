"""Push the norms of a scoring step down to the matmul that makes a weight gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import MM_SQUARED_NORMS, SELECT, SQUARED_NORMS
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import make_early
from grass_fx.passes.push_rules import CONVERSIONS, COPIES, RESHAPES, dim_below_reshape

aten = torch.ops.aten

LARGE_GRADIENT = 64 << 20
"""With ``scoring="auto"`` a GPU forms no full gradient of this many bytes or more."""


def push_norms_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Replace ``squared_norms`` of a full weight gradient by norms taken tile by tile.

    Before::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm = torch.ops.aten.mm.default(permute, x)                 # G = DᵀX, (m, n)
        select = torch.ops.grass.select.default(mm, indices, None, 0)
        squared_norms = torch.ops.grass.squared_norms.default(mm, 0, 'tiles')

    After, when ``push_selection`` has run too::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        selected_mm = torch.ops.grass.selected_mm.default(permute, x, indices, None, 0)
        mm_squared_norms = torch.ops.grass.mm_squared_norms.default(permute, x, 0)

    This happens if tiles are wanted (:func:`wants_tiles`), only transposes, views and conversions
    lie between product and norms, and besides the norms only a selection needs the gradient.
    Otherwise the norms are only computed earlier, right after their gradient. Rewritten: the new
    norms.
    """
    result = Result()
    for norms in graph.find_nodes(op="call_function", target=SQUARED_NORMS):
        g, dim, *scoring = norms.args
        make_early(norms)
        if not wants_tiles(g.meta["val"], *scoring):
            continue
        product = _product_below(g, dim, norms)
        if product is None:
            continue
        a, b, dim = product
        with graph.inserting_before(norms):
            a, b = (_matrix(graph, x) for x in (a, b))
            new = graph.create_node(
                "call_function", MM_SQUARED_NORMS, (a, b, dim), name="mm_squared_norms"
            )
        new.meta.update(norms.meta)
        norms.replace_all_uses_with(new)
        graph.erase_node(norms)
        result.rewritten.append(new)
    return result


def wants_tiles(g: torch.Tensor, scoring: str = "auto") -> bool:
    """Whether to compute the norms of G tile by tile; with "auto" if G is large and on a GPU.

    Forming G once costs its memory. Tiles cost another compact product, r/m of the full one.
    """
    if scoring == "auto":
        return g.device.type == "cuda" and g.numel() * g.element_size() >= LARGE_GRADIENT
    return scoring == "tiles"


def _product_below(g: fx.Node, dim: int, user: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """The factors of G, and what ``dim`` is in their product; None if G is no plain product."""
    while g.op == "call_function" and all(u is user or u.target is SELECT for u in g.users):
        args = cast("tuple[Any, ...]", g.args)
        if g.target is aten.mm.default:
            return args[0], args[1], dim
        if g.target is aten.bmm.default and g.meta["val"].shape[0] == 1 and dim > 0:
            return args[0], args[1], dim - 1
        if g.target is aten.permute.default:
            dim = args[1][dim]
        elif g.target is aten.t.default:
            dim = 1 - dim
        elif g.target in RESHAPES:
            below = dim_below_reshape(args[0].meta["val"].shape, g.meta["val"].shape, dim)
            if below is None:
                return None
            dim = below
        elif g.target not in (*CONVERSIONS, *COPIES):
            return None
        g, user = args[0], g
    return None


def _matrix(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """A factor as a matrix, without the batch dimension of size 1 that einsum adds."""
    value = x.meta["val"]
    if value.dim() == 2:
        return x
    matrix = graph.call_function(aten.squeeze.dim, (x, 0))
    matrix.meta["val"] = value.squeeze(0)
    return matrix
