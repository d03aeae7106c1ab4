"""How a weight is spread over processes, as rooms below grass_fx.distributed must know it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from grass_fx.state.records import PerParameter
from grass_fx.state.selection import Selection


@dataclass(frozen=True)
class Shards:
    """How a graph averages the gradient of a weight whose dimension 0 is sharded.

    ``group``, of ``ranks`` processes, holds one copy of the weight; ``replicas`` are the groups
    over which there are several. All by name, so that graphs with equal ones are equal.
    """

    group: str
    ranks: int
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sharding:
    """A weight as a DTensor: the last dimension of ``mesh`` shards it, the first may replicate."""

    mesh: DeviceMesh
    reshard_after_forward: bool

    @property
    def shards(self) -> Shards:
        """The same for graphs."""
        *replicas, group = (each.group_name for each in self.mesh.get_all_groups())
        return Shards(group, self.mesh.size(-1), tuple(replicas))

    @property
    def placements(self) -> list[Any]:
        """Of the weight, and of whatever has a part for each of its rows or selected rows."""
        return [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]

    def whole(self, local: Tensor) -> DTensor:
        """The DTensor of which every process has such a part along dimension 0."""
        made: DTensor = DTensor.from_local(local, self.mesh, self.placements, run_check=False)
        return made

    def first(self, size: int) -> int:
        """Where this process's part begins of what has ``size`` rows in all."""
        rank: int = self.mesh.get_local_rank(self.mesh.ndim - 1)
        return size // self.mesh.size(-1) * rank

    def own(self, selection: Selection, rows: int) -> Selection:
        """The part of a selection of ``rows`` rows that lies in this process's part of them.

        Selected columns are the same everywhere.
        """
        if selection.dim != 0:
            return selection
        count = selection.indices.numel() // self.mesh.size(-1)
        places = slice(start := self.first(selection.indices.numel()), start + count)
        scale = None if selection.scale is None else selection.scale[places]
        indices = selection.indices[places] - self.first(rows)
        return replace(selection, indices=indices, scale=scale)


def local(tensor: Any) -> Any:
    """This process's part of a DTensor, in the same memory; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def common_parts(shards: Shards, units: int, selected: int) -> int | None:
    """In how many equal parts a selection is drawn, a multiple of the number of processes.

    8 where that divides, so that 1, 2, 4 and 8 processes select alike; None if nothing does.
    """
    for parts in (math.lcm(8, shards.ranks), shards.ranks):
        if units % parts == 0 and selected % parts == 0:
            return parts
    return None


sharding_of: PerParameter[Sharding] = PerParameter("sharding")
"""Parameter -> its :class:`Sharding`."""
