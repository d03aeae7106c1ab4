"""Select from a layer's input already in the forward, so that only the selected part is saved.

Equation 3 of docs/method.md needs only X[:, σ] in the backward.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from grass_fx._torch_compat import backward_nodes
from grass_fx.ops import SELECT, SELECTED_MM, SQUARED_NORMS
from grass_fx.passes.factors import views_of
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import ALL_PRODUCTS, SPLITS, insert

aten, prims = torch.ops.aten, torch.ops.prims

PARTS = (
    *SPLITS, operator.getitem, aten.slice.Tensor, aten.select.int, aten.unbind.int,
    aten.expand.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
"""Views of a tensor that may be larger and stays in memory anyway."""

CASTS = (aten._to_copy.default, prims.convert_element_type.default)
"""Autocast makes a cast for each linear layer; the partitioner merges equal ones."""


def keep_selected_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Gather a factor in the forward that makes it, so that only the selected part is saved.

    Before, the backward needs all of x::

        mm = torch.ops.aten.mm.default(x, weight_t)
        selected_mm = torch.ops.grass.selected_mm.default(d_t, x, indices, None, 1)

    After::

        mm = torch.ops.aten.mm.default(x, weight_t)
        select = torch.ops.grass.select.default(x, indices, None, 1)
        mm_1 = torch.ops.aten.mm.default(d_t, select)

    There are two conditions. In the backward, only selected products use x, and together they
    select less than all of x. And nothing else that the backward uses is made of x in the forward,
    but by products. Otherwise all of x, or as much, is saved anyway. Inputs inside activation
    checkpointing stay as they are. ρ scales the product, as
    before. The pass is for joint graphs that are not partitioned yet, and for rules without scores:
    a scoring step needs all of x, and both variants share a forward.
    Rewritten: the new products.
    """
    backward = backward_nodes(graph)
    products: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=SELECTED_MM):
        factor, sigma = _factor(node), cast(fx.Node, node.args[2])
        if sigma.op == "placeholder" and node in backward and factor not in backward:
            products[_alike(views_of(factor)[0])[0]].append(node)
    result = Result()
    for users in products.values():
        forward = _forward_products(users, backward)
        if not (forward and _is_less(users)):
            continue
        last = max(forward)  # nodes of a graph compare by their places in it
        if all(last < node for node in users):
            for node in users:
                result.rewritten.append(_keep(graph, node, last, backward))
    result.note = f"{result.count} kept"
    return result


def _factor(node: fx.Node) -> fx.Node:
    """The factor of a selected product from which rows or columns are gathered."""
    a, b, _, _, dim, *_ = node.args
    factor: Any = a if dim == 0 else b
    return factor


def _alike(x: fx.Node) -> list[fx.Node]:
    """All nodes with the same value as ``x``, in the same order whichever of them ``x`` is."""
    if x.target not in CASTS:
        return [x]
    what = x.target, x.args, x.kwargs
    return [y for y in x.all_input_nodes[0].users if (y.target, y.args, y.kwargs) == what]


def _forward_products(users: list[fx.Node], backward: set[fx.Node]) -> list[fx.Node]:
    """The products of the forward that use the factor of ``users``, or what else is made of it.

    Empty if the backward needs the factor besides, or something that it could recompute from it:
    then that is saved anyway.
    """
    x = views_of(_factor(users[0]))[0]
    if x.op != "call_function" or x.target in PARTS:
        return []  # an input of the graph is in memory anyway
    found, ahead, seen = list[fx.Node](), _alike(x), set[fx.Node]()
    while ahead:
        node = ahead.pop()
        if "recompute" in node.meta:
            return []
        for user in node.users:
            if user in seen or user in users or user.target is SQUARED_NORMS:
                continue  # of x there are a few numbers only
            seen.add(user)
            if user in backward or user.op == "output":
                return []
            (found if user.target in ALL_PRODUCTS else ahead).append(user)
    return found


def _turns(view: fx.Node) -> bool:
    """Whether a view transposes a matrix."""
    return view.target is aten.t.default or (
        view.target is aten.permute.default and view.args[1] == [1, 0]
    )


def _is_less(users: list[fx.Node]) -> bool:
    """Whether all selected parts together are smaller than the tensor."""
    selected: dict[Any, float] = {}
    for node in users:
        factor, indices, dim = _factor(node), cast(fx.Node, node.args[2]), cast(int, node.args[4])
        rank, size = indices.meta["val"].shape[0], factor.meta["val"].shape[dim]
        selected[factor, indices] = rank / size
    return sum(selected.values()) < 1


def _keep(graph: fx.Graph, node: fx.Node, last: fx.Node, backward: set[fx.Node]) -> fx.Node:
    """Replace a selected product by a gather in the forward, after ``last``, and a product."""
    a, b, indices, scale, dim, *block = cast("tuple[Any, ...]", node.args)
    x, *views = views_of(_factor(node))
    turned = dim == 0 and bool(views) and _turns(views[-1])
    if turned:
        views.pop()
    for view in views:
        if view > last:  # autograd has made it in the backward
            if all(used <= last for used in view.all_input_nodes):
                last.append(view)
            last = view
    rows, along = [x, *views][-1], 1 if turned else dim
    with graph.inserting_after(last):
        kept = graph.call_function(SELECT, (rows, indices, None, along, *block))
    kept.meta = {**x.meta, "val": SELECT(rows.meta["val"], indices.meta["val"], None, along)}
    kept.meta.pop("tensor_meta", None)
    call = partial(insert, node)
    part = call(aten.permute.default, kept, [1, 0]) if turned else kept
    new = call(aten.mm.default, *((part, b) if dim == 0 else (a, part)))
    backward.add(new)  # its other factor may be the input that another weight selects from
    if scale is not None:
        scale = call(aten.unsqueeze.default, scale, 1) if dim == 0 else scale
        new = call(aten.mul.Tensor, new, scale)
        new = call(prims.convert_element_type.default, new, node.meta["val"].dtype)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
