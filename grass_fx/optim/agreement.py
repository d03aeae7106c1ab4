"""Keeps processes that train one model on the same selections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from grass_fx.errors import DistributedError
from grass_fx.optim.layout import Plan
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.gradient.votes import Votes
from grass_fx.state.refresh import Finished
from grass_fx.state.replicas import Replicas, replicas_of
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


VOTES_AT_ONCE = 25 << 20
"""About how many bytes of votes a process sends at a time."""


def share_votes(plan: Plan) -> None:
    """Let all processes that train a weight together step by the votes of all of their gradients.

    Each sends its bits to the others once in a step, after all micro-batches: m·n/8 bytes for each
    weight, and for k micro-batches as many times that as k has binary digits.
    """
    alike: dict[tuple[Replicas, torch.device], list[list[CompactGrad]]] = {}
    for p, grad in (entry for group in plan for entry in group):
        replicas = replicas_of.get(p)
        if replicas is None or grad is None or grad.votes is None or grad.votes.common:
            continue
        lists = alike.setdefault((replicas, grad.device), [[]])
        if sum(each.votes.nbytes for each in lists[-1] if each.votes) >= VOTES_AT_ONCE:
            lists.append([])
        lists[-1].append(grad)
    for (replicas, _), lists in alike.items():
        for grads in lists:
            own = [grad.votes.settled() for grad in grads if grad.votes is not None]
            flat = torch.cat([plane.flatten() for mine in own for plane in mine.planes])
            sums: list[Votes | None] = [None] * len(grads)
            for one in replicas.gathered(flat):
                left = iter(one.split([plane.numel() for mine in own for plane in mine.planes]))
                for k, mine in enumerate(own):
                    planes = tuple(next(left).view(plane.shape) for plane in mine.planes)
                    sent = Votes(planes, most=2 ** len(planes) - 1)
                    sums[k] = sent if (so_far := sums[k]) is None else so_far.plus(sent)
            for grad, votes in zip(grads, sums, strict=True):
                assert votes is not None
                grad.vote(replace(votes, common=True))


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
