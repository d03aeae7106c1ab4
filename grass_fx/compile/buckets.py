"""Reduces the compact gradients of a graph together, as FSDP2 does with full ones.

One reduce-scatter for all weights of a graph with one mesh and dtype. A micro-batch without
synchronisation sends nothing: its gradients are held until one synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grass_fx._torch_compat import FSDPWeight, at_end_of_backward, current_backward
from grass_fx.errors import SelectionChangedError
from grass_fx.passes.averaging import average, collectives_of_shards
from grass_fx.state.selection import Selection
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
    """Puts a reduced gradient on the parameter, outside of autograd."""

    @property
    def is_due(self) -> bool:
        """Whether this backward reduces it."""
        return self.weight.reduces


class Buckets:
    """Reduces gradients, and holds those of micro-batches without synchronisation, in order."""

    def __init__(self) -> None:
        self._held: dict[int, Arrived] = {}
        self._backward = -1

    def held(self, weights: Iterable[Tensor]) -> list[str]:
        """Names of those of the weights whose gradients wait for a backward that synchronises."""
        if not self._held:
            return []
        ids = {id(weight) for weight in weights}
        return [a.subspace.name for a in self._held.values() if id(a.weight.sharded) in ids]

    def reduce(self, arrived: Sequence[Arrived]) -> list[tuple[Tensor, Tensor | None] | None]:
        """Each gradient, averaged over processes, this process's part; None while it is held."""
        for each in arrived:
            each.compact = each.compact.to(each.weight.reduce_dtype or each.compact.dtype)
            if (held := self._held.pop(id(each.subspace), None)) is not None:
                _add(each, held)
            if not each.is_due:
                self._held[id(each.subspace)] = each
        due = [each for each in arrived if each.is_due]
        if due and self._held and self._backward != current_backward():
            self._backward = current_backward()
            at_end_of_backward(self._flush)
        parts = iter(reduced(due))
        return [(next(parts), each.scores) if each.is_due else None for each in arrived]

    def _flush(self) -> None:
        """At the end of a synchronised backward: weights it did not use may hold gradients."""
        due = [each for each in self._held.values() if each.is_due]
        for each in due:
            _check(each)
            del self._held[id(each.subspace)]
        for each, part in zip(due, reduced(due), strict=True):
            each.deliver(part, each.scores)


def _add(arrived: Arrived, held: Arrived) -> None:
    """Add the held gradient to one that has arrived."""
    _check(held)
    arrived.compact = arrived.compact + held.compact
    if held.scores is not None:
        scores = arrived.scores
        arrived.scores = held.scores if scores is None else held.scores + scores


def _check(held: Arrived) -> None:
    if held.subspace.selection.generation != held.selection.generation:
        raise SelectionChangedError(
            f"{held.subspace.name}: its selection has changed since a micro-batch without gradient "
            "synchronisation. Synchronise the last micro-batch before optimizer.step(): "
            "model.set_requires_gradient_sync(True)."
        )


def reduced(entries: Sequence[Arrived]) -> list[Tensor]:
    """This process's part of each average: one collective for all of one mesh and dtype."""
    buckets: dict[Any, list[Arrived]] = {}
    for each in entries:
        assert each.subspace.sharding is not None
        key = each.subspace.sharding.shards, each.compact.dtype
        buckets.setdefault(key, []).append(each)
    parts: dict[Arrived, Tensor] = {}
    for (shards, _), bucket in buckets.items():
        flat = torch.cat([each.compact.reshape(shards.ranks, -1) for each in bucket], dim=1)
        part = average(flat.view(-1), collectives_of_shards(shards))
        sizes = [each.compact.numel() // shards.ranks for each in bucket]
        for each, own in zip(bucket, part.split(sizes), strict=True):
            first, *rest = each.compact.shape
            own = own.view(first // shards.ranks, *rest)
            if each.weight.factor != 1:
                own = own * each.weight.factor
            parts[each] = own.to(each.weight.sharded.dtype)
    return [parts[each] for each in entries]


buckets = Buckets()
"""The one of this process."""
