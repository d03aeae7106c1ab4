"""Let selected products read the padded copies that Inductor has made for other products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from grass_fx._torch_compat import backward_nodes, sort_topologically
from grass_fx.ops import SELECT
from grass_fx.passes.factors import views_of
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import insert

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default)
TURNS = (aten.permute.default, aten.t.default, aten.transpose.int)

Key = tuple[fx.Node, str]
"""A tensor, and the views of it that lead to another: equal for nodes with equal values."""


def read_padded_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Read a part of a tensor's padded copy, where there is one, in place of the tensor.

    On a GPU Inductor pads a factor of a product whose size is no multiple of 16 bytes. A tensor
    that has other readers besides is then stored twice. Before::

        constant_pad_nd = torch.ops.aten.constant_pad_nd.default(d, [0, 3, 0, 0])
        mm = torch.ops.aten.mm.default(constant_pad_nd, constant_pad_nd_1)   # (b, 5464)
        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm_1 = torch.ops.aten.mm.default(permute, select)

    After::

        constant_pad_nd = torch.ops.aten.constant_pad_nd.default(d, [0, 3, 0, 0])
        mm = torch.ops.aten.mm.default(constant_pad_nd, constant_pad_nd_1)
        slice_1 = torch.ops.aten.slice.Tensor(constant_pad_nd, 1, 0, 5461)
        permute_1 = torch.ops.aten.permute.default(slice_1, [1, 0])
        mm_1 = torch.ops.aten.mm.default(permute_1, select)

    The slice is a view, and its rows begin at multiples of 16 bytes. This is done for the operators
    of grass_fx and for the products with what they select, if the copy is made for products alone.
    A model's own padding stays. A gather of the forward reads no copy that the backward makes.
    Rewritten: the readers.
    """
    result = Result()
    padded: dict[Key, list[fx.Node]] = {}
    for pad in graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default):
        if _is_of_products(pad):
            padded.setdefault(_key(pad.all_input_nodes[0]), []).append(pad)
    if not padded:
        return result
    backward = backward_nodes(graph)
    for reader in _readers(graph):
        copies = {x: _copy_of(x, reader, padded, backward) for x in reader.all_input_nodes}
        for x, copy in copies.items():
            if copy is not None:
                reader.replace_input_with(x, copy)
        if any(copies.values()):
            result.rewritten.append(reader)
    sort_topologically(graph)  # a copy may be made only after what now reads it
    result.note = f"{result.count} read padded copies"
    return result


def _readers(graph: fx.Graph) -> Iterator[fx.Node]:
    """The operators of grass_fx, and products with what they select."""
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") == "grass" or (
            node.target is aten.mm.default
            and any(views_of(x)[0].target is SELECT for x in node.all_input_nodes)
        ):
            yield node


def _is_of_products(pad: fx.Node) -> bool:
    """Whether a copy is padded as Inductor does: for products alone, and constant sizes at ends."""
    return all(user.target in PRODUCTS for user in pad.users) and all(
        left == 0 and isinstance(right, int) and right >= 0 and isinstance(size, int)
        for left, right, size in _padding(pad)
        if left != 0 or right != 0
    )


def _padding(pad: fx.Node) -> Iterator[tuple[Any, Any, Any]]:
    """(left, right) of the last dimension and its size before, of the dimension before, ..."""
    x, sizes = cast("tuple[fx.Node, list[Any]]", pad.args[:2])
    shape = reversed(x.meta["val"].shape)
    return zip(sizes[::2], sizes[1::2], shape, strict=False)


def _key(x: fx.Node) -> Key:
    base, *views = views_of(x)
    return base, str([(view.target, view.args[1:], view.kwargs) for view in views])


def _copy_of(
    x: fx.Node, reader: fx.Node, padded: dict[Key, list[fx.Node]], backward: set[fx.Node]
) -> fx.Node | None:
    """The part of a padded copy that equals ``x``, in front of ``reader``; None without a copy."""
    views = views_of(x)
    for place in reversed(range(len(views))):
        if any(view.target not in TURNS for view in views[place + 1 :]):
            return None  # of a part of a tensor such a view may not exist
        for pad in padded.get(_key(views[place]), ()):
            if pad in backward and reader not in backward:
                continue
            copy = _unpadded(pad, reader)
            for view in views[place + 1 :]:
                copy = insert(reader, view.target, copy, *view.args[1:], **view.kwargs)
            return copy
    return None


def _unpadded(pad: fx.Node, reader: fx.Node) -> fx.Node:
    """A view of a padded copy, which leaves the padding out."""
    copy, last = pad, pad.meta["val"].dim() - 1
    for k, (_, right, size) in enumerate(_padding(pad)):
        if right:
            copy = insert(reader, aten.slice.Tensor, copy, last - k, 0, size)
    return copy
