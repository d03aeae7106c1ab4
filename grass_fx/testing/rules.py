"""A second implementation of the selection rules in docs/method.md, as plain loops over lists."""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = {"uniform": 0, "multinomial_norm": 1, "multinomial_norm_sq": 2, "input_norm": 1}


def spans(size: int, block: int, overlap: bool) -> list[range]:
    """The rows of each unit; the last is shorter, or does ``overlap`` the one before."""
    firsts = range(0, size, block)
    if overlap:
        return [range(min(first, size - block), min(first + block, size)) for first in firsts]
    return [range(first, min(first + block, size)) for first in firsts]


def places(spans: list[range], units: list[int], block: int) -> list[int]:
    """The rows of a selection: each ascending unit has ``block`` rows, its own and some before."""
    rows: list[int] = []
    free = spans[-1].stop  # all rows from here on are taken
    for unit in reversed(units):
        stop = min(spans[unit].start + block, free)
        free = stop - block
        rows = [*range(free, stop), *rows]
    return rows


def cyclic(queue: list[int], total: int, k: int, gen: torch.Generator) -> list[int]:
    """Rule 10: take the next k units from ``queue``, the rest of a permutation, in place."""
    units = queue[:k]
    del queue[:k]
    if len(units) < k:
        order = torch.randperm(total, generator=gen).tolist()
        filling = [u for u in order if u not in units][: k - len(units)]
        queue.extend(u for u in order if u not in filling)
        units += filling
    return units


def top(norms: Tensor, k: int, gen: torch.Generator) -> list[int]:
    """Rules 5 and 9: the k largest norms; ties go to the lowest index."""
    order = sorted(range(norms.numel()), key=lambda i: (-float(norms[i]), i))
    return filled([i for i in order if norms[i] > 0][:k], norms.numel(), k, gen)


def multinomial(
    norms: Tensor, power: int, k: int, replacement: bool, gen: torch.Generator
) -> tuple[list[int], list[float]]:
    """Rules 6 to 8: units drawn with q ∝ norm^power, and ρ."""
    q = norms**power / (norms**power).sum()
    if replacement:
        units = torch.multinomial(q, k, replacement=True, generator=gen).tolist()
        return units, [(k * max(float(q[u]), 1e-12)) ** -0.5 for u in units]
    keys = q.log() - (-torch.rand(q.numel(), dtype=q.dtype, generator=gen).log()).log()  # Gumbel
    order = sorted(range(q.numel()), key=lambda i: (-float(keys[i]), i))
    return filled([i for i in order if q[i] > 0][:k], q.numel(), k, gen), [1.0] * k


def filled(units: list[int], total: int, k: int, gen: torch.Generator) -> list[int]:
    """``units``, filled up to k with a uniform draw from the others."""
    if len(units) == k:
        return units
    others = torch.randperm(total, generator=gen).tolist()
    return units + [u for u in others if u not in units][: k - len(units)]
