"""Keeps processes that train one model on the same selections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from grass_fx.errors import DistributedError
from grass_fx.state.refresh import Finished
from grass_fx.state.replicas import Replicas
from grass_fx.state.subspace import Subspace, Upcoming

_REMEDY = (
    "Every process must take the same steps with the same options, from the same checkpoint. To go "
    "on from here, load one checkpoint on all of them."
)


def with_common_scores(finished: Finished) -> Finished:
    """Return ``finished`` with the scores of replicated weights summed over the processes.

    This takes one all-reduce for all weights, of one float per row, in the last step of a period. A
    process that has no scores for a weight adds zeros.
    """
    result = list(finished)
    due: dict[tuple[Replicas, torch.device], list[tuple[int, Tensor]]] = {}
    for place, (subspace, scores) in enumerate(finished):
        if subspace.replicas is not None and subspace.scoring_due:
            if scores is None:
                scores = torch.zeros(subspace.spec.rows, device=subspace.selection.indices.device)
            due.setdefault((subspace.replicas, scores.device), []).append((place, scores))
    for (replicas, _), entries in due.items():
        names = [f"{finished[place][0].name}: {scores.shape}" for place, scores in entries]
        replicas.agree("scored weights", names, _REMEDY)
        totals = replicas.total([scores for _, scores in entries])
        for (place, _), total in zip(entries, totals, strict=True):
            result[place] = finished[place][0], total
    return result


def check_synchronised(weights: Iterable[Tensor]) -> None:
    """Raise DistributedError if gradients of micro-batches wait to be reduced under FSDP2."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from grass_fx.compile.buckets import buckets  # here, because it loads Inductor

    if held := buckets.held(weights):
        raise DistributedError(
            f"{held[0]}: a micro-batch without gradient synchronisation has left a gradient, and "
            "no backward has reduced it since. Call model.set_requires_gradient_sync(True) for the "
            "last micro-batch before optimizer.step()."
        )


def check_selections(changed: Sequence[tuple[Subspace, Upcoming]]) -> None:
    """Raise DistributedError on every process unless all are about to make the same selections."""
    by_replicas: dict[Replicas, list[str]] = {}
    for subspace, upcoming in changed:
        if subspace.replicas is not None:
            assert upcoming.drawn is not None
            selected = f"{subspace.name}: step {upcoming.step}, {_hash(upcoming.drawn)}"
            by_replicas.setdefault(subspace.replicas, []).append(selected)
    for replicas, own in by_replicas.items():
        replicas.agree("selections", own, _REMEDY)


def _hash(indices: Tensor) -> str:
    return hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]
