"""Orders Inductor's scheduler nodes so that all-reduces overlap the backward's computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grass_fx._torch_compat import scheduling_of


def all_reduce_early(nodes: list[Any]) -> list[Any]:
    """Reorder Inductor's scheduler nodes: start collectives early, and wait for them late.

    Neither takes memory, because an all-reduce works in place.
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
    """A new order of nodes, as positions in the old order.

    Each start of a collective moves right behind the nodes it needs. Each wait moves right before
    the first node that needs it, or to the end. ``before`` has the nodes that each node needs, all
    of them earlier. Starts keep their order among themselves, which is the same on all processes.
    All other nodes, and waits that a start needs, stay where they are. Apart from the final sort
    it takes linear time.
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
