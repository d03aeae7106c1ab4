"""Lays out an optimizer's state as a checkpoint has it, before any graph has told what is taken.

``torch.distributed.checkpoint`` reads into tensors that exist already, so it asks the optimizer for
them first. Which weights are taken, and with which shapes, is then known from the checkpoint alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grass_fx.errors import OptionError, StateError
from grass_fx.optim.checkpoint import SHAPE, CheckpointedOptimizer, is_of_selection, plain_name
from grass_fx.optim.loading import SUBSPACE, damage_of, how_sharded
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.sharding import Sharding, local
from grass_fx.state.subspace import selects_rows

Plan = list[list[tuple[Tensor, "CompactGrad | None"]]]
"""For each parameter group, the parameters to step, each with its compact gradient, if any."""

Entries = dict[str, dict[str, Any]]
"""For each parameter the entries of its state: small ones as they are, large ones on "meta"."""


def lay_out_from(
    optimizer: torch.optim.Optimizer, checkpoint: str | os.PathLike[str], model: nn.Module
) -> None:
    """Let an optimizer lay out its state as ``checkpoint`` has it, before the first forward.

    Call it in a new process before ``get_optimizer_state_dict``, accelerate's ``load_state`` or the
    Trainer's ``resume_from_checkpoint``; these then load what was saved. The files are read when
    the state is laid out, and only the selections among them. Nothing happens if the model has run.

    Args:
        optimizer: a ``grass_fx.AdamW``, or of a class made by ``grass_fx.subspace``; also as
            accelerate wraps it.
        checkpoint: a folder of ``torch.distributed.checkpoint``, or a file of ``torch.save``, that
            has the state by the parameters' names, as ``get_optimizer_state_dict`` gives it.
        model: the model whose parameters the optimizer has, for their names. It may be sharded
            afterwards.

    Raises:
        OptionError: another optimizer is given.
        StateError: (when the state is laid out) the checkpoint cannot be read, or does not fit.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate and Lightning wrap it
    if not isinstance(optimizer, CheckpointedOptimizer):
        raise OptionError(
            f"lay_out_from({type(optimizer).__name__}): it takes an optimizer that steps in the "
            "subspace, grass_fx.AdamW or a class made by grass_fx.subspace."
        )
    path = os.fspath(checkpoint)
    optimizer.layout_source = lambda: _state_from(path, optimizer, model)


def _state_from(path: str, optimizer: CheckpointedOptimizer, model: nn.Module) -> dict[Any, Any]:
    """For each parameter, by its place in the optimizer, a state of the checkpoint's lay-out."""
    from torch.distributed.checkpoint.api import CheckpointException  # here: it takes time

    names = {p: plain_name(name) for name, p in model.named_parameters()}
    try:
        found = _read(path, {*names.values()}) if os.path.isdir(path) else _loaded(path)
    except (Exception, CheckpointException) as error:  # which is no Exception
        raise StateError(
            f"lay_out_from: no optimizer state can be read from {path!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    state = {}
    for place, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if entries := found.get(names.get(p, "")):
            with damage_of(names[p]):
                state[place] = dict(_laid_out(p, entries))
    if not state:
        raise StateError(
            f"lay_out_from: {path!r} has no state of this optimizer's parameters, such as "
            f"{next(iter(names.values()), 'none')}. Name the folder that has the optimizer's "
            "state, and the model that the optimizer trains."
        )
    return state


def _is_small(entry: str, numel: int) -> bool:
    """Whether its values are needed to lay out the others."""
    return _is_alike(entry) or is_of_selection(entry) or numel <= 1


def _is_alike(entry: str) -> bool:
    """Whether every process saves it whole."""
    return entry.startswith(SUBSPACE) or entry == SHAPE


def _read(path: str, names: set[str]) -> Entries:
    """The entries in a folder of torch.distributed.checkpoint; its small ones are loaded."""
    from torch.distributed.checkpoint import state_dict_loader  # here, because it takes time
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(path)
    found: Entries = {}
    wanted: dict[str, Any] = {}
    places: dict[str, tuple[str, str]] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        name, entry = _split(key, names)
        if not name:
            continue
        value: Any = None
        if isinstance(stored, TensorStorageMetadata):
            dtype = stored.properties.dtype
            value = torch.empty(stored.size, dtype=dtype, device="meta")
        if value is None or _is_small(entry, value.numel()):
            wanted[key] = value if value is None else torch.empty_like(value, device="cpu")
            places[key] = name, entry
        found.setdefault(name, {})[entry] = value
    with warnings.catch_warnings():  # every process reads alone, and torch warns of that
        warnings.simplefilter("ignore")
        state_dict_loader.load(wanted, storage_reader=reader, no_dist=True)
    for key, (name, entry) in places.items():
        found[name][entry] = wanted[key]
    return found


def _split(key: str, names: set[str]) -> tuple[str, str]:
    """The parameter and the entry that a checkpoint's key is of, ``...state.NAME.ENTRY``, or ""."""
    rest, _, entry = f".{key}".rpartition(".")
    while rest:
        _, _, rest = rest.partition(".state.")
        if (name := plain_name(rest)) in names:
            return name, entry
    return "", ""


def _loaded(path: str) -> Entries:
    """The entries in a file of torch.save, of which large ones are left there."""
    found: Entries = {}
    for saved in _optimizers_in(torch.load(path, mmap=True, weights_only=True)):
        found |= {plain_name(str(name)): dict(each) for name, each in saved["state"].items()}
    return found


def _optimizers_in(value: Any) -> Iterator[Mapping[str, Any]]:
    """The state dicts of optimizers in what a file has."""
    if isinstance(value, Mapping) and value.keys() >= {"state", "param_groups"}:
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _optimizers_in(item)


def _laid_out(p: Tensor, entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries in the form in which this process saves them, large ones as zeros."""
    sharding = how_sharded(p) if "indices" in entries else None
    by_rows = "indices" in entries and selects_rows(entries, p)
    for entry, value in entries.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or _is_alike(entry):
            yield entry, value
        elif _is_small(entry, value.numel()):
            split = sharding if by_rows and is_of_selection(entry) else None
            yield entry, value if split is None else _part(value, split)
        elif sharding is not None:
            first, *rest = value.shape
            own = (first // sharding.shards.ranks, *rest)
            yield entry, sharding.whole(torch.zeros(own, dtype=value.dtype, device=p.device))
        elif isinstance(p, DTensor) and value.shape == p.shape:
            yield entry, torch.zeros_like(p, dtype=value.dtype)
        else:
            yield entry, torch.zeros(value.shape, dtype=value.dtype, device=p.device)


def _part(value: Tensor, sharding: Sharding) -> DTensor:
    """Of a value for each selected row, the DTensor with this process's part."""
    count = value.shape[0] // sharding.shards.ranks
    start = sharding.first(value.shape[0])
    return sharding.whole(value[start : start + count].clone())


# --- the step with which torch.distributed.checkpoint initialises an empty optimizer --------------


def is_layout_step(optimizer: CheckpointedOptimizer) -> bool:
    """Whether this step can move nothing: no state, lr = 0, and dense gradients of zeros."""
    rates = [group.get("lr", 1) for group in optimizer.param_groups]
    if optimizer.state or any(rate is None or float(rate) != 0 for rate in rates):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    given = [g for g in grads if g is not None]
    return bool(given) and not any(
        isinstance(g, CompactGrad) or bool(local(g).any()) for g in given
    )


def layout_plan(optimizer: CheckpointedOptimizer) -> Plan | None:
    """Plan all parameters, taken ones with a zero gradient; None while none is known to be taken.

    The compiled model must have run before it is known which weights are taken.
    """
    plan: Plan = []
    known = False
    for group in optimizer.param_groups:
        entries: list[tuple[Tensor, CompactGrad | None]] = []
        for p in group["params"]:
            subspace = registry.get(p)
            known = known or subspace is not None
            if p.grad is None:
                continue
            if subspace is None:
                entries.append((p, None))
            else:
                selection = subspace.own(subspace.selection_on(p.device))
                compact = selection.project(local(p.grad))
                entries.append((p, CompactGrad(compact, selection, p.shape, zeroed=True)))
        plan.append(entries)
    return plan if known else None
