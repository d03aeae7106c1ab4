"""Treats the state of an arbitrary optimizer as rows: keeps, splits by age and rejoins them.

There are three kinds of entries. *Row entries* are floating-point tensors of C's shape.
*Scalars* are numbers and tensors without dimensions, such as ``step``. If rows of one weight
have different ages, an entry ``per_row_step`` beside ``step`` has each row's value, as an (r,)
tensor or a list, and ``step`` itself is the value of the oldest rows. All other entries mix rows.

Splitting and rejoining take a number of operations that grows with the number of different ages,
not with the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grass_fx.ops import along, select
from grass_fx.optim.carry import carried_rows
from grass_fx.optim.probe import Entry
from grass_fx.optim.rows import rows_of
from grass_fx.state.selection import Selection
from grass_fx.state.transfers import send

State = dict[str, Any]

PER_ROW = "per_row_"


@dataclass(eq=False, slots=True)
class Cohorts:
    """The rows of one weight grouped by age, youngest first; ``ages`` are known on the host.

    ``rows``: the places of each cohort's rows among the selected ones, ascending; None for all.
    ``firsts``, on the host: the first place of each cohort. ``which`` (r,): the cohort of each row,
    on the weight's device; ``which_here``: the same on the CPU. ``back`` (r,): where each row is if
    one cohort follows another. ``uniform``: whether all rows of a cohort have one age; else
    ``ages`` has that of the youngest.
    """

    ages: tuple[int, ...]
    rows: tuple[Tensor | None, ...]
    firsts: tuple[int, ...]
    which: Tensor
    which_here: Tensor
    back: Tensor
    uniform: bool = True
    _parts: list[Selection] = field(default_factory=list, repr=False)
    """A selection, its rows cohort by cohort, and its parts: of the last :meth:`parts`."""

    def __len__(self) -> int:
        return len(self.ages)

    def older(self) -> Cohorts:
        """Return the cohorts after a step."""
        ages = tuple([age + 1 for age in self.ages])
        tensors = self.rows, self.firsts, self.which, self.which_here, self.back
        return Cohorts(ages, *tensors, self.uniform, self._parts)

    def together(self) -> Cohorts:
        """Return all rows as one cohort with the age of the youngest."""
        tensors = self.which, self.which_here, self.back
        return Cohorts(self.ages[:1], (None,), (0,), *tensors, uniform=len(self) == 1)

    def young_and_others(self) -> Cohorts:
        """Return two cohorts: the youngest, and all others with the age of their youngest."""
        two = _cohorts(self.ages[:2], self.which_here.clamp(max=1), self.which.device)
        return replace(two, uniform=len(self) == 2)

    def parts(self, selection: Selection) -> list[Selection]:
        """Return each cohort's part of the selection."""
        return [selection] if len(self) == 1 else self._split(selection)[2:]

    def indices(self, selection: Selection) -> Tensor:
        """Return the selection's indices (r,), cohort by cohort."""
        return selection.indices if len(self) == 1 else self._split(selection)[1].indices

    def _split(self, selection: Selection) -> list[Selection]:
        known = self._parts
        if known and known[0].indices is selection.indices and known[0].scale is selection.scale:
            return known
        parts = [selection.part(rows) for rows in self.rows if rows is not None]
        in_order = replace(selection, indices=torch.cat([part.indices for part in parts]))
        known[:] = [selection, in_order, *parts]
        return known


def cohorts_of(age: Tensor) -> Cohorts:
    """Group the rows by their ages (r,), which are read on the host."""
    ages, which = age.cpu().unique(return_inverse=True)
    return _cohorts(tuple(ages.tolist()), which, age.device)


def _cohorts(ages: tuple[int, ...], which: Tensor, device: torch.device) -> Cohorts:
    if len(ages) == 1:
        return Cohorts(ages, (None,), (0,), which, which, which)  # one cohort needs none of these
    order = which.argsort(stable=True)
    parts = order.split(which.bincount().tolist())
    firsts = tuple(int(part[0]) for part in parts)
    rows, there, back = send(torch.stack([order, which, order.argsort()]), device).unbind()
    return Cohorts(ages, rows.split([part.numel() for part in parts]), firsts, there, which, back)


def is_row_entry(value: Any, shape: torch.Size) -> bool:
    """Whether an entry has a number for each number of C, whose shape is ``shape``."""
    return type(value) is Tensor and value.shape == shape and value.is_floating_point()


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.dim() == 0
    return isinstance(value, (int, float))


def counts(state: State, shape: torch.Size) -> bool:
    """Whether rows of different ages need state of their own, because there are scalars."""
    return any(v is not None and not is_row_entry(v, shape) for v in state.values())


def carried_state(
    state: State,
    old: Selection,
    new: Selection,
    place: Tensor,
    fresh: Tensor,
    weight: Tensor,
    shape: torch.Size,
    entries: Mapping[str, Entry],
) -> State | None:
    """Return ``state`` for the rows of ``new``, or None if that is impossible.

    Row entries are kept for rows that stay. For new rows they get their start values: zero, or for
    entries that hold weights the rows PᵀW of ``weight``. ``shape``: C's. ``place`` and ``fresh``:
    from :func:`~grass_fx.optim.carry.places`. It is impossible if an entry mixes rows, if
    ``entries`` lacks it, or if rows change their scale ρ and the entry does not scale with a power
    of ρ.
    """
    rescaled = old.scale is not None and new.scale is not None
    result: State = {}
    for name, value in state.items():
        if name.startswith(PER_ROW):
            if isinstance(value, Tensor):
                result[name] = value[place.to(value.device)]
            else:
                result[name] = [value[j] for j in place.tolist()]
        elif is_row_entry(value, shape):
            entry = entries.get(name)
            if entry is None or (rescaled and entry.power is None):
                return None
            kept = carried_rows(value, old, new, place, fresh, entry.power or 0)
            if entry.start == "weight":
                own = select(weight, new.indices, new.scale, new.dim).to(kept.dtype)
                kept = torch.where(along(fresh, new.dim, 2), own, kept)
            result[name] = kept
        elif value is None or _is_scalar(value):
            result[name] = value
        else:
            return None
    return result


def cut(state: State, cohorts: Cohorts, shape: torch.Size, dim: int) -> list[State]:
    """Split the state into that of each cohort: {} for rows that are new.

    A single cohort gets the tensors of ``state`` themselves; several cohorts get copies.
    """
    plain = {k: v for k, v in state.items() if not k.startswith(PER_ROW)}
    if len(plain) == len(state) and len(cohorts) == 1:
        return [plain]
    scalars = {name: _each(state, name, cohorts) for name in plain if PER_ROW + name in state}
    if len(cohorts) == 1:
        return [{**plain, **{name: values[0] for name, values in scalars.items()}}]
    result: list[State] = []
    for k, rows in enumerate(cohorts.rows):
        assert rows is not None  # only a single cohort has rows None
        own: State = {}
        for name, value in plain.items() if cohorts.ages[k] else ():
            if is_row_entry(value, shape):
                own[name] = rows_of(value, rows, dim)
            elif name in scalars:
                own[name] = scalars[name][k]
            else:
                own[name] = value.clone() if isinstance(value, Tensor) else value
        result.append(own)
    return result


def _each(state: State, name: str, cohorts: Cohorts) -> list[Any]:
    """Return each cohort's value of a scalar."""
    values = state[PER_ROW + name]
    if isinstance(values, Tensor):
        return [values[first].clone() for first in cohorts.firsts]
    return [values[first] for first in cohorts.firsts]


def joined(states: Sequence[State], cohorts: Cohorts, shape: torch.Size, dim: int) -> State:
    """Join the states of all cohorts: the inverse of :func:`cut`.

    {} if X has kept different entries for the cohorts, or entries that mix rows: the state starts
    anew then.
    """
    if len(states) == 1:
        return states[0]
    if any(state.keys() != states[-1].keys() for state in states):
        return {}
    result: State = {}
    places = [rows for rows in cohorts.rows if rows is not None]
    shapes = [torch.Size([*shape[:dim], rows.numel(), *shape[dim + 1 :]]) for rows in places]
    for name, oldest in states[-1].items():
        values = [state[name] for state in states]
        if all(map(is_row_entry, values, shapes)):
            result[name] = rows_of(torch.cat(values, dim), cohorts.back, dim)
        elif all(isinstance(value, Tensor) and _is_scalar(value) for value in values):
            which = cohorts.which_here if oldest.device.type == "cpu" else cohorts.which
            result[name], result[PER_ROW + name] = oldest, torch.stack(values)[which]
        elif all(value is None for value in values):
            result[name] = None
        elif not any(isinstance(v, Tensor) for v in values) and all(map(_is_scalar, values)):
            result[name] = oldest
            if any(value != oldest for value in values):
                result[PER_ROW + name] = [values[k] for k in cohorts.which_here.tolist()]
        else:
            return {}
    return result


def with_rows(state: State, rows: int) -> State:
    """Return ``state`` as it is saved: tensor scalars get values per row even if all are equal.

    So the shapes in a checkpoint do not depend on the ages of the rows.
    """
    added = {
        PER_ROW + name: value.expand(rows).clone()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == 0 and PER_ROW + name not in state
    }
    return {**state, **added}


def without_equal_rows(state: State) -> State:
    """Undo :func:`with_rows`: drop values per row that all equal the scalar."""
    return {
        name: value
        for name, value in state.items()
        if not (
            name.startswith(PER_ROW)
            and isinstance(value, Tensor)
            and bool((value == state[name.removeprefix(PER_ROW)]).all())
        )
    }
