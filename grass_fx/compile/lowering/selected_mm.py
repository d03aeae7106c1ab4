"""Decides how ``grass::selected_mm`` runs: a gather and the vendor's GEMM, or one Triton kernel.

The kernel (selected_mm.py.jinja) gathers rows of A or columns of B while it loads its tiles, so the
gathered matrix is never written. Whether that pays depends on how the gathered elements lie in
memory, see :func:`takes_template`. Measured on an H100: docs/benchmarks-log.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grass_fx.state.units import Units

MAX_SPLIT = 16


@dataclass(frozen=True)
class Tile:
    """A configuration of the kernel."""

    m: int
    n: int
    stages: int
    warps: int

    def k(self, itemsize: int) -> int:
        """BLOCK_K: 128 bytes of each row, so that a tile takes the same memory in every dtype."""
        return 128 // itemsize


# The large tile is what a dense bfloat16 GEMM uses on Hopper; the others fill the chip when the
# compact matrix is small or thin. Their stages fit into the shared memory of sm_80 (163 KiB).
LARGE = Tile(128, 128, 4, 8)
WIDE = Tile(64, 256, 3, 8)
TALL = Tile(256, 64, 3, 8)
SMALL = Tile(64, 64, 6, 4)
TILES = (LARGE, WIDE, TALL, SMALL)
SIGNING_TILE = LARGE
"""For signs: as high as a block of ``grass_fx.ops.bits`` has rows, and whole words wide."""


GATHER, TEMPLATE, MEASURED = "gather + mm", "triton template", "autotuned"


Strides = tuple[int | None, int | None]
"""Strides of the factor that is gathered from, in elements: (gathered dimension, other dimension).
A stride that is not known is None."""


def way(device: str, dtype: torch.dtype, strides: Strides, tunes: bool) -> str:
    """How a product is computed: in one of two ways, or in the one that measures faster.

    ``tunes`` says whether Inductor measures its choices. For ``dtype`` and ``strides`` see
    :func:`takes_template`.
    """
    if device != "cuda":
        return GATHER
    if tunes and dtype.itemsize <= 4:
        return MEASURED
    return TEMPLATE if takes_template(dtype, strides) else GATHER


def takes_template(dtype: torch.dtype, strides: Strides) -> bool:
    """Whether to use the Triton kernel without autotuning.

    It is used if the dimension that is not gathered is contiguous. Then each selected row or column
    is one run of memory, and the kernel takes 1.2 times as long as the dense product of its shape.
    A gather, which has to transpose, and the vendor's GEMM take 1.5 times as long. Along the
    contiguous dimension the kernel gathers pieces again for every tile: in blocks of 8 it takes
    more than twice as long as a gather and the GEMM, in blocks of 64 about as long.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False  # without tensor cores the vendor's GEMM is faster
    gathered, other = strides
    return other == 1 and gathered not in (None, 1)


def spread(size: int, r: int, block: int, device: torch.device) -> torch.Tensor:
    """σ for measuring: r of ``size`` rows, in evenly spread blocks."""
    units = torch.arange(r // block, device=device) * (size // block) // (r // block)
    return Units(size, block).rows(units)


def best_tile(m: int, n: int) -> Tile:
    """The configuration to use without autotuning for an (m, n) compact gradient."""
    if m <= 64 and n <= 64:
        return SMALL
    if m <= 64:
        return WIDE
    return TALL if n <= 64 else LARGE


def split_of(m: int, n: int, steps: int, tile: Tile, processors: int) -> int:
    """Into how many parts to cut the ``steps`` along K, so that parts use idle multiprocessors.

    A part keeps at least eight steps of the loop, so that filling its pipeline pays.
    """
    tiles = -(-m // tile.m) * -(-n // tile.n)
    split = 1
    while split * 2 <= min(MAX_SPLIT, steps // 8) and tiles * split * 2 <= processors:
        split *= 2
    return split


def options_of(tile: Tile, itemsize: int, **given: Any) -> dict[str, Any]:
    """The arguments of the template."""
    return {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k(itemsize), "GROUP_M": 8,
        "num_stages": tile.stages, "num_warps": tile.warps,
        "ALLOW_TF32": allows_tf32(), **given,
    }  # fmt: skip


def allows_tf32() -> bool:
    """Whether float32 products on a GPU may round their factors to TF32, as torch's own may.

    This reads the setting of the backend, which ``torch.set_float32_matmul_precision`` also writes.
    The getter of the latter raises once a user has set the backend's precision directly.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
