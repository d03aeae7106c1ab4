"""Checks and converts the parts of a saved state before any of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grass_fx.errors import GrassError, StateError, warn
from grass_fx.optim.decay import PENDING, nothing
from grass_fx.optim.rowwise import PER_ROW
from grass_fx.state.registry import registry
from grass_fx.state.saved import check_saved, pieces_of, selection_damage, sound_history
from grass_fx.state.selection import Selection
from grass_fx.state.sharding import Sharding, local, sharding_of
from grass_fx.state.subspace import selects_rows

SUBSPACE = "subspace_"
"""The prefix of the keys of ``Subspace.state()``, which the registry keeps between checkpoints."""

OWN = ("indices", "generation", "age", "scale", PENDING)
"""The entries of a taken weight's state that are ours; all others are the optimizer's."""


def selection_entries(selection: Selection) -> dict[str, Tensor]:
    """Return the entries of a weight's state that hold the selection it belongs to."""
    draw = torch.tensor(selection.draw, device="cpu")
    entries = {"indices": selection.indices, "generation": draw}
    return entries if selection.scale is None else {**entries, "scale": selection.scale}


def how_sharded(parameter: Tensor) -> Sharding | None:
    """How an optimizer's parameter is sharded, also before FSDP2 has gathered it for a graph."""
    if isinstance(parameter, DTensor) and parameter not in sharding_of:
        from grass_fx.state.fsdp2 import adopt_shard  # here, because it loads Inductor

        adopt_shard(parameter)
    return sharding_of.get(parameter)


def copied(value: Any, device: torch.device) -> Any:
    """Return a copy in which all tensors are on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(copied(item, device) for item in value)
    if type(value) is dict:
        return {k: copied(item, device) for k, item in value.items()}
    return value


def viewed(value: Any, wanted: tuple[int, ...] | None, compact: tuple[int, ...]) -> Any:
    """Reshape a moment of a stack to ``wanted``: three-dimensional, or one matrix."""
    flat = (math.prod(compact[:-1]), *compact[-1:])
    if isinstance(value, Tensor) and wanted in (compact, flat):
        return value.reshape(wanted) if tuple(value.shape) in (compact, flat) else value
    return value


@contextmanager
def damage_of(name: str) -> Iterator[None]:
    """Turn errors that a damaged state raises while it is read into a StateError."""
    try:
        yield
    except GrassError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error


def _damaged(name: str, problem: str) -> StateError:
    return StateError(
        f"{name}: its saved state is damaged: {problem}. Load another "
        "checkpoint, or delete this weight's entry from the state dict's state: the weight "
        "then starts anew."
    )


def check_rows(state: Mapping[str, Any], name: str) -> None:
    """Raise StateError if rows of several ages have one count, and none for each."""
    ages = state["age"]
    if ages.numel() == 0 or bool((ages == ages[0]).all()):
        return
    for entry, value in state.items():
        single = isinstance(value, Tensor) and value.dim() == 0 and entry not in OWN
        if single and PER_ROW + entry not in state:
            raise _damaged(name, f"{PER_ROW}{entry} is missing")


def _stack_of(p: Tensor) -> int | None:
    return p.shape[0] if p.dim() == 3 else None


def check_subspace(p: Tensor, ours: Mapping[str, Any], name: str) -> None:
    """Raise StateError if ``ours`` are not the saved entries of a subspace of ``p``."""
    if not ours:
        raise StateError(
            f"{name}: its state is of a subspace, and without the "
            f"entries {SUBSPACE}* that tell which. flatten_optimizer_state_dict of "
            "torch.distributed.checkpoint drops them at loading: save and load "
            "without it."
        )
    if registry.get(p) is not None:
        registry.check(p, ours)
    else:
        check_saved(name, ours, _stack_of(p))
    dim, size = ours["subspace_counters"].tolist()[7:9]
    if p.dim() not in (2, 3) or dim != (1 if p.dim() == 3 else dim) or size != p.shape[dim]:
        raise StateError(
            f"{name} has shape {tuple(p.shape)}, but its saved selection is of {size} rows along "
            f"dimension {dim}. Load it into the model that it was saved from."
        )


def check_selection(
    p: Tensor, state: Mapping[str, Any], ours: Mapping[str, Tensor], name: str
) -> None:
    """Raise StateError if the ages, or the selection that p's moments belong to, are damaged."""
    pieces, units = pieces_of(ours, _stack_of(p))
    ranks = _ranks(p) if selects_rows(ours, p) else 1
    problem = None
    for entry in ("indices", "age"):
        value = state.get(entry)
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            problem = f"{entry} is {'no list of integers' if entry in state else 'missing'}"
        elif value.shape != (ours["subspace_indices"].numel() // ranks,):
            problem = f"{entry} has shape {tuple(value.shape)}"
        if problem is not None:
            break
    else:
        scale, generation = state.get("scale"), state.get("generation")
        left = state.get(PENDING, nothing())  # old checkpoints lack it
        single = isinstance(generation, Tensor) and generation.numel() == 1
        if not single or int(cast("Tensor", generation)) < 0:
            problem = f"generation is {'negative' if single else 'missing'}"
        elif int(state["age"].min()) < 0:
            problem = "an age is negative"
        elif not (isinstance(left, Tensor) and left.numel() == 1 and math.isfinite(left)):
            problem = f"{PENDING} is {left!r}, and no finite number"
        elif (scale is None) != ("subspace_scale" not in ours):
            problem = f"scale is {'missing' if scale is None else 'not of its selection'}"
        else:
            problem = selection_damage(state["indices"], scale, pieces // ranks, units)
    if problem is not None:
        raise _damaged(name, problem)


def _ranks(p: Tensor) -> int:
    sharding = how_sharded(p)
    return 1 if sharding is None else sharding.shards.ranks


def compact_shape(p: Tensor, ours: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of this process's part of C."""
    shape = list(p.shape)
    shape[int(ours["subspace_counters"][7])] = ours["subspace_indices"].numel() // (
        _stack_of(p) or 1
    )
    return (shape[0] // _ranks(p), *shape[1:])


def past_of(
    p: Tensor, ours: Mapping[str, Tensor], past: Any, key: Any, name: str
) -> dict[str, Tensor]:
    """Return a weight's saved history, for reports; if it is damaged, warn and return none."""
    saved = past.get(key, {}) if isinstance(past, Mapping) else past
    if saved is None or saved == {}:
        return {}
    step, size = (int(ours["subspace_counters"][k]) for k in (0, 8))
    if not sound_history(saved, size * (_stack_of(p) or 1), step):
        warn(
            f"{name}: the saved history of its selections is damaged, and starts "
            "anew. It is for reports alone: training is not affected."
        )
        return {}
    return {k: v.to("cpu", copy=True) for k, v in saved.items()}


def own_part(p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return this process's part of a saved state, in which tensors may be DTensors."""
    sharding = how_sharded(p) if "indices" in state else None
    if sharding is None:
        return dict(state)  # dense parameters are stepped as DTensors
    own = {k: local(v) for k, v in state.items()}
    if isinstance(state["indices"], DTensor):
        own["indices"] = own["indices"] - sharding.first(math.prod(p.shape[:-1]))
    return own
