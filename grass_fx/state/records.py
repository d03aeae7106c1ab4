"""What is known of a Parameter: one record each, that lives as long as the Parameter does.

The record hangs on the Parameter itself, as torch.compile's own notes do. Nothing refers to a
Parameter weakly: ``module.to()`` may have to exchange what is in it, and refuses to if somebody
does. That exchange takes attributes along; the optimizers, which hold Parameters anyway, hold their
records too, and give them back.
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
    """What is known of one Parameter. ``Any`` stands for classes of the floors above.

    ``subspace``: its Subspace, once a compiled graph has taken it. ``key``: what keys its random
    streams, once one was drawn from; ``place``: where it stood in its last optimizer. ``name``:
    what its optimizer calls it. ``saved``: a loaded ``Subspace.state()`` that waits for the first
    graph. ``left``: why the last graph that used it left it dense, a registry.Left. ``replicas``,
    ``sharding``: how it is spread over processes.
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


class Tag:
    """What hangs on the Parameter, and ends with it; the record may be held by optimizers too."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __reduce__(self) -> Any:
        # In a pickled model nothing of it: whoever loads that need not have grass_fx.
        return OrderedDict, ()


class Holder(Protocol):
    """An optimizer: ``records`` are those of its parameters, in their order."""

    param_groups: list[dict[str, Any]]
    records: Sequence[Record]


_holders: list[weakref.ref[Any]] = []


def add_holder(optimizer: Holder) -> None:
    """An optimizer is asked from now on, while it lives, for its parameters' records and places."""
    if all(ref() is not optimizer for ref in _holders):
        _holders[:] = [ref for ref in _holders if ref() is not None]
        _holders.append(weakref.ref(optimizer))


def holders() -> Iterator[Holder]:
    """The optimizers, the newest first."""
    for ref in reversed(_holders):
        if (optimizer := ref()) is not None:
            yield optimizer


def place_of(parameter: Tensor) -> tuple[Holder, int] | None:
    """The newest optimizer that has the parameter now, and its place there, counted over groups."""
    for optimizer in holders():
        place = 0
        for group in optimizer.param_groups:
            for each in group["params"]:
                if each is parameter:
                    return optimizer, place
                place += 1
    return None


def known(parameter: Tensor) -> Record | None:
    """The parameter's record, if it has one."""
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
    """The parameter's record, made at its first use."""
    record = known(parameter)
    if record is None:
        record = Record()
        _hang(parameter, record)
    return record


def _hang(parameter: Tensor, record: Record) -> None:
    parameter.__dict__[_ATTRIBUTE] = Tag(record)


def tag_of(parameter: Tensor) -> Tag:
    """What hangs on a parameter with a record, and lives as long."""
    tag: Tag = parameter.__dict__[_ATTRIBUTE]
    return tag


def when_gone(parameter: Tensor, function: Callable[[], None]) -> None:
    """Call ``function`` when a parameter with a record has ended, or was exchanged."""
    weakref.finalize(tag_of(parameter), function).atexit = False


class PerParameter(Generic[T]):
    """A field of all records as a mapping from Parameters."""

    def __init__(self, field: str) -> None:
        self._field = field

    def get(self, parameter: Tensor) -> T | None:
        """The field's value; None where nothing has been put."""
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
