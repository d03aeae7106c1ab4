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
    padded = torch.nn.functional.pad(flags, (0, -n % WORD)) if n % WORD else flags
    # Eight bytes of 0 or 1 at once: the product moves byte k to bit 56 + k, and nothing carries.
    eight = (padded.contiguous().view(torch.int64) * 0x0102040810204080).view(torch.uint8)
    return eight[..., 7::8].clone(memory_format=torch.contiguous_format).view(torch.int32)


def put_signs(into: Tensor, first: int, g: Tensor) -> None:
    """Pack some rows ``g`` of a matrix, which begin with the block ``first``.

    ``into``: int32 words of the whole matrix.
    """
    if not g.numel():
        return
    rows = into.shape[1] - 1
    above = g > 0
    bits, whole = packed_bits(above), g.shape[0] // rows
    start = 0
    for blocks, height in ((whole, rows), (1, g.shape[0] % rows)):
        if blocks and height:
            part, shape = slice(start, start + blocks * height), (blocks, height)
            place = into[first + start // rows :][:blocks]
            place[:, :height] = bits[part].unflatten(0, shape)
            alive = _alive(g[part].unflatten(0, shape), above[part].unflatten(0, shape))
            place[:, rows] = packed_bits(alive)
            start = part.stop


def _alive(g: Tensor, above: Tensor) -> Tensor:
    """Return which columns of some blocks ``g``, (blocks, height, n), are not 0 everywhere."""
    if g.device.type == "cpu":
        some = above.view(torch.uint8).amax(1)  # amax is fast, any is not
        if bool(some.all()):
            return some.view(torch.bool)
    return g.any(1)


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
    return _looked_up(words, n, _table(dtype))


def signs_of(words: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Unpack blocks of words (blocks, rows + 1, w) into the signs 1, -1 and 0 of their elements:
    (blocks, rows, n) of ``dtype``.
    """
    signs, some = words[:, :-1], words[:, -1:]
    if words.device.type != "cpu":
        return shifted(signs, n).to(dtype).mul_(2).sub_(shifted(some, n))
    ones = _looked_up(signs, n, _table(dtype).mul_(2).sub_(1))
    if n % WORD == 0 and bool((some.view(torch.int32) == -1).all()):
        return ones
    return ones.mul_(bits_of(some, n, dtype))


def _looked_up(words: Tensor, n: int, table: Tensor) -> Tensor:
    eight = words.contiguous().view(torch.uint8).int()
    return torch.nn.functional.embedding(eight, table).flatten(-2)[..., :n]
