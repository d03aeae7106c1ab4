"""The votes that gradients make with the signs of their elements, counted bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from grass_fx.ops.bits import bits_of, signs_of


@dataclass(frozen=True)
class Votes:
    """How many of some gradients are above 0, element by element, as bits of these numbers.

    ``planes``: words (blocks, rows + 1, words), the lowest bit first. The last row of each block
    counts the gradients that have a sign there. ``factor``: what the gradients were multiplied by
    since; of it only the sign counts. ``most``: no count is above it. There are as many planes as
    it has binary digits.
    """

    planes: tuple[Tensor, ...]
    factor: Tensor | float = 1.0
    most: int = 1
    common: bool = False
    """Whether they are the votes of all processes that train the weight together."""

    @property
    def nbytes(self) -> int:
        """The bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes)

    def times(self, factor: Tensor | float) -> Votes:
        """Return the votes of the gradients times a number."""
        if isinstance(factor, Tensor):
            factor = factor.reshape(())
        elif factor > 0:
            return self
        return replace(self, factor=factor * self.factor)

    def plus(self, other: Votes) -> Votes:
        """Return the votes of both."""
        most = self.most + other.most
        planes = _sum(self.settled().planes, other.settled().planes)
        return Votes(planes[: most.bit_length()], most=most)

    def up_to(self, most: int) -> Votes:
        """Return the same votes, with planes for counts of at least ``most``."""
        most = max(most, self.most)
        more = most.bit_length() - len(self.planes)
        return replace(
            self, planes=(*self.planes, *[torch.zeros_like(self.planes[0])] * more), most=most
        )

    def to(self, device: torch.device) -> Votes:
        """Return them on another device."""
        factor = self.factor.to(device) if isinstance(self.factor, Tensor) else self.factor
        return replace(self, planes=tuple(p.to(device) for p in self.planes), factor=factor)

    def settled(self) -> Votes:
        """The same votes with factor 1: against is for, where it is negative."""
        if not isinstance(self.factor, Tensor) and self.factor > 0:
            return self
        negative = torch.as_tensor(self.factor < 0, device=self.planes[0].device)
        zero = torch.as_tensor(self.factor == 0, device=self.planes[0].device)
        # Those who have a sign, less those above 0: a − c = a + ¬c + 1 in as many bits.
        planes = [plane.view(torch.int32) for plane in self.planes]
        against = []
        carry = torch.full((), -1, dtype=torch.int32, device=negative.device)
        for plane in planes:
            voters, above = plane[:, -1:], ~plane[:, :-1]
            against.append(voters ^ above ^ carry)
            carry = (voters & above) | (carry & (voters ^ above))
        turned = []
        for plane, below in zip(planes, against, strict=True):
            new = plane.clone()
            new[:, :-1] = torch.where(negative, below, plane[:, :-1])
            turned.append(new.masked_fill_(zero, 0).view(torch.float32))
        return Votes(tuple(turned), most=self.most)

    def parts(self, most: int) -> Iterator[slice]:
        """Yield slices of rows, whole blocks, of at most ``most`` rows if that is a block."""
        blocks, rows, _ = self.planes[0].shape
        step = max(1, most // (rows - 1))
        for first in range(0, blocks, step):
            yield slice(first * (rows - 1), min(first + step, blocks) * (rows - 1))

    def majority(self, part: slice, m: int, n: int, dtype: torch.dtype) -> Tensor:
        """Return rows ``part`` of an (m, n) matrix with 1, -1, or 0 where as many are above 0 as
        below it. ``part`` begins and ends with a block, or ends with the matrix.
        """
        rows = self.planes[0].shape[1] - 1
        count = min(part.stop, m) - part.start
        blocks = slice(part.start // rows, -(-part.stop // rows))
        if len(self.planes) == 1:
            signs = signs_of(self.planes[0][blocks], n, dtype)
        else:
            total = bits_of(self.planes[0][blocks], n, dtype)
            for power, plane in enumerate(self.planes[1:], start=1):
                total.add_(bits_of(plane[blocks], n, dtype), alpha=2**power)
            signs = torch.add(total[:, -1:].neg(), total[:, :-1], alpha=2).sign_()
        signs = signs.flatten(0, 1)[:count]
        if isinstance(self.factor, Tensor) or self.factor != 1:
            signs.mul_(torch.as_tensor(self.factor, device=signs.device).sign().to(dtype))
        return signs


def _sum(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Add numbers whose bits lie in planes; the last plane is the last carry."""
    result, carry = [], torch.zeros_like(left[0].view(torch.int32))
    for a, b in zip_longest(left, right):
        x, y = (carry.new_zeros(()) if t is None else t.view(torch.int32) for t in (a, b))
        result.append(x ^ y ^ carry)
        carry = (x & y) | (carry & (x ^ y))
    result.append(carry)
    return tuple(plane.view(torch.float32) for plane in result)
