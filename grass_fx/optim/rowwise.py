"""The state of an arbitrary optimizer, seen as rows: kept, cut up by age, and put together again.

Three kinds of entries are told apart. *Row entries* are floating-point tensors of C's shape.
*Scalars* are numbers and tensors without dimensions, such as ``step``; where rows of one weight
differ in them they are kept per row, as an (r,) tensor or a list. Everything else mixes rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grass_fx.gradient import Selection
from grass_fx.optim.update import carried_rows, places

State = dict[str, Any]

POWERS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2),
}
"""Which power of the gradient an entry goes with, by the names torch.optim uses."""


@dataclass(frozen=True)
class Cohort:
    """Rows of one weight that came in together: ``rows`` (k,), or None for all of them."""

    age: int
    rows: Tensor | None


def cohorts_of(age: Tensor) -> list[Cohort]:
    """The rows by age, youngest first; reads ``age`` (r,) on the host."""
    ages = age.unique().tolist()
    if len(ages) == 1:
        return [Cohort(ages[0], None)]
    return [Cohort(a, (age == a).nonzero().flatten()) for a in ages]


def _is_row_entry(value: Any, shape: torch.Size) -> bool:
    return type(value) is Tensor and value.shape == shape and value.is_floating_point()


def _is_scalar(value: Any, rows: int) -> bool:
    """A number, or one per row."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.shape in (torch.Size(()), torch.Size((rows,)))
    return isinstance(value, (int, float)) or (isinstance(value, list) and len(value) == rows)


def counts(state: State, shape: torch.Size) -> bool:
    """Whether rows of different ages need state of their own: there are scalars."""
    return any(v is not None and not _is_row_entry(v, shape) for v in state.values())


def carried_state(state: State, old: Selection, new: Selection, shape: torch.Size) -> State | None:
    """``state`` for the rows of ``new`` that stay, zeros for new rows; None if it cannot be.

    It cannot if an entry mixes rows or, where rows change their scale ρ, has an unknown power.
    """
    place, stays = places(old, new)
    rescaled = old.scale is not None and new.scale is not None
    result: State = {}
    for name, value in state.items():
        if _is_row_entry(value, shape):
            if rescaled and name not in POWERS:
                return None
            power = POWERS.get(name, 0)
            result[name] = carried_rows(value, old, new, place, stays, power)
        elif value is None or _is_scalar(value, new.indices.numel()):
            if isinstance(value, list):
                value = [value[j] for j in place.tolist()]
            elif isinstance(value, Tensor) and value.dim() == 1:
                value = value[place.to(value.device)]
            result[name] = value
        else:
            return None
    return result


def cut(state: State, cohort: Cohort, shape: torch.Size, dim: int) -> State:
    """The state of one cohort alone; empty for rows that are new."""
    rows = cohort.rows
    if rows is None:
        return dict(state)
    if cohort.age == 0:
        return {}
    first = int(rows[0])
    result: State = {}
    for name, value in state.items():
        if _is_row_entry(value, shape):
            result[name] = value.index_select(dim, rows)
        elif isinstance(value, list):
            result[name] = value[first]
        elif isinstance(value, Tensor):
            result[name] = (value[first] if value.dim() else value).clone()
        else:
            result[name] = value
    return result


def joined(parts: Sequence[tuple[Cohort, State]], shape: torch.Size, dim: int) -> State:
    """The state of all cohorts together: what :func:`cut` takes apart."""
    if len(parts) == 1:
        return parts[0][1]
    result: State = {}
    for name in parts[0][1]:
        pieces = [(cohort.rows, state[name]) for cohort, state in parts]
        values = [value for _, value in pieces]
        if all(isinstance(v, Tensor) and v.dim() == len(shape) for v in values):
            whole = values[0].new_empty(shape)
            for rows, value in pieces:
                whole.index_copy_(dim, rows, value)
        elif all(bool(v is values[0]) or bool(v == values[0]) for v in values):
            whole = values[0]
        elif isinstance(values[0], Tensor):
            whole = values[0].new_empty(shape[dim])
            for rows, value in pieces:
                whole[rows.to(whole.device)] = value
        else:
            whole = [None] * shape[dim]
            for rows, value in pieces:
                for j in rows.tolist():
                    whole[j] = value
        result[name] = whole
    return result
