"""Adds gradients, as autograd does in backward and as a training loop may.

Two compact gradients with the same selection add up. With different selections:

    the left one         the right one     the result
    zeroed               any               the right one, if it is newer or not zeroed
    any                  zeroed            the left one
    used by a step       another           the right one: a step has done what the left one is for
    another              another           a SelectionChangedError

A dense gradient that is added to a compact one is projected; if the compact one has signs, its
signs count as one vote. If autograd adds a compact gradient in
place to a dense one, which cannot change its type, it adds a dense tensor whose projection is the
compact gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import CompactGradError, SelectionChangedError, warn
from grass_fx.ops import signs
from grass_fx.state.gradient.compact import CompactGrad, Used, bare, handles, times
from grass_fx.state.gradient.copies import copied
from grass_fx.state.gradient.votes import Votes

aten = torch.ops.aten


@handles(aten.add.Tensor)
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    left, right = args[:2]
    alpha = kwargs.get("alpha", 1)
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.shape != right.shape:
        return NotImplemented
    if isinstance(left, CompactGrad) and isinstance(right, CompactGrad):
        total = copied(left)
        total._cell.used = left._cell.used
        return _add_compact(total, right, alpha)
    if not _in_backward():
        raise _mixed(left, right)
    # Autograd adds gradients of one weight, in any order; the sum may stay compact.
    if isinstance(left, CompactGrad):
        return _add_dense(copied(left), right, alpha)
    assert isinstance(right, CompactGrad)
    return _add_dense(copied(right), left, 1) if alpha == 1 else NotImplemented


@handles(aten.add_.Tensor)
def _add_(func: Any, args: Any, kwargs: Any) -> Any:
    left, right = args[:2]
    alpha = kwargs.get("alpha", 1)
    if not isinstance(right, Tensor) or left.shape != right.shape:
        return NotImplemented
    if not isinstance(left, CompactGrad):
        # Autograd adds gradients only with alpha = 1, and never to a parameter.
        if not _in_backward() or alpha != 1 or left.requires_grad:
            raise _mixed(left, right)
        assert isinstance(right, CompactGrad)
        return left.add_(right.selection.lift(right.compact, right.shape))
    if isinstance(right, CompactGrad):
        return _add_compact(left, right, alpha)
    return _add_dense(left, right, alpha)


@handles(aten.sub.Tensor)
def _sub(func: Any, args: Any, kwargs: Any) -> Any:
    return _add(aten.add.Tensor, args, {"alpha": -kwargs.get("alpha", 1)})


@handles(aten.sub_.Tensor)
def _sub_(func: Any, args: Any, kwargs: Any) -> Any:
    return _add_(aten.add_.Tensor, args, {"alpha": -kwargs.get("alpha", 1)})


def _in_backward() -> bool:
    """Whether autograd is running: then the operands of an addition are gradients of one weight."""
    return torch._C._current_graph_task_id() >= 0


def _mixed(left: Tensor, right: Tensor) -> CompactGradError:
    grad = left if isinstance(left, CompactGrad) else right
    assert isinstance(grad, CompactGrad)
    name = grad.selection.name
    return CompactGradError(
        f"{name}: its compact gradient and a dense tensor are added. weight.grad.to_dense() is a "
        "dense gradient, zero where no row is selected; weight.grad.add_(dense) adds the selected "
        "rows of a dense tensor to the gradient. If this is a step written by hand: no selection "
        "would ever change after it. Use grass_fx.AdamW, or grass_fx.subspace(torch.optim.SGD), "
        f"or exclude {name}."
    )


def _add_dense(grad: CompactGrad, dense: Tensor, alpha: Any) -> CompactGrad:
    """C += PᵀG."""
    cell = grad._cell
    cell.compact.add_(cell.selection.project(dense), alpha=alpha)
    if cell.votes is not None:
        own = Votes((signs(dense.reshape(-1, dense.shape[-1]), cell.selection.dim),)).times(alpha)
        cell.votes = cell.votes.plus(own)
    cell.zeroed, cell.local, cell.projected = False, True, True
    return grad


def _add_compact(grad: CompactGrad, other: CompactGrad, alpha: Any) -> CompactGrad:
    """C += C′ of the same selection; otherwise as the table above says."""
    left, right = grad._cell, other._cell
    if left.used is not None and not right.zeroed:
        _warn_unzeroed(left.used, other)
    if left.selection.same_as(right.selection):
        left.compact.add_(right.compact, alpha=alpha)
        more = times(right.scores, alpha)
        if more is not None:
            left.scores = more if left.scores is None else left.scores + more
        if (votes := right.votes and right.votes.times(alpha)) is not None:
            left.votes = votes if left.votes is None else left.votes.plus(votes)
        # A zeroed gradient counts as neither local nor averaged.
        left.local = (left.local and not left.zeroed) or (right.local and not right.zeroed)
        left.projected = left.projected or right.projected
        if not right.zeroed:
            left.zeroed, left.used = False, None
            left.owner = right.owner or left.owner
        return grad
    newer = right.selection.generation > left.selection.generation
    if right.zeroed and not (left.zeroed and newer):
        return grad
    if not left.zeroed and left.used is None:
        raise SelectionChangedError(
            f"{other.selection.name}: a compact gradient of selection {right.selection.draw} "
            f"cannot be added to one of selection {left.selection.draw}. The selection changes at "
            "optimizer.step(): call optimizer.zero_grad() after it, before the next backward. An "
            "average of gradients that is kept over steps starts anew with each selection."
        )
    left.compact = (right.compact * alpha).to(grad.dtype)
    left.scores, left.selection = times(right.scores, alpha), right.selection
    left.owner, left.votes = right.owner, right.votes and right.votes.times(alpha)
    left.zeroed, left.local, left.projected = right.zeroed, right.local, right.projected
    left.used = None
    return grad


def _warn_unzeroed(used: Used, grad: CompactGrad) -> None:
    """Warn once per optimizer; once is enough: such a loop repeats it in each iteration."""
    if used.warned:
        return
    used.warned = True
    warn(
        f"{grad.selection.name}: its gradient has been used by optimizer.step() and was not "
        "zeroed, and now a backward adds another one to it. While the selection stays the sum is "
        "as it would be without grass; where the selection has changed the gradient starts anew "
        "from the new one. If the sum is not meant, call optimizer.zero_grad() before this "
        "backward, or "
        "weight.requires_grad_(False) for a backward that is to leave the weight alone."
    )


# --- moving averages of gradients of one selection ------------------------------------------------


@handles(aten.lerp.Scalar, aten.addcmul.default)
def _average(func: Any, args: Any, kwargs: Any) -> Any:
    if not _alike(args):
        return NotImplemented
    return args[0].derived(func(*bare(args), **kwargs))


@handles(aten.lerp_.Scalar, aten.addcmul_.default)
def _average_(func: Any, args: Any, kwargs: Any) -> Any:
    if not _alike(args):
        return NotImplemented
    func(*bare(args), **kwargs)
    return args[0]


def _alike(args: Any) -> bool:
    """Whether all tensors are compact gradients of one selection whose rows can be multiplied."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    grads = [tensor for tensor in tensors if isinstance(tensor, CompactGrad)]
    if len(grads) < len(tensors):
        return False
    first = grads[0]
    if first.selection.scale is not None and len(grads) > 2:
        return False
    return all(first.selection.same_as(grad.selection) for grad in grads)


@handles(aten.is_same_size)
def _is_same_size(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].shape == args[1].shape
