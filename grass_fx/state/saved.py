"""Checks a saved selection before anything is loaded, whatever program wrote it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import StateError
from grass_fx.state.history import BINS
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.units import Units

_NAMES = ("step", "period", "generation", "position", "key", "frozen", "retry", "dim", "size",
          "parts", "block")  # fmt: skip
_FIRST = 9
"""All checkpoints have this many counters. Old ones lack parts, which is 1 then. Block is there
only if it does not divide the rows of a piece."""
_TENSORS = ("subspace_counters", "subspace_order", "subspace_indices")


def check_saved(name: str, state: Mapping[str, Any], stack: int | None) -> None:
    """Raise StateError, naming the weight, if ``state`` is not a valid saved ``Subspace.state()``.

    ``stack``: the number of matrices in a stacked weight. ``Subspace.check`` decides whether the
    state also fits the options.
    """
    damage = _damage(state, stack)
    if damage is not None:
        raise StateError(
            f"{name}: its saved selection is damaged: {damage}. Load another checkpoint, or delete "
            "this weight's entry from the state dict's state: the weight then starts anew."
        )


def check_fits(name: str, state: Mapping[str, Any], spec: SubspaceSpec) -> None:
    """Raise StateError, naming the weight, if a checked ``state`` is not of a subspace ``spec``."""
    indices, scale = state["subspace_indices"], state.get("subspace_scale")
    counters = _counters(state["subspace_counters"])
    pieces, units = pieces_of(state, spec.stack)
    rows = math.prod(spec.indices_shape)
    if (
        (indices.numel(), counters["dim"], pieces) == (rows, spec.dim, spec.pieces)
        and counters["size"] == spec.size
        and units == spec.units
    ):
        return
    remedy = "Compile with the rank, block, side and replacement of the saved run."
    if spec.units.uneven and units.block == 1:
        remedy += (
            f" If that was block={spec.block}: older versions selected single rows where the "
            "block does not divide the dimension. Then delete this weight's entry from the state "
            "dict's state: the weight starts anew."
        )
    raise StateError(
        f"{name}: the saved selection has {indices.numel()} rows of {counters['size']} in "
        f"blocks of {units.block} along dimension {counters['dim']}"
        f"{' with scales' if scale is not None else ''}, but the options ask for "
        f"{rows} rows of {spec.size} in blocks of {spec.block} along "
        f"dimension {spec.dim}{' with scales' if spec.replacement else ''}. {remedy}"
    )


def pieces_of(state: Mapping[str, Tensor], stack: int | None) -> tuple[int, Units]:
    """For a checked state: the number of pieces of its selection, and the units of each piece."""
    counters = _counters(state["subspace_counters"])
    pieces, size = stack or counters["parts"], counters["size"] // counters["parts"]
    count = state["subspace_order"].numel() // pieces
    return pieces, Units(size, counters["block"] or size // count, "subspace_scale" in state)


def _counters(counters: Tensor) -> dict[str, int]:
    numbers: list[int] = counters.tolist()
    return dict(zip(_NAMES, [*numbers, *(1, 0)[len(numbers) - _FIRST :]], strict=True))


def _damage(state: Mapping[str, Any], stack: int | None) -> str | None:
    for entry in _TENSORS:
        value = state.get(entry)
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
            there = entry in state
            return f"{entry} is {'no list of integers' if there else 'missing'}"
    if not _FIRST <= state["subspace_counters"].numel() <= len(_NAMES):
        return f"subspace_counters has {state['subspace_counters'].numel()} numbers"
    counters = _counters(state["subspace_counters"])
    for name, number in counters.items():
        if number < 0:
            return f"{name} is {number}"
    size, parts = counters["size"], counters["parts"]
    if counters["dim"] > 1 or parts == 0 or size == 0 or size % parts:
        return f"it is of {size} rows in {parts} parts along dimension {counters['dim']}"
    pieces, order = stack or parts, state["subspace_order"].cpu()
    units = order.numel() // pieces
    if units == 0 or order.numel() % pieces or pieces_of(state, stack)[1].count != units:
        return f"subspace_order has {order.numel()} units, for {size} rows"
    walk = torch.arange(units, device="cpu")
    if not torch.equal(order.view(pieces, -1).sort(1).values, walk.expand(pieces, -1)):
        return "subspace_order is no permutation"
    if counters["position"] > units:
        return f"position is {counters['position']} in a permutation of {units}"
    scale = state.get("subspace_scale")
    return selection_damage(state["subspace_indices"], scale, *pieces_of(state, stack))


def selection_damage(indices: Tensor, scale: Any, pieces: int, units: Units) -> str | None:
    """Describe what is wrong with σ, or with ρ if it is not None; return None if nothing is.

    ``units``: those of each piece. All pieces have equally many selected rows.
    """
    indices, size, block = indices.cpu(), units.size, units.block
    if indices.numel() == 0 or indices.numel() % (pieces * block):
        return f"{indices.numel()} rows are selected, in {pieces} pieces and blocks of {block}"
    least, most = int(indices.min()), int(indices.max())
    if least < 0 or most >= pieces * size:
        return f"rows {least} to {most} are selected of {pieces * size}"
    starts = torch.arange(pieces, device="cpu") * size
    within = indices.view(pieces, -1) - starts.unsqueeze(1)
    if bool((within < 0).any() or (within >= size).any()):
        return "its rows are not alike in all pieces"
    selected = units.of(within)
    ascents = selected.diff(dim=1)
    if bool((ascents < 0).any()):
        return "its rows are not in ascending order"
    if not torch.equal(within, torch.stack([units.rows(piece) for piece in selected])):
        return f"its rows are no blocks of {block}"
    if scale is None:
        return "a row is selected twice" if bool((ascents == 0).any()) else None
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        return "its scale is no list of numbers"
    if scale.shape != indices.shape:
        return f"its scale has the shape {tuple(scale.shape)} for {indices.numel()} rows"
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return "its scale is not finite and positive"
    return None


def sound_history(past: Any, rows: int, step: int) -> bool:
    """Whether ``past`` can be a ``SelectionHistory.state()`` of ``rows`` rows up to ``step``."""
    shares = min(rows, BINS)
    wanted = {
        "history_numbers": (torch.float64, (6,)),
        "history_ever": (torch.bool, (rows,)),
        "history_closed": (torch.uint8, (None, shares)),
        "history_open": (torch.float32, (shares,)),
    }
    if not isinstance(past, Mapping) or past.keys() != wanted.keys():
        return False
    for entry, (dtype, shape) in wanted.items():
        value = past[entry]
        if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
            return False
        if any(m not in (None, n) for n, m in zip(value.shape, shape, strict=True)):
            return False
    numbers, closed = past["history_numbers"], len(past["history_closed"])
    if not bool(numbers.isfinite().all() and past["history_open"].isfinite().all()):
        return False
    begin, drawn, width, until = numbers[:4].tolist()
    whole = all(number == int(number) for number in (begin, drawn, width, until))
    ordered = 0 <= begin <= drawn <= step and begin + closed * width <= until <= step
    return whole and ordered and width >= 1
