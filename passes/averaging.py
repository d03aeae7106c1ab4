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
    """The collectives that average a weight's whole gradient in a graph; empty for one process."""
    if spec.shards is not None:
        groups = (spec.shards.group, *spec.shards.replicas)
    else:
        groups = () if spec.group is None else (spec.group,)
    return tuple(Collective("all_reduce", group) for group in groups)


def collectives_of_shards(shards: Shards) -> tuple[Collective, ...]:
    """After the graph: a reduce-scatter over the shards, then an all-reduce over each group of
    replicas."""
    scatter = Collective("reduce_scatter", shards.group, shards.ranks)
    return (scatter, *(Collective("all_reduce", group) for group in shards.replicas))


def start(x: Tensor, collective: Collective) -> Tensor:
    """Start a collective; its result may be read after :func:`wait`."""
    return AVERAGES[collective.name](x.contiguous(), collective)


def wait(x: Tensor) -> Tensor:
    """Let what follows wait for a started collective: the device's stream, or on a CPU the host."""
    result: Tensor = c10d.wait_tensor(x)
    return result


def average(x: Tensor, collectives: Sequence[Collective]) -> Tensor:
    """The mean of ``x`` over processes."""
    for collective in collectives:
        x = wait(start(x, collective))
    return x
