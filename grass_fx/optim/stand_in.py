"""Parameters of the compact shape, which stand in for taken weights while an optimizer X works.

A stand-in holds PᵀW. If X is known never to look at its parameters, it holds zeros instead: what X
makes of them is the change itself, and nothing has to be read from W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from grass_fx.ops import along
from grass_fx.optim.loading import OWN
from grass_fx.optim.probe import Entry, is_narrow
from grass_fx.optim.rows import add_to_rows_, put_rows_, rows_of
from grass_fx.optim.rowwise import Cohorts, State, counts, cut, is_row_entry, joined
from grass_fx.optim.update import add_rows_, warmup
from grass_fx.state.selection import Selection, matrix
from grass_fx.state.sharding import local


@dataclass(slots=True)
class StandIn:
    """A parameter that replaces some rows of a taken weight: PᵀW or zeros, with C as gradient."""

    parameter: Parameter
    selection: Selection
    state: State
    before: Tensor | None = None
    """A copy of PᵀW, if it is known and needed."""
    factor: float | Tensor | None = None
    """α · ρ · warm-up, by which X's change is multiplied: one number, or one for each row; None
    for ones."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """The former values of the state's entries that hold weights."""

    def follow_weight(self, entries: Mapping[str, Entry]) -> None:
        """Move entries that hold weights as far as the weight moves."""
        if self.before is None or self.factor is None:
            return
        for name in weights_among(self.state, entries):
            value = self.state[name]
            if entries[name].moves and is_row_entry(value, self.before.shape):
                held = self.held.get(name, self.before).to(value.dtype)
                gain = self._broadcast(self._gain(), value.dtype)
                self.state[name] = torch.lerp(held, value, gain)

    def new_rows(self, dtype: torch.dtype, shrink: float) -> Tensor:
        """Return PᵀW · shrink, moved by ``factor`` of the way from there to X's result.

        They have ``dtype``, unless X's result is taken as it is. For rows that do not repeat.
        """
        after = self.parameter.detach()
        if self.before is None or self.factor is None:
            return after
        factor = self._broadcast(self.factor, dtype)
        if shrink == 1 and self.before.dtype == dtype:
            return torch.lerp(self.before, after, factor)
        return self.before.to(dtype, copy=True).mul_(shrink).lerp_(after.to(dtype), factor)

    def change(self, dtype: torch.dtype, shrink: float) -> Tensor:
        """Return what to add to the weight's rows multiplied by ``shrink``.

        It has ``dtype``, unless X's result is taken as it is.
        """
        change = self.parameter.detach()
        if self.before is not None:
            change = self.before.to(dtype, copy=True).mul_(-shrink).add_(change)
        if self.factor is None:
            return change
        return change.to(dtype) * self._broadcast(self.factor, dtype)

    def _gain(self) -> float | Tensor:
        """The ratio of PᵀW's change to X's change: copies of a row add."""
        assert self.factor is not None
        if self.selection.scale is None:
            return self.factor
        _, which, copies = self.selection.indices.unique(return_inverse=True, return_counts=True)
        return self.factor * self.selection.scale * copies[which]

    def _broadcast(self, values: float | Tensor, dtype: torch.dtype) -> float | Tensor:
        """Return a number as it is, and numbers for rows so that they broadcast over PᵀW."""
        if not isinstance(values, Tensor):
            return values
        return along(values.to(dtype), self.selection.dim, 2)


def weights_among(state: State, entries: Mapping[str, Entry]) -> list[str]:
    """Return the names of the entries that hold weights."""
    return [name for name in state if name in entries and entries[name].start == "weight"]


@dataclass(slots=True)
class Taken:
    """A taken weight while X works: one stand-in for all of its rows, or one for each cohort."""

    weight: Tensor
    values: Tensor
    """The weight as a matrix; if it is sharded, this process's part of it."""
    selection: Selection
    cohorts: Cohorts
    shape: torch.Size
    former: State
    """The weight's state before X works, with our own entries."""
    parts: list[StandIn]
    entries: Mapping[str, Entry]
    from_zero: bool
    """Whether the stand-ins hold zeros instead of PᵀW."""
    shrink: float = 1.0
    """The factor by which decoupled weight decay multiplies the weight."""
    narrow: frozenset[str] = frozenset()
    """The entries of X's state that are bfloat16 between steps, and float32 while X works."""
    seed: Tensor | None = None
    """Of the noise with which new rows are rounded, if they are."""
    state: State = field(default_factory=dict)
    """X's state for all rows, after X has worked."""
    age: Tensor | None = None
    """The rows' ages (r,) after the step."""

    def warm_up(self, scale: float, steps: int) -> None:
        """Set the factors for the step that raises each row's age by one."""
        cohorts, repeats = self.cohorts, self.selection.scale is not None
        for part, rows, youngest in zip(self.parts, cohorts.rows, cohorts.ages, strict=True):
            if scale == 1 and not repeats and youngest + 1 >= steps:
                continue
            if cohorts.uniform:
                part.factor = (min(1.0, (youngest + 1) / steps) if steps else 1.0) * scale
            else:
                age = self.former["age"]
                part.factor = warmup((age if rows is None else age[rows]) + 1, steps) * scale
            if part.selection.scale is not None:
                part.factor = part.selection.scale.double() * part.factor
            if not self.from_zero:
                part.before = part.parameter.detach().clone()
            for name in weights_among(part.state, self.entries):
                part.held[name] = part.state[name].clone()

    def collect(self) -> None:
        """Take X's state from the stand-ins."""
        for part in self.parts:
            part.follow_weight(self.entries)
        states = [part.state for part in self.parts]
        self.state = joined(states, self.cohorts, self.shape, self.selection.dim)
        for name in self.narrow & self.state.keys():
            self.state[name] = self.state[name].to(self.values.dtype)
        for part in self.parts:
            part.state = {}

    def writes(self) -> list[Callable[[], None]]:
        """Move the selected rows, to be run after X's step:
        W[σ] = shrink · W[σ] + α · ρ · warm-up · (X's change without weight decay).
        """
        if self.selection.scale is not None:
            return [partial(self._add, part) for part in self.parts]
        return [self._write]

    def _write(self) -> None:
        """Move all selected rows, none of which repeats."""
        weight, dim = self.values, self.selection.dim
        dtype, indices = _wide(weight.dtype), self.cohorts.indices(self.selection)
        if self.from_zero:
            changes = [part.change(dtype, self.shrink) for part in self.parts]
            decay = 1 - self.shrink
            add_to_rows_(weight, indices, _one(changes, dim), dim, decay, self.seed)
        else:
            rows = [part.new_rows(dtype, self.shrink) for part in self.parts]
            put_rows_(weight, indices, _one(rows, dim), dim, self.seed)

    def _add(self, part: StandIn) -> None:
        """Move the rows of a stand-in, which may repeat: then their changes add."""
        change = part.change(_wide(self.values.dtype), self.shrink)
        add_rows_(self.values, part.selection, change, self.seed, decay=1 - self.shrink)

    def put(self) -> None:
        """Write PᵀW back as X left it: this is no step, so without factor, decay and warm-up."""
        weight = self.values
        for part in self.parts:
            assert part.before is not None
            rows, s = part.parameter.detach(), part.selection
            if torch.equal(rows, part.before):
                continue
            if s.scale is None:
                put_rows_(weight, s.indices, rows, s.dim)
            else:  # copies of a row are equal, so any may be written last
                scale = along(s.scale, s.dim, 2).to(rows.dtype)
                rows = weight.index_select(s.dim, s.indices) + (rows - part.before) / scale
                weight.index_copy_(s.dim, s.indices, rows)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of a weight of ``dtype`` are computed."""
    return torch.promote_types(dtype, torch.float32)


def _one(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def grow_older(taken: Sequence[Taken]) -> None:
    """Compute the rows' ages after the step, for all weights in one operation."""
    if taken:
        ages = torch._foreach_add([each.former["age"] for each in taken], 1)
        for each, age in zip(taken, ages, strict=True):
            each.age = age


def is_compact(state: Any) -> bool:
    """Whether this is the state of a taken weight: hooks may put anything into an optimizer's."""
    return isinstance(state, Mapping) and "indices" in state


def inner_state(state: State) -> State:
    """Return the entries of a taken weight's state that are X's."""
    return {name: value for name, value in state.items() if name not in OWN}


def compact_shape(weight: Tensor, selection: Selection) -> torch.Size:
    """Return the shape of C as a matrix; of a sharded weight, of this process's part."""
    return _compact_shape(matrix(local(weight)), selection)


def _compact_shape(values: Tensor, selection: Selection) -> torch.Size:
    rows, columns = values.shape
    size = selection.indices.numel()
    return torch.Size((rows, size) if selection.dim else (size, columns))


def take(
    weight: Tensor,
    selection: Selection,
    compact: Tensor | None,
    state: State,
    cohorts: Cohorts,
    entries: Mapping[str, Entry],
    from_zero: bool,
    narrow: frozenset[str] | None,
) -> Taken:
    """Make stand-ins for a weight: one, or one per age if X's state tells ages apart.

    Their gradient is C, ``compact``. ``from_zero``: they hold zeros instead of PᵀW. ``narrow``: if
    given, they have float32, and so have while X works those entries of its state, which it keeps
    in bfloat16; so no change is rounded off.
    """
    values, dim = matrix(local(weight)), selection.dim
    shape, inner = _compact_shape(values, selection), inner_state(state)
    if len(cohorts) > 1 and not counts(inner, shape):
        own = any(name in entries and entries[name].start == "own" for name in inner)
        apart = own and cohorts.ages[0] == 0
        cohorts = cohorts.young_and_others() if apart else cohorts.together()
    if narrow is not None:
        compact = None if compact is None else compact.float()
        found = {name for name, value in inner.items() if is_narrow(value)}
        narrow = frozenset(found | (narrow - inner.keys()))
        inner = {k: v.float() if k in found else v for k, v in inner.items()}
    states = cut(inner, cohorts, shape, dim)
    parts = []
    for chosen, places, own_state in zip(
        cohorts.parts(selection), cohorts.rows, states, strict=True
    ):
        gradient = compact
        if compact is not None and places is not None:
            gradient = rows_of(compact, places, dim)
        if from_zero:
            size = list(shape)
            size[dim] = chosen.indices.numel()
            rows = values.new_zeros(size)
        else:
            rows = rows_of(values, chosen.indices, dim)
            if chosen.scale is not None:
                rows = (rows * along(chosen.scale, dim, 2)).to(values.dtype)
        parameter = Parameter(rows if narrow is None else rows.float())
        parameter.grad = gradient
        parts.append(StandIn(parameter, chosen, own_state))
    return Taken(
        *(weight, values, selection, cohorts, shape, state, parts, entries, from_zero),
        narrow=narrow or frozenset(),
    )
