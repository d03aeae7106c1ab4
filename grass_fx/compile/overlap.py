"""All-reduces beside the backward's computation: in which order Inductor's scheduler nodes run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grass_fx._torch_compat import scheduling_of


def all_reduce_early(nodes: list[Any]) -> list[Any]:
    """Inductor's scheduler nodes, with collectives started early and waited for late.

    An all-reduce works in place, so neither takes memory.
    """
    if not nodes:
        return nodes
    starts, waits, makes, needs = zip(*map(scheduling_of, nodes), strict=True)
    maker = {name: k for k, names in enumerate(makes) for name in names}
    before = [{maker[name] for name in names & maker.keys()} - {k} for k, names in enumerate(needs)]
    return [nodes[k] for k in early_order(starts, waits, before)]


def early_order(
    starts: Sequence[bool], waits: Sequence[bool], before: Sequence[set[int]]
) -> list[int]:
    """A new order of nodes, which are positions in the old: each start of a collective right after
    what it needs, each wait right before what needs it first, or at the end. In linear time.

    ``before``: what each needs, all of it earlier. Starts keep their order among themselves, which
    is that of all processes, and all else stays where it is. So does a wait that a start needs.
    """
    first_user = [len(before)] * len(before)
    for k, needed in reversed([*enumerate(before)]):
        for other in needed:
            first_user[other] = k
    by_starts = set().union(*(needed for k, needed in enumerate(before) if starts[k]))
    keys, latest = [], -1
    for k, needed in enumerate(before):
        if starts[k]:
            latest = max(latest, *needed, -1)
            keys.append((latest, 1, k))
        elif waits[k] and k not in by_starts:
            keys.append((first_user[k], -1, k))
        else:
            keys.append((k, 0, k))
    return sorted(range(len(before)), key=keys.__getitem__)
