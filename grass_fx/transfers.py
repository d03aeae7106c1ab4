"""Small tensors between the host and a device, without waiting and in one copy where they are many.

A copy that waits does so for everything that the device has been given to do, and a small one costs
as much as a large one. At a refresh every weight has something to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, of one dtype, flattened and on the CPU: one copy for each device."""
    result = [each.flatten() for each in tensors]
    places: dict[torch.device, list[int]] = {}
    for k, each in enumerate(tensors):
        if each.device.type != "cpu":
            places.setdefault(each.device, []).append(k)
    for ks in places.values():
        sizes = [tensors[k].numel() for k in ks]
        parts = torch.cat([result[k] for k in ks]).cpu().split(sizes)
        for k, part in zip(ks, parts, strict=True):
            result[k] = part
    return result


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``. On CUDA nothing waits, and ``tensor`` may go at once:
    pageable memory has been read when the call returns. Elsewhere that is not promised.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors, (k,) of one dtype on the CPU, on ``device``, each in memory of its own."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    moved = send(torch.cat(list(tensors)), device)
    return [part.clone() for part in moved.split([each.numel() for each in tensors])]
