"""SubspaceSpec: what a compiled graph demands of a weight's subspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from grass_fx.config import GrassConfig
from grass_fx.state.sharding import Shards


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """ρ is as exact as the weight, but never less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class SubspaceSpec:
    """What a compiled graph demands of a weight's subspace: shapes, rule and schedule."""

    size: int
    """The size of the selected dimension, m (side "out") or n (side "in")."""
    dim: int
    """The tensor dimension that is selected."""
    side: str = field(compare=False)
    """"out" or "in", for reports: of a matrix used both ways, graphs may see different sides."""
    rank: int
    """r."""
    block: int
    """B, 1 where the configured one does not divide ``size``."""
    selection: str
    replacement: bool
    refresh_every: int | float
    seed: int
    group: str | None = field(default=None, compare=False)
    """The process group by which the graph averages C, by name; graphs may know it or not."""
    shards: Shards | None = field(default=None, compare=False)
    """How the graph averages C if dimension 0 of the weight is sharded over processes."""
    parts: int = 1
    """A selection of rows that are sharded has as many in each of so many equal parts."""
    stack: int | None = None
    """How many matrices a stacked weight holds, each with r rows of its own; None: it is one."""

    @classmethod
    def of(
        cls, config: GrassConfig, size: int, dim: int, side: str, stack: int | None = None
    ) -> SubspaceSpec:
        """The subspace that ``config`` wants along a dimension of ``size``."""
        rank, block = config.rank_and_block(size)
        schedule = (config.selection, config.replacement, config.refresh_every, config.seed)
        return cls(size, dim, side, rank, block, *schedule, stack=stack)

    @property
    def indices_shape(self) -> tuple[int, ...]:
        """The shape of σ, and of ρ, in graphs."""
        return (self.rank,) if self.stack is None else (self.stack, self.rank)

    @property
    def pieces(self) -> int:
        """How many draws make a selection: one for each matrix of a stack, or each part."""
        return self.stack or self.parts

    @property
    def piece_size(self) -> int:
        """The rows that one draw selects from."""
        return self.size // self.parts

    @property
    def piece_rank(self) -> int:
        """The rows that one draw selects."""
        return self.rank // self.parts

    @property
    def rows(self) -> int:
        """How many rows have a score: those of all matrices of a stack."""
        return self.size * (self.stack or 1)

    def compact_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of C for a weight of ``shape``."""
        compact = list(shape)
        compact[self.dim] = self.rank
        return tuple(compact)

    def own_compact_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of this process's part of it."""
        first, *rest = self.compact_shape(shape)
        return (first // (self.shards.ranks if self.shards else 1), *rest)
