"""Copies and converts compact gradients, and makes new tensors like one."""

from __future__ import annotations

from typing import Any

import torch

from grass_fx.errors import CompactGradError
from grass_fx.state.gradient.compact import Cell, CompactGrad, handles, wrap

aten = torch.ops.aten


@handles(aten.detach.default, aten.alias.default)
def _share(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    cell = grad._cell
    if cell.compact.requires_grad:
        return grad.derived(cell.compact.detach(), cell.scores)
    return wrap(cell, grad.shape)  # shares state: autograd detaches every gradient


@handles(aten.detach_)
def _itself(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]


@handles(aten.clone)
def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return copied(args[0])


def copied(grad: CompactGrad) -> CompactGrad:
    """Return a separate gradient with the same numbers."""
    scores = None if grad.scores is None else grad.scores.clone()
    return grad.derived(grad.compact.clone(), scores)


@handles(aten._to_copy)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    compact = func(grad.compact, **kwargs)
    scores = None if grad.scores is None else grad.scores.to(compact.device)
    votes = grad.votes and grad.votes.to(compact.device)
    return grad.derived(compact, scores, selection=grad.selection.to(compact.device), votes=votes)


@handles(aten._pin_memory)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].derived(func(args[0].compact, *args[1:], **kwargs), args[0].scores)


@handles(aten.is_pinned)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return func(args[0].compact, *args[1:], **kwargs)


@handles(aten.zeros_like, aten.empty_like, aten.new_empty_strided, aten.new_empty)
def _zeros_like(func: Any, args: Any, kwargs: Any) -> Any:
    """Return zeros, which adopt the next selection; also if uninitialised memory was asked for."""
    grad = args[0]
    if func.overloadpacket not in (aten.zeros_like, aten.empty_like) and (
        tuple(args[1]) != tuple(grad.shape)
    ):
        return torch.empty(args[1], **{**_kind(grad), **_asked(kwargs)})
    compact = torch.zeros_like(grad.compact, **_asked(kwargs))
    if grad.device.type == "meta" != compact.device.type:
        raise CompactGradError(
            f"the compact gradient of {grad.selection.name} is on the meta device: which rows it "
            "holds is not known. Call zero_grad() before module.to_empty()."
        )
    selection = grad.selection.to(compact.device)
    return wrap(Cell(compact, selection, zeroed=True, owner=grad._cell.owner), grad.shape)


@handles(
    aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like, aten.randint_like,
    aten.new_zeros, aten.new_ones, aten.new_full,
)  # fmt: skip
def _dense_like(func: Any, args: Any, kwargs: Any) -> Any:
    """Return a dense tensor: only the gradient's shape, dtype and device are needed."""
    like = torch.empty((1,), **_kind(args[0])).expand(args[0].shape)
    if func.overloadpacket not in (aten.new_zeros, aten.new_ones, aten.new_full):
        kwargs = {**kwargs, "memory_format": torch.contiguous_format}
    return func(like, *args[1:], **kwargs)


def _kind(grad: CompactGrad) -> dict[str, Any]:
    return {"dtype": grad.dtype, "device": grad.device}


def _asked(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The dtype and device that the caller asks for."""
    return {k: kwargs[k] for k in ("dtype", "device") if kwargs.get(k) is not None}


@handles(aten.copy_)
def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    into, source = args[:2]
    if not isinstance(source, CompactGrad):
        return NotImplemented
    if into.shape != source.shape:
        return NotImplemented
    if not isinstance(into, CompactGrad):
        return into.copy_(source.to_dense())
    cell, other = into._cell, source._cell
    cell.compact = other.compact.to(into.device, into.dtype, copy=True)
    cell.scores = None if other.scores is None else other.scores.to(into.device, copy=True)
    cell.votes = other.votes and other.votes.to(into.device)
    cell.selection, cell.owner = other.selection.to(into.device), other.owner
    cell.zeroed, cell.local, cell.projected = other.zeroed, other.local, other.projected
    cell.used = None
    return into
