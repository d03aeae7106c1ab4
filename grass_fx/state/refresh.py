"""Ends an optimizer step for subspaces: this is where a training run changes selections.

The optimizers of grass_fx call :func:`finish_steps` (docs/method.md, "Steps, periods, refreshes").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from grass_fx.state import rules
from grass_fx.state.selection import Selection
from grass_fx.state.subspace import Subspace, Upcoming
from grass_fx.state.transfers import reading, to_device
from grass_fx.state.units import Units


def may_refresh(subspace: Subspace) -> bool:
    """Whether the subspace's selection may change at the end of this step."""
    if subspace.rule.scores:
        return subspace.scoring_due
    return subspace.at_period_end(subspace.step + 1)


Finished = list[tuple[Subspace, Tensor | None]]
"""The subspaces whose step ends, each with its scores s, (size,) float32, or None."""


def scores_on_host(finished: Finished) -> Callable[[], Finished]:
    """Start copying the scores that are due to the CPU; the returned function waits for them."""
    scored = [
        (k, scores)
        for k, (subspace, scores) in enumerate(finished)
        if scores is not None and subspace.scoring_due
    ]
    copied = reading([scores for _, scores in scored])

    def wait() -> Finished:
        result = list(finished)
        for (k, _), scores in zip(scored, copied(), strict=True):
            result[k] = finished[k][0], scores
        return result

    return wait


def finish_steps(
    finished: Iterable[tuple[Subspace, Tensor | None]],
    check: Callable[[Sequence[tuple[Subspace, Upcoming]]], None] = lambda changed: None,
) -> None:
    """Tell subspaces that an optimizer step used their selections, and refresh those that are due.

    ``finished`` has each subspace with the scores s that its gradient carried, (size,) float32, or
    None. If scores are missing, not finite or all zero, the selection stays and the next step is a
    scoring step. For a stack, scores (e·size,), only the affected matrices keep their selection; if
    all matrices are affected, the next step scores again.

    ``check`` gets the subspaces whose selections are about to change. If it or anything else
    raises, no selection has changed.
    """
    upcoming: list[tuple[Subspace, Upcoming]] = []
    alike: dict[tuple[Units, int], list[tuple[Subspace, Tensor]]] = {}
    for subspace, scores in finished:
        rule, spec = subspace.rule, subspace.spec
        if scores is None or not subspace.scoring_due:
            upcoming.append((subspace, subspace.upcoming()))
        elif rule.power or spec.replacement or spec.pieces > 1:
            pieces = scores.cpu().view(spec.pieces, -1)
            upcoming.append((subspace, subspace.upcoming(pieces, spec.units.norms(pieces))))
        else:
            alike.setdefault((spec.units, spec.rank), []).append((subspace, scores))
    for (units, rank), entries in alike.items():
        # The top units of all weights are found at once: weight by weight this would be the
        # slowest part of a refresh.
        scored = torch.stack([scores.cpu() for _, scores in entries]).unsqueeze(1)
        norms = units.norms(scored)
        tops = rules.tops(norms.squeeze(1), rank // units.block)
        for (subspace, _), scores, own, top in zip(entries, scored, norms, tops, strict=True):
            upcoming.append((subspace, subspace.upcoming(scores, own, [top])))
    check([(subspace, change) for subspace, change in upcoming if change.selection is not None])
    changed: dict[torch.device, list[int]] = {}
    for k, (subspace, change) in enumerate(upcoming):
        device = subspace.selection.indices.device
        if change.selection is not None and device.type != "cpu":
            changed.setdefault(device, []).append(k)
    for device, ks in changed.items():
        moved = to_device([cast(Tensor, upcoming[k][1].drawn) for k in ks], device)
        for k, indices in zip(ks, moved, strict=True):
            subspace, change = upcoming[k]
            selection = cast(Selection, change.selection).moved(indices)
            upcoming[k] = subspace, replace(change, selection=selection)
    for subspace, change in upcoming:
        subspace.become(change)
