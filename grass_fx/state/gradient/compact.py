"""CompactGrad, which is a tensor of the weight's shape to the rest of torch.

It accumulates, is clipped, unscaled and zeroed like any gradient, and can be inspected. An
operation that needs the rows it does not store raises a :class:`~grass_fx.errors.CompactGradError`,
which says what to do.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from grass_fx.errors import CompactGradError
from grass_fx.state.gradient.votes import Votes
from grass_fx.state.selection import Selection

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_has_no_memory = torch._C._set_throw_on_mutable_data_ptr
_HANDLERS: dict[Any, Handler] = {}
LISTS: dict[Any, Handler] = {}
"""Handlers for functions that take lists of tensors, keyed by their Python functions."""


def handles(*ops: Any) -> Callable[[Handler], Handler]:
    """Register the decorated function for these operators; it may return NotImplemented."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return register


class Owner:
    """Refers weakly to a Subspace.

    A plain weakref would make Dynamo treat it as the Subspace itself.
    """

    def __init__(self, subspace: Any) -> None:
        self._ref = weakref.ref(subspace)

    def get(self) -> Any:
        """Return the Subspace, or None if it has been deleted."""
        return self._ref()


class Used:
    """Marks the gradients with which one optimizer has stepped; accumulation.py sets ``warned``."""

    warned = False


@dataclass(slots=True)
class Cell:
    """The content of a gradient. Detached copies share it, so in-place changes show in all."""

    compact: Tensor
    selection: Selection
    scores: Tensor | None = None
    zeroed: bool = False
    local: bool = True
    projected: bool = False
    owner: Owner | None = None
    used: Used | None = None
    votes: Votes | None = None

    def empty(self) -> None:
        """Mark the gradient as zeros that belong to no selection, process or step in particular."""
        self.scores = self.used = self.votes = None
        self.zeroed, self.projected = True, False


class CompactGrad(Tensor):
    """The compact gradient C of a weight (m, n), equations 2 and 3 of docs/method.md.

    Attributes:
        compact: C, (r, n) or (m, r); for a stack (e, r, n).
        selection: the :class:`~grass_fx.Selection` to which C belongs.
        scores: s, (m,), (n,) or (e·m,) float32: in a scoring step the squared gradient norms of the
            rows, else None.
        zeroed: ``zero_`` has emptied it; it adopts the selection of the next gradient.
        local: a part of it comes from this process alone and has not been averaged over the
            processes that train together (grass_fx.distributed).
        projected: a part of it was added as a dense gradient and projected.
        owner: the Subspace whose step ends when an optimizer steps with this gradient, on whichever
            parameter it is; None if that has been deleted.
        used: an optimizer has stepped with it.
        votes: with ``rest="sign"`` the signs of the gradient of the whole weight, else None.
    """

    _cell: Cell

    @staticmethod
    def __new__(
        cls: Any,
        compact: Tensor,
        selection: Selection,
        shape: Sequence[int],
        scores: Tensor | None = None,
        zeroed: bool = False,
        local: bool = True,
        projected: bool = False,
        owner: Any = None,
        votes: Votes | None = None,
    ) -> CompactGrad:
        by = None if owner is None else owner.owner
        cell = Cell(compact, selection, scores, zeroed, local, projected, by, None, votes)
        return wrap(cell, shape)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def compact(self) -> Tensor:
        return self._cell.compact

    @property
    def selection(self) -> Selection:
        return self._cell.selection

    @property
    def scores(self) -> Tensor | None:
        return self._cell.scores

    @property
    def votes(self) -> Votes | None:
        return self._cell.votes

    @property
    def zeroed(self) -> bool:
        return self._cell.zeroed

    @property
    def local(self) -> bool:
        return self._cell.local

    @property
    def projected(self) -> bool:
        return self._cell.projected

    @property
    def owner(self) -> Any:
        return None if self._cell.owner is None else self._cell.owner.get()

    @property
    def used(self) -> bool:
        return self._cell.used is not None

    def mark_used(self, by: Used) -> None:
        """Note that an optimizer has stepped with it: zero it before the next backward."""
        self._cell.used = by

    def vote(self, votes: Votes) -> None:
        """Replace its votes by those of all processes."""
        self._cell.votes = votes

    def mark_averaged(self) -> None:
        """Note that it now holds the average over all processes."""
        self._cell.local = False

    def derived(self, compact: Tensor, scores: Tensor | None = None, **changes: Any) -> CompactGrad:
        """Return a separate gradient of the same weight with other numbers, not yet used."""
        cell = dataclasses.replace(self._cell, compact=compact, scores=scores, used=None, **changes)
        return wrap(cell, self.shape)

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """P C, (m, n): the selected rows (times ρ, repeated rows adding) and 0 elsewhere.

        For a sharded weight a DTensor, sharded as the weight is.
        """
        compact, owner = self.compact, self.owner
        if not isinstance(compact, DTensor):
            return self.selection.embed(compact, self.shape)
        if owner is None or owner.sharding is None:  # of a copy
            return self.selection.embed(compact.full_tensor(), self.shape)
        own = (self.shape[0] // owner.sharding.shards.ranks, *self.shape[1:])
        whole: Tensor = owner.sharding.whole(
            owner.own(self.selection).embed(compact.to_local(), own)
        )
        return whole

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        parts = [
            f"shape={tuple(self.shape)}",
            f"compact={tuple(self.compact.shape)}",
            f"dim={self.selection.dim}",
            f"dtype={self.dtype}",
        ]
        if self.device.type != "cpu":
            parts.append(f"device='{self.device}'")
        parts += ["with scores"] if self.scores is not None else []
        parts += ["with signs"] if self.votes is not None else []
        return f"CompactGrad({', '.join(parts)})"

    __format__ = object.__format__

    # ``module.to(dtype)`` assigns ``grad.data``, which replaces only the tensor's torch part.
    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, CompactGrad):
            raise CompactGradError(
                f"the compact gradient of {self.selection.name} cannot become a dense tensor in "
                "place: assign weight.grad = ... instead."
            )
        descriptor: Any = torch.Tensor.data
        descriptor.__set__(self, value)
        self._cell = value._cell

    def __reduce_ex__(self, protocol: Any) -> Any:
        s, c = self.selection, self._cell
        state = (c.compact, s.indices, s.scale, s.dim, s.generation, s.name)
        marks = (c.zeroed, c.local, c.projected)
        v = Votes(()) if c.votes is None else c.votes
        votes = v.planes, v.factor, v.most, v.common
        return _rebuild, (*state, tuple(self.shape), c.scores, *marks, s.draw, *votes)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactGrad:
        # The copy belongs to a copy of the weight, which gets a subspace of its own.
        compact, scores = copy.deepcopy(self.compact, memo), copy.deepcopy(self.scores, memo)
        return self.derived(compact, scores, owner=None)

    # --- no memory of the whole matrix ------------------------------------------------------------

    def share_memory_(self) -> CompactGrad:
        """Move C and any scores to shared memory."""
        self.compact.share_memory_()
        if self.scores is not None:
            self.scores.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether C is in shared memory."""
        return self.compact.is_shared()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the whole matrix, zeros included, as a read-only NumPy array."""
        array = self.to_dense().numpy(force=force)
        array.flags.writeable = False  # writes would not reach the gradient
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self) -> Any:
        """Return the whole matrix as nested lists, zeros included."""
        return self.to_dense().tolist()

    def untyped_storage(self) -> Any:
        """Return the storage of C, which is all the memory there is."""
        return self.compact.untyped_storage()

    def _no_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise CompactGradError(f"the compact gradient of {self.selection.name} {_NO_MEMORY}")

    data_ptr = storage = _typed_storage = _no_memory
    __dlpack__ = __dlpack_device__ = _no_memory
    __cuda_array_interface__ = property(_no_memory)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func) or _HANDLERS.get(func.overloadpacket)
        result = handler(func, args, kwargs or {}) if handler else NotImplemented
        if result is NotImplemented:
            raise _cannot(func, (args, kwargs))
        return result


class BesideDTensors(CompactGrad):
    """A gradient whose C is a DTensor, for models in which dense gradients are DTensors too.

    For a list with both kinds torch asks the class of the first tensor, and DTensor does not know
    compact gradients. So this class handles functions of lists before torch makes that choice.
    """

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = LISTS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            try:
                result = (handler or _called)(func, args, kwargs or {})
            except RuntimeError as error:  # of a DTensor, which torch asks first
                if "mixed torch.Tensor and DTensor" not in str(error):
                    raise
                raise _cannot(func, (args, kwargs)) from error
        if result is NotImplemented:
            raise _cannot(func, (args, kwargs))
        return result


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def wrap(cell: Cell, shape: Sequence[int]) -> CompactGrad:
    """Return a gradient with content ``cell`` for a weight of ``shape``."""
    compact = cell.compact
    grad: CompactGrad = torch.Tensor._make_wrapper_subclass(
        BesideDTensors if isinstance(compact, DTensor) else CompactGrad,
        shape,
        dtype=compact.dtype,
        device=compact.device,
    )
    # C++ code that asks for its memory gets an error, instead of reading memory that is not there.
    if not is_dynamo_compiling():  # Dynamo does not know the function
        _has_no_memory(grad)
    grad._cell = cell
    return grad


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
    draw: int = 0,
    planes: tuple[Tensor, ...] = (),
    factor: Tensor | float = 1.0,
    most: int = 1,
    common: bool = False,
) -> CompactGrad:
    selection = Selection(indices, scale, dim, generation, name, draw)
    votes = Votes(planes, factor, most, common) if planes else None
    return CompactGrad(compact, selection, shape, scores, zeroed, local, projected, votes=votes)


torch.serialization.add_safe_globals([CompactGrad, _rebuild])

_NO_MEMORY = (
    "has no memory of the weight's shape. weight.grad.compact is a plain tensor of its selected "
    "rows, weight.grad.to_dense() makes the whole matrix."
)


def name_in(tree: Any) -> str:
    """Return the name of the weight of the first compact gradient among the arguments."""
    found = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, CompactGrad))
    return next((grad.selection.name for grad in found), "a weight")


def _cannot(func: Any, arguments: Any) -> CompactGradError:
    return CompactGradError(
        f"{name_in(arguments)}: {func} needs rows that its compact gradient does not hold. Use "
        "weight.grad.compact, a plain tensor of the selected rows, or weight.grad.to_dense(), the "
        "whole matrix with zeros elsewhere. If this is an optimizer's step: use grass_fx.AdamW, or "
        "grass_fx.subspace(X) for a torch optimizer class X."
    )


def bare(tree: Any) -> Any:
    """Replace each compact gradient among the arguments by its C."""
    return tree_map(lambda t: t.compact if isinstance(t, CompactGrad) else t, tree)


def times(scores: Tensor | None, factor: Any, power: int = 1) -> Tensor | None:
    """Return the scores of a gradient times ``factor``**``power``: they scale with its square."""
    if scores is None:
        return None
    if isinstance(factor, DTensor):  # when a sharded model is clipped
        factor = factor.full_tensor()
    if isinstance(factor, Tensor):
        factor = factor.to(scores.device, scores.dtype).reshape(())
    return scores * factor ** (2 * power)


def is_factor(value: Any) -> bool:
    """Whether multiplying by ``value`` multiplies by a single number."""
    return not isinstance(value, CompactGrad) and (
        not isinstance(value, Tensor) or value.numel() == 1
    )
