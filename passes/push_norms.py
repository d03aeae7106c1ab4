"""Push the norms of a scoring step down to the matmul that makes a weight gradient."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import MM_SQUARED_NORMS, SELECT, SQUARED_NORMS
from grass_fx.passes.factors import matrix_of, one_below, product_below
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import insert, make_early
from grass_fx.passes.taps import INPUT

aten = torch.ops.aten

NO_PRODUCT = "its gradient is no sum of products, so its rows are scored by its own norms"

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
    Otherwise the norms are only computed earlier, right after their gradient.

    The rule ``input_norm`` scores a row of G by the factor that the selection is taken from,
    whether or not anything else needs G. Of a sum of products the norms are added. Before::

        mm = torch.ops.aten.mm.default(permute, x)
        squared_norms = torch.ops.grass.squared_norms.default(mm, 1, 'input')

    After::

        squared_norms = torch.ops.grass.squared_norms.default(x, 1)

    Where G is no sum of products, its own norms remain. Rewritten: the new norms. Stopped: norms of
    G in place of a factor's, by the ``indices`` of the weight.
    """
    result = Result()
    for norms in graph.find_nodes(op="call_function", target=SQUARED_NORMS):
        g, dim, *scoring = norms.args
        if scoring == [INPUT]:
            _take_factors(norms, result)
            continue
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


def _take_factors(norms: fx.Node, result: Result) -> None:
    """Replace norms of a gradient by those of the factors from which it is selected."""
    g, dim, _ = cast("tuple[Any, ...]", norms.args)
    summands = _summands(g, dim)
    found = [product for part in summands if (product := product_below(*part, None))]
    if len(found) < len(summands):
        indices = _indices_beside(g)
        result.stopped[norms if indices is None else indices] = NO_PRODUCT
        return
    with norms.graph.inserting_before(norms):
        factors = [matrix_of(norms.graph, (b if dim else a)) for a, b, dim in found]
    dims = [dim for _, _, dim in found]
    new, *more = map(partial(insert, norms, SQUARED_NORMS), factors, dims)
    for each in more:
        new = insert(norms, aten.add.Tensor, new, each)
    norms.replace_all_uses_with(new)
    norms.graph.erase_node(norms)
    result.rewritten.append(new)


def _summands(g: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
    """The addends of a gradient that sums several uses, else itself; and what ``dim`` is there."""
    x, along = g, dim
    while x.op == "call_function":
        if x.target is aten.add.Tensor and not x.kwargs:
            a, b = x.args
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                return [*_summands(a, along), *_summands(b, along)]
        below = one_below(x, along)
        if below is None:
            break
        x, along = below
    return [(g, dim)]


def _indices_beside(g: fx.Node) -> fx.Node | None:
    """σ of the selection of a gradient, or of the gradient of which ``g`` is a view."""
    for user in (*g.users, *(user for x in g.all_input_nodes for user in x.users)):
        if user.target is SELECT:
            return cast(fx.Node, user.args[1])
    return None


def wants_tiles(g: torch.Tensor, scoring: str = "auto") -> bool:
    """Whether to compute the norms of G tile by tile; with "auto" if G is large and on a GPU.

    Forming G once costs its memory. Tiles cost another compact product, r/m of the full one.
    """
    if scoring == "auto":
        return g.device.type == "cuda" and g.numel() * g.element_size() >= LARGE_GRADIENT
    return scoring == "tiles"
