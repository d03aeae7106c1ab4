"""Finds the two factors of a weight gradient, for operators that need all of it but not at once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from grass_fx.ops import SELECT, SIGNS
from grass_fx.passes.push_rules import CONVERSIONS, COPIES, RESHAPES, dim_below_reshape

aten = torch.ops.aten

SHARING = (SELECT, SIGNS)
"""What may use a gradient besides, since passes of its own move it to the factors."""

VIEWS = (aten.permute.default, aten.t.default, aten.transpose.int, *RESHAPES)
"""Views of all of a tensor."""


def product_below(
    g: fx.Node, dim: int, user: fx.Node | None
) -> tuple[fx.Node, fx.Node, int] | None:
    """The factors of G, and what ``dim`` is in their product; None if G is no plain product, or
    if others than ``user`` and the operators of ``SHARING`` use it, so that it is formed anyway.
    (``user`` None: whatever uses it.)
    """
    while g.op == "call_function" and (
        user is None or all(u is user or u.target in SHARING for u in g.users)
    ):
        args = cast("tuple[Any, ...]", g.args)
        if g.target is aten.mm.default:
            return args[0], args[1], dim
        if g.target is aten.bmm.default and g.meta["val"].shape[0] == 1 and dim > 0:
            return args[0], args[1], dim - 1
        below = one_below(g, dim)
        if below is None:
            return None
        g, dim, user = *below, user and g
    return None


def one_below(g: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
    """What a view, copy or conversion is made of, and what ``dim`` is there; None of others."""
    x, *args = cast("tuple[Any, ...]", g.args)
    if g.target is aten.permute.default:
        return x, args[0][dim]
    if g.target is aten.t.default:
        return x, 1 - dim
    if g.target in RESHAPES:
        below = dim_below_reshape(x.meta["val"].shape, g.meta["val"].shape, dim)
        return None if below is None else (x, below)
    return (x, dim) if g.target in (*CONVERSIONS, *COPIES) else None


def matrix_of(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """A factor as a matrix, without the batch dimension of size 1 that einsum adds."""
    value = x.meta["val"]
    if value.dim() == 2:
        return x
    matrix = graph.call_function(aten.squeeze.dim, (x, 0))
    matrix.meta["val"] = value.squeeze(0)
    return matrix


def views_of(x: fx.Node) -> list[fx.Node]:
    """The chain of views that ends in ``x``, from the tensor itself to ``x``."""
    views = [x]
    while x.target in VIEWS:
        x = x.all_input_nodes[0]
        views.append(x)
    return views[::-1]
