"""Answers queries about a compact gradient as if it were P C, zeros included.

Nothing here makes a tensor of the weight's shape, except flags (comparisons, ``isnan``), which take
one byte per element. Norms are those of C, as clipping takes them: with replacement P C has others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grass_fx.ops import along
from grass_fx.state.gradient.compact import CompactGrad, handles
from grass_fx.state.gradient.scaling import keeps_zeros
from grass_fx.state.selection import Selection, matrix

aten = torch.ops.aten


def _rows(grad: CompactGrad) -> tuple[Tensor, Tensor]:
    """Return the distinct selected rows of P C, and their indices."""
    selection, compact = grad.selection, matrix(grad.compact)
    if selection.scale is None:
        return compact, selection.indices
    compact = (compact * along(selection.scale, selection.dim, 2)).to(compact.dtype)
    indices, place = selection.indices.unique(return_inverse=True)
    shape = list(compact.shape)
    shape[selection.dim] = indices.numel()
    return compact.new_zeros(shape).index_add_(selection.dim, place, compact), indices


def _is_whole(grad: CompactGrad) -> bool:
    """Whether this process holds all of C: for a part, only norms over all parts are known."""
    return not isinstance(grad.compact, DTensor)


# --- elementwise ----------------------------------------------------------------------------------


@handles(
    aten.abs, aten.sign, aten.sgn, aten.sqrt, aten.pow.Tensor_Scalar, aten.nan_to_num.default,
    aten.relu, aten.tanh, aten.sin, aten.atan, aten.erf, aten.expm1, aten.log1p, aten.asinh,
    aten.trunc, aten.round.default, aten.floor, aten.ceil, aten.positive,
)  # fmt: skip
def _elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """f(P C), for an f with f(0) = 0: it changes the same rows only."""
    grad, rest = args[0], args[1:]
    if not (isinstance(grad, CompactGrad) and _is_whole(grad)):
        return NotImplemented
    if not keeps_zeros(func, rest, kwargs):
        return NotImplemented
    if grad.selection.scale is None:
        return grad.derived(func(grad.compact, *rest, **kwargs))
    rows, indices = _rows(grad)
    old = grad.selection
    selection = Selection(indices, None, old.dim, old.generation, old.name)
    return grad.derived(func(rows, *rest, **kwargs), selection=selection)


@handles(aten.nan_to_num_.default, aten.nan_to_num.out)
def _nan_to_num_(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    out = kwargs.pop("out", grad)
    if not isinstance(grad, CompactGrad) or out is not grad and not _shares(out, grad):
        return NotImplemented
    if not keeps_zeros(func, args[1:], kwargs):
        return NotImplemented
    torch.nan_to_num_(grad.compact, *args[1:], **kwargs)
    return out


def _shares(out: Any, grad: CompactGrad) -> bool:
    return isinstance(out, CompactGrad) and out._cell is grad._cell


@handles(
    aten.isnan, aten.isinf, aten.isposinf.default, aten.isneginf.default, aten.logical_not.default,
    aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar,
    aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor,
)  # fmt: skip
def _flags(func: Any, args: Any, kwargs: Any) -> Any:
    """A comparison of each element with a number or with the same element: (m, n) bool."""
    grad, rest = args[0], list(args[1:])
    if not (isinstance(grad, CompactGrad) and _is_whole(grad)) or kwargs:
        return NotImplemented
    rows, indices = _rows(grad)
    others = [_rows(arg)[0] if _is_like(arg, grad) else arg for arg in rest]
    if any(isinstance(other, CompactGrad) for other in others) or any(
        isinstance(other, Tensor) and other.numel() != 1 and not _is_like(arg, grad)
        for other, arg in zip(others, rest, strict=True)
    ):
        return NotImplemented
    zero = rows.new_zeros(())
    elsewhere = func(zero, *(zero if _is_like(arg, grad) else arg for arg in rest))
    flags = elsewhere.expand(grad.shape).clone()
    matrix(flags).index_copy_(grad.selection.dim, indices, func(rows, *others))
    return flags


def _is_like(other: Any, grad: CompactGrad) -> bool:
    return isinstance(other, CompactGrad) and grad.selection.same_as(other.selection)


@handles(aten.equal)
def _equal(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if not (isinstance(a, CompactGrad) and _is_like(b, a)):
        return NotImplemented
    return func(a.compact, b.compact)


# --- sums, means, extremes ------------------------------------------------------------------------


@handles(aten.linalg_vector_norm)
def _vector_norm(func: Any, args: Any, kwargs: Any) -> Any:
    named = dict(zip(("x", "ord", "dim", "keepdim"), args, strict=False)) | kwargs
    grad, order, dim = named["x"], named.get("ord", 2), named.get("dim")
    options = {"dtype": named["dtype"]} if named.get("dtype") is not None else {}
    if order < 0:  # the zeros decide: 0 to a negative power
        return NotImplemented if dim is not None else _extreme_norm(func, grad, order, options)
    if _all_dims(grad, dim):
        norm = func(grad.compact, order, **options)
        return norm.reshape([1] * grad.dim()) if named.get("keepdim") else norm
    return _along(
        grad, dim, named.get("keepdim", False), lambda t, d, k: func(t, order, d, k, **options)
    )


def _extreme_norm(func: Any, grad: CompactGrad, order: float, options: Any) -> Any:
    rows, _ = _rows(grad)
    norm = func(rows, order, **options)
    return norm if rows.numel() == grad.numel() else torch.zeros_like(norm)


@handles(aten.sum.default, aten.sum.dim_IntList)
def _sum(func: Any, args: Any, kwargs: Any) -> Any:
    grad, dim, keep = _reduced(args, kwargs)
    if not _is_whole(grad):
        return NotImplemented
    dtype = kwargs.get("dtype")
    if _all_dims(grad, dim):
        total = _rows(grad)[0].sum(dtype=dtype)
        return total.reshape([1] * grad.dim()) if keep else total
    return _along(grad, dim, keep, lambda t, d, k: torch.sum(t, d, k, dtype=dtype))


@handles(aten.mean.default, aten.mean.dim)
def _mean(func: Any, args: Any, kwargs: Any) -> Any:
    dtype = kwargs.get("dtype") or args[0].dtype
    exact = torch.promote_types(dtype, torch.float32)  # a sum of float16 may overflow
    total = _sum(func, args, {**kwargs, "dtype": exact})
    if total is NotImplemented:
        return NotImplemented
    return (total / (args[0].numel() // total.numel())).to(dtype)


@handles(
    aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction
)
def _spread(func: Any, args: Any, kwargs: Any) -> Any:
    grad, dim, keep = _reduced(args, kwargs)
    if not _is_whole(grad) or not _all_dims(grad, dim) or keep:
        return NotImplemented
    correction = kwargs.get("correction")
    rows = _rows(grad)[0].to(torch.promote_types(grad.dtype, torch.float32))
    count, mean = grad.numel(), rows.sum() / grad.numel()
    squares = (rows - mean).square().sum() + (count - rows.numel()) * mean.square()
    result = squares / (count - (1 if correction is None else correction))
    name = func.overloadpacket.__name__
    result = (result.sqrt() if name.startswith("std") else result).to(grad.dtype)
    return (result, mean.to(grad.dtype)) if name.endswith("_mean") else result


@handles(aten.max.default, aten.min.default, aten.amax, aten.amin, aten.aminmax)
def _extremes(func: Any, args: Any, kwargs: Any) -> Any:
    grad, dim, keep = _reduced(args, kwargs)
    if not _is_whole(grad):
        return NotImplemented
    if func.overloadpacket is aten.aminmax:
        return (grad.amin(), grad.amax()) if dim is None else NotImplemented
    least = func.overloadpacket in (aten.min, aten.amin)
    reduce, clamp = (torch.amin, torch.Tensor.clamp_max) if least else (
        torch.amax, torch.Tensor.clamp_min)  # fmt: skip
    if _all_dims(grad, dim):
        rows, _ = _rows(grad)
        found = reduce(rows)
        if rows.numel() < grad.numel():
            found = clamp(found, 0)
        return found.reshape([1] * grad.dim()) if keep else found
    missing = _rows(grad)[1].numel() < grad.shape[grad.selection.dim]

    def along_one(t: Tensor, d: Any, k: bool) -> Tensor:
        found = reduce(t, d, k)
        return clamp(found, 0) if missing and d == [grad.selection.dim] else found

    return _along(grad, dim, keep, along_one)


@handles(
    aten.any.default, aten.all.default, aten.count_nonzero.default, aten.count_nonzero.dim_IntList
)
def _counts(func: Any, args: Any, kwargs: Any) -> Any:
    grad, dim, _ = _reduced(args, kwargs)
    if not _is_whole(grad) or not _all_dims(grad, dim):
        return NotImplemented
    rows, _ = _rows(grad)
    if func.overloadpacket is aten.all and rows.numel() < grad.numel():
        return torch.zeros((), dtype=torch.bool, device=grad.device)
    return getattr(torch, func.overloadpacket.__name__)(rows)


def _reduced(args: Any, kwargs: Any) -> tuple[CompactGrad, Any, bool]:
    """Return (gradient, dimensions or None, whether they are kept)."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return args[0], None if dim == [] else dim, keep


def _all_dims(grad: CompactGrad, dim: Any) -> bool:
    if dim is None:
        return True
    dims = [dim] if isinstance(dim, int) else dim
    return len({d % grad.dim() for d in dims}) == grad.dim()


def _along(grad: CompactGrad, dim: Any, keep: bool, reduce: Any) -> Any:
    """Reduce a matrix along one dimension, by a reduction that maps zeros to zero."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    if grad.dim() != 2 or len(dims) != 1 or not _is_whole(grad):
        return NotImplemented
    d, selected = dims[0] % 2, grad.selection.dim
    rows, indices = _rows(grad)
    found = reduce(rows, [d], keep)
    if d == selected:
        return found
    shape = list(found.shape)
    where = selected if keep else 0
    shape[where] = grad.shape[selected]
    return found.new_zeros(shape).index_copy_(where, indices, found)


# --- histograms -----------------------------------------------------------------------------------


@handles(aten.histc)
def _histc(func: Any, args: Any, kwargs: Any) -> Any:
    named = dict(zip(("x", "bins", "min", "max"), args, strict=False)) | kwargs
    bins = named.get("bins", 100)
    grad, low, high = named["x"], float(named.get("min", 0)), float(named.get("max", 0))
    if not _is_whole(grad):
        return NotImplemented
    if low == high == 0:
        low, high = float(grad.min()), float(grad.max())
    rows, _ = _rows(grad)
    counts = func(rows, bins, low, high)
    zeros = func(rows.new_zeros(1), bins, low, high)
    return counts + zeros * (grad.numel() - rows.numel())


@handles(aten.histogram.bin_ct)
def _histogram(func: Any, args: Any, kwargs: Any) -> Any:
    named = dict(zip(("x", "bins"), args, strict=False)) | kwargs
    grad, bins, span = named["x"], named.get("bins", 100), named.get("range")
    if not _is_whole(grad) or named.get("weight") is not None:
        return NotImplemented
    rows, _ = _rows(grad)
    if span is None:
        span = [float(grad.min()), float(grad.max())]
    counts, edges = torch.histogram(rows, bins, range=span)
    zeros, _ = torch.histogram(rows.new_zeros(1), bins, range=span)
    counts += zeros * (grad.numel() - rows.numel())
    if named.get("density"):
        counts /= counts.sum() * edges.diff()
    return counts, edges
