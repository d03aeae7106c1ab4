"""Tells which parameters several processes train together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from grass_fx.errors import DistributedError
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

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have one shape and dtype, by rank."""


class GroupReplicas:
    """The processes of ``group``, which train one model; torch's FSDP2 averages its gradients."""

    def __init__(self, group: Any) -> None:
        self.group, self.enabled = group, True
        self.ranks = dist.get_world_size(group)
        self._averaged, self._log = 0, hashlib.sha256()

    def syncs(self) -> bool:
        """Whether the backward of a forward that runs now averages gradients."""
        return self.enabled

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over the processes; all have one dtype and device."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._explained():
            dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have one shape and dtype, by rank."""
        everyones = [torch.empty_like(tensor) for _ in range(self.ranks)]
        with self._explained():
            dist.all_gather(everyones, tensor, group=self.group)
        return everyones

    def agree(self, what: str, mine: Sequence[Any], remedy: str) -> None:
        """Raise DistributedError on every process unless all processes have the same values.

        Processes exchange a hash of their values, and the values only if the hashes differ.
        """
        mine = [*map(str, mine), f"{self._averaged} steps of {self._log.hexdigest()[:8]}"]
        text = "\n".join(mine)
        digest = hashlib.sha256(text.encode()).digest()[:8]
        hashes: list[Any] = [None] * self.ranks
        with self._explained():
            dist.all_gather_object(hashes, digest, group=self.group)
            if len(set(hashes)) == 1:
                return
            everyones: list[Any] = [None] * self.ranks
            dist.all_gather_object(everyones, mine, group=self.group)
        other = next(k for k in range(self.ranks) if everyones[k] != everyones[0])
        ours, theirs = (
            sorted(set(everyones[a]) - set(everyones[b])) for a, b in ((0, other), (other, 0))
        )
        raise DistributedError(
            f"{what} differ between processes: {_some(ours)} on rank 0, {_some(theirs)} on rank "
            f"{other}. {remedy}"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the failure of a collective into an error that lists possible causes."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            rank = dist.get_rank(self.group)
            raise DistributedError(
                f"rank {rank} of {self.ranks} cannot reach the others: {error}. One of them has "
                "ended, does something else, such as a step more or less, or takes longer than the "
                "timeout of the process group. Its own error, if it has one, tells more."
            ) from error


replicas_of: PerParameter[Replicas] = PerParameter("replicas")
"""Maps a Parameter to its :class:`Replicas`."""


def _some(values: Sequence[str], most: int = 3) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return "; ".join(values[:most]) + more if values else "nothing"
