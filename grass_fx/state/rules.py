"""The selection rules of docs/method.md (equations 5 to 10), as functions of numbers.

A *unit* is a block of B consecutive rows (B = 1: a row; ``units.py``). All rules run on the CPU
between two optimizer steps, whatever torch's default device is, and in float64 where precision
matters. So they select the same units on every device and rank.
"""

from __future__ import annotations

import hashlib
import math
import struct

import torch
from torch import Tensor

from grass_fx.config import SelectionRule

Q_FLOOR = 1e-12
"""The lower bound of q in 1/√(k q), so that ρ stays finite."""


def stream(seed: int, key: int, draw: int, purpose: str = "grass") -> torch.Generator:
    """Return the generator of a weight's ``draw``-th draw, which depends on three integers alone.

    So a checkpoint needs no generator state, and every rank draws the same units.
    """
    digest = _digest(seed, key, draw, purpose)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def halves(seed: int, key: int, draw: int, purpose: str) -> tuple[int, int]:
    """Return two integers of 32 bits, with a sign, in place of a generator that is used once."""
    return struct.unpack("<2i", _digest(seed, key, draw, purpose))


def _digest(seed: int, key: int, draw: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"{purpose} {seed} {key} {draw}".encode(), digest_size=8).digest()


def cyclic(
    order: Tensor, position: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """Equation 10: the next ``count`` units of a walk through random permutations.

    ``order`` (u,) is the current permutation, whose first ``position`` units have been walked.
    Returns the units and the new (order, position). If fewer than ``count`` units are left, the
    piece is filled from the next permutation with units that are not already in it. Units that are
    passed over keep their place in that permutation.
    """
    piece, position = order[position : position + count], position + count
    missing = count - piece.numel()
    if missing > 0:
        order = torch.randperm(order.numel(), generator=generator, device="cpu")
        fresh = ~torch.isin(order, piece)
        filling = order[fresh][:missing]
        piece = torch.cat([piece, filling])
        # Move the units just walked to the front, so that one number still tells the position.
        order, position = torch.cat([filling, order[~torch.isin(order, filling)]]), missing
    return piece, order, position


def top(norms: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Equation 5: the ``count`` units of largest norm; ties go to the lowest index.

    If fewer than ``count`` units score above 0, the rest is drawn uniformly from the others.
    """
    least = norms.topk(count).values[-1]
    # Sort only the candidates: a selection is a small part of the units.
    candidates = (norms >= least).nonzero().flatten()
    order = norms[candidates].sort(descending=True, stable=True).indices[:count]
    largest = candidates[order]
    if least <= 0:
        largest = largest[norms[largest] > 0]
    return _filled(largest, norms.numel(), count, generator)


def tops(norms: Tensor, count: int) -> list[Tensor | None]:
    """Apply :func:`top` to each row of (k, u); return the units in ascending order.

    A row's result is None if equal, zero or non-finite norms require :func:`top` itself.
    """
    least = norms.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = norms >= least
    clear = (chosen.sum(1) == count) & (least.squeeze(1) > 0) & norms.sum(1).isfinite()
    if bool(clear.all()):
        return list(chosen.nonzero()[:, 1].view(-1, count))
    rows = zip(chosen, clear.tolist(), strict=True)
    return [row.nonzero().flatten() if sure else None for row, sure in rows]


def multinomial(
    weights: Tensor, count: int, replacement: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Equations 6 to 8: draw ``count`` units with q ∝ ``weights``; with replacement also return ρ.

    Without replacement (Gumbel top-k on log q) ρ is None, which stands for all ones.
    """
    q = weights.double() / weights.double().sum()
    if replacement:
        units = torch.multinomial(q, count, replacement=True, generator=generator)
        return units, (count * q[units].clamp(min=Q_FLOOR)).rsqrt()
    uniform = torch.rand(q.numel(), dtype=torch.float64, generator=generator, device="cpu")
    keys = q.log() - (-uniform.log()).log()
    drawn = keys.sort(descending=True, stable=True).indices[:count]
    drawn = drawn[q[drawn] > 0]
    return _filled(drawn, q.numel(), count, generator), None


def _filled(units: Tensor, total: int, count: int, generator: torch.Generator) -> Tensor:
    """Fill ``units`` up to ``count`` by a uniform draw from the other units."""
    missing = count - units.numel()
    if missing == 0:
        return units
    shuffled = torch.randperm(total, generator=generator, device="cpu")
    return torch.cat([units, shuffled[~torch.isin(shuffled, units)][:missing]])


def select_by_norms(
    rule: SelectionRule, norms: Tensor, count: int, replacement: bool, gen: torch.Generator
) -> tuple[Tensor, Tensor | None] | None:
    """(units, ρ per unit) by a rule that needs scores, or None if s is not finite or all zero.

    ``norms``: the norms of the units, from :meth:`Units.norms`.
    """
    least, most = norms.aminmax()  # both are NaN if any norm is
    if not 0 <= float(least) <= float(most) < math.inf or most == 0:
        return None
    if rule.power:
        return multinomial(norms**rule.power, count, replacement, gen)
    return top(norms, count, gen), None
