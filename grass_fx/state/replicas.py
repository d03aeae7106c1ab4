"""Which parameters are trained by several processes together, as rooms below must know it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from grass_fx.state.records import PerParameter


class Replicas(Protocol):
    """One model that every process of ``group`` has (grass_fx.distributed.data_parallel)."""

    group: Any
    enabled: bool
    """Whether gradients are averaged at all, or accumulated (no_sync)."""

    def syncs(self) -> bool:
        """Whether the backward of a forward that runs now is to average gradients."""

    def agree(self, what: str, mine: Sequence[Any], remedy: str) -> None:
        """Raise DistributedError, on every process, unless all have the same values."""

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, of one dtype and device, each summed over the processes."""


replicas_of: PerParameter[Replicas] = PerParameter("replicas")
"""Parameter -> its :class:`Replicas`."""
