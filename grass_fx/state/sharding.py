"""Tells how a weight is sharded over processes."""

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

    The ``ranks`` processes of ``group`` hold one copy of the weight together. ``replicas`` are the
    groups over which the weight has several copies. Groups are stored by name, so that equal graphs
    have equal Shards.
    """

    group: str
    ranks: int
    replicas: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Sharding:
    """A weight as a DTensor: the last dimension of ``mesh`` shards it, the first may replicate."""

    mesh: DeviceMesh

    @property
    def shards(self) -> Shards:
        """The same facts for graphs."""
        *replicas, group = (
            process_group.group_name for process_group in self.mesh.get_all_groups()
        )
        return Shards(group, self.mesh.size(-1), tuple(replicas))

    @property
    def placements(self) -> list[Any]:
        """The placements of the weight, and of tensors with a part for each row or selected row."""
        return [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]

    def whole(self, local: Tensor) -> DTensor:
        """Return the DTensor of which ``local`` is this process's part along dimension 0."""
        tensor: DTensor = DTensor.from_local(local, self.mesh, self.placements, run_check=False)
        return tensor

    def first(self, size: int) -> int:
        """Return where this process's part of ``size`` rows begins."""
        rank: int = self.mesh.get_local_rank(self.mesh.ndim - 1)
        return size // self.mesh.size(-1) * rank

    def own(self, selection: Selection, rows: int) -> Selection:
        """Return the part of a selection of ``rows`` rows that lies in this process's part of them.

        If columns are selected, every process has the whole selection.
        """
        if selection.dim != 0:
            return selection
        count = selection.indices.numel() // self.mesh.size(-1)
        places = slice(start := self.first(selection.indices.numel()), start + count)
        scale = None if selection.scale is None else selection.scale[places]
        indices = selection.indices[places] - self.first(rows)
        return replace(selection, indices=indices, scale=scale)


def local(tensor: Any) -> Any:
    """Return this process's part of a DTensor, in the same memory; other values as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def common_parts(shards: Shards, size: int, block: int, rank: int) -> int | None:
    """Return the number of equal parts in which a selection is drawn, a multiple of the ranks.

    The number is 8 if that divides, so that 1, 2, 4 and 8 processes select the same rows. Parts
    that consist of whole blocks come first. Returns None if no number divides both ``size`` and the
    selected blocks.
    """
    for whole in (block, 1):
        for parts in (math.lcm(8, shards.ranks), shards.ranks):
            if size % (parts * whole) == 0 and rank % (parts * block) == 0:
                return parts
    return None


sharding_of: PerParameter[Sharding] = PerParameter("sharding")
"""Maps a Parameter to its :class:`Sharding`, once a graph or a checkpoint has needed it."""
