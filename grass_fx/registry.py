"""From a Parameter to its subspace: the objects that graphs and optimizers share.

A weight's subspace is found by the Parameter that arrives at call time, weakly: no graph and no
checkpoint owns it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from grass_fx.errors import GrassWarning, OptionError
from grass_fx.gradient import CompactGrad
from grass_fx.replicas import replicas_of
from grass_fx.sharding import sharding_of
from grass_fx.subspace import Subspace, SubspaceSpec

log = logging.getLogger(__name__)


class Registry:
    """From Parameter to Subspace, weakly, and what is known of a Parameter before it has one.

    ``version`` counts what makes an answer of :meth:`demand` untrue.
    """

    def __init__(self) -> None:
        self.version = 0
        self._subspaces: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._keys: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._saved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._announced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._first_uses = itertools.count()

    def get(self, weight: Tensor) -> Subspace | None:
        """The weight's subspace, or None while no compiled graph has used it."""
        return self._subspaces.get(weight)

    def announce(self, weights: Iterable[Tensor], names: Iterable[str | None]) -> None:
        """An optimizer registers its parameters: their index keys their random streams."""
        for index, (weight, name) in enumerate(zip(weights, names, strict=True)):
            if is_traceable_wrapper_subclass(weight) and weight not in sharding_of:
                continue  # never taken; and torch converts one only if no weak reference knows it
            self._keys[weight], self._announced[weight] = index, True
            if name is not None:
                self._names[weight] = name
                if (subspace := self.get(weight)) is not None:
                    subspace.rename(name)

    def name_of(self, weight: Tensor, default: str = "a parameter") -> str:
        """What reports call the parameter: as its optimizer does, else as the graph does."""
        subspace = self.get(weight)
        name: str = self._names.get(weight, default if subspace is None else subspace.name)
        return name

    def key_of(self, weight: Tensor) -> int:
        """What keys the parameter's random streams: its index in its optimizer."""
        if weight not in self._keys:
            self._keys[weight] = next(self._first_uses)
        key: int = self._keys[weight]
        return key

    def strays(self) -> list[str]:
        """Names of weights with a compact gradient that are in no optimizer of ours."""
        return [
            subspace.name
            for weight, subspace in self._subspaces.items()
            if weight not in self._announced and isinstance(weight.grad, CompactGrad)
        ]

    def demand(
        self, weights: Sequence[Tensor], specs: Sequence[SubspaceSpec], names: Sequence[str]
    ) -> list[Subspace]:
        """The weights' subspaces as a compiled graph needs them, made at their first use.

        A graph compiled with other options replaces them; selections go on being counted, so that
        no gradient of the old one is taken for one of the new.

        Raises:
            OptionError: a weight holds a gradient of the old one; none is replaced.
        """
        known: list[Subspace | None] = [self._subspaces.get(weight) for weight in weights]
        for weight, subspace, spec, name in zip(weights, known, specs, names, strict=True):
            if subspace is not None and not _serves(subspace, spec):
                self._check_replaced(weight, subspace.spec, spec, name)
        return [
            self._made(weight, subspace, spec, name)
            for weight, subspace, spec, name in zip(weights, known, specs, names, strict=True)
        ]

    def _made(
        self, weight: Tensor, subspace: Subspace | None, spec: SubspaceSpec, name: str
    ) -> Subspace:
        if subspace is not None and _serves(subspace, spec):
            if subspace.convert(weight.dtype):
                self._outdate()
            return subspace
        name = self._names.get(weight, name)
        if subspace is not None:
            change = _change(subspace.spec, spec)
            log.warning(
                "%s: compiled with other options (%s), its subspace starts anew", name, change
            )
            warnings.warn(  # one text for all weights: shown once
                f"the model was compiled with other options before ({change}): subspaces start "
                "anew. If one function uses a weight and another its transpose, compile them as "
                "one function, or exclude the weight.",
                GrassWarning,
                stacklevel=4,
            )
        made = Subspace(spec, self.key_of(weight), name, weight.device, weight.dtype)
        saved = self._saved.get(weight)
        if saved is not None:
            made.load(saved)
            del self._saved[weight]
        elif subspace is not None:
            generation = subspace.selection.generation + 1
            made.selection = replace(made.selection, generation=generation)
        made.replicas, made.sharding = replicas_of.get(weight), sharding_of.get(weight)
        self._subspaces[weight] = made
        self._outdate()
        weakref.finalize(weight, self._outdate).atexit = False
        return made

    def _outdate(self) -> None:
        self.version += 1

    def _check_replaced(
        self, weight: Tensor, old: SubspaceSpec, new: SubspaceSpec, name: str
    ) -> None:
        """Raise OptionError if another graph wants another subspace inside a step."""
        if isinstance(weight.grad, CompactGrad) and not weight.grad.zeroed:
            raise OptionError(
                f"{self._names.get(weight, name)}: two compiled functions with different options "
                f"share this weight ({_change(old, new)}), and it holds a gradient of the first. "
                "Compile both with the same options, or call optimizer.zero_grad() before the "
                "other one takes over."
            )

    def check(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Raise StateError if a saved state cannot be restored."""
        subspace: Subspace | None = self._subspaces.get(weight)
        if subspace is not None:
            subspace.check(state)

    def restore(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Load a saved :meth:`Subspace.state`, now or when a graph first uses the weight."""
        subspace: Subspace | None = self._subspaces.get(weight)
        if subspace is None:
            self._saved[weight] = dict(state)
        else:
            subspace.load(state)

    def restart(self, weight: Tensor) -> None:
        """The weight's subspace is as before the first step, and nothing waits for its first use.

        One that has not stepped stays as it is: a backward may be under way.
        """
        self._saved.pop(weight, None)
        subspace, key = self.get(weight), self.key_of(weight)
        if subspace is not None and (subspace.step or subspace.key != key):
            subspace.restart(key, subspace.selection.indices.device)

    def saved_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of the weight's subspace; empty if it has none."""
        subspace = self._subspaces.get(weight)
        return subspace.state() if subspace is not None else self._saved.get(weight, {})


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
