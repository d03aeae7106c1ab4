"""Taps: autograd functions whose gradient for a weight is compact, and leaves by a proxy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_fx.ops import SELECT, SQUARED_NORMS
from grass_fx.passes.averaging import Collective, average


class TapSpec(NamedTuple):
    """What a tap does with the gradient."""

    dim: int
    """The selected dimension of the weight."""
    block: int = 1
    """B, rows that are selected together."""
    collectives: tuple[Collective, ...] = ()
    """How gradients are averaged over processes."""
    scoring: str | None = None
    """The option ``scoring``, in a scoring step; None in a regular one, which yields no scores."""
    score_sync: str = "norms"
    """The option ``score_sync``: what several processes score."""
    bucketed: bool = False
    """Whether C is averaged after the graph, with those of all its weights."""


class Tap(torch.autograd.Function):
    """Forward: the weight itself. Backward: PᵀG as the gradient of the proxy d, nothing for W.

    In a scoring step also s_i = ‖g_i‖², as the gradient of the proxy e: nothing is mutated.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, spec: TapSpec, roles: tuple[str, ...], *added: Any) -> Tensor:
        """``added``: the weight's added inputs (passes/signature.py), which ``roles`` names."""
        given = dict(zip(roles, added, strict=True))
        ctx.save_for_backward(given["indices"], given.get("scale"))
        ctx.spec, ctx.roles = spec, roles
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        spec: TapSpec = ctx.spec
        collectives = spec.collectives
        scores_average = spec.scoring is not None and spec.score_sync == "gradient"
        if scores_average:  # every process needs the averaged gradient whole
            g = average(g, [c._replace(name="all_reduce") for c in collectives])
            collectives = tuple(c for c in collectives if c.name == "reduce_scatter")
        indices, scale = ctx.saved_tensors
        if spec.bucketed:
            collectives = ()
        block = () if spec.block == 1 else (spec.block,)
        # Selected first, so that nothing else travels.
        gradients = {"d": average(SELECT(g, indices, scale, spec.dim, *block), collectives)}
        if spec.scoring is not None:
            rows, dim = (g.flatten(0, 1), 0) if g.dim() == 3 else (g, spec.dim)  # of all matrices
            how = () if spec.scoring == "auto" else (spec.scoring,)
            gradients["e"] = SQUARED_NORMS(rows, dim, *how)
        return None, None, None, *(gradients.get(role) for role in ctx.roles)


# A function of a module, so that the caches can name it (_torch_compat.compile_inductor).
def tap(
    w: Tensor,
    *,
    dim: int,
    block: int = 1,
    collectives: tuple[Any, ...] = (),
    scoring: str | None = None,
    score_sync: str = "norms",
    bucketed: bool = False,
    **added: Tensor,
) -> Tensor:
    """The weight ``w``, tapped: the fields of :class:`TapSpec`, then the added inputs by role."""
    averages = tuple(map(Collective._make, collectives))
    spec = TapSpec(dim, block, averages, scoring, score_sync, bucketed)
    with torch.enable_grad():  # a graph may turn gradients on after its taps
        return Tap.apply(w, spec, tuple(added), *added.values())
