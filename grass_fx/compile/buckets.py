"""Reduces the compact gradients of a graph together, as FSDP2 does with full ones.

One reduce-scatter for all weights of a graph with one mesh and dtype. A micro-batch without
synchronisation sends nothing: its gradients are held until one synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grass_fx._torch_compat import FSDPWeight, at_end_of_backward, current_backward
from grass_fx.errors import SelectionChangedError
from grass_fx.passes.averaging import Collective, collectives_of_shards, start, wait
from grass_fx.state.selection import Selection
from grass_fx.state.sharding import Shards
from grass_fx.state.subspace import Subspace


@dataclass(eq=False)
class Arrived:
    """One weight's gradient as a backward of its graph brings it: C of all its rows, and scores."""

    weight: FSDPWeight
    subspace: Subspace
    selection: Selection
    compact: Tensor
    scores: Tensor | None
    deliver: Callable[[Tensor, Tensor | None], None]
    """Puts a reduced gradient on the parameter, as FSDP2 does, outside of autograd."""

    @property
    def is_due(self) -> bool:
        """Whether this backward reduces it."""
        return self.weight.reduces

    @property
    def is_stale(self) -> bool:
        """Whether the selection that it is of has changed since."""
        return self.subspace.selection.generation != self.selection.generation


@dataclass
class Travelling:
    """Gradients in one tensor, of which a collective runs, and those that follow it."""

    entries: Sequence[Arrived]
    shards: Shards
    tensor: Tensor
    left: list[Collective]

    @classmethod
    def of(cls, entries: Sequence[Arrived], shards: Shards) -> Travelling:
        """Send the entries, row by row of the processes that are to have them."""
        flat = torch.cat([each.compact.reshape(shards.ranks, -1) for each in entries], dim=1)
        first, *left = collectives_of_shards(shards)
        return cls(entries, shards, start(flat.view(-1), first), left)

    def advance(self) -> bool:
        """Wait for the collective; then start the next one, or deliver and return True."""
        self.tensor = wait(self.tensor)
        if self.left:
            self.tensor = start(self.tensor, self.left.pop(0))
            return False
        sizes = [each.compact.numel() // self.shards.ranks for each in self.entries]
        for each, own in zip(self.entries, self.tensor.split(sizes), strict=True):
            first, *rest = each.compact.shape
            own = own.view(first // self.shards.ranks, *rest)
            if each.weight.factor != 1:
                own = own * each.weight.factor
            each.deliver(own.to(each.weight.sharded.dtype), each.scores)
        return True


class Buckets:
    """Reduces gradients, and holds those of micro-batches without synchronisation, in order."""

    def __init__(self) -> None:
        self._held: dict[int, Arrived] = {}
        self._backward = -1  # in which the held ones have been looked through
        self._under_way: dict[int, list[Travelling]] = {}
        """Backward -> its buckets of which a collective runs."""

    def held(self, weights: Iterable[Tensor]) -> list[str]:
        """Names of those of the weights whose gradients wait for a backward that synchronises."""
        if not self._held:
            return []
        ids = {id(weight) for weight in weights}
        return [a.subspace.name for a in self._held.values() if id(a.weight.sharded) in ids]

    def reduce(self, arrived: Sequence[Arrived]) -> None:
        """Average each gradient over processes, and deliver this process's part of it.

        The collective runs beside the backward of the graphs that follow. It is waited for when the
        next graph brings its gradients, or at the end of the backward.
        """
        backward = current_backward()
        if self._held and self._backward != backward:
            self._backward = backward
            self._drop_stale()
        for each in arrived:
            each.compact = each.compact.to(each.weight.reduce_dtype or each.compact.dtype)
            if (held := self._held.pop(id(each.subspace), None)) is not None:
                _add(each, held)
            if not each.is_due:
                self._held[id(each.subspace)] = each
        due = [each for each in arrived if each.is_due]
        if not due:
            return
        if backward not in self._under_way:
            self._under_way[backward] = []
            at_end_of_backward(partial(self._finish, backward))
        self._under_way[backward] = [*_advanced(self._under_way[backward]), *_sent(due)]

    def forget_failed(self) -> None:
        """Outside of a backward: drop what a backward that failed has left under way."""
        if self._under_way and current_backward() < 0:
            self._under_way.clear()

    def _drop_stale(self) -> None:
        """Drop what is held of selections that have changed, and raise if there was any."""
        stale = [each for each in self._held.values() if each.is_stale]
        for each in stale:
            del self._held[id(each.subspace)]
        if stale:
            raise SelectionChangedError(
                f"{stale[0].subspace.name}: its selection has changed since a micro-batch without "
                "gradient synchronisation. Synchronise the last micro-batch before "
                "optimizer.step(): model.set_requires_gradient_sync(True)."
            )

    def _finish(self, backward: int) -> None:
        """At the end of a synchronised backward; weights it did not use may hold gradients."""
        due = [each for each in self._held.values() if each.is_due]
        for each in due:
            del self._held[id(each.subspace)]
        under_way = [*self._under_way.pop(backward), *_sent(due)]
        while under_way:
            under_way = _advanced(under_way)


def _add(arrived: Arrived, held: Arrived) -> None:
    """Add the held gradient to one that has arrived."""
    arrived.compact = arrived.compact + held.compact
    if held.scores is not None:
        scores = arrived.scores
        arrived.scores = held.scores if scores is None else held.scores + scores


def _sent(entries: Sequence[Arrived]) -> list[Travelling]:
    """Start one collective for all entries of one mesh and dtype."""
    alike: dict[Any, list[Arrived]] = {}
    for each in entries:
        assert each.subspace.sharding is not None
        key = each.subspace.sharding.shards, each.compact.dtype
        alike.setdefault(key, []).append(each)
    return [Travelling.of(bucket, shards) for (shards, _), bucket in alike.items()]


def _advanced(under_way: Sequence[Travelling]) -> list[Travelling]:
    """Wait for the collectives that run, and return the buckets of which another one runs now."""
    return [bucket for bucket in under_way if not bucket.advance()]


buckets = Buckets()
"""The one of this process."""
