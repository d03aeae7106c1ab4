"""Keeps one record of what is known about each Parameter, for as long as the Parameter lives.

The record is an attribute of the Parameter, like torch.compile's own notes. Nothing holds a weak
reference to a Parameter: ``module.to()`` may have to swap the Parameter's contents, and refuses if
a weak reference exists. A swap takes attributes along. Optimizers, which hold Parameters anyway,
also hold their records, and restore a record that a Parameter has lost.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")

_ATTRIBUTE = "_grass_fx"


class Record:
    """What is known about one Parameter. ``Any`` stands for classes of higher layers.

    ``subspace``: the Parameter's Subspace, once a compiled graph has taken it. ``key``: the key of
    its random streams, once it was needed. ``place``: its place in its last optimizer. ``name``:
    its name in its optimizer. ``saved``: a loaded ``Subspace.state()`` that waits for the first
    compiled graph. ``left``: a registry.Left with the reason why the last graph that used the
    Parameter left it dense. ``replicas``, ``sharding``: how it is spread over processes.
    ``matched``: (option, pattern) -> whether it matches, in the last graph.
    """

    def __init__(self) -> None:
        self.subspace: Any = None
        self.key: int | None = None
        self.place: int | None = None
        self.name: str | None = None
        self.saved: Mapping[str, Tensor] | None = None
        self.left: Any = None
        self.replicas: Any = None
        self.sharding: Any = None
        self.matched: Mapping[tuple[str, str], bool] = {}


class Tag:
    """A Parameter's attribute, which ends with it; optimizers may keep the record for longer."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __reduce__(self) -> Any:
        # A pickled model contains nothing of the tag, so it loads without grass_fx.
        return OrderedDict, ()


class Holder(Protocol):
    """An optimizer; ``records`` are the records of its parameters, in their order."""

    param_groups: list[dict[str, Any]]
    records: Sequence[Record]


_holders: list[weakref.ref[Any]] = []


def add_holder(optimizer: Holder) -> None:
    """Look up records and places of parameters in this optimizer too, for as long as it lives."""
    if all(ref() is not optimizer for ref in _holders):
        _holders[:] = [ref for ref in _holders if ref() is not None]
        _holders.append(weakref.ref(optimizer))


def holders() -> Iterator[Holder]:
    """Yield the optimizers, newest first."""
    for ref in reversed(_holders):
        if (optimizer := ref()) is not None:
            yield optimizer


def place_of(parameter: Tensor) -> tuple[Holder, int] | None:
    """Find the newest optimizer that has the parameter now, and its place there over all groups."""
    for optimizer in holders():
        place = 0
        for group in optimizer.param_groups:
            for candidate in group["params"]:
                if candidate is parameter:
                    return optimizer, place
                place += 1
    return None


def known(parameter: Tensor) -> Record | None:
    """Return the parameter's record, or None if it has none."""
    tag = getattr(parameter, "__dict__", {}).get(_ATTRIBUTE)
    if isinstance(tag, Tag):
        return tag.record
    found = place_of(parameter)
    if found is None or found[1] >= len(found[0].records):
        return None
    record = found[0].records[found[1]]
    _hang(parameter, record)
    return record


def record_of(parameter: Tensor) -> Record:
    """Return the parameter's record; make one if it has none."""
    record = known(parameter)
    if record is None:
        record = Record()
        _hang(parameter, record)
    return record


def _hang(parameter: Tensor, record: Record) -> None:
    parameter.__dict__[_ATTRIBUTE] = Tag(record)


def tag_of(parameter: Tensor) -> Tag:
    """Return the tag of a parameter that has a record; the tag lives as long as the parameter."""
    tag: Tag = parameter.__dict__[_ATTRIBUTE]
    return tag


def when_gone(parameter: Tensor, function: Callable[[], None]) -> None:
    """Call ``function`` when a parameter that has a record is deleted or swapped."""
    weakref.finalize(tag_of(parameter), function).atexit = False


class PerParameter(Generic[T]):
    """A field of all records, as a mapping from Parameters to its values."""

    def __init__(self, field: str) -> None:
        self._field = field

    def get(self, parameter: Tensor) -> T | None:
        """Return the field's value, or None if none was set."""
        record = known(parameter)
        return None if record is None else getattr(record, self._field)

    def __contains__(self, parameter: Tensor) -> bool:
        return self.get(parameter) is not None

    def __getitem__(self, parameter: Tensor) -> T:
        value = self.get(parameter)
        if value is None:
            raise KeyError(parameter)
        return value

    def __setitem__(self, parameter: Tensor, value: T) -> None:
        setattr(record_of(parameter), self._field, value)
