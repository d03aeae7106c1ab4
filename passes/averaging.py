"""Averages tensors over processes inside a graph, with operators that Inductor schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grass_fx.state.sharding import Shards
from grass_fx.state.spec import SubspaceSpec

c10d = torch.ops._c10d_functional


class Collective(NamedTuple):
    """A collective that averages: a key of :data:`AVERAGES`, its group, and the number of ranks."""

    name: str
    group: str
    ranks: int = 0


AVERAGES: dict[str, Callable[[Tensor, Collective], Tensor]] = {
    "all_reduce": lambda x, by: c10d.all_reduce(x, "avg", by.group),
    "reduce_scatter": lambda x, by: c10d.reduce_scatter_tensor(x, "avg", by.ranks, by.group),
}
"""Each gives the mean over a group; a reduce-scatter gives this process's part of dimension 0."""


def collectives_of(spec: SubspaceSpec) -> tuple[Collective, ...]:
    """The collectives that average a weight's gradient; empty for one process."""
    if spec.shards is not None:
        return collectives_of_shards(spec.shards)
    return () if spec.group is None else (Collective("all_reduce", spec.group),)


def collectives_of_shards(shards: Shards) -> tuple[Collective, ...]:
    """A reduce-scatter over the shards, and an all-reduce over each group of replicas."""
    scatter = Collective("reduce_scatter", shards.group, shards.ranks)
    return (scatter, *(Collective("all_reduce", group) for group in shards.replicas))


def average(x: Tensor, collectives: Sequence[Collective]) -> Tensor:
    """The mean of ``x`` over processes, or this process's part of it along dimension 0."""
    for collective in collectives:
        x = c10d.wait_tensor(AVERAGES[collective.name](x.contiguous(), collective))
    return x
