"""Checks a saved selection before anything is loaded, whatever program wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import StateError
from grass_fx.state.history import BINS

_NAMES = ("step", "period", "generation", "position", "key", "frozen", "retry", "dim", "size",
          "parts")  # fmt: skip
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


def pieces_of(state: Mapping[str, Tensor], stack: int | None) -> tuple[int, int, int]:
    """For a checked state: the number of pieces of its selection, the rows of each piece, and B."""
    *_, size, parts = _counters(state["subspace_counters"])
    pieces = stack or parts
    units = state["subspace_order"].numel() // pieces
    return pieces, size // parts, size // parts // units


def _counters(counters: Tensor) -> list[int]:
    numbers: list[int] = counters.tolist()
    return numbers if len(numbers) == len(_NAMES) else [*numbers, 1]  # some checkpoints lack parts


def _damage(state: Mapping[str, Any], stack: int | None) -> str | None:
    for entry in _TENSORS:
        value = state.get(entry)
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
            there = entry in state
            return f"{entry} is {'no list of integers' if there else 'missing'}"
    if state["subspace_counters"].numel() not in (len(_NAMES) - 1, len(_NAMES)):
        return f"subspace_counters has {state['subspace_counters'].numel()} numbers"
    counters = dict(zip(_NAMES, _counters(state["subspace_counters"]), strict=True))
    for name, number in counters.items():
        if number < 0:
            return f"{name} is {number}"
    size, parts = counters["size"], counters["parts"]
    if counters["dim"] > 1 or parts == 0 or size == 0 or size % parts:
        return f"it is of {size} rows in {parts} parts along dimension {counters['dim']}"
    pieces, order = stack or parts, state["subspace_order"].cpu()
    units = order.numel() // pieces
    if units == 0 or order.numel() % pieces or (size // parts) % units:
        return f"subspace_order has {order.numel()} units, for {size} rows"
    walk = torch.arange(units, device="cpu")
    if not torch.equal(order.view(pieces, -1).sort(1).values, walk.expand(pieces, -1)):
        return "subspace_order is no permutation"
    if counters["position"] > units:
        return f"position is {counters['position']} in a permutation of {units}"
    scale = state.get("subspace_scale")
    return selection_damage(state["subspace_indices"], scale, *pieces_of(state, stack))


def selection_damage(indices: Tensor, scale: Any, pieces: int, size: int, block: int) -> str | None:
    """Describe what is wrong with σ, or with ρ if it is not None; return None if nothing is.

    ``size``: the number of rows in each piece. All pieces have equally many selected rows, in
    blocks of ``block``.
    """
    indices = indices.cpu()
    if indices.numel() == 0 or indices.numel() % (pieces * block):
        return f"{indices.numel()} rows are selected, in {pieces} pieces and blocks of {block}"
    least, most = int(indices.min()), int(indices.max())
    if least < 0 or most >= pieces * size:
        return f"rows {least} to {most} are selected of {pieces * size}"
    starts = torch.arange(pieces, device="cpu") * size
    blocks = (indices.view(pieces, -1) - starts.unsqueeze(1)).view(pieces, -1, block)
    first, within = blocks[..., 0], torch.arange(block, device="cpu")
    if bool((blocks < 0).any() or (blocks >= size).any()):
        return "its rows are not alike in all pieces"
    if not torch.equal(blocks, first.unsqueeze(2) + within) or bool((first % block).any()):
        return f"its rows are no blocks of {block}"
    ascents = first.diff(dim=1)
    if bool((ascents < 0).any()):
        return "its rows are not in ascending order"
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
