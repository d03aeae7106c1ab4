"""Saves and loads an optimizer's state together with the subspaces of its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import OptionError, StateError, warn
from grass_fx.optim.decay import PENDING
from grass_fx.optim.entries import COUNT, Kept, recounted
from grass_fx.optim.loading import (
    OWN,
    SUBSPACE,
    check_rows,
    check_selection,
    check_subspace,
    compact_shape,
    copied,
    damage_of,
    how_sharded,
    own_part,
    past_of,
    viewed,
)
from grass_fx.optim.rowwise import PER_ROW
from grass_fx.state.gradient import Used
from grass_fx.state.records import Record
from grass_fx.state.registry import registry
from grass_fx.state.subspace import selects_rows

SHAPE = "weight_shape"
LAY_OUT_FIRST = (
    "To load, call grass_fx.lay_out_from(optimizer, checkpoint, model) first, or run one forward "
    "with gradients enabled."
)
_HISTORY = "history_"  # prefix of the keys of SelectionHistory.state()
_SUBSPACES = "subspaces"  # in a pickle or a copy: Subspace.state() of each parameter
_PAST = "selection_history"  # a checkpoint's entry for histories, beside "state"; optional


class CheckpointedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose state dict, pickle and copy hold the subspaces of its weights."""

    records: Sequence[Record] = ()
    """The records of its parameters, in their order: see grass_fx.state.records."""
    _kind = "grass_fx"
    _own: Mapping[str, Any] = {}
    """Options of parameter groups that are not among ``defaults``."""
    _layout_unknown = False
    """The state was to be laid out before any compiled graph had told which weights are taken."""
    layout_source: Callable[[], dict[Any, Any]] | None = None
    """Gives a state of the right lay-out then: see grass_fx.lay_out_from."""

    def _forget(self) -> None:
        """Drop what is known beside the state; it is found out again."""
        self._layouts: dict[Tensor, tuple[torch.dtype, torch.Size]] = {}
        self._used = Used()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _announce(self, groups: Sequence[Mapping[str, Any]], first: int) -> list[Record]:
        """Announce the groups' parameters, from place ``first`` on, and return their records."""
        named = [
            (p, name)
            for group in groups
            for p, name in zip(
                group["params"],
                group.get("param_names", [None] * len(group["params"])),
                strict=True,
            )
        ]
        return registry.announce(self, [p for p, _ in named], [name for _, name in named], first)

    def __getstate__(self) -> dict[str, Any]:
        # Subspaces belong to Parameter objects, and a copy or a pickle has other Parameters.
        saved = [dict(registry.saved_state(p)) for p in self._parameters()]
        return {**super().__getstate__(), _SUBSPACES: saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.get(_SUBSPACES)
        self._forget()
        super().__setstate__({k: v for k, v in state.items() if k != _SUBSPACES})
        for group in self.param_groups:  # saved by another class or an older version
            for name, value in {**self.defaults, **self._own}.items():
                if name != "differentiable":  # torch has just put it into the defaults
                    group.setdefault(name, value)
        if saved is not None:  # None if torch's load_state_dict calls
            self.records = self._announce(self.param_groups, 0)
            for p, saved_subspace in zip(self._parameters(), saved, strict=True):
                if saved_subspace:
                    registry.restore(p, saved_subspace)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the state of each taken weight includes its selection and schedule.

        It holds plain tensors and numbers, so ``torch.load(weights_only=True)`` can read it.
        """
        if self._layout_unknown and not self.state:
            warn(
                "the optimizer's state cannot be laid out before the compiled model has run, and "
                f"torch.distributed.checkpoint loads no state into it. {LAY_OUT_FIRST}"
            )
        result: dict[str, Any] = super().state_dict()
        past = {}
        for p, key, _ in self._entries(result):
            state = result["state"].get(key, {})
            if "indices" in state:
                own = {k: state[k].clone() for k in ("indices", "scale") if k in state}
                saved, past[key] = _apart(registry.saved_state(p))
                state = _spread(p, self._saved({**state, **own}), saved)
                # On one device: torch.distributed.checkpoint cannot broadcast from several.
                saved[SHAPE] = torch.tensor(p.shape, device="cpu")
                saved = {k: v.to(p.device) for k, v in saved.items()}
                result["state"][key] = {**state, **saved}
        if past:
            result[_PAST] = past
        return result

    def _lay_out_from_source(self) -> None:
        """Lay the state out as a checkpoint has it, if one was named."""
        source = self.layout_source
        if source is not None:
            groups = super().state_dict()["param_groups"]
            self.load_state_dict({"state": source(), "param_groups": groups})
            self.layout_source = None

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert a taken weight's state to the form it has in a checkpoint."""
        return state

    def _unsaved(self, state: dict[str, Any]) -> dict[str, Any]:
        """Undo :meth:`_saved`."""
        return state

    def _kept(
        self,
        p: Tensor,
        shape: tuple[int, ...],
        compact: bool,
        groups: Sequence[Mapping[str, Any]],
        asked: Any,
    ) -> Iterator[Kept]:
        """Yield what the optimizer may keep for ``p``, or for C in its place; nothing if unknown.

        ``groups``: the options to be loaded and the current ones; ``asked``: from :meth:`_asking`.
        """
        yield from ()

    def _asking(self) -> Any:
        """Return the object in which :meth:`_kept` caches its answers during one load."""

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise OptionError for an impossible hyper-parameter."""

    def _check_switches(self, group: Mapping[str, Any]) -> None:
        """Raise OptionError if a group switches on a feature that the optimizer lacks."""

    def _entries(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, Any, str]]:
        """Yield each parameter with its key and its name in a state dict."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            names = saved.get("param_names", [""] * len(saved["params"]))
            yield from zip(group["params"], saved["params"], names, strict=False)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, each tensor in its own dtype; selections go to the weights' subspaces.

        ``grass_fx.AdamW`` and ``grass_fx.subspace(torch.optim.AdamW)`` read each other's state
        dicts. The optimizer keeps copies only, nothing of ``state_dict`` itself.

        Raises:
            StateError: names, shapes or a selection do not fit, the state is another optimizer's,
                or it is damaged; the message names the weight. Or torch.distributed.checkpoint has
                read nothing, because it was asked to before the compiled model has run.
            OptionError: a group has options that this optimizer cannot have.
        After any exception neither the optimizer nor the weights' subspaces have changed.
        """
        if self._layout_unknown and not self.state and not state_dict["state"]:
            raise StateError(
                "there is nothing to load: torch.distributed.checkpoint has read no state of this "
                f"optimizer. {LAY_OUT_FIRST} If the checkpoint was saved before the first step, do "
                "not load the optimizer."
            )
        load, before = super().load_state_dict, dict(self.__dict__)
        prepared: dict[str, Any] = {}
        subspaces: dict[Tensor, dict[str, Tensor]] = {}

        def prepare(_: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
            prepared.update(self._prepared(raw, subspaces))
            return dict(prepared)

        def settle(_: Any) -> None:
            for p, key, _ in self._entries(prepared):
                if key in prepared["state"]:
                    self._settle(p, prepared["state"][key])

        with ExitStack() as undone:
            undone.callback(self._become, before)
            with ExitStack() as hooks:
                if getattr(load, "__func__", None) is torch.optim.Optimizer.load_state_dict:
                    # After hooks that convert the state dict, before hooks that look at the result.
                    first = self.register_load_state_dict_pre_hook(prepare)
                    hooks.callback(first.remove)
                    second = self.register_load_state_dict_post_hook(settle, prepend=True)
                    hooks.callback(second.remove)
                    load(state_dict)
                else:  # a class that overrides it may run no hooks
                    load(prepare(self, state_dict))
                    settle(self)
            undone.pop_all()
        for p in self._parameters():  # everything has been checked
            if p in subspaces:
                registry.restore(p, subspaces[p])
            else:  # it had not stepped in its subspace
                registry.restart(p)

    def _become(self, attributes: Mapping[str, Any]) -> None:
        self.__dict__.clear()
        self.__dict__.update(attributes)

    def _prepared(
        self, state_dict: Mapping[str, Any], subspaces: dict[Tensor, dict[str, Tensor]]
    ) -> dict[str, Any]:
        """Check and convert a state dict for torch's load; put its subspaces into ``subspaces``."""
        groups = [{**self.defaults, **self._own, **g} for g in state_dict["param_groups"]]
        for place, group in enumerate(groups):
            _of_group(place, self._check_switches, group)
        own, past = dict(state_dict["state"]), state_dict.get(_PAST)
        asked, seen = self._asking(), set()
        for now, group in zip(self.param_groups, groups, strict=False):
            names = group.get("param_names", [""] * len(group["params"]))
            for p, key, name in zip(now["params"], group["params"], names, strict=False):
                seen.add(key)
                self._check_name(p, name)
                if key not in own:
                    continue
                name = registry.name_of(p, default=f"parameter {key}")
                if not isinstance(own[key], Mapping):
                    raise StateError(f"{name}: its saved state is no mapping of entries.")
                with damage_of(name):
                    self._check_shape(p, own[key], name)
                    ours = {k: v for k, v in own[key].items() if k.startswith(SUBSPACE)}
                    state = {k: v for k, v in own[key].items() if k not in (*ours, SHAPE)}
                    if ours or "indices" in state:
                        check_subspace(p, ours, name)
                        state = own_part(p, state)
                        check_selection(p, state, ours, name)
                        check_rows(state, name)
                        subspaces[p] = {k: v.to(p.device, copy=True) for k, v in ours.items()}
                        subspaces[p] |= past_of(p, ours, past, key, name)
                    own[key] = self._fitting(p, state, ours, name, (group, now), asked)
        for place, group in enumerate(groups):
            if isinstance(group.get("lr"), int | float):  # a schedule may end just below 0
                group["lr"] = abs(group["lr"])
            _of_group(place, self._check_group, group)
        own = {k: v if k in seen else copy.deepcopy(v) for k, v in own.items()}
        return {**state_dict, "state": own}

    def _fitting(
        self,
        p: Tensor,
        state: Mapping[str, Any],
        ours: Mapping[str, Tensor],
        name: str,
        groups: Sequence[Mapping[str, Any]],
        asked: Any,
    ) -> dict[str, Any]:
        """Return a parameter's saved state in this optimizer's form, or raise StateError."""
        if not state:
            return {}
        rows = state["indices"].numel() if ours else None
        shape = compact_shape(p, ours) if ours else tuple(p.shape)
        about = {k: v for k, v in state.items() if ours and k in OWN}
        inner = {k: v for k, v in state.items() if k not in about}
        first: Kept | None = None
        problem = None
        for kept in self._kept(p, shape, bool(ours), groups, asked):
            entries = recounted(inner, about["age"], kept) if ours else inner
            if ours:
                entries = {k: viewed(v, kept.shapes.get(k), shape) for k, v in entries.items()}
            if kept.has_entries(entries, rows):
                problem = kept.misfit(entries, rows)
                if problem is None:
                    return {**entries, **about}
            first = first or kept
        if first is None:
            return dict(state)
        if problem is not None:
            raise StateError(
                f"{name} has shape {tuple(p.shape)}, and {problem}. Load the state into the model "
                "and the optimizer that it was saved from; without this weight's entry in the "
                "state dict's state the weight starts anew."
            )
        found = ", ".join(sorted(k for k in inner if not k.startswith(PER_ROW))) or "nothing"
        raise StateError(
            f"{name}: the state is another optimizer's: it holds {found}, and {self._kind} "
            f"keeps {first}. Load it into an optimizer of the class and options that saved it; "
            "without this weight's entry in the state dict's state the weight starts anew."
        )

    def _settle(self, p: Tensor, saved: Mapping[str, Any]) -> None:
        """Replace p's loaded state by copies of ``saved``, each tensor in its own dtype."""
        loaded = self.state[p]
        for k, v in saved.items():
            # Torch casts entries to the weight's dtype: an index 257 becomes 256 in bfloat16. It
            # leaves only "step" alone, and puts it on the right device.
            there = loaded.get(k)
            if k == COUNT:
                loaded[k] = there.clone() if isinstance(there, Tensor) else there
            elif k in ("generation", PENDING):  # the host reads it
                loaded[k] = v.to("cpu", copy=True)
            elif k.startswith(PER_ROW):
                loaded[k] = _like(v, loaded.get(k.removeprefix(PER_ROW)))
            elif type(there) is type(v) or (isinstance(there, Tensor) and isinstance(v, Tensor)):
                loaded[k] = copied(v, p.device)
        self.state[p] = self._unsaved(loaded)

    def _check_name(self, p: Tensor, saved: str) -> None:
        name = registry.name_of(p, default="")
        if saved and name and plain_name(saved) != plain_name(name):
            raise StateError(
                f"{name}: the state in its place was saved for {saved}. Build the optimizer from "
                "the same parameters in the same order as in the saved run."
            )

    def _check_shape(self, p: Tensor, state: Mapping[str, Any], name: str) -> None:
        """Raise StateError if a saved state is that of a weight of another shape."""
        shape = state.get(SHAPE)
        if shape is None:
            return
        saved = tuple(shape.tolist() if isinstance(shape, Tensor) else shape)
        if saved != tuple(p.shape):
            raise StateError(
                f"{name} has shape {tuple(p.shape)}, but its state was saved for shape {saved}. "
                "Load it into the model that it was saved from."
            )


def is_of_selection(entry: str) -> bool:
    """Whether an entry has one number for each selected row."""
    return entry in ("indices", "scale", "age") or entry.startswith(PER_ROW)


def _like(each: Any, count: Any) -> Any:
    """Convert the rows' counts to the form of the weight's count: a tensor or a list."""
    if isinstance(count, Tensor):
        each = torch.as_tensor(each, device=count.device)
        return each.to(count.dtype, copy=True)
    return each.tolist() if isinstance(each, Tensor) else list(each)


def _of_group(
    place: int, check: Callable[[Mapping[str, Any]], None], group: Mapping[str, Any]
) -> None:
    try:
        check(group)
    except OptionError as error:
        raise OptionError(f"param_groups[{place}] of the state dict: {error}") from None


_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A parameter's name without the parts that torch.compile and other wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _spread(p: Tensor, state: Mapping[str, Any], saved: Mapping[str, Tensor]) -> dict[str, Any]:
    """A taken weight's state for a checkpoint: tensors that are spread over processes as DTensors.

    ``saved`` is its subspace's saved state, which may still wait for the first compiled call.
    """
    sharding = how_sharded(p)
    if sharding is None or not saved:
        return dict(state)
    by_rows = selects_rows(saved, p)  # else all processes have the same columns
    spread: dict[str, Any] = {}
    for k, v in state.items():
        if by_rows and isinstance(v, list) and is_of_selection(k):
            v = torch.tensor(v, device=p.device)
        if isinstance(v, Tensor) and v.dim() > 0 and (by_rows or not is_of_selection(k)):
            v = sharding.whole(v + sharding.first(math.prod(p.shape[:-1])) if k == "indices" else v)
        spread[k] = v
    return spread


def _apart(saved: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a subspace's state into what training needs and what only reports need."""
    past = {k: v for k, v in saved.items() if k.startswith(_HISTORY)}
    return {k: v for k, v in saved.items() if k not in past}, past
