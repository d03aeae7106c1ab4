"""Push the norms of a scoring step down to the matmul that makes a weight gradient."""

from __future__ import annotations

import torch
from torch import fx

from grass_fx.ops import MM_SQUARED_NORMS, SQUARED_NORMS
from grass_fx.passes.factors import matrix_of, product_below
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import make_early

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
        product = product_below(g, dim, norms)
        if product is None:
            continue
        a, b, dim = product
        with graph.inserting_before(norms):
            a, b = (matrix_of(graph, x) for x in (a, b))
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
