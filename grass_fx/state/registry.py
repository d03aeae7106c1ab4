"""From a Parameter to its subspace: the objects that graphs and optimizers share.

A weight's subspace is found by the Parameter that arrives at call time: no graph and no checkpoint
owns it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from grass_fx.errors import OptionError, warn
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.records import (
    Record,
    Tag,
    add_holder,
    holders,
    known,
    place_of,
    record_of,
    tag_of,
    when_gone,
)
from grass_fx.state.replicas import replicas_of
from grass_fx.state.sharding import sharding_of
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Left:
    """Why a compiled graph leaves a weight dense."""

    name: str
    """Its name, relative to the compiled region."""
    reason: str
    unwanted: bool
    """Whether ``include``/``exclude`` say so."""


class Registry:
    """What graphs and optimizers ask of a Parameter's record, and what they put there.

    ``version`` increases whenever an earlier answer of :meth:`demand` may be stale.
    """

    def __init__(self) -> None:
        self.version = 0
        self._taken: weakref.WeakSet[Tag] = weakref.WeakSet()  # of Parameters that live
        self._first_uses = itertools.count()

    def get(self, weight: Tensor) -> Subspace | None:
        """The weight's subspace, or None while no compiled graph has used it."""
        record = known(weight)
        return None if record is None else record.subspace

    def announce(
        self, optimizer: Any, weights: Iterable[Tensor], names: Iterable[str | None], first: int
    ) -> list[Record]:
        """An optimizer has these parameters now, from its place ``first`` on: their records.

        Their places in it key their random streams. Places are looked up at first use: libraries
        exchange an optimizer's parameters after its construction.
        """
        add_holder(optimizer)
        records = []
        for place, (weight, name) in enumerate(zip(weights, names, strict=True), first):
            record = record_of(weight)
            record.key, record.place = None, place
            if name is not None:
                record.name = name
                if record.subspace is not None:
                    record.subspace.rename(name)
            records.append(record)
        return records

    def name_of(self, weight: Tensor, default: str = "a parameter") -> str:
        """What reports call the parameter: as its optimizer does, else as the graph does."""
        record = known(weight)
        if record is None:
            return default
        return record.name or (default if record.subspace is None else record.subspace.name)

    def key_of(self, weight: Tensor) -> int:
        """What keys the parameter's random streams: its index in its optimizer."""
        record = record_of(weight)
        if record.key is None:
            found = place_of(weight)
            place = record.place if found is None else found[1]
            record.key = next(self._first_uses) if place is None else place
        return record.key

    def note_left(self, weight: Tensor, left: Left) -> None:
        """A compiled graph that uses the weight leaves it dense; the latest one's reason counts."""
        record_of(weight).left = left

    def left(self, weight: Tensor) -> Left | None:
        """Why a graph leaves the weight dense, or None while no graph of ours has said so."""
        record = known(weight)
        return None if record is None else record.left

    def latest_backward(self) -> int:
        """The number of the last backward that brought a weight that lives a compact gradient."""
        return max((tag.record.subspace.backward for tag in self._taken), default=-1)

    def strays(self, after: int) -> list[str]:
        """Names of weights in no optimizer of ours that a backward after ``after`` has reached."""
        held = {id(r.subspace) for optimizer in holders() for r in optimizer.records}
        live = [tag.record.subspace for tag in self._taken]
        return [s.name for s in live if s.delivered and s.backward > after and id(s) not in held]

    def adopt(self, parameter: Tensor, subspace: Subspace) -> None:
        """A parameter that no graph uses has got a gradient of ``subspace``, and steps in it.

        So do master weights: ``master.grad = weight.grad.float()``.
        """
        record = record_of(parameter)
        saved, record.saved = record.saved, None
        if saved is not None:
            subspace.load(saved)
            warn(
                f"{subspace.name}: the loaded state of its subspace was that of another parameter, "
                "and is known since this step: its gradient is of the selection before."
            )
        record.subspace = subspace

    def demand(
        self, weights: Sequence[Tensor], specs: Sequence[SubspaceSpec], names: Sequence[str]
    ) -> list[Subspace]:
        """The weights' subspaces as a compiled graph needs them, made at their first use.

        A graph compiled with other options replaces them; selections go on being counted, so that
        no gradient of the old one is taken for one of the new.

        Raises:
            OptionError: a weight holds a gradient of the old one; none is replaced.
        """
        found = [self.get(weight) for weight in weights]
        for weight, subspace, spec, name in zip(weights, found, specs, names, strict=True):
            if subspace is not None and not _serves(subspace, spec):
                self._check_replaced(weight, subspace.spec, spec, name)
        return [
            self._made(weight, subspace, spec, name)
            for weight, subspace, spec, name in zip(weights, found, specs, names, strict=True)
        ]

    def _made(
        self, weight: Tensor, subspace: Subspace | None, spec: SubspaceSpec, name: str
    ) -> Subspace:
        if subspace is not None and _serves(subspace, spec):
            if subspace.convert(weight.dtype):
                self._outdate()
            return subspace
        record = record_of(weight)
        name = record.name or name
        if subspace is not None:
            change = _change(subspace.spec, spec)
            log.warning(
                "%s: compiled with other options (%s), its subspace starts anew", name, change
            )
            warn(  # one text for all weights: shown once
                f"the model was compiled with other options before ({change}): subspaces start "
                "anew. If one function uses a weight and another its transpose, compile them as "
                "one function, or exclude the weight."
            )
        made = Subspace(spec, self.key_of(weight), name, weight.device, weight.dtype)
        if record.saved is not None:
            made.load(record.saved)
            record.saved = None
        elif subspace is not None:  # an optimizer's state of the old one is of an older draw
            made.selection = replace(made.selection, draw=subspace.selection.draw + 1)
        made.replicas, made.sharding = replicas_of.get(weight), sharding_of.get(weight)
        record.subspace = made
        self._taken.add(tag_of(weight))
        self._outdate()
        when_gone(weight, self._outdate)
        return made

    def _outdate(self) -> None:
        self.version += 1

    def _check_replaced(
        self, weight: Tensor, old: SubspaceSpec, new: SubspaceSpec, name: str
    ) -> None:
        """Raise OptionError if another graph wants another subspace inside a step."""
        if isinstance(weight.grad, CompactGrad) and not weight.grad.zeroed:
            raise OptionError(
                f"{self.name_of(weight, name)}: two compiled functions with different options "
                f"share this weight ({_change(old, new)}), and it holds a gradient of the first. "
                "Compile both with the same options, or call optimizer.zero_grad() before the "
                "other one takes over."
            )

    def check(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Raise StateError if a saved state cannot be restored."""
        subspace = self.get(weight)
        if subspace is not None:
            subspace.check(state)

    def restore(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Load a saved :meth:`Subspace.state`, now or when a graph first uses the weight."""
        record = record_of(weight)
        if record.subspace is None:
            record.saved = dict(state)
        else:
            record.subspace.load(state)

    def restart(self, weight: Tensor) -> None:
        """The weight's subspace is as before the first step, and nothing waits for its first use.

        One that has not stepped stays as it is: a backward may be under way.
        """
        record_of(weight).saved = None
        subspace, key = self.get(weight), self.key_of(weight)
        if subspace is not None and (subspace.step or subspace.key != key):
            subspace.restart(key, subspace.selection.indices.device)

    def saved_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of the weight's subspace; empty if it has none."""
        record = known(weight)
        if record is None:
            return {}
        if record.subspace is None:
            return record.saved or {}
        state: Mapping[str, Tensor] = record.subspace.state()
        return state


def _serves(subspace: Subspace, spec: SubspaceSpec) -> bool:
    return subspace.spec is spec or subspace.spec == spec


def _change(old: SubspaceSpec, new: SubspaceSpec) -> str:
    """In what two differ."""
    fields = [f.name for f in dataclasses.fields(SubspaceSpec) if f.compare]
    differing = [f for f in fields if getattr(old, f) != getattr(new, f)]
    return ", ".join(f"{f} {getattr(old, f)!r} -> {getattr(new, f)!r}" for f in differing)


class Demand:
    """What one graph demands of its weights: :meth:`Registry.demand`, asked at every call.

    The answer is remembered for the weights that were given, until the registry's version changes.
    """

    def __init__(
        self, within: Registry, specs: Sequence[SubspaceSpec], names: Sequence[str]
    ) -> None:
        self._registry, self._specs, self._names = within, specs, names
        self._known: dict[tuple[int, ...], list[weakref.ref[Subspace]]] = {}
        self._version = within.version

    def __call__(self, weights: Sequence[Tensor]) -> list[Subspace]:
        """The weights' subspaces; errors as of :meth:`Registry.demand`."""
        ids = tuple(map(id, weights))
        if self._version == self._registry.version and (known := self._known.get(ids)) is not None:
            return [cast(Subspace, subspace()) for subspace in known]
        found = self._registry.demand(weights, self._specs, self._names)
        if self._version != self._registry.version:
            self._known.clear()
            self._version = self._registry.version
        self._known[ids] = [weakref.ref(subspace) for subspace in found]
        return found


registry = Registry()
"""The one registry of this process."""
