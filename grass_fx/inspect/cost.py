"""The cost of a linear weight, as formulas in the symbols of docs/method.md.

:class:`LinearCost` gives the FLOPs, traffic and bytes of one weight. All of it is plain arithmetic:
numbers give numbers, and symbols give sympy expressions. ``grass_fx.plan`` adds up the same bytes
over a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]

from grass_fx.ops.bits import packed_shape

b, m, n, r, K, e, p = sympy.symbols("b m n r K e p")
"""Tokens, output features, input features, rank, steps between refreshes, bytes per number, and
the number of processes."""

MOMENTS = {"adamw": 2, "momentum": 1, "sgd": 0}
"""How many numbers of optimizer state there are for each number of the gradient."""

LLAMA = {
    "llama-60m": (512, 1376, 8, 32000),
    "llama-130m": (768, 2048, 12, 32000),
    "llama-350m": (1024, 2736, 24, 32000),
    "llama-1b": (2048, 5461, 24, 32000),
    "llama-7b": (4096, 11008, 32, 32000),
    "llama-13b": (5120, 13824, 40, 32000),
}
"""(hidden, intermediate, layers, vocabulary). The small models are those of the GaLore and Grass
papers."""


@dataclass(frozen=True)
class LinearCost:
    """FLOPs, traffic and bytes of one linear weight W (m, n) in one step on b tokens.

    A size may be a number or a sympy expression. A size that is not given is its symbol:
    ``LinearCost(m=4096, n=4096).compact_gradient_flops.subs({"b": 2048, "r": 512})``. Names in
    quotation marks are sections of docs/method.md. The formulas in docstrings are for side "in",
    the default; for "out" exchange m and n in every term that contains r.

    Traffic is the bytes that the operations have to read and write once; caches are not modelled.
    *scoring* is None for a rule without scores, otherwise "gradient" or "tiles".
    """

    m: Any = m
    n: Any = n
    r: Any = r
    b: Any = b
    K: Any = K
    itemsize: Any = e
    """Bytes per number of weight, activations, gradient and moments."""
    side: str = "in"
    scoring: str | None = None
    replacement: bool = False
    moments: int = 2
    weight_decay: bool = True
    ranks: Any = p
    """Number of processes in an all-reduce."""
    matrices: int = 1
    """E for a stack (E, m, n); b is then the number of tokens for each matrix."""
    signs_every: int = 0
    """In every so many steps the backward yields the signs of G (``rest="sign"``); 0: never."""

    @property
    def selected(self) -> Any:
        """Size of the selected dimension ("Symbols"): m for side "out", n for side "in"."""
        return self.m if self.side == "out" else self.n

    @property
    def full_size(self) -> Any:
        """How many numbers G has ("Symbols"): mn."""
        return self.matrices * self.m * self.n

    @property
    def compact_size(self) -> Any:
        """How many numbers C has (equations 2 and 3): rm for side "in", rn for side "out"."""
        other = self.n if self.side == "out" else self.m
        return self.matrices * self.r * other

    # --- FLOPs: a multiplication and its addition count as two ------------------------------------

    @property
    def forward_flops(self) -> Any:
        """Y = X Wᵀ, 2bmn ("What follows from the equations")."""
        return 2 * self.b * self.full_size

    @property
    def input_gradient_flops(self) -> Any:
        """D W, 2bmn ("What follows from the equations")."""
        return 2 * self.b * self.full_size

    @property
    def full_gradient_flops(self) -> Any:
        """G = Dᵀ X, 2bmn ("Symbols")."""
        return 2 * self.b * self.full_size

    @property
    def compact_gradient_flops(self) -> Any:
        """C: 2brm for side "in" (equation 3), 2brn for side "out" (equation 2)."""
        return 2 * self.b * self.compact_size

    @property
    def scoring_gradient_flops(self) -> Any:
        """The products for the weight gradient in a scoring step ("Steps, periods, refreshes").

        "gradient" forms G once, 2bmn. "tiles" computes tiles of G and, separately, C: 2bmn + 2brm.
        For a rule without scores the result is that of a regular step.
        """
        if self.scoring is None:
            return self.compact_gradient_flops
        beside = self.compact_gradient_flops if self.scoring == "tiles" else 0
        return self.full_gradient_flops + beside

    @property
    def refresh_flops(self) -> Any:
        """The FLOPs that scoring adds to each step on average; one step in K is a scoring step."""
        return (self.scoring_gradient_flops - self.compact_gradient_flops) / self.K

    @property
    def full_step_flops(self) -> Any:
        """The three products at full rank, 6bmn ("What follows from the equations")."""
        return self.forward_flops + self.input_gradient_flops + self.full_gradient_flops

    @property
    def step_flops(self) -> Any:
        """The three products, scoring averaged over K steps; (2 + r/n) · 2bmn without scores.

        With signs 6bmn, averaged likewise. A GPU computes C beside them, 2brm more.
        """
        products = self.forward_flops + self.input_gradient_flops + self.compact_gradient_flops
        if self.signs_every:  # C comes from the same product
            more = self.full_gradient_flops - self.compact_gradient_flops
            products += more / self.signs_every
        return products + self.refresh_flops if self.scoring else products

    # --- traffic ----------------------------------------------------------------------------------

    @property
    def product_bytes(self) -> Any:
        """Forward or input gradient: read X or D, read W, write the result ("Symbols")."""
        return (self.matrices * self.b * (self.m + self.n) + self.full_size) * self.itemsize

    @property
    def full_gradient_traffic(self) -> Any:
        """G = Dᵀ X: read D and X, write G ("Symbols")."""
        return self.product_bytes

    @property
    def compact_gradient_traffic(self) -> Any:
        """C from gathered factors: read b × r and b × m (side "out": b × n), write C.

        Equations 2 and 3.
        """
        other = self.n if self.side == "out" else self.m
        factors = self.matrices * self.b * (self.r + other)
        return (factors + self.compact_size) * self.itemsize

    @property
    def selection_traffic(self) -> Any:
        """The gather before the product: read and write b × r, read σ (equations 2 and 3).

        A kernel that gathers while it loads its tiles has none of this traffic.
        """
        return self.matrices * (2 * self.b * self.r * self.itemsize + 8 * self.r)

    @property
    def full_optimizer_traffic(self) -> Any:
        """Read the gradient, read and write the weight and the moments; AdamW: 7mn numbers."""
        return (3 + 2 * self.moments) * self.full_size * self.itemsize

    @property
    def optimizer_traffic(self) -> Any:
        """The update with C (equation 4), weight decay of all of W, ages, σ and ρ.

        AdamW: 7rm + 2mn numbers, and 24r bytes for ages (read and written) and σ (read).
        """
        numbers = (3 + 2 * self.moments) * self.compact_size
        if self.weight_decay:
            numbers += 2 * self.full_size
        return numbers * self.itemsize + self.matrices * self.r * (24 + self._scale_itemsize)

    @property
    def full_all_reduce_bytes(self) -> Any:
        """Bytes each process sends for G in a ring all-reduce: 2 (p − 1)/p · mn numbers."""
        return self._ring(self.full_gradient_bytes)

    @property
    def all_reduce_bytes(self) -> Any:
        """Bytes each process sends for C in a ring all-reduce: 2 (p − 1)/p · rm numbers.

        Equations 2 and 3.
        """
        return self._ring(self.gradient_bytes)

    @property
    def votes_bytes(self) -> Any:
        """Bytes each process sends of its signs to all others, once in a step: p − 1 times."""
        return (self.ranks - 1) * self.sign_bytes

    def _ring(self, size: Any) -> Any:
        return 2 * (self.ranks - 1) * size / self.ranks

    # --- memory -----------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> Any:
        """W: mn numbers."""
        return self.full_size * self.itemsize

    @property
    def full_gradient_bytes(self) -> Any:
        """G in weight.grad: mn numbers ("What follows from the equations")."""
        return self.full_size * self.itemsize

    @property
    def full_state_bytes(self) -> Any:
        """AdamW: two moments, 2mn numbers, and a step count of 4 bytes."""
        return self.moments * self.full_size * self.itemsize + (4 if self.moments else 0)

    @property
    def gradient_bytes(self) -> Any:
        """C in weight.grad: rm numbers ("What follows from the equations")."""
        return self.compact_size * self.itemsize

    @property
    def sign_bytes(self) -> Any:
        """The signs of G in weight.grad: a bit for each element, and n bits more for 128 rows."""
        if not self.signs_every:
            return 0
        rows = self.n if self.side == "out" else self.m
        columns = self.matrices * self.selected
        if isinstance(rows, int) and isinstance(columns, int):
            return 4 * math.prod(packed_shape(rows, columns))
        return rows * columns * sympy.Rational(129, 1024)

    @property
    def state_bytes(self) -> Any:
        """Moments (2rm numbers), ages and σ (int64, 16r bytes), the generation and pending decay.

        With replacement there is also ρ, 4r bytes. "What follows from the equations" counts
        2rm + 3r numbers.
        """
        rows = self.matrices * self.r * (16 + self._scale_itemsize)
        return self.moments * self.compact_size * self.itemsize + rows + 16

    @property
    def graph_input_bytes(self) -> Any:
        """Copies of σ and ρ that compiled graphs read: 8r bytes, and 4r more with replacement."""
        return self.matrices * self.r * (8 + self._scale_itemsize)

    @property
    def _scale_itemsize(self) -> int:
        """Bytes per number of ρ: float64 for float64 weights, else float32; 0 without ρ."""
        return 0 if not self.replacement else 8 if self.itemsize == 8 else 4

    @property
    def score_bytes(self) -> Any:
        """s in a scoring step: n (side "out": m) float32 numbers, held until the optimizer step."""
        return 4 * self.matrices * self.selected if self.scoring else 0

    @property
    def scoring_transient_bytes(self) -> Any:
        """G while the backward of a scoring step is in this layer: mn numbers, 0 with tiles."""
        return self.full_gradient_bytes if self.scoring == "gradient" else 0
