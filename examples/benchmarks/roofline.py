"""What a machine can do at most, measured in the same run as what is compared with it."""

import time
from collections.abc import Callable

import torch

LARGE = {"cuda": (8192, 2**31), "cpu": (2048, 2**28)}
"""Rows of the product and bytes of the copy that are large on a device."""


class Timer:
    """Milliseconds of a call: the host's clock on a CPU, events on a GPU."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            memory = torch.cuda.get_device_properties(device).total_memory
            self.filler = torch.empty(min(2**32, memory // 16), dtype=torch.uint8, device=device)

    def __call__(self, function: Callable, *args) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            function(*args)
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.filler.zero_()  # about a millisecond, in which the host enqueues what follows
        start.record()
        function(*args)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def least_seconds(self, function: Callable, *args) -> float:
        return min(self(function, *args) for _ in range(20)) / 1e3


class Roofline:
    """Peak and bandwidth of this machine in this run (the best of 20), and the time they allow."""

    def __init__(
        self, timer: Timer, device: str, dtype: torch.dtype, square: int, copied: int
    ) -> None:
        """``square``: rows and columns of the product; ``copied``: bytes of the copy."""
        options = {"device": device, "dtype": dtype}
        a, b = (torch.randn(square, square, **options) for _ in range(2))
        self.flops = 2 * square**3 / timer.least_seconds(torch.mm, a, b)
        source = torch.ones(copied // a.itemsize, **options)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / timer.least_seconds(target.copy_, source)

    def milliseconds(self, rows: int, inner: int, columns: int, itemsize: int) -> float:
        """The bound of (rows, inner) x (inner, columns)."""
        moved = (rows * inner + inner * columns + rows * columns) * itemsize
        return 1e3 * max(2 * rows * inner * columns / self.flops, moved / self.bandwidth)

    def bounds(self, flops: float, moved: float) -> dict[str, float]:
        """The two numbers of a roofline: FLOPs over peak, bytes over bandwidth."""
        return {
            "gflop": flops / 1e9,
            "flop_ms": 1e3 * flops / self.flops,
            "gigabytes": moved / 1e9,
            "byte_ms": 1e3 * moved / self.bandwidth,
        }
