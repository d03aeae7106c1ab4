"""Tells which parameters several processes train together, in the terms that this layer needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from grass_fx.state.records import PerParameter


class Replicas(Protocol):
    """A model that every process of ``group`` holds whole (grass_fx.distributed.data_parallel)."""

    group: Any
    enabled: bool
    """Whether gradients are averaged at all; under no_sync they only accumulate."""

    def syncs(self) -> bool:
        """Whether the backward of a forward that runs now averages gradients."""

    def agree(self, what: str, mine: Sequence[Any], remedy: str) -> None:
        """Raise DistributedError on every process unless all of them have the same values."""

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over the processes; all tensors have one dtype and device."""


replicas_of: PerParameter[Replicas] = PerParameter("replicas")
"""Maps a Parameter to its :class:`Replicas`."""
