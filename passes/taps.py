"""Taps: autograd functions that return a weight's compact gradient as the gradient of a proxy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_fx.ops import SELECT, SIGNS, SQUARED_NORMS
from grass_fx.passes.averaging import Collective, average

INPUT = "input"
"""In place of the option ``scoring``: norms of the factor that is selected, and not of G."""


class TapSpec(NamedTuple):
    """How a tap treats the gradient."""

    dim: int
    """The selected dimension of the weight."""
    block: int = 1
    """The length of the runs in which rows are selected, which begin at multiples of it."""
    collectives: tuple[tuple[Any, ...], ...] = ()
    """The fields of the collectives that average gradients over processes."""
    scoring: str | None = None
    """The option ``scoring`` or INPUT in a scoring step; None in a regular one, without scores."""
    score_sync: str = "norms"
    """The option ``score_sync``: whether processes score their own or the averaged gradient."""
    signs: bool = False
    """Whether the graph yields the signs of the gradient."""


class Tap(torch.autograd.Function):
    """Forward: the weight itself. Backward: PᵀG as the gradient of the proxy d, nothing for W.

    In a scoring step the backward also returns s_i = ‖g_i‖² as the gradient of the proxy e, and
    with ``rest="sign"`` the signs of G as that of the proxy b. So the graph mutates no input.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, spec: TapSpec, roles: tuple[str, ...], *added: Any) -> Tensor:
        """``added`` has the weight's added inputs (passes/signature.py); ``roles`` names them."""
        by_role = dict(zip(roles, added, strict=True))
        ctx.save_for_backward(by_role["indices"], by_role.get("scale"))
        ctx.spec, ctx.roles = spec, roles
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        spec: TapSpec = ctx.spec
        collectives = [Collective._make(fields) for fields in spec.collectives]
        scores_average = spec.scoring is not None and spec.score_sync == "gradient"
        if scores_average:  # every process needs the averaged gradient whole
            g, collectives = average(g, collectives), []
        indices, scale = ctx.saved_tensors
        block = () if spec.block == 1 else (spec.block,)
        # Select first, so that only the compact gradient is sent.
        gradients = {"d": average(SELECT(g, indices, scale, spec.dim, *block), collectives)}
        rows, dim = g, spec.dim
        if g.dim() == 3 and (spec.signs or spec.scoring is not None):
            # A stack is like one matrix that has the rows of all its matrices.
            rows, dim = g.flatten(0, 1), 0
        if spec.signs:
            gradients["b"] = SIGNS(rows, dim)
        if spec.scoring is not None:
            how = () if spec.scoring == "auto" else (spec.scoring,)
            gradients["e"] = SQUARED_NORMS(rows, dim, *how)
        return None, None, None, *(gradients.get(role) for role in ctx.roles)


# A module-level function, so that caches can name it (_torch_compat.compile_inductor).
def tap(w: Tensor, **arguments: Any) -> Tensor:
    """Tap the weight ``w``; takes the fields of :class:`TapSpec` and the added inputs by role."""
    added = {k: v for k, v in arguments.items() if k not in TapSpec._fields}
    spec = TapSpec(**{k: v for k, v in arguments.items() if k not in added})
    with torch.enable_grad():  # a graph may turn gradients on after its taps
        return Tap.apply(w, spec, tuple(added), *added.values())
