"""Rounds stochastically to bfloat16, so that small updates move a weight in expectation.

The random bits are a hash of an element's place and a seed: every device makes the same bits,
compiled code and eager code too, and no generator's state changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grass_fx.ops import rounded
from grass_fx.state.rules import stream
from grass_fx.state.transfers import send


def rounding_stream(seed: int, key: int, step: int) -> torch.Generator:
    """Return the generator of the seeds for a parameter's rounding in one step.

    It depends on three integers, so a checkpoint needs no generator state. Draws of selections use
    other streams.
    """
    return stream(seed, key, step, purpose="rounding")


def draw_seed(generator: torch.Generator) -> Tensor:
    """Draw the seed of one tensor's noise: (2,) int32, on the CPU."""
    return torch.randint(
        -(1 << 31), 1 << 31, (2,), dtype=torch.int32, generator=generator, device="cpu"
    )


def noise(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return 16 random bits for each element, as int32, on the device of ``seed`` (2,).

    The element's place is mixed by shifts and multiplications that wrap around. The constants are
    those of C. Wellons' hash-prospector (two rounds). The second half of the seed is added between
    the rounds, so that different streams are not shifted copies of one stream.
    """
    first, second = seed.unbind()
    x = torch.arange(math.prod(shape), dtype=torch.int32, device=seed.device).view(*shape)
    x += first
    x ^= (x >> 16) & 0xFFFF  # masked, since >> repeats the sign
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x += second
    x *= 0x735A2D97
    x >>= 15
    x &= 0xFFFF
    return x


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round ``values`` (float32) to bfloat16, up or down at random so that the mean is exact."""
    seed = send(draw_seed(generator), values.device)
    return rounded(values, noise(seed, values.shape)).to(torch.bfloat16)
