"""Finds the subspace of a Parameter, which compiled graphs and optimizers share.

The lookup uses the Parameter that is passed at call time: no graph and no checkpoint owns a
subspace.
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
from grass_fx.state.by_name import ByName
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
    """The reason why a compiled graph leaves a weight dense."""

    name: str
    """The weight's name, relative to the compiled region."""
    reason: str
    unwanted: bool
    """Whether ``include`` or ``exclude`` is the reason."""


class Registry:
    """Reads and writes the records of Parameters for compiled graphs and optimizers.

    ``version`` increases whenever an earlier answer of :meth:`demand` may have become stale.
    """

    def __init__(self) -> None:
        self.version = 0
        self._taken: weakref.WeakSet[Tag] = weakref.WeakSet()  # of live Parameters
        self._first_uses = itertools.count()

    def get(self, weight: Tensor) -> Subspace | None:
        """Return the weight's subspace, or None if no compiled graph has used the weight yet."""
        record = known(weight)
        return None if record is None else record.subspace

    def announce(
        self, optimizer: Any, weights: Iterable[Tensor], names: Iterable[str | None], first: int
    ) -> list[Record]:
        """Note that ``optimizer`` has these parameters from place ``first`` on; return the records.

        A parameter's place in the optimizer keys its random streams. Places are looked up when
        first used, because libraries exchange an optimizer's parameters after its construction.
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
        """Return the parameter's name for reports: from its optimizer, else from its graph."""
        record = known(weight)
        if record is None:
            return default
        return record.name or (default if record.subspace is None else record.subspace.name)

    def key_of(self, weight: Tensor) -> int:
        """Return the key of the parameter's random streams: its index in its optimizer."""
        record = record_of(weight)
        if record.key is None:
            found = place_of(weight)
            place = record.place if found is None else found[1]
            record.key = next(self._first_uses) if place is None else place
        return record.key

    def note_left(self, weight: Tensor, left: Left) -> None:
        """Note that a compiled graph leaves the weight dense; the latest reason replaces others."""
        record_of(weight).left = left

    def left(self, weight: Tensor) -> Left | None:
        """Return why a graph leaves the weight dense, or None if no grass graph has said so."""
        record = known(weight)
        return None if record is None else record.left

    def latest_backward(self) -> int:
        """Return the number of the last backward that gave a live weight a compact gradient."""
        return max((tag.record.subspace.backward for tag in self._taken), default=-1)

    def strays(self, after: int) -> list[str]:
        """Name the weights that a backward after ``after`` reached and no grass optimizer holds."""
        held = {id(r.subspace) for optimizer in holders() for r in optimizer.records}
        live = [tag.record.subspace for tag in self._taken]
        return [s.name for s in live if s.delivered and s.backward > after and id(s) not in held]

    def matched(self, weights: Iterable[Tensor]) -> dict[tuple[str, str], bool]:
        """Return (option, pattern) -> whether it matches a parameter, for patterns of ``weights``.

        The parameters are those of all graphs that the last backward of ``weights`` has met.
        """
        own = [record for weight in weights if (record := known(weight)) is not None]
        met = {record.subspace.backward for record in own if record.subspace is not None}
        live = [tag.record for tag in self._taken]
        records = [*own, *(record for record in live if record.subspace.backward in met)]
        found = {each for record in records for each, seen in record.matched.items() if seen}
        return {each: each in found for record in own for each in record.matched}

    def adopt(self, parameter: Tensor, subspace: Subspace) -> None:
        """Let a parameter that no graph uses step in ``subspace``: it was assigned its gradient.

        Master weights need this: ``master.grad = weight.grad.float()``.
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
        """Return the weights' subspaces as a compiled graph needs them, made when first used.

        If the graph was compiled with other options, new subspaces replace the old. The draw
        number keeps increasing, so that a gradient of an old subspace is never taken for one of the
        new.

        Raises:
            OptionError: a weight holds a gradient of its old subspace; then none is replaced.
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
        created = Subspace(spec, self.key_of(weight), name, weight.device, weight.dtype)
        if record.saved is not None:
            created.load(record.saved)
            record.saved = None
        elif subspace is not None:  # optimizer state of the old subspace has an older draw
            created.selection = replace(created.selection, draw=subspace.selection.draw + 1)
        created.replicas, created.sharding = replicas_of.get(weight), sharding_of.get(weight)
        record.subspace = created
        self._taken.add(tag_of(weight))
        self._outdate()
        when_gone(weight, self._outdate)
        return created

    def _outdate(self) -> None:
        self.version += 1

    def _check_replaced(
        self, weight: Tensor, old: SubspaceSpec, new: SubspaceSpec, name: str
    ) -> None:
        """Raise OptionError if a graph needs another subspace while the weight holds a gradient."""
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
        """Load a saved :meth:`Subspace.state`: now, or when a graph first uses the weight."""
        record = record_of(weight)
        if record.subspace is None:
            record.saved = dict(state)
        else:
            record.subspace.load(state)

    def restart(self, weight: Tensor) -> None:
        """Reset the weight's subspace to before the first step, and drop a waiting saved state.

        A subspace that has not stepped is left alone: a backward may be under way.
        """
        record_of(weight).saved = None
        subspace, key = self.get(weight), self.key_of(weight)
        if subspace is not None and (subspace.step or subspace.key != key):
            subspace.restart(key, subspace.selection.indices.device)

    def saved_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Return what a checkpoint must hold of the weight's subspace; empty if it has none."""
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
    """Describe the options in which the two specs differ."""
    fields = [f.name for f in dataclasses.fields(SubspaceSpec) if f.compare]
    differing = [f for f in fields if getattr(old, f) != getattr(new, f)]
    return ", ".join(f"{f} {getattr(old, f)!r} -> {getattr(new, f)!r}" for f in differing)


class Demand:
    """Asks :meth:`Registry.demand` for one graph's weights at every call, and caches the answer.

    An answer is cached for the given weights until the registry's version changes.
    """

    def __init__(
        self,
        within: Registry,
        specs: Sequence[SubspaceSpec],
        names: Sequence[str],
        by_name: ByName | None = None,
    ) -> None:
        self._registry, self._specs, self._names = within, specs, names
        self._by_name = by_name or ByName()
        self._known: dict[tuple[int, ...], list[weakref.ref[Subspace]]] = {}
        self._version = within.version

    def __call__(self, weights: Sequence[Tensor]) -> list[Subspace]:
        """Return the weights' subspaces; raises the errors of :meth:`Registry.demand`."""
        ids = tuple(map(id, weights))
        if self._version == self._registry.version and (known := self._known.get(ids)) is not None:
            return [cast(Subspace, subspace()) for subspace in known]
        self._by_name.check(weights)
        found = self._registry.demand(weights, self._specs, self._names)
        for weight in weights:
            self._by_name.note(weight)
        if self._version != self._registry.version:
            self._known.clear()
            self._version = self._registry.version
        self._known[ids] = [weakref.ref(subspace) for subspace in found]
        return found


registry = Registry()
"""The only registry of this process."""
