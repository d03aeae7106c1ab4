"""Handles lists of gradients, compact and dense mixed: one foreach call on the stored tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grass_fx.state.gradient.compact import LISTS, CompactGrad, bare, handles, is_factor, times

aten = torch.ops.aten


@handles(aten._foreach_norm)
def _foreach_norm(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*bare(args), **kwargs)


@handles(aten._foreach_zero_)
def _foreach_zero_(func: Any, args: Any, kwargs: Any) -> Any:
    func(bare(args[0]))
    for grad in args[0]:
        if isinstance(grad, CompactGrad):
            grad._cell.empty()


@handles(aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar)
def _foreach_clamp_(func: Any, args: Any, kwargs: Any) -> Any:
    func(*bare(args), **kwargs)


@handles(
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.Tensor,
)
def _foreach_scale_(func: Any, args: Any, kwargs: Any) -> Any:
    grads, factor = args
    if not is_factor(factor):
        return NotImplemented
    func(*bare(args))
    power = -1 if func.__name__.startswith("_foreach_div_") else 1
    for grad in grads:
        if isinstance(grad, CompactGrad):
            grad._cell.scores = times(grad.scores, factor, power)


@handles(aten._foreach_add_.List)
def _foreach_add_(func: Any, args: Any, kwargs: Any) -> Any:
    for grad, other in zip(*args[:2], strict=True):
        grad.add_(other, **kwargs)


@handles(aten._amp_foreach_non_finite_check_and_unscale_)
def _amp_unscale_(func: Any, args: Any, kwargs: Any) -> Any:
    grads, found_inf, inv_scale = args
    # DTensor asks other processes whether they found an inf only if its first gradient is sharded.
    func(sorted(bare(grads), key=_is_whole), found_inf, inv_scale)
    for grad in grads:
        if isinstance(grad, CompactGrad):
            grad._cell.scores = times(grad.scores, inv_scale)


def _is_whole(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(
        placement.is_replicate() for placement in tensor.placements
    )


LISTS.update({
    torch._foreach_norm: _foreach_norm,
    torch._foreach_zero_: _foreach_zero_,
    torch._foreach_clamp_min_: _foreach_clamp_,
    torch._foreach_clamp_max_: _foreach_clamp_,
    torch._foreach_mul_: _foreach_scale_,
    torch._foreach_div_: _foreach_scale_,
    torch._foreach_add_: _foreach_add_,
    torch._amp_foreach_non_finite_check_and_unscale_: _amp_unscale_,
})  # fmt: skip
