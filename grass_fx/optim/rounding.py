"""Rounds stochastically to 16 bits, so that small changes move a weight in expectation.

The random bits are a hash of an element's place and a seed: every device makes the same bits,
compiled code and eager code too, and no generator's state changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grass_fx.ops import PART, rounded
from grass_fx.state.rules import halves
from grass_fx.state.transfers import send


def rounding_seed(seed: int, key: int, step: int, purpose: str = "rounding") -> Tensor:
    """Return the seed of the :func:`noise` for one parameter in one step: (2,) int32, on the CPU.

    It depends on three integers, so a checkpoint needs no generator state.
    """
    return torch.tensor(halves(seed, key, step, purpose), dtype=torch.int32, device="cpu")


def noise(seed: Tensor, shape: Sequence[int], first: int = 0) -> Tensor:
    """Return 16 random bits for each element, as int32, on the device of ``seed`` (2,).

    All dimensions but the last count as one, of rows; the first row is number ``first``. A hash of
    the row, which is odd, is multiplied by a hash of the column, and the product's upper half is
    taken: so bits are uniform, and those of two elements independent, over the seeds.
    """
    of_rows, of_columns = seed.unbind()
    count = math.prod(shape[:-1])
    rows = torch.arange(first, first + count, dtype=torch.int32, device=seed.device)
    columns = torch.arange(math.prod(shape[-1:]), dtype=torch.int32, device=seed.device)
    x = (_mixed(rows + of_rows) | 1).unsqueeze(1) * _mixed(columns + of_columns)
    x >>= 16
    x &= 0xFFFF
    return x.view(torch.Size(shape))


def _mixed(x: Tensor) -> Tensor:
    """A round of C. Wellons' hash-prospector, in place: shifts, and products that wrap around."""
    x ^= (x >> 16) & 0xFFFF  # masked, since >> repeats the sign
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    return x


def round_stochastically(
    values: Tensor, seed: Tensor, dtype: torch.dtype = torch.bfloat16, first: int = 0
) -> Tensor:
    """Round ``values`` (float32) to 16 bits, up or down at random so that the mean is exact.

    ``seed``: of :func:`rounding_seed`; ``first``: of :func:`noise`.
    """
    bits = noise(send(seed, values.device), values.shape, first)
    return rounded(values, bits, dtype).to(dtype)


def parts_of(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """Yield indices of parts along dimension 0 and the first row of each, as :func:`noise` counts.

    A part has at most about an eighth of the tensor and :data:`PART` elements (a GPU wants few and
    large operations), so that a float32 copy is small beside the tensor.
    """
    if tensor.dim() < 2:
        yield ..., 0
        return
    count = tensor.numel()
    most = min(count // 8, PART if tensor.device.type == "cpu" else 64 * PART)
    size = max(1, most * tensor.shape[0] // max(1, count))
    inner = math.prod(tensor.shape[1:-1])
    for start in range(0, tensor.shape[0], size):
        yield slice(start, start + size), start * inner
