"""Stochastic rounding to bfloat16: small updates move a weight in expectation, not never.

The random bits are a hash of an element's place and a seed: every device, and compiled code as
well as eager code, makes the same ones, and no generator's state is touched.
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
    """The seeds of a parameter's rounding in one step: a function of three integers.

    So a checkpoint needs no generator state; draws of selections use other streams.
    """
    return stream(seed, key, step, purpose="rounding")


def draw_seed(generator: torch.Generator) -> Tensor:
    """The seed of one tensor's noise: (2,) int32, on the CPU."""
    return torch.randint(
        -(1 << 31), 1 << 31, (2,), dtype=torch.int32, generator=generator, device="cpu"
    )


def noise(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """16 random bits for each element, as int32, on the device of ``seed`` (2,).

    The place among the elements, mixed by shifts and multiplications that wrap around: the
    constants are those of C. Wellons' hash-prospector (two rounds). The other half of the seed
    comes in between, so that streams are not one stream, shifted.
    """
    first, second = seed.unbind()
    x = torch.arange(math.prod(shape), dtype=torch.int32, device=seed.device).view(*shape)
    x += first
    x ^= (x >> 16) & 0xFFFF  # masks, since >> repeats the sign
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x += second
    x *= 0x735A2D97
    x >>= 15
    x &= 0xFFFF
    return x


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """``values`` (float32) as bfloat16, up or down at random so that the expectation is exact."""
    seed = send(draw_seed(generator), values.device)
    return rounded(values, noise(seed, values.shape)).to(torch.bfloat16)
