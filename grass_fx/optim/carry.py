"""What a weight's state keeps at a refresh: rows that stay selected keep their moments and ages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from grass_fx.ops import along
from grass_fx.state.selection import Selection
from grass_fx.state.transfers import owned, send


@dataclass(frozen=True)
class Move:
    """A weight's change from one selection to another, with the ages of its rows, (r,), and the
    ``size`` of the selected dimension.
    """

    old: Selection
    new: Selection
    age: Tensor
    size: int


Carried = tuple[Tensor, Tensor, Tensor]
"""For each row of a new selection, (r,): its place in the old one, whether it is new, its age."""


def carried(moves: Sequence[Move]) -> list[Carried]:
    """Return where the rows of new selections were, and their ages: rows that stay keep theirs."""
    result: list[Carried | None] = [None] * len(moves)
    alike = defaultdict(list)
    for k, move in enumerate(moves):
        if move.old.scale is None:
            alike[move.age.device].append(k)
        else:
            place, fresh = places(move.old, move.new)
            result[k] = place, fresh, move.age[place].masked_fill_(fresh, 0)
    for ks in alike.values():
        for k, carried_by_move in zip(ks, _carried_together([moves[k] for k in ks]), strict=True):
            result[k] = carried_by_move
    return cast("list[Carried]", result)


def _carried_together(moves: Sequence[Move]) -> Iterator[Carried]:
    """:func:`carried` on one device, for selections in which no row repeats.

    Weight by weight, a GPU would run six tiny kernels for each. So the rows of all weights are
    searched like those of one large weight.
    """
    device = moves[0].age.device
    olds, news = [move.old.indices for move in moves], [move.new.indices for move in moves]
    old_sizes, sizes = [indices.numel() for indices in olds], [indices.numel() for indices in news]
    starts = [0, *accumulate(move.size for move in moves)][:-1]  # of each weight's rows
    firsts = [0, *accumulate(old_sizes)][:-1]  # of each weight's selected rows
    # Only a few numbers per weight are copied; the device repeats them for the weight's rows.
    table = send(torch.tensor([starts, firsts, old_sizes, sizes], device="cpu"), device)
    start, begin, old_count, count = table.unbind()
    of_old = start.repeat_interleave(old_count, output_size=sum(old_sizes))
    of_new = start.repeat_interleave(count, output_size=sum(sizes))
    first = begin.repeat_interleave(count, output_size=sum(sizes))
    rows, wanted = torch.cat(olds).add_(of_old), torch.cat(news).add_(of_new)
    place = torch.searchsorted(rows, wanted).clamp_(max=rows.numel() - 1)
    fresh = rows[place] != wanted
    ages = torch.cat([move.age for move in moves])[place].masked_fill_(fresh, 0)
    place = place.sub_(first).masked_fill_(fresh, 0)  # a new row gets any valid place
    return zip(place.split(sizes), fresh.split(sizes), owned(ages.split(sizes)), strict=True)


def places(old: Selection, new: Selection) -> tuple[Tensor, Tensor]:
    """For each row of ``new``: its place in ``old``, (r,) int64, and whether it was not there."""
    rows, order = old.indices, None
    if old.scale is not None:  # a block that was drawn twice breaks the order
        rows, order = rows.sort(stable=True)
    place = torch.searchsorted(rows, new.indices).clamp_(max=rows.numel() - 1)
    if order is not None:
        place = order[place]
    return place, old.indices[place] != new.indices


def carried_rows(
    moment: Tensor, old: Selection, new: Selection, place: Tensor, fresh: Tensor, power: int
) -> Tensor:
    """Return a moment's rows that stay, × (ρ′/ρ)^power, and zeros for new rows."""
    dim, ndim = new.dim, moment.dim()
    # Fill with zeros, do not multiply: a non-finite moment must not outlive its row.
    rows = moment.index_select(dim, place).masked_fill_(along(fresh, dim, ndim), 0)
    if old.scale is not None and new.scale is not None:
        ratio = torch.where(fresh, 1.0, new.scale.double() / old.scale[place].double()) ** power
        rows.mul_(along(ratio.to(rows.dtype), dim, ndim))
    return rows
