"""SubspaceSpec: the properties of a weight's subspace that a compiled graph demands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from grass_fx.config import RULES, GrassConfig
from grass_fx.state.sharding import Shards
from grass_fx.state.units import Units


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of ρ: as exact as the weight, but at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class SubspaceSpec:
    """The subspace that a compiled graph demands of a weight: shapes, rule and schedule."""

    size: int
    """The size of the selected dimension, m (side "out") or n (side "in")."""
    dim: int
    """The tensor dimension that is selected."""
    side: str = field(compare=False)
    """"out" or "in", for reports: if a matrix is used both ways, graphs may see different sides."""
    rank: int
    """r."""
    block: int
    """B."""
    selection: str
    replacement: bool
    refresh_every: int | float
    seed: int
    group: str | None = field(default=None, compare=False)
    """The name of the process group by which the graph averages C, or None; it is not compared."""
    shards: Shards | None = field(default=None, compare=False)
    """How the graph averages C if dimension 0 of the weight is sharded over processes."""
    parts: int = 1
    """The number of equal parts of sharded rows; equally many rows are selected in each part."""
    stack: int | None = None
    """The number of matrices in a stacked weight, each with r rows of its own; else None."""
    rest: int = 0
    """In every so many steps gradients have signs, for rows that are not selected; 0: never."""

    @classmethod
    def of(
        cls, config: GrassConfig, size: int, dim: int, side: str, stack: int | None = None
    ) -> SubspaceSpec:
        """Return the subspace along a dimension of ``size``; ``config`` is the weight's own."""
        rank, block = config.rank_of(size), config.block
        schedule = (config.selection, config.replacement, config.refresh_every, config.seed)
        return cls(size, dim, side, rank, block, *schedule, stack=stack, rest=config.signs_every)

    @property
    def scores(self) -> str:
        """What the rule uses norms of: "gradient", "input" or nothing."""
        return RULES[self.selection].scores

    @property
    def scoring_period(self) -> int | float:
        """Steps per scoring step in a long run; infinite for a rule that freezes its selection."""
        return math.inf if RULES[self.selection].freezes else self.refresh_every

    @property
    def indices_shape(self) -> tuple[int, ...]:
        """The shape that σ and ρ have in graphs."""
        return (self.rank,) if self.stack is None else (self.stack, self.rank)

    @property
    def pieces(self) -> int:
        """The number of draws for one selection: one per matrix of a stack, or one per part."""
        return self.stack or self.parts

    @property
    def piece_size(self) -> int:
        """The number of rows from which one draw selects."""
        return self.size // self.parts

    @property
    def piece_rank(self) -> int:
        """The number of rows that one draw selects."""
        return self.rank // self.parts

    @property
    def units(self) -> Units:
        """The units among which one draw selects."""
        return Units(self.piece_size, self.block, self.replacement)

    @property
    def run(self) -> int:
        """What graphs may rely on: σ comes in runs of this length, which begin at multiples of it.

        This is B, unless the last unit is shorter and makes blocks begin elsewhere.
        """
        return math.gcd(self.block, self.piece_size)

    @property
    def rows(self) -> int:
        """The number of rows with a score; for a stack, the rows of all matrices."""
        return self.size * (self.stack or 1)

    def compact_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of C for a weight of ``shape``."""
        compact = list(shape)
        compact[self.dim] = self.rank
        return tuple(compact)

    def own_compact_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of this process's part of C."""
        first, *rest = self.compact_shape(shape)
        return (first // (self.shards.ranks if self.shards else 1), *rest)
