"""Small tensors between the host and a device, without waiting and in one copy where they are many.

A copy that waits does so for everything that the device has been given to do, and a small one costs
as much as a large one. At a refresh every weight has something to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STAGED = 64 << 10
"""Bytes of pageable memory that CUDA takes in at once. Of more a copy first waits for what the
device has been given to do."""


def reading(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begins to copy tensors of one dtype to the CPU, flattened; what is returned waits for them.

    One copy for each device.

    A GPU goes on with what it is given in between.
    """
    result = [each.flatten() for each in tensors]
    places: dict[torch.device, list[int]] = {}
    for k, each in enumerate(tensors):
        if each.device.type != "cpu":
            places.setdefault(each.device, []).append(k)
    copied: list[torch.cuda.Event] = []
    for device, ks in places.items():
        together = torch.cat([result[k] for k in ks])
        if device.type == "cuda":
            together = together.to("cpu", non_blocking=True)  # into pinned memory
            with torch.cuda.device(device):
                copied.append(torch.cuda.Event())
                copied[-1].record()
        sizes = [tensors[k].numel() for k in ks]
        for k, part in zip(ks, together.cpu().split(sizes), strict=True):
            result[k] = part

    def wait() -> list[Tensor]:
        for each in copied:
            each.synchronize()
        return result

    return wait


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``. On CUDA nothing waits, and ``tensor`` may go at once."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes > STAGED:
        tensor = tensor.pin_memory()  # which torch keeps until the copy is done
    return tensor.to(device, non_blocking=True)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors, (k,) of one dtype on the CPU, on ``device``, each in memory of its own."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    moved = send(torch.cat(list(tensors)), device)
    return owned(moved.split([each.numel() for each in tensors]))


def owned(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts of larger tensors, of one device, each in memory of its own: one kernel for many."""
    made = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(made, list(parts))
    return made
