"""Moves the rows that are not selected, by the signs of their gradients alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grass_fx.ops import DROPPED, PART
from grass_fx.optim import compiled
from grass_fx.optim.rounding import round_stochastically
from grass_fx.optim.rows import per_row
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.gradient.votes import Votes


def rest_passes(
    w: Tensor,
    grad: CompactGrad,
    rate: float,
    factor: float,
    seed: Tensor,
    compile: bool | None = False,
) -> Iterator[Callable[[], Any]]:
    """W = ``factor`` · W − ``rate`` · sign(G), W (m, n), but for the rows that ``grad`` selects.

    Where as many gradients were above 0 as below, nothing moves, nor where all of C says that there
    was no gradient: in a row of W of which C is 0 (if rows are selected: of Wᵀ). Yields
    functions that do it part by part, each of which changes nothing if it fails. A W of 16 bits is
    rounded stochastically, always: to nearest, most of these steps would be lost. ``seed``: of the
    noise. ``compile``: as :class:`~grass_fx.AdamW`'s.
    """
    assert grad.votes is not None
    w = w if grad.selection.dim == 1 else w.t()  # below, columns are selected
    of = w, 1, grad.selection.indices
    factors, rates = per_row(*of, own=1, others=factor), per_row(*of, own=0, others=-rate)
    live = live_rows(grad)
    if compiled.compiles(compile, w.device):
        direction = torch.as_tensor(grad.votes.factor, device=w.device).sign().to(rates.dtype)
        tensors = w, factors, rates * direction, live, seed, grad.votes.planes
        yield partial(compiled.move_rest_, *tensors)
        return
    some = None if live.device.type == "cpu" and bool(live.all()) else live
    for part in grad.votes.parts(max(1, PART // max(1, w.shape[1]))):
        yield partial(_move_part, w, part, grad.votes, factors, rates, some, seed)


def live_rows(grad: CompactGrad) -> Tensor:
    """Return where C is not 0: (m, 1) if columns of W are selected, (n, 1) for rows, (n, e) for
    those of a stack.
    """
    if grad.compact.dim() == 3:
        return grad.compact.any(1).t()
    return grad.compact.any(grad.selection.dim).unsqueeze(1)


def _move_part(
    w: Tensor,
    part: slice,
    votes: Votes,
    factors: Tensor,
    rates: Tensor,
    live: Tensor | None,
    seed: Tensor,
) -> None:
    """``live``: of :func:`live_rows`; None if all are."""
    m, n = w.shape
    part = slice(part.start, min(part.stop, m))
    signs = votes.majority(part, m, n, factors.dtype)
    if live is not None:
        signs.unflatten(1, (live.shape[1], -1)).mul_(live[part].unsqueeze(2))
    old = w[part]
    if w.dtype in DROPPED:
        new = signs.mul_(rates).addcmul_(old.to(factors.dtype), factors)
        old.copy_(round_stochastically(new, seed, w.dtype, part.start))
    else:
        old.mul_(factors).addcmul_(signs, rates)
