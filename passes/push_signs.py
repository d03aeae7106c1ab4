"""Push the signs of a weight gradient, and its selection, down to the matmul that makes it."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import MM_SIGNS, SELECT, SIGNS
from grass_fx.passes.factors import matrix_of, product_below
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import erase_unused, insert, make_early

aten, prims = torch.ops.aten, torch.ops.prims


def push_signs_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Replace ``signs`` and ``select`` of a full weight gradient by a product that yields both.

    Before::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm = torch.ops.aten.mm.default(permute, x)                 # G = DᵀX, (m, n)
        select = torch.ops.grass.select.default(mm, indices, None, 1)
        signs = torch.ops.grass.signs.default(mm)

    After::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm_signs = torch.ops.grass.mm_signs.default(permute, x, indices, None, 1)
        getitem = mm_signs[0]                                      # C
        getitem_1 = mm_signs[1]

    This happens if only transposes, views and conversions lie between product and signs, and
    nothing else needs the gradient. In a scoring step that forms the gradient for
    its norms, signs are taken from it as well. Elsewhere the full gradient is formed for the signs,
    and the reason is reported.

    Rewritten: the ``indices`` nodes of these selections.
    """
    result = Result()
    for signs in graph.find_nodes(op="call_function", target=SIGNS):
        g = cast(fx.Node, signs.args[0])
        make_early(signs)
        select = next((user for user in g.users if user.target is SELECT), None)
        product = product_below(g, 0, signs)
        if select is None or product is None:
            continue  # push_selection finds and reports that the gradient is needed whole
        a, b, dim = product
        with graph.inserting_before(signs):
            a, b = (matrix_of(graph, x) for x in (a, b))
        if dim == 1:  # G is the product's transpose
            a, b = (insert(signs, aten.permute.default, x, [1, 0]) for x in (b, a))
        indices, *how = cast("tuple[Any, ...]", select.args[1:])
        both = insert(signs, MM_SIGNS, a, b, indices, *how)
        compact, bits = (insert(signs, operator.getitem, both, k) for k in range(2))
        dtype = select.meta["val"].dtype
        if compact.meta["val"].dtype != dtype:
            compact = insert(signs, prims.convert_element_type.default, compact, dtype)
        for old, new in ((select, compact), (signs, bits)):
            old.replace_all_uses_with(new)
            erase_unused(graph, old)
        result.rewritten.append(indices)
    return result
