"""Finds out which entries an optimizer keeps for a parameter, and whether a saved state has them.

The names of the entries decide, and which of them have the parameter's shape; classes do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grass_fx.optim.rowwise import PER_ROW

COUNT = "step"
"""The entry in which all of torch's optimizers count steps; ours keep an age per row instead."""

_SIZES = (2, 3, 5, 7, 11, 13, 17)  # all different, so that each size identifies a dimension
_LONGER = 10  # additional steps, after which late entries have appeared

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """The entries that an optimizer keeps for one parameter.

    ``shapes``: the shape of each entry, () for a number, None if it can be anything. ``dtypes``:
    the dtypes of the entries that are tensors. ``late``: names of entries that may be missing.
    ``wrapped``: entries that are tensors of a subclass, such as quantised ones.
    """

    shapes: Mapping[str, Shape | None]
    dtypes: Mapping[str, torch.dtype]
    late: frozenset[str] = frozenset()
    wrapped: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return ", ".join(sorted(self.shapes)) or "nothing"

    def has_entries(self, state: Mapping[str, Any], rows: int | None) -> bool:
        """Whether ``state`` has these entries, of any shape; ``rows``: see :meth:`misfit`."""
        names = {name for name in state if rows is None or not name.startswith(PER_ROW)}
        extra = {k for k in names - self.shapes.keys() - self.late if state[k] is not None}
        return self.shapes.keys() <= names and not extra

    def misfit(self, state: Mapping[str, Any], rows: int | None) -> str | None:
        """Say what is wrong with the entries of ``state``; ``rows``: r, or None if dense."""
        alike: dict[torch.dtype, Tensor] = {}  # entries of one dtype were saved in one
        for name, value in state.items():
            if name.startswith(PER_ROW) and rows is not None:
                if (problem := _misfit_per_row(name, value, state, rows)) is not None:
                    return problem
                continue
            shape = self.shapes.get(name)
            if shape == ():
                number = value.item() if _is_single(value) else value
                if not isinstance(number, int | float | complex):
                    return f"its saved {name} is {_what(value)}, no number"
                if name == COUNT and not 0 <= float(number.real) < math.inf:
                    return f"its saved {name} is {number}"
            elif shape is not None:
                if not isinstance(value, Tensor):
                    return f"its saved {name} is {_what(value)}, no tensor"
                if tuple(value.shape) != shape:
                    return f"its saved {name} has shape {tuple(value.shape)}, and needs {shape}"
                if _is_wrapped(value) and name not in self.wrapped:
                    return f"its saved {name} is of {type(value).__name__}"
                if _is_real(self.dtypes[name]) != _is_real(value.dtype):
                    return f"its saved {name} is of {value.dtype}"
                if (first := alike.setdefault(self.dtypes[name], value)).dtype != value.dtype:
                    return f"its saved {name} is of {value.dtype}, beside one of {first.dtype}"
        return None


def _misfit_per_row(name: str, value: Any, state: Mapping[str, Any], rows: int) -> str | None:
    if name.removeprefix(PER_ROW) not in state:
        return f"its saved {name} has no {name.removeprefix(PER_ROW)} beside it"
    shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
    if shape != (rows,):
        return f"its saved {name} has shape {shape}, and needs {(rows,)}"
    if name == PER_ROW + COUNT and min(_listed(value)) < 0:
        return f"its saved {name} is negative"
    return None


def _is_wrapped(value: Any) -> bool:
    return is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor)


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _listed(value: Any) -> list[Any]:
    return list(value.tolist() if isinstance(value, Tensor) else value)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if value is not None else "None"


def recounted(state: Mapping[str, Any], age: Tensor, kept: Kept) -> dict[str, Any]:
    """Return ``state`` with the rows' steps where ``kept`` has them: in ``step``, or only in ages.

    Counts that differ from ``age`` (r,) stay as they are.
    """
    counts = (COUNT, PER_ROW + COUNT)
    if COUNT in kept.shapes and not any(name in state for name in counts):
        steps = age.cpu()
        if COUNT not in kept.dtypes:  # a plain number
            return {**state, COUNT: int(steps.max()), PER_ROW + COUNT: steps.tolist()}
        steps = steps.to(kept.dtypes[COUNT])
        return {**state, COUNT: steps.max(), PER_ROW + COUNT: steps}
    if COUNT not in kept.shapes and COUNT in state:
        ages, listed = age.tolist(), state.get(PER_ROW + COUNT)
        step = state[COUNT].item() if _is_single(state[COUNT]) else state[COUNT]
        if ages == (_listed(listed) if listed is not None else [step] * len(ages)):
            return {name: value for name, value in state.items() if name not in counts}
    return dict(state)


class Asked:
    """Finds out what a class keeps for a parameter, by steps of that class on small parameters.

    ``make`` returns an optimizer of one parameter with a group's options, ``step`` steps it. The
    object caches its answers.
    """

    def __init__(
        self,
        make: Callable[[Tensor, Mapping[str, Any]], torch.optim.Optimizer],
        step: Callable[[torch.optim.Optimizer], Any],
    ) -> None:
        self._make, self._step = make, step
        self._known: dict[tuple[Any, ...], dict[str, Any] | None] = {}

    def answers(
        self, p: Tensor, shape: Shape, groups: Sequence[Mapping[str, Any]]
    ) -> Iterator[Kept]:
        """Yield what the class may keep for ``shape`` in place of ``p``, cheapest answer first.

        ``groups``: options; the first with which the class can step are used. Yields nothing if
        nothing is known.
        """
        small = _SIZES[: len(shape)]
        sizes = dict(zip(small, shape, strict=False))
        for group in groups if len(small) == len(shape) else ():
            first = self._state(p, small, group, 1)
            if first is None:
                continue
            yield _kept(first, sizes)
            # Some entries appear only after several steps, or with other options.
            longer = [self._state(p, small, other, 1 + _LONGER) or {} for other in groups]
            yield _kept(first, sizes, frozenset(name for state in longer for name in state))
            break
        # Some state depends on the size: quantised blocks, factors only for large matrices.
        if not isinstance(p, DTensor):
            for group in groups:
                if (state := self._state(p, shape, group, 1)) is not None:
                    yield _kept(state, {})
                    break

    def _state(
        self, p: Tensor, shape: Shape, group: Mapping[str, Any], steps: int
    ) -> dict[str, Any] | None:
        """The saved state after ``steps`` steps; None if the class cannot step so."""
        key = shape, p.dtype, p.device, id(group), steps
        if key not in self._known:
            devices = [p.device] if p.is_cuda else []
            with torch.random.fork_rng(devices), torch.enable_grad():
                self._known[key] = self._stepped(p, shape, group, steps)
        return self._known[key]

    def _stepped(
        self, p: Tensor, shape: Shape, group: Mapping[str, Any], steps: int
    ) -> dict[str, Any] | None:
        try:
            like = torch.nn.Parameter(torch.ones(shape, dtype=p.dtype, device=p.device))
            optimizer = self._make(like, group)
            for _ in range(steps):
                like.grad = torch.full_like(like, 0.5)
                self._step(optimizer)
            states = optimizer.state_dict()["state"]
            return dict(states.get(0, {}))
        except Exception:  # a class may raise anything; then its entries stay unknown
            return None


def _kept(
    state: Mapping[str, Any], sizes: Mapping[int, int], late: frozenset[str] = frozenset()
) -> Kept:
    shapes: dict[str, Shape | None] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            shapes[name] = tuple(sizes.get(n, n) for n in value.shape)
        else:
            shapes[name] = () if isinstance(value, int | float) else None
    dtypes = {name: value.dtype for name, value in state.items() if isinstance(value, Tensor)}
    return Kept(shapes, dtypes, late, frozenset(k for k, v in state.items() if _is_wrapped(v)))
