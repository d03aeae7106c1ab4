"""Signs of a gradient, packed as bits.

A matrix (m, n) becomes float32 words of 32 bits, (blocks, rows + 1, words), as autograd takes
floats alone for gradients. No arithmetic touches these floats. A block has the bits of ``rows``
rows: 1 where an element is above 0. Its last row has a 1 for each column in which any element of
the block is not 0: where a whole column of a block is 0, nothing has a sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128
"""The most rows of a block: those of one tile of the GPU's kernel."""

WORD = 32
"""The bits of a word."""


def rows_of_block(m: int) -> int:
    """Return how many rows the blocks of a matrix of ``m`` rows have."""
    return min(m, ROWS)


def packed_shape(m: int, n: int) -> tuple[int, int, int]:
    """Return the shape of the words of an (m, n) matrix."""
    rows = rows_of_block(m)
    return -(-m // max(1, rows)), rows + 1, -(-n // WORD)


def packed_bits(flags: Tensor) -> Tensor:
    """Pack booleans (..., n) into words: (..., ⌈n / 32⌉) int32, of which bit j is number j."""
    n = flags.shape[-1]
    padded = torch.nn.functional.pad(flags, (0, -n % WORD)) if n % WORD else flags.contiguous()
    # Eight bytes of 0 or 1 at once: the product moves byte k to bit 56 + k, and nothing carries.
    eight = padded.view(torch.int64).mul(0x0102040810204080).bitwise_right_shift_(56)
    return eight.to(torch.uint8).view(torch.int32)


def put_signs(into: Tensor, first: int, g: Tensor) -> None:
    """Pack some rows ``g`` of a matrix, which begin with the block ``first``.

    ``into``: int32 words of the whole matrix.
    """
    rows, words = into.shape[1] - 1, into.shape[2]
    above = g > 0
    bits, whole = packed_bits(above), g.shape[0] // max(1, rows)
    for start, blocks, height in ((0, whole, rows), (whole, 1, g.shape[0] - whole * rows)):
        if not blocks or not height:
            continue
        part = slice(start * rows, start * rows + blocks * height)
        shape = blocks, height, g.shape[1]
        place = into[first + start : first + start + blocks]
        place[:, :height] = bits[part].view(blocks, height, words)
        alive = above[part].view(torch.uint8).view(shape).amax(1).bool()  # amax is fast, any is not
        if g.device.type != "cpu" or not bool(alive.all()):
            alive = (g[part].reshape(shape) != 0).any(1)
        place[:, rows] = packed_bits(alive)


def pack(g: Tensor) -> Tensor:
    """Return the words of a matrix (m, n)."""
    words = torch.zeros(packed_shape(*g.shape), dtype=torch.int32, device=g.device)
    put_signs(words, 0, g)
    return words.view(torch.float32)


def _table(dtype: torch.dtype) -> Tensor:
    """(256, 8): the bits of each byte."""
    byte = torch.arange(256, device="cpu").unsqueeze(1)
    return ((byte >> torch.arange(8, device="cpu")) & 1).to(dtype)


def shifted(words: Tensor, n: int) -> Tensor:
    """Unpack words (..., w) into int32 0 and 1, (..., n), by shifts, which a GPU fuses."""
    places = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words.view(torch.int32).unsqueeze(-1) >> places) & 1).flatten(-2)[..., :n]


def bits_of(words: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Unpack words (..., w) into 0 and 1: (..., n) of ``dtype``."""
    if words.device.type != "cpu":
        return shifted(words, n).to(dtype)
    eight = words.contiguous().view(torch.uint8).int()
    bits = torch.nn.functional.embedding(eight, _table(dtype))
    return bits.flatten(-2)[..., :n]
