"""Multiplies a compact gradient by a number or by a mask of the weight's shape, and clamps it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grass_fx.errors import CompactGradError
from grass_fx.ops import select
from grass_fx.state.gradient.compact import CompactGrad, bare, handles, is_factor, times

aten = torch.ops.aten


@handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg)
def _scale(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.mul.Tensor and all(isinstance(arg, CompactGrad) for arg in args):
        a, b = args
        if a.selection.scale is not None or not a.selection.same_as(b.selection):
            return NotImplemented
        return a.derived(func(*bare(args)))
    grad, factor, power = _factor(func, args)
    if grad is None or kwargs:
        return NotImplemented
    if isinstance(factor, Tensor) and factor.numel() != 1:
        return grad.derived(func(*_in_order(args, grad, factor)), grad.scores)
    votes = grad.votes and grad.votes.times(factor)
    return grad.derived(func(*bare(args)), times(grad.scores, factor, power), votes=votes)


@handles(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.neg_)
def _scale_(func: Any, args: Any, kwargs: Any) -> Any:
    grad, factor, power = _factor(func, args)
    if grad is None or grad is not args[0] or kwargs:
        return NotImplemented
    if isinstance(factor, Tensor) and factor.numel() != 1:
        func(*_in_order(args, grad, factor))
        return grad
    func(*bare(args))
    grad._cell.scores = times(grad.scores, factor, power)
    grad._cell.votes = grad.votes and grad.votes.times(factor)
    return grad


def _factor(func: Any, args: Any) -> tuple[CompactGrad | None, Any, int]:
    """(gradient, factor, power) of a product with a number or a mask; else no gradient.

    Scores are not masked: they decide which rows to select, not how to step.
    """
    if len(args) == 1:
        return args[0], -1, 1
    divides = func.overloadpacket in (aten.div, aten.div_)
    grad, factor = args if isinstance(args[0], CompactGrad) or divides else args[::-1]
    if not isinstance(grad, CompactGrad):
        return None, None, 0
    if is_factor(factor):
        return grad, factor, -1 if divides else 1
    if (masked := rows_of(factor, grad)) is None:
        return None, None, 0
    _check_mask(grad)
    return grad, masked, 1


def _check_mask(grad: CompactGrad) -> None:
    """Raise CompactGradError if a mask would leave the steps by signs as they are."""
    if grad.votes is not None:
        raise CompactGradError(
            f'{grad.selection.name}: with rest="sign" a mask would reach the selected rows of the '
            "gradient alone, and all others would still move by their signs. Compile with "
            'rest="none", or keep a copy of what is not to move and put it back after the step.'
        )


def rows_of(other: Any, grad: CompactGrad) -> Tensor | None:
    """The part of a dense tensor at C's places; None if it does not broadcast to the weight."""
    if not isinstance(other, Tensor) or isinstance(other, (CompactGrad, DTensor)):
        return None
    if isinstance(grad.compact, DTensor) or other.dim() > grad.dim():
        return None
    try:
        whole = other.expand(grad.shape)
    except RuntimeError:  # another shape
        return None
    selection = grad.selection
    if whole.dim() == 3:
        whole = whole.reshape(-1, whole.shape[-1])
    return select(whole, selection.indices, None, selection.dim).view(grad.compact.shape)


def _in_order(args: Any, grad: CompactGrad, factor: Tensor) -> list[Tensor]:
    """C and its part of the mask, in the order in which the factors were passed."""
    return [grad.compact if arg is grad else factor for arg in args]


@handles(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(func: Any, args: Any, kwargs: Any) -> Any:
    grad, rows = args[0], _filled(*args)
    if rows is None:
        return NotImplemented
    return grad.derived(grad.compact.masked_fill(rows, 0), grad.scores)


@handles(aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def _masked_fill_(func: Any, args: Any, kwargs: Any) -> Any:
    grad, rows = args[0], _filled(*args)
    if rows is None:
        return NotImplemented
    grad.compact.masked_fill_(rows, 0)
    return grad


def _filled(grad: Any, mask: Any, value: Any) -> Tensor | None:
    """The mask at C's places; None unless a gradient is filled, and with zeros."""
    if not isinstance(grad, CompactGrad) or value != 0:
        return None
    _check_mask(grad)
    return rows_of(mask, grad)


@handles(aten.clamp, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    if not keeps_zeros(func, args[1:], kwargs):
        return NotImplemented
    return args[0].derived(func(*bare(args), **kwargs), args[0].scores)


@handles(aten.clamp_.default, aten.clamp_min_.default, aten.clamp_max_.default)
def _clamp_(func: Any, args: Any, kwargs: Any) -> Any:
    if not keeps_zeros(func, args[1:], kwargs):
        return NotImplemented
    func(*bare(args), **kwargs)
    return args[0]


def keeps_zeros(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an elementwise function of a tensor and numbers maps 0 to 0."""
    if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        return False
    functional = getattr(aten, func.overloadpacket.__name__.rstrip("_"))
    return not bool(functional(torch.zeros((), device="cpu"), *args, **kwargs))


@handles(aten.fill_)
def _fill_(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].zero_() if args[1] == 0 else NotImplemented


@handles(aten.zero_)
def _zero_(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    grad.compact.zero_()
    grad._cell.empty()
    return grad
