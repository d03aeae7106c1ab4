"""What an optimizer keeps of a parameter, and whether a saved state is that.

Decided by the entries, not by classes: their names, and which of them have the parameter's shape.
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
"""The entry that counts steps, in all of torch's optimizers; ours have each row's age instead."""

_SIZES = (2, 3, 5, 7, 11, 13, 17)  # all different, so that a shape tells which dimension is which
_LONGER = 10  # steps after which an optimizer has shown entries that come late

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """What an optimizer keeps of one parameter.

    ``shapes``: of each entry the shape, () for a number, None for what can be anything.
    ``dtypes``: of those that are tensors. ``late``: names of entries that it may hold as well.
    ``wrapped``: those that are tensors of a class of their own, such as quantised ones.
    """

    shapes: Mapping[str, Shape | None]
    dtypes: Mapping[str, torch.dtype]
    late: frozenset[str] = frozenset()
    wrapped: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return ", ".join(sorted(self.shapes)) or "nothing"

    def has_entries(self, state: Mapping[str, Any], rows: int | None) -> bool:
        """Whether ``state`` has the entries, of whatever shape; ``rows``: as of :meth:`misfit`."""
        names = {name for name in state if rows is None or not name.startswith(PER_ROW)}
        extra = {k for k in names - self.shapes.keys() - self.late if state[k] is not None}
        return self.shapes.keys() <= names and not extra

    def misfit(self, state: Mapping[str, Any], rows: int | None) -> str | None:
        """What is wrong with the entries of ``state``; ``rows``: r, None of a dense parameter."""
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
    """``state`` with the rows' steps as ``kept`` has them: in ``step``, or in the ages alone.

    Unchanged where they say something else than ``age`` (r,).
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
    """What a class keeps of a parameter, asked of the class itself, by steps on small ones.

    ``make`` gives an optimizer of one parameter with the options of a group, ``step`` steps it.
    Answers are remembered for as long as this object.
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
        """What it may keep of ``shape`` in the place of ``p``, the cheapest answer first.

        ``groups``: options, of which the first are to be used with which the class can step. None
        at all: nothing is known.
        """
        small = _SIZES[: len(shape)]
        sizes = dict(zip(small, shape, strict=False))
        for group in groups if len(small) == len(shape) else ():
            first = self._state(p, small, group, 1)
            if first is None:
                continue
            yield _kept(first, sizes)
            # More of them than after a step: some come late, or with other options.
            longer = [self._state(p, small, each, 1 + _LONGER) or {} for each in groups]
            yield _kept(first, sizes, frozenset(name for state in longer for name in state))
            break
        # What hangs on the size: quantised blocks, factors for large matrices only.
        if not isinstance(p, DTensor):
            for group in groups:
                if (state := self._state(p, shape, group, 1)) is not None:
                    yield _kept(state, {})
                    break

    def _state(
        self, p: Tensor, shape: Shape, group: Mapping[str, Any], steps: int
    ) -> dict[str, Any] | None:
        """A saved state after so many steps; None if the class cannot do that."""
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
        except Exception:  # whatever a class may raise: then it is not known what it keeps
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
