"""The state of an arbitrary optimizer, seen as rows: kept, cut up by age, and put together again.

Three kinds of entries are told apart. *Row entries* are floating-point tensors of C's shape.
*Scalars* are numbers and tensors without dimensions, such as ``step``. Where rows of one weight
differ in one, an entry ``per_row_step`` beside it has each row's, as an (r,) tensor or a list, and
``step`` itself is that of the oldest rows. Everything else mixes rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grass_fx.optim.carry import carried_rows
from grass_fx.selected import Selection

State = dict[str, Any]

PER_ROW = "per_row_"

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


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.dim() == 0
    return isinstance(value, (int, float))


def counts(state: State, shape: torch.Size) -> bool:
    """Whether rows of different ages need state of their own: there are scalars."""
    return any(v is not None and not _is_row_entry(v, shape) for v in state.values())


def carried_state(
    state: State, old: Selection, new: Selection, place: Tensor, fresh: Tensor, shape: torch.Size
) -> State | None:
    """``state`` for the rows of ``new`` that stay, zeros for new rows; None if it cannot be.

    ``place`` and ``fresh``: by :func:`~grass_fx.optim.carry.places`. It cannot
    if an entry mixes rows or, where rows change their scale ρ, has an unknown power.
    """
    rescaled = old.scale is not None and new.scale is not None
    result: State = {}
    for name, value in state.items():
        if name.startswith(PER_ROW):
            if isinstance(value, Tensor):
                result[name] = value[place.to(value.device)]
            else:
                result[name] = [value[j] for j in place.tolist()]
        elif _is_row_entry(value, shape):
            if rescaled and name not in POWERS:
                return None
            power = POWERS.get(name, 0)
            result[name] = carried_rows(value, old, new, place, fresh, power)
        elif value is None or _is_scalar(value):
            result[name] = value
        else:
            return None
    return result


def cut(state: State, cohort: Cohort, shape: torch.Size, dim: int) -> State:
    """The state of one cohort alone; empty for rows that are new."""
    rows = cohort.rows
    if rows is None:
        return {k: v for k, v in state.items() if not k.startswith(PER_ROW)}
    if cohort.age == 0:
        return {}
    first = int(rows[0])
    result: State = {}
    for name, value in state.items():
        if name.startswith(PER_ROW):
            continue
        each = state.get(PER_ROW + name)
        if _is_row_entry(value, shape):
            result[name] = value.index_select(dim, rows)
        elif each is None:
            result[name] = value.clone() if isinstance(value, Tensor) else value
        else:
            result[name] = each[first].clone() if isinstance(each, Tensor) else each[first]
    return result


def joined(parts: Sequence[tuple[Cohort, State]], shape: torch.Size, dim: int) -> State:
    """The state of all cohorts, youngest first, together: what :func:`cut` takes apart."""
    if len(parts) == 1:
        return parts[0][1]
    result: State = {}
    for name, oldest in parts[-1][1].items():
        pieces = [(cohort.rows, state[name]) for cohort, state in parts]
        if isinstance(oldest, Tensor) and oldest.dim() == len(shape):
            result[name] = oldest.new_empty(shape)
            for rows, value in pieces:
                result[name].index_copy_(dim, rows, value)
            continue
        result[name] = oldest
        if all(value is oldest or bool(value == oldest) for _, value in pieces):
            continue
        each = oldest.new_empty(shape[dim]) if isinstance(oldest, Tensor) else [oldest] * shape[dim]
        for rows, value in pieces:
            assert rows is not None  # one part alone has all rows
            for j in rows.tolist():
                each[j] = value
        result[PER_ROW + name] = each
    return result


def with_rows(state: State, rows: int) -> State:
    """``state`` as it is saved: tensors of scalars per row as well, whether rows differ or not.

    So the shapes in a checkpoint do not depend on the rows' ages.
    """
    added = {
        PER_ROW + name: value.expand(rows).clone()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == 0 and PER_ROW + name not in state
    }
    return {**state, **added}


def without_equal_rows(state: State) -> State:
    """Undoes :func:`with_rows`: rows that do not differ are told by the scalar alone."""
    return {
        name: value
        for name, value in state.items()
        if not (
            name.startswith(PER_ROW)
            and isinstance(value, Tensor)
            and bool((value == state[name.removeprefix(PER_ROW)]).all())
        )
    }
