"""What a linear weight costs, as formulas in the symbols of docs/method.md.

:class:`LinearCost` has FLOPs, traffic and bytes of one weight. They are plain arithmetic: with
numbers they are numbers, with symbols they are sympy expressions. ``grass_fx.plan`` adds up the
same bytes over a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]

b, m, n, r, K, e, p = sympy.symbols("b m n r K e p")
"""Tokens, output and input features, rank, steps between refreshes; bytes per number, ranks."""

MOMENTS = {"adamw": 2, "momentum": 1, "sgd": 0}
"""Numbers of optimizer state for each number of the gradient."""

LLAMA = {
    "llama-60m": (512, 1376, 8, 32000),
    "llama-130m": (768, 2048, 12, 32000),
    "llama-350m": (1024, 2736, 24, 32000),
    "llama-1b": (2048, 5461, 24, 32000),
    "llama-7b": (4096, 11008, 32, 32000),
    "llama-13b": (5120, 13824, 40, 32000),
}
"""hidden, intermediate, layers, vocabulary; the small ones as in the papers on GaLore and Grass."""


@dataclass(frozen=True)
class LinearCost:
    """One linear weight W (m, n) and one step on b tokens: FLOPs, traffic and bytes.

    A size may be a number or a sympy expression, and is its symbol if not given:
    ``LinearCost(m=4096, n=4096).compact_gradient_flops.subs({"b": 2048, "r": 512})``. Names in
    quotation marks are parts of docs/method.md. Formulas here are those of side "in", the
    default; for "out" exchange m and n in what has r.

    Traffic is what the operations have to read and write once, in bytes; caches are not modelled.
    A *scoring* of None is a rule without scores, else "gradient" or "tiles".
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
    """Processes of an all-reduce."""
    matrices: int = 1
    """E: of a stack (E, m, n); b is then the tokens of each matrix."""

    @property
    def selected(self) -> Any:
        """Size of the selected dimension ("Symbols"): m for side "out", n for "in"."""
        return self.m if self.side == "out" else self.n

    @property
    def full_size(self) -> Any:
        """Numbers in G ("Symbols"): mn."""
        return self.matrices * self.m * self.n

    @property
    def compact_size(self) -> Any:
        """Numbers in C (equations 2 and 3): rm for side "in", rn for "out"."""
        other = self.n if self.side == "out" else self.m
        return self.matrices * self.r * other

    # --- FLOPs: two for each multiplication and addition ------------------------------------------

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
        """C, 2brm (equation 3) or, for "out", 2brn (equation 2)."""
        return 2 * self.b * self.compact_size

    @property
    def scoring_gradient_flops(self) -> Any:
        """The weight gradient's product in a scoring step ("Steps, periods, refreshes").

        "gradient" forms G once, 2bmn; "tiles" makes tiles of it and C beside them, 2bmn + 2brm.
        Without scores it is a regular step's.
        """
        if self.scoring is None:
            return self.compact_gradient_flops
        beside = self.compact_gradient_flops if self.scoring == "tiles" else 0
        return self.full_gradient_flops + beside

    @property
    def refresh_flops(self) -> Any:
        """What scoring adds to each step on average: one step in K scores."""
        return (self.scoring_gradient_flops - self.compact_gradient_flops) / self.K

    @property
    def full_step_flops(self) -> Any:
        """Three products at full rank, 6bmn ("What follows from the equations")."""
        return self.forward_flops + self.input_gradient_flops + self.full_gradient_flops

    @property
    def step_flops(self) -> Any:
        """The three products, scoring amortised over K steps: (2 + r/n) · 2bmn without scores."""
        products = self.forward_flops + self.input_gradient_flops + self.compact_gradient_flops
        return products + self.refresh_flops if self.scoring else products

    # --- traffic ----------------------------------------------------------------------------------

    @property
    def product_bytes(self) -> Any:
        """Forward or input gradient: X or D read, W read, the result written ("Symbols")."""
        return (self.matrices * self.b * (self.m + self.n) + self.full_size) * self.itemsize

    @property
    def full_gradient_traffic(self) -> Any:
        """G = Dᵀ X: D and X read, G written ("Symbols")."""
        return self.product_bytes

    @property
    def compact_gradient_traffic(self) -> Any:
        """C from gathered factors: b × r and b × m (b × n for "out") read, C written (2 and 3)."""
        other = self.n if self.side == "out" else self.m
        factors = self.matrices * self.b * (self.r + other)
        return (factors + self.compact_size) * self.itemsize

    @property
    def selection_traffic(self) -> Any:
        """The gather before the product: b × r read and written, σ read (equations 2 and 3).

        A kernel that gathers while it loads does without.
        """
        return self.matrices * (2 * self.b * self.r * self.itemsize + 8 * self.r)

    @property
    def full_optimizer_traffic(self) -> Any:
        """Gradient read, weight and moments read and written; AdamW: 7mn numbers."""
        return (3 + 2 * self.moments) * self.full_size * self.itemsize

    @property
    def optimizer_traffic(self) -> Any:
        """The same of C (equation 4), decay of all of W, ages read and written, σ and ρ read.

        AdamW: 7rm + 2mn numbers, and 24r bytes of ages and σ.
        """
        numbers = (3 + 2 * self.moments) * self.compact_size
        if self.weight_decay:
            numbers += 2 * self.full_size
        return numbers * self.itemsize + self.matrices * self.r * (24 + self._scale_itemsize)

    @property
    def full_all_reduce_bytes(self) -> Any:
        """Sent by each process for G, by a ring: 2 (p − 1)/p · mn numbers."""
        return self._ring(self.full_gradient_bytes)

    @property
    def all_reduce_bytes(self) -> Any:
        """Sent by each process for C, by a ring: 2 (p − 1)/p · rm numbers (equations 2 and 3)."""
        return self._ring(self.gradient_bytes)

    def _ring(self, size: Any) -> Any:
        return 2 * (self.ranks - 1) * size / self.ranks

    # --- memory -----------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> Any:
        """W: mn numbers."""
        return self.full_size * self.itemsize

    @property
    def full_gradient_bytes(self) -> Any:
        """G on weight.grad: mn numbers ("What follows from the equations")."""
        return self.full_size * self.itemsize

    @property
    def full_state_bytes(self) -> Any:
        """AdamW: two moments, 2mn numbers, and a step count of 4 bytes."""
        return self.moments * self.full_size * self.itemsize + (4 if self.moments else 0)

    @property
    def gradient_bytes(self) -> Any:
        """C on weight.grad: rm numbers ("What follows from the equations")."""
        return self.compact_size * self.itemsize

    @property
    def state_bytes(self) -> Any:
        """Moments, 2rm; ages and σ, int64, 16r bytes; ρ, 4r; the selection's number, 8 bytes.

        "What follows from the equations": 2rm + 3r numbers. ρ only with replacement.
        """
        rows = self.matrices * self.r * (16 + self._scale_itemsize)
        return self.moments * self.compact_size * self.itemsize + rows + 8

    @property
    def graph_input_bytes(self) -> Any:
        """σ and ρ once more, as compiled graphs read them: 8r bytes, and 4r with replacement."""
        return self.matrices * self.r * (8 + self._scale_itemsize)

    @property
    def _scale_itemsize(self) -> int:
        """ρ is as exact as the weight, but never less than float32."""
        return 0 if not self.replacement else 8 if self.itemsize == 8 else 4

    @property
    def score_bytes(self) -> Any:
        """s of a scoring step: n (m for "out") numbers of float32, held until the step."""
        return 4 * self.matrices * self.selected if self.scoring else 0

    @property
    def scoring_transient_bytes(self) -> Any:
        """G while a scoring step's backward is in this layer: mn numbers, none with tiles."""
        return self.full_gradient_bytes if self.scoring == "gradient" else 0
