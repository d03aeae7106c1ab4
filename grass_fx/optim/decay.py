"""Weight decay of rows that are not selected: a factor that is kept, and applied once a period.

Decoupled decay multiplies the whole W by 1 − lr · λ in each step. Selected rows are multiplied as
they move. A pass over all others would read and write eight times as much at r = m / 8, and in
bfloat16 would change nothing: W · (1 − lr · λ) rounds back to W while lr · λ < 2⁻⁹. So the product
of the factors is kept, as ``pending_decay`` in a weight's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grass_fx.ops import DROPPED
from grass_fx.optim import compiled
from grass_fx.optim.rounding import parts_of, round_stochastically
from grass_fx.optim.rows import per_row

PENDING = "pending_decay"
"""The entry of a weight's state: W without its selected rows is still to be multiplied by this.
It is a float64 number in a tensor on the CPU, as state that is no tensor surprises other code."""

MOST = 2.0**-6
"""The decay that is kept at most: in a long period it is applied whenever it exceeds this."""


def nothing() -> Tensor:
    """Return the value of the entry if nothing is pending."""
    return torch.tensor(1.0, dtype=torch.float64, device="cpu")


def pending(state: Mapping[str, Any]) -> float:
    """Return what is pending; old checkpoints lack the entry."""
    return float(state.get(PENDING, 1.0))


def keep(state: dict[str, Any], factor: float) -> None:
    """Note that a step has multiplied only the selected rows by ``factor``."""
    if factor != 1:
        state[PENDING] = state[PENDING] * factor


def is_due(left: float, may_refresh: bool) -> bool:
    """Whether to apply what is ``left`` pending after a step."""
    return left != 1 and (may_refresh or abs(1 - left) > MOST)


def passes(
    w: Tensor,
    dim: int,
    selected: Tensor,
    factor: float,
    seed: Tensor,
    compile: bool | None = False,
) -> Iterator[Callable[[], Any]]:
    """Multiply all rows of W (m, n) along ``dim`` by ``factor``, but not those in ``selected``.

    Yields functions that do it part by part, each of which changes nothing if it fails. A W of 16
    bits is rounded stochastically, always: to nearest, a small decay would change nothing.
    ``seed``: of the noise. ``compile``: as :class:`~grass_fx.AdamW`'s.
    """
    each = per_row(w, dim, selected, own=1, others=factor)  # a product with 1 is exact, rounded too
    if w.dtype not in DROPPED:
        yield partial(w.mul_, each)
    elif compiled.compiles(compile, w.device):
        yield partial(compiled.scale_, w, each, seed)
    else:
        for rows, first in parts_of(w):
            yield partial(_scale_part, w[rows], each if dim == 1 else each[rows], seed, first)


def _scale_part(part: Tensor, factors: Tensor, seed: Tensor, first: int) -> None:
    part.copy_(round_stochastically(part.float().mul_(factors), seed, part.dtype, first))
