"""The rules for gradients of lookups: rows of D are added up by index, in every column alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from grass_fx.passes.push import MASKED_ADDITION, Push, Rule, Stop, Value
from grass_fx.passes.push_rules import registers_in

aten = torch.ops.aten

LOOKUP_RULES: dict[Any, Rule] = {}

rule = registers_in(LOOKUP_RULES)


@rule(aten.embedding_dense_backward.default)
def _embedding(push: Push, node: fx.Node, dim: int) -> Value:
    d, *rest = cast("tuple[Any, ...]", node.args)
    if dim != 1:
        raise Stop(f"{node.name} adds into rows that are selected")
    return push.call(node.target, push.selected(d, d.meta["val"].dim() - 1), *rest)


@rule(MASKED_ADDITION)
def _masked_index_put(push: Push, node: fx.Node, dim: int) -> Value:
    """The same, as Inductor decomposes it: what the mask leaves out is not added."""
    base, mask, where, d = cast("tuple[Any, ...]", node.args)
    place = _place(node, where, d, dim)
    sizes = mask.meta["val"].shape
    along = place - d.meta["val"].dim() + len(sizes)
    if along >= 0 and sizes[along] != 1:
        raise Stop(f"{node.name} masks along the selected dimension")
    return push.call(node.target, push.of(base, dim, node), mask, where, push.selected(d, place))


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(push: Push, node: fx.Node, dim: int) -> Value:
    """The gradient of ``w[indices]`` and of ``index_select``."""
    base, where, d, *accumulate = cast("tuple[Any, ...]", node.args)
    place = _place(node, where, d, dim)
    below = push.of(base, dim, node), push.selected(d, place)
    return push.call(node.target, below[0], where, below[1], *accumulate)


def _place(node: fx.Node, where: list[Any], d: fx.Node, dim: int) -> int:
    """The dimension of D that is the dimension ``dim`` of the sum."""
    indexed = [k for k, indices in enumerate(where) if indices is not None]
    indices = where[indexed[0]].meta["val"]
    if len(indexed) != 1 or indices.dtype in (torch.bool, torch.uint8):
        raise Stop(f"{node.name} adds to single elements")
    if dim == indexed[0]:
        raise Stop(f"{node.name} adds into rows that are selected")
    place = dim if dim < indexed[0] else dim - 1 + indices.dim()
    whole, part = node.meta["val"].shape, d.meta["val"].shape
    if len(part) != len(whole) - 1 + indices.dim() or part[place] != whole[dim]:
        raise Stop(f"{node.name} broadcasts what it adds")
    return place
