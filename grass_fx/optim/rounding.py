"""Stochastic rounding to bfloat16: small updates move a weight in expectation, not never."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_fx.selection import stream


def rounding_stream(seed: int, key: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of a parameter's rounding in one step: a function of three integers.

    So a checkpoint needs no generator state; draws of selections use other streams.
    """
    host = stream(seed, key, step, purpose="rounding")
    if device.type == "cpu":
        return host
    return torch.Generator(device).manual_seed(host.initial_seed())


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """``values`` (float32) as bfloat16, up or down at random so that the expectation is exact.

    A bfloat16 is a float32 without its lower 16 bits. Adding 16 random bits carries into the upper
    ones with the probability of the part that is cut off. What is not finite stays as it is.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(
        1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
