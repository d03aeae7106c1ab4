"""CompactGrad: the gradient of a taken weight, on ``weight.grad``, storing only its selected rows.

To the rest of torch it is a tensor of the weight's shape: it accumulates, is clipped, unscaled and
zeroed like any gradient. What has no meaning without the rows that are not there raises a
:class:`~grass_fx.errors.CompactGradError` that says what to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from grass_fx.errors import CompactGradError, SelectionChangedError
from grass_fx.selected import Selection, matrix

aten = torch.ops.aten


class CompactGrad(Tensor):
    """The compact gradient C of a weight (m, n), equations 2 and 3 of docs/method.md.

    Attributes: ``compact`` C, (r, n) or (m, r), of a stack (e, r, n); ``subspace``, the
    :class:`~grass_fx.Selection` it belongs to; ``scores`` s, (m,), (n,) or (e·m,) float32, the
    rows' squared gradient norms in a scoring step, else None. ``zeroed`` tells a gradient that
    ``zero_`` emptied: it adopts the next one's selection. ``local``: whether some of it is this
    process's alone, no average over the processes that train together (grass_fx.distributed).
    ``projected``: whether some of it came dense, and was projected when it was added.
    """

    compact: Tensor
    subspace: Selection
    scores: Tensor | None
    zeroed: bool
    local: bool
    projected: bool

    @staticmethod
    def __new__(
        cls: Any,
        compact: Tensor,
        subspace: Selection,
        shape: Sequence[int],
        scores: Tensor | None = None,
        zeroed: bool = False,
        local: bool = True,
        projected: bool = False,
    ) -> CompactGrad:
        if isinstance(compact, DTensor):
            cls = _BesideDTensors
        self: CompactGrad = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=compact.dtype, device=compact.device
        )
        return self._hold(compact, subspace, scores, zeroed, local, projected)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _hold(
        self,
        compact: Tensor,
        subspace: Selection,
        scores: Tensor | None,
        zeroed: bool,
        local: bool,
        projected: bool,
    ) -> CompactGrad:
        self.compact, self.subspace, self.scores, self.zeroed = compact, subspace, scores, zeroed
        self.local, self.projected = local, projected
        return self

    def _with(self, compact: Tensor, scores: Tensor | None) -> CompactGrad:
        shape, zeroed, local, projected = self.shape, self.zeroed, self.local, self.projected
        return CompactGrad(compact, self.subspace, shape, scores, zeroed, local, projected)

    @property
    def _marks(self) -> tuple[bool, bool, bool]:
        return self.zeroed, self.local, self.projected

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """P C, (m, n): the selected rows (times ρ, repeated rows adding) and 0 elsewhere."""
        return self.subspace.embed(self.compact, self.shape)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        parts = [
            f"shape={tuple(self.shape)}",
            f"compact={tuple(self.compact.shape)}",
            f"dim={self.subspace.dim}",
            f"generation={self.subspace.generation}",
            f"dtype={self.dtype}",
        ]
        if self.device.type != "cpu":
            parts.append(f"device='{self.device}'")
        if self.scores is not None:
            parts.append("with scores")
        return f"CompactGrad({', '.join(parts)})"

    # ``module.to(dtype)`` assigns ``grad.data``, which replaces only what torch keeps of a tensor.
    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, CompactGrad):
            raise CompactGradError(
                f"the compact gradient of {self.subspace.name} cannot become a dense tensor in "
                "place: assign weight.grad = ... instead."
            )
        theirs: Any = torch.Tensor.data
        theirs.__set__(self, value)
        self.__dict__ = value.__dict__

    def __reduce_ex__(self, protocol: Any) -> Any:
        s = self.subspace
        state = (self.compact, s.indices, s.scale, s.dim, s.generation, s.name)
        return _rebuild, (*state, tuple(self.shape), self.scores, *self._marks)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactGrad:
        return self._with(copy.deepcopy(self.compact, memo), copy.deepcopy(self.scores, memo))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func) or _HANDLERS.get(func.overloadpacket)
        result = handler(func, args, kwargs or {}) if handler else NotImplemented
        if result is NotImplemented:
            raise _cannot(func)
        return result


class _BesideDTensors(CompactGrad):
    """A gradient whose C is a DTensor, as those of dense parameters are then.

    Of a list of both torch asks the class of the first, and DTensor knows no compact gradients. So
    functions of lists are handled before that choice.
    """

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            handler = _LISTS.get(func)
            result = handler(func, args, kwargs or {}) if handler else func(*args, **(kwargs or {}))
        if result is NotImplemented:
            raise _cannot(func)
        return result


def _rebuild(
    compact: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    dim: int,
    generation: int,
    name: str,
    shape: tuple[int, ...],
    scores: Tensor | None,
    zeroed: bool,
    local: bool = True,
    projected: bool = False,
) -> CompactGrad:
    selection = Selection(indices, scale, dim, generation, name)
    return CompactGrad(compact, selection, shape, scores, zeroed, local, projected)


torch.serialization.add_safe_globals([CompactGrad, _rebuild])

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _cannot(func: Any) -> CompactGradError:
    return CompactGradError(
        f"{func} cannot be done on a compact gradient, which holds only the selected rows of its "
        "weight. To step with it, use grass_fx.AdamW, or grass_fx.subspace(X) for a torch "
        "optimizer class X. weight.grad.compact is those rows, weight.grad.to_dense() the whole "
        "matrix."
    )


_HANDLERS: dict[Any, Handler] = {}


def _handles(*ops: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return register


def _bare(tree: Any) -> Any:
    return tree_map(lambda t: t.compact if isinstance(t, CompactGrad) else t, tree)


def _is_factor(value: Any) -> bool:
    return not isinstance(value, CompactGrad) and (
        not isinstance(value, Tensor) or value.numel() == 1
    )


def _times(scores: Tensor | None, factor: Any, power: int) -> Tensor | None:
    """Scores of a gradient times ``factor``**``power``: squared norms go with its square."""
    if scores is None:
        return None
    if isinstance(factor, DTensor):  # of clipping a sharded model
        factor = factor.full_tensor()
    if isinstance(factor, Tensor):
        factor = factor.to(scores.device, scores.dtype).reshape(())
    return scores * factor ** (2 * power)


@_handles(aten.detach.default, aten.alias.default)
def _share(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    if grad.compact.requires_grad:
        return grad._with(grad.compact.detach(), grad.scores)
    # Autograd asks for one of each gradient. What is done to one in place is done to both.
    compact: Tensor = grad.compact
    shared: CompactGrad = torch.Tensor._make_wrapper_subclass(
        type(grad), grad.shape, dtype=compact.dtype, device=compact.device
    )
    shared.__dict__ = grad.__dict__
    return shared


@_handles(aten.detach_)
def _itself(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]


@_handles(aten.clone)
def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    return grad._with(grad.compact.clone(), None if grad.scores is None else grad.scores.clone())


@_handles(aten._to_copy)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    compact = func(grad.compact, **kwargs)
    scores = None if grad.scores is None else grad.scores.to(compact.device)
    subspace = grad.subspace.to(compact.device)
    return CompactGrad(compact, subspace, grad.shape, scores, *grad._marks)


@_handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg)
def _scale(func: Any, args: Any, kwargs: Any) -> Any:
    grad, factor, power = _factor(func, args)
    if grad is None or kwargs:
        return NotImplemented
    return grad._with(func(*_bare(args)), _times(grad.scores, factor, power))


@_handles(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.neg_)
def _scale_(func: Any, args: Any, kwargs: Any) -> Any:
    grad, factor, power = _factor(func, args)
    if grad is not args[0] or kwargs:
        return NotImplemented
    func(*_bare(args))
    grad.scores = _times(grad.scores, factor, power)
    return grad


def _factor(func: Any, args: Any) -> tuple[CompactGrad | None, Any, int]:
    """(gradient, factor, power) of a multiplication by one number; no gradient if it is another."""
    if len(args) == 1:
        return args[0], -1, 1
    divides = func.overloadpacket in (aten.div, aten.div_)
    grad, factor = args if isinstance(args[0], CompactGrad) or divides else args[::-1]
    if isinstance(grad, CompactGrad) and _is_factor(factor):
        return grad, factor, -1 if divides else 1
    return None, None, 0


@_handles(aten.clamp, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._with(func(*_bare(args), **kwargs), args[0].scores)


@_handles(aten.clamp_.default, aten.clamp_min_.default, aten.clamp_max_.default)
def _clamp_(func: Any, args: Any, kwargs: Any) -> Any:
    func(*_bare(args), **kwargs)
    return args[0]


@_handles(aten.zero_)
def _zero_(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    grad.compact.zero_()
    grad.scores, grad.zeroed, grad.projected = None, True, False
    return grad


@_handles(aten.zeros_like)
def _zeros_like(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    compact = torch.zeros_like(grad.compact, **_kind(kwargs))
    subspace = grad.subspace.to(compact.device)
    return CompactGrad(compact, subspace, grad.shape, None, zeroed=True)


def _kind(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a new tensor is asked to be."""
    return {name: kwargs[name] for name in ("dtype", "device") if name in kwargs}


@_handles(aten.empty_like, aten.new_empty_strided, aten.new_empty)
def _empty(func: Any, args: Any, kwargs: Any) -> Any:
    grad = args[0]
    if len(args) > 1 and tuple(args[1]) != tuple(grad.shape):
        return NotImplemented
    compact = torch.empty_like(grad.compact, **_kind(kwargs))
    if grad.device.type == "meta" != compact.device.type:
        raise CompactGradError(
            f"the compact gradient of {grad.subspace.name} is on the meta device: which rows it "
            "holds is not known. Call zero_grad() before module.to_empty()."
        )
    subspace = grad.subspace.to(compact.device)
    return CompactGrad(compact, subspace, grad.shape, None, zeroed=True)


@_handles(aten.copy_)
def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    into, source = args[:2]
    if not (isinstance(into, CompactGrad) and isinstance(source, CompactGrad)):
        return NotImplemented
    compact = source.compact.to(into.device, into.dtype, copy=True)
    scores = None if source.scores is None else source.scores.to(into.device, copy=True)
    selection = source.subspace.to(into.device)
    return into._hold(compact, selection, scores, *source._marks)


@_handles(aten.linalg_vector_norm)
def _vector_norm(func: Any, args: Any, kwargs: Any) -> Any:
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    return func(*_bare(args), **kwargs) if dims is None else NotImplemented


@_handles(aten.isnan)
def _isnan(func: Any, args: Any, kwargs: Any) -> Any:
    """What anomaly detection asks; full-shaped, as a caller expects, and of repeated rows any."""
    grad = args[0]
    flags = torch.zeros(grad.shape, dtype=torch.uint8, device=grad.device)
    bad = func(grad.compact).to(torch.uint8)
    matrix(flags).index_add_(grad.subspace.dim, grad.subspace.indices, matrix(bad))
    return flags.bool()


@_handles(aten.is_same_size)
def _is_same_size(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].shape == args[1].shape


@_handles(aten.add.Tensor)
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    grad, other = args[:2]
    alpha = kwargs.get("alpha", 1)
    if isinstance(grad, CompactGrad):
        return _add_(func, (_clone(func, (grad,), {}), other), kwargs)
    if not isinstance(other, CompactGrad) or grad.shape != other.shape or alpha != 1:
        return NotImplemented
    return _add_(func, (_clone(func, (other,), {}), grad), kwargs)


@_handles(aten.add_.Tensor)
def _add_(func: Any, args: Any, kwargs: Any) -> Any:
    """C += C′ of the same selection, C += PᵀG, or G += (what projects to C)."""
    grad, other = args[:2]
    alpha = kwargs.get("alpha", 1)
    if not isinstance(other, Tensor) or grad.shape != other.shape:
        return NotImplemented
    if not isinstance(grad, CompactGrad):
        # With a factor it is no accumulation, but an optimizer that knows nothing of subspaces.
        if alpha != 1 or not isinstance(other, CompactGrad):
            return NotImplemented
        return grad.add_(other.subspace.lift(other.compact, other.shape))
    if not isinstance(other, CompactGrad):
        grad.compact.add_(grad.subspace.project(other), alpha=alpha)
        grad.zeroed, grad.local, grad.projected = False, True, True
        return grad
    if not grad.subspace.same_as(other.subspace):
        newer = other.subspace.generation > grad.subspace.generation
        if other.zeroed and not (grad.zeroed and newer):
            return grad  # nothing to add
        if not grad.zeroed:
            raise SelectionChangedError(
                f"{other.subspace.name}: a compact gradient of selection "
                f"{other.subspace.generation} cannot be added to one of selection "
                f"{grad.subspace.generation}. The selection changes at optimizer.step(): call "
                "optimizer.zero_grad() after it, before the next backward."
            )
        compact = (other.compact * alpha).to(grad.dtype)
        scores = _times(other.scores, alpha, 1)
        return grad._hold(compact, other.subspace, scores, *other._marks)
    grad.compact.add_(other.compact, alpha=alpha)
    more = _times(other.scores, alpha, 1)
    if more is not None:
        grad.scores = more if grad.scores is None else grad.scores + more
    # What holds nothing is neither one nor the other.
    grad.local = (grad.local and not grad.zeroed) or (other.local and not other.zeroed)
    grad.zeroed = grad.zeroed and other.zeroed
    grad.projected = grad.projected or other.projected
    return grad


# Lists of gradients, compact and dense mixed: one foreach call on what is stored.


@_handles(aten._foreach_norm)
def _foreach_norm(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*_bare(args), **kwargs)


@_handles(aten._foreach_zero_)
def _foreach_zero_(func: Any, args: Any, kwargs: Any) -> Any:
    func(_bare(args[0]))
    for grad in args[0]:
        if isinstance(grad, CompactGrad):
            grad.scores, grad.zeroed, grad.projected = None, True, False


@_handles(aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar)
def _foreach_clamp_(func: Any, args: Any, kwargs: Any) -> Any:
    func(*_bare(args), **kwargs)


@_handles(
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.Tensor,
)
def _foreach_scale_(func: Any, args: Any, kwargs: Any) -> Any:
    grads, factor = args
    if not _is_factor(factor):
        return NotImplemented
    func(*_bare(args))
    power = -1 if func.__name__.startswith("_foreach_div_") else 1
    for grad in grads:
        if isinstance(grad, CompactGrad):
            grad.scores = _times(grad.scores, factor, power)


@_handles(aten._foreach_add_.List)
def _foreach_add_(func: Any, args: Any, kwargs: Any) -> Any:
    for grad, other in zip(*args[:2], strict=True):
        grad.add_(other, **kwargs)


@_handles(aten._amp_foreach_non_finite_check_and_unscale_)
def _amp_unscale_(func: Any, args: Any, kwargs: Any) -> Any:
    grads, found_inf, inv_scale = args
    # DTensor asks other processes whether they have found one if its first gradient has parts.
    func(sorted(_bare(grads), key=_is_whole), found_inf, inv_scale)
    for grad in grads:
        if isinstance(grad, CompactGrad):
            grad.scores = _times(grad.scores, inv_scale, 1)


def _is_whole(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or all(each.is_replicate() for each in tensor.placements)


_LISTS: dict[Any, Handler] = {
    torch._foreach_norm: _foreach_norm,
    torch._foreach_zero_: _foreach_zero_,
    torch._foreach_clamp_min_: _foreach_clamp_,
    torch._foreach_clamp_max_: _foreach_clamp_,
    torch._foreach_mul_: _foreach_scale_,
    torch._foreach_div_: _foreach_scale_,
    torch._foreach_add_: _foreach_add_,
    torch._amp_foreach_non_finite_check_and_unscale_: _amp_unscale_,
}
"""The functions of lists above, as Python calls them."""
