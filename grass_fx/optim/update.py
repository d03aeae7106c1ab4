"""The subspace update of docs/method.md, as free functions on one weight.

Shapes, for side "out" (dim 0; dim 1 transposed): W (m, n); C and both moments (r, n); σ, ρ and the
ages (r,). Each row has an age of its own, the steps since it was last new.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grass_fx.gradient import Selection
from grass_fx.ops import along


def warmup(age: Tensor, warmup_steps: int) -> Tensor:
    """min(1, age / warmup_steps) of each row, age counted from 1; ones if ``warmup_steps`` is 0."""
    age = age.double()
    return torch.ones_like(age) if warmup_steps == 0 else (age / warmup_steps).clamp(max=1)


def adam_update_(
    w: Tensor,
    compact: Tensor,
    selection: Selection,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    warmup_steps: int,
) -> None:
    """W[σ] −= lr · α · ρ · warm-up · Adam(C), in place (equation 4; repeated rows add).

    Bias correction counts from each row's own start. Weight decay is decoupled: lr · λ on the whole
    W, without α and warm-up. The ages advance by one.
    """
    dim = selection.dim
    age.add_(1)
    exp_avg.lerp_(compact, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(compact, compact, value=1 - beta2)

    ages = age.double()
    factor = warmup(age, warmup_steps) / (1 - beta1**ages) * scale
    if selection.scale is not None:
        factor = factor * selection.scale
    root = (1 - beta2**ages).rsqrt()
    denominator = exp_avg_sq.sqrt().mul_(along(root.to(w.dtype), dim, w.dim())).add_(eps)
    delta = (exp_avg / denominator).mul_(along(factor.to(w.dtype), dim, w.dim())).mul_(-lr)

    if weight_decay != 0:
        w.mul_(1 - lr * weight_decay)
    w.index_add_(dim, selection.indices, delta)


def carried(
    old: Selection, new: Selection, exp_avg: Tensor, exp_avg_sq: Tensor, age: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments and ages for the new selection: rows that stay keep theirs, new rows start at zero.

    With replacement each new copy of a row inherits, the first moment × ρ′/ρ and the second
    × (ρ′/ρ)².
    """
    place = torch.searchsorted(old.indices, new.indices).clamp_(max=old.indices.numel() - 1)
    stays = old.indices[place] == new.indices
    ratio = stays.to(torch.float64)
    if old.scale is not None and new.scale is not None:
        ratio = ratio * (new.scale.double() / old.scale[place].double())
    dim, ndim = new.dim, exp_avg.dim()

    def moved(moments: Tensor, factor: Tensor) -> Tensor:
        rows = moments.index_select(dim, place)
        # where, not times zero: a moment that is not finite must not outlive its row.
        kept = torch.where(along(stays, dim, ndim), rows, torch.zeros_like(rows))
        return kept.mul_(along(factor.to(rows.dtype), dim, ndim))

    return moved(exp_avg, ratio), moved(exp_avg_sq, ratio**2), age[place] * stays
