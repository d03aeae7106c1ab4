"""Saving and loading: an optimizer's state together with its weights' subspaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grass_fx.errors import StateError, warn
from grass_fx.gradient import Used
from grass_fx.records import Record
from grass_fx.registry import registry
from grass_fx.sharding import local, sharding_of
from grass_fx.subspace import selects_rows

_SUBSPACE = "subspace_"  # keys of Subspace.state(), which live in the registry between checkpoints
_SHAPE = "weight_shape"
_OF_SELECTION = ("indices", "scale", "age")  # one number for each selected row
_HISTORY = "history_"  # keys of SelectionHistory.state()
_SUBSPACES = "subspaces"  # in a pickle or a copy: Subspace.state() of each parameter
_PAST = "selection_history"  # where a checkpoint has those: beside "state", and it can lack them


class CheckpointedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state dict, pickle and copy hold its weights' subspaces."""

    records: Sequence[Record] = ()
    """Those of its parameters, in their order: see grass_fx.records."""
    _own: Mapping[str, Any] = {}
    """Options of groups that are not among ``defaults``."""
    _layout_unknown = False
    """The state was to be laid out, and no compiled graph had told which weights are taken."""

    def _forget(self) -> None:
        """Begin without what is known beside the state: it is found out again."""
        self._layouts: dict[Tensor, tuple[torch.dtype, torch.Size]] = {}
        self._used = Used()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _announce(self, groups: Sequence[Mapping[str, Any]]) -> list[Record]:
        """The records of the groups' parameters, which this optimizer has from now on."""
        named = [
            (p, name)
            for group in groups
            for p, name in zip(
                group["params"],
                group.get("param_names", [None] * len(group["params"])),
                strict=True,
            )
        ]
        return registry.announce(self, [p for p, _ in named], [name for _, name in named])

    def __getstate__(self) -> dict[str, Any]:
        # Subspaces belong to Parameter objects: those that a copy or a pickle has are others.
        saved = [dict(registry.saved_state(p)) for p in self._parameters()]
        return {**super().__getstate__(), _SUBSPACES: saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.get(_SUBSPACES)
        self._forget()
        super().__setstate__({k: v for k, v in state.items() if k != _SUBSPACES})
        for group in self.param_groups:  # of another class, or of before there was such an entry
            for name, value in {**self.defaults, **self._own}.items():
                if name != "differentiable":  # which torch has just put into the defaults
                    group.setdefault(name, value)
        if saved is not None:  # else torch's load_state_dict calls
            self.records = self._announce(self.param_groups)
            for p, theirs in zip(self._parameters(), saved, strict=True):
                if theirs:
                    registry.restore(p, theirs)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each taken weight's selection and schedule among its state.

        Plain tensors and numbers: ``torch.load(weights_only=True)`` reads it.
        """
        if self._layout_unknown and not self.state:
            warn(
                "the optimizer's state cannot be laid out before the compiled model has run: run "
                "one forward with gradients enabled first, or torch.distributed.checkpoint loads "
                "no state into it."
            )
        result: dict[str, Any] = super().state_dict()
        past = {}
        for p, key, _ in self._entries(result):
            state = result["state"].get(key, {})
            if "indices" in state:
                own = {k: state[k].clone() for k in ("indices", "scale") if k in state}
                saved, past[key] = _apart(registry.saved_state(p))
                state = _spread(p, self._saved({**state, **own}), saved)
                # On one device: torch.distributed.checkpoint broadcasts no state of several.
                saved[_SHAPE] = torch.tensor(p.shape, device="cpu")
                saved = {k: v.to(p.device) for k, v in saved.items()}
                result["state"][key] = {**state, **saved}
        if past:
            result[_PAST] = past
        return result

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """A taken weight's state as a checkpoint holds it."""
        return state

    def _entries(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, Any, str]]:
        """Each parameter with its key in a state dict and its name there."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            names = saved.get("param_names", [""] * len(saved["params"]))
            yield from zip(group["params"], saved["params"], names, strict=False)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, each tensor in its own dtype; selections go to the weights' subspaces.

        Raises StateError, naming the weight, if names, shapes or a selection do not fit. Then
        nothing has changed.
        """
        own, subspaces = dict(state_dict["state"]), {}
        past = state_dict.get(_PAST, {})
        for p, key, name in self._entries(state_dict):
            self._check_name(p, name)
            if key in own:
                self._check_loaded(p, own[key])
                ours = {k: v for k, v in own[key].items() if k.startswith(_SUBSPACE)}
                own[key] = {k: v for k, v in own[key].items() if k not in (*ours, _SHAPE)}
                own[key] = _own_part(p, own[key])
                if "indices" in own[key] and not ours:
                    raise StateError(
                        f"{registry.name_of(p)}: its state is of a subspace, and without the "
                        f"entries {_SUBSPACE}* that tell which. flatten_optimizer_state_dict of "
                        "torch.distributed.checkpoint drops them at loading: save and load "
                        "without it."
                    )
                if ours:
                    registry.check(p, ours)
                    subspaces[p] = {k: v.to(p.device, copy=True) for k, v in ours.items()}
                    subspaces[p] |= {k: v.cpu() for k, v in past.get(key, {}).items()}
        super().load_state_dict({**state_dict, "state": own})
        for p, key, _ in self._entries(state_dict):
            for k, v in own.get(key, {}).items():
                # Torch casts to the weight's dtype: an index 257 is 256 in bfloat16. Only "step" it
                # leaves alone, and puts it on the device where it belongs.
                if isinstance(v, Tensor) and k in self.state[p]:
                    device = self.state[p][k].device if k == "step" else p.device
                    if k == "generation":  # read by the host
                        device = torch.device("cpu")
                    self.state[p][k] = v.to(device, copy=True)
            if p in subspaces:
                registry.restore(p, subspaces[p])
            else:  # it had not stepped in its subspace
                registry.restart(p)

    def _check_name(self, p: Tensor, saved: str) -> None:
        name = registry.name_of(p, default="")
        if saved and name and _plain(saved) != _plain(name):
            raise StateError(
                f"{name}: the state in its place was saved for {saved}. Build the optimizer from "
                "the same parameters in the same order as in the saved run."
            )

    def _check_loaded(self, p: Tensor, state: Mapping[str, Any]) -> None:
        """Raise StateError if a saved state is of a weight of another shape."""
        shape = state.get(_SHAPE)
        if shape is not None and shape.tolist() != list(p.shape):
            raise StateError(
                f"{registry.name_of(p)} has shape {tuple(p.shape)}, but its state was saved for "
                f"shape {tuple(shape.tolist())}. Load it into the model that it was saved from."
            )


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile and data-parallel wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def _spread(p: Tensor, state: Mapping[str, Any], saved: Mapping[str, Tensor]) -> dict[str, Any]:
    """A taken weight's state as a checkpoint holds it: DTensors of what processes have parts of.

    ``saved`` is its subspace's, which may still wait for the first compiled call.
    """
    sharding = sharding_of.get(p)
    if sharding is None or not saved:
        return dict(state)
    by_rows = selects_rows(saved, p)  # else all processes have the same columns
    spread: dict[str, Any] = {}
    for k, v in state.items():
        if isinstance(v, Tensor) and v.dim() > 0 and (by_rows or k not in _OF_SELECTION):
            v = sharding.whole(v + sharding.first(math.prod(p.shape[:-1])) if k == "indices" else v)
        spread[k] = v
    return spread


def _own_part(p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`_spread` made, back to what this process steps with."""
    sharding = sharding_of.get(p)
    if sharding is None or "indices" not in state:
        return dict(state)  # a dense parameter is stepped as a DTensor
    own = {k: local(v) for k, v in state.items()}
    if isinstance(state["indices"], DTensor):
        own["indices"] = own["indices"] - sharding.first(math.prod(p.shape[:-1]))
    return own


def _apart(saved: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A subspace's state: what training needs, and what only reports need."""
    past = {k: v for k, v in saved.items() if k.startswith(_HISTORY)}
    return {k: v for k, v in saved.items() if k not in past}, past
