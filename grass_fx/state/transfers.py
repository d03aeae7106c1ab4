"""Copies small tensors between host and device without waiting, and many of them in one copy.

A blocking copy waits for all work queued on the device, so a small one costs as much as a large
one. At a refresh every weight has something to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STAGED = 64 << 10
"""CUDA takes in at most this many bytes of pageable memory at once. A larger copy first waits for
the device's queued work.
"""


def reading(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start copying tensors of one dtype to the CPU, flattened; the returned function waits.

    Each device needs one copy. Until the returned function is called, a GPU goes on working.
    """
    result = [tensor.flatten() for tensor in tensors]
    places: dict[torch.device, list[int]] = {}
    for k, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            places.setdefault(tensor.device, []).append(k)
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
        for event in copied:
            event.synchronize()
        return result

    return wait


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device``. CUDA does not wait, and ``tensor`` may be freed at once."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes > STAGED:
        tensor = tensor.pin_memory()  # torch keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy 1-D CPU tensors of one dtype to ``device``, each into memory of its own."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    moved = send(torch.cat(list(tensors)), device)
    return owned(moved.split([tensor.numel() for tensor in tensors]))


def owned(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copy parts of larger tensors, all on one device, into memory of their own with one kernel."""
    copies = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(copies, list(parts))
    return copies
