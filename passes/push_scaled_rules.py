"""The rule for products of float8 factors with scales, as of float8 training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from grass_fx.passes.push import Push, Rule, Stop, Value
from grass_fx.passes.push_rules import COPIES, registers_in

aten = torch.ops.aten

SCALED_RULES: dict[Any, Rule] = {}

rule = registers_in(SCALED_RULES)

MULTIPLE = 16
"""What float8 kernels want of sizes and strides."""


@rule(aten._scaled_mm.default)
def _scaled_mm(push: Push, node: fx.Node, dim: int) -> Value:
    """select((s_a ∘ a) @ (b ∘ s_b)) = (select(s_a) ∘ select(a)) @ (b ∘ s_b), with ρ afterwards.

    Factors keep the layout that the kernel asks for, and are gathered after their cast: one byte an
    element.
    """
    a, b, *scales = cast("tuple[Any, ...]", node.args)
    if push.rank % MULTIPLE:
        raise Stop(f"{node.name} takes no {push.rank} rows: make r a multiple of {MULTIPLE}")
    if scales[2:3] not in ([], [None]) or scales[3:4] not in ([], [None]):
        raise Stop(f"{node.name} has a bias or a scale of its result")
    factors, by = [a, b], push.unscaled()
    factors[dim] = _gathered(by, factors[dim], dim)
    if scales[dim].meta["val"].numel() > 1:  # one for each row or column
        scales[dim] = by.selected(scales[dim], dim)
    product = push.call(node.target, *factors, *scales, **node.kwargs)
    if push.scale is None:
        return product
    rho = push.call(aten.unsqueeze.default, push.scale, 1 - dim)
    scaled = push.call(aten.mul.Tensor, product, rho)
    dtype = node.meta["val"].dtype
    return push.call(torch.ops.prims.convert_element_type.default, scaled, dtype)


def _gathered(push: Push, x: fx.Node, dim: int) -> Value:
    """The selection of a factor, below what only lays it out."""
    if x.target is aten.permute.default:
        below, dims = cast("tuple[fx.Node, list[int]]", x.args)
        return push.call(x.target, _gathered(push, below, dims[dim]), dims)
    if x.target is aten.t.default:
        return push.call(x.target, _gathered(push, cast(fx.Node, x.args[0]), 1 - dim))
    if x.target in COPIES:
        return push.call(x.target, _gathered(push, cast(fx.Node, x.args[0]), dim), **x.kwargs)
    return push.selected(x, dim)
