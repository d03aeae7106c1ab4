"""The seconds of a training step on one GPU, from counted FLOPs and counted bytes.

Matrix products and attention take their FLOPs over a rate. Everything else takes its bytes over a
rate: gathers, norms and other pointwise operations, the loss, and the optimizer. The rates are
parts of a card's peaks (``ATTAINED``), which examples/benchmarks/scaling.py fits to a profile of
one step on one H100. docs/memory-planning.md compares predictions with measured steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grass_fx.errors import OptionError
from grass_fx.inspect.activations import Activations
from grass_fx.inspect.candidates import Candidate
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.parts import layer_of


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products, FLOP/s of attention, and bytes/s."""

    products: float
    attention: float
    memory: float


ATTAINED = Rates(products=0.69, attention=0.23, memory=0.70)
"""The parts of a card's peaks that a step attains."""

PEAKS = {
    "h100": (989e12, 3.35e12),
    "h200": (989e12, 4.8e12),
    "a100": (312e12, 2.039e12),
    "l40s": (362e12, 0.864e12),
    "a6000": (154.8e12, 0.768e12),
    "rtx5090": (209.5e12, 1.792e12),
    "rtx4090": (165.2e12, 1.008e12),
    "rtx3090": (71e12, 0.936e12),
}
"""Card -> dense bfloat16 FLOP/s with sums in float32, and bytes/s, as NVIDIA states them.

The first four from their data sheets, where FLOP/s "with sparsity" are twice these: H100 SXM, H200
SXM, A100 80GB SXM, L40S. The others from the appendices of white papers on their architectures:
GA102 V2 (RTX A6000, GeForce RTX 3090), Ada (4090), RTX Blackwell (5090).
"""

ERRORS = "within 7 % of the steps measured on an H100, and checked on no other card"
"""How far off predictions may be: docs/memory-planning.md."""


def rates_of(card: str) -> Rates:
    """What a step attains on the card with this name; capitals, blanks and "-" do not matter.

    Raises:
        OptionError: the card is not known.
    """
    if (name := _plain(card)) not in PEAKS:
        raise OptionError(f"card={card!r} is not known. Known are {', '.join(PEAKS)}.")
    flops, memory = PEAKS[name]
    return Rates(ATTAINED.products * flops, ATTAINED.attention * flops, ATTAINED.memory * memory)


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward, and of the optimizer."""

    forward: float = 0
    backward: float = 0
    optimizer: float = 0

    def __add__(self, other: Times) -> Times:
        return Times(
            self.forward + other.forward,
            self.backward + other.backward,
            self.optimizer + other.optimizer,
        )

    def __mul__(self, factor: int) -> Times:
        return Times(factor * self.forward, factor * self.backward, factor * self.optimizer)

    @property
    def checkpointed(self) -> Times:
        """The same with another forward in the backward."""
        return replace(self, backward=self.backward + self.forward)

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


def of_products(cost: LinearCost, rates: Rates, trains: bool = True) -> Times:
    """The three products of one weight; r = ``cost.selected`` means full rank.

    A compact gradient takes the longer of its FLOPs and its bytes. The gather before it reads all
    b × n numbers, because single columns touch nearly all cache lines.
    """
    forward = cost.forward_flops / rates.products
    backward = cost.input_gradient_flops / rates.products
    gradient = cost.full_gradient_flops / rates.products
    if trains and cost.r == cost.selected:
        backward += gradient
    elif trains:
        compact = cost.compact_gradient_flops / rates.products
        gathered = cost.matrices * cost.b * (cost.selected + cost.r) * cost.itemsize
        backward += max(compact, cost.compact_gradient_traffic / rates.memory)
        backward += gathered / rates.memory
        if cost.signs_every:
            backward += gradient / cost.signs_every
    return Times(forward, backward)


def of_other(it: Activations, tokens: int, length: int, rates: Rates) -> tuple[Times, Times]:
    """Attention and pointwise operations of all layers; and what is outside of layers: the loss.

    Causal attention has 7 b s A FLOPs in a layer, 2/7 of them in the forward, for b tokens in
    sequences of length s, and A = heads · head_dim; windows are not counted. Each number that is
    saved for the backward is written and read, and so is its gradient: 4 times its bytes. Logits
    are read twice, and their gradient is written.
    """
    attention = 7 * tokens * length * it.width * it.layers / rates.attention
    pointwise = 4 * it.layers * it.layer_full / rates.memory
    loss = (4 * it.beside + 1.5 * it.logits) / rates.memory
    layers = Times(attention * 2 / 7 + pointwise / 3, attention * 5 / 7 + pointwise * 2 / 3)
    return layers, Times(loss / 3, loss * 2 / 3)


def optimizer_bytes(cost: LinearCost) -> Any:
    """Bytes that the optimizer moves for one weight; r = ``cost.selected`` means full rank.

    For a compact weight all of W counts, because single columns touch nearly all its cache lines.
    """
    if cost.r == cost.selected:
        return cost.full_optimizer_traffic
    return cost.optimizer_traffic + 2 * (cost.full_size - cost.compact_size) * cost.itemsize


@dataclass(frozen=True)
class Speed:
    """A regular step on one GPU, predicted, and rounded to the two digits that may be right."""

    card: str
    seconds: dict[str, float]
    """Of a step, at "full rank" and in the "subspace"."""
    tokens: dict[str, float]
    """Tokens/s, at "full rank" and in the "subspace"."""
    ratio: float
    """Tokens/s in the subspace over tokens/s at full rank."""

    def line(self, full_rank_fits: bool, full_rank_only: bool) -> str:
        """The prediction as text."""
        full, compact = (f"{self.tokens[way]:,.0f}" for way in ("full rank", "subspace"))
        if full_rank_only:
            return f"predicted for one {self.card}: {full} tokens/s at full rank"
        fits = "" if full_rank_fits else ", which does not fit"
        told = f"{compact} tokens/s, {self.ratio:g} times full rank's {full}{fits}"
        return f"predicted for one {self.card}: {told}"


def predicted(
    card: str,
    batch: tuple[int, int] | None,
    weights: Mapping[str, Sequence[tuple[Candidate, LinearCost]]],
    activations: Any,
    checkpointing: bool,
    gpus: int,
) -> Speed | str:
    """The speed of a step, or the reason why none can be predicted.

    Args:
        card: a name in ``PEAKS``.
        batch: (sequences, tokens of each).
        weights: all parameters with their costs, at "full rank" and in the "subspace".
        activations: counted ones, as ``Activations``; other forms predict nothing.
        checkpointing: each layer computes its forward again.
        gpus: processes; several predict nothing, because the network between them is not known.

    Raises:
        OptionError: the card is not known.
    """
    rates = rates_of(card)
    if batch is None or not isinstance(activations, Activations):
        return "give tokens, and a model with a name or a config.json"
    if gpus > 1:
        return "the network between several GPUs is not known (docs/scaling.md computes some)"
    parameters = [p for p, _ in weights["full rank"]]
    if any(p.itemsize != 2 for p in parameters):
        return "rates are those of bfloat16"
    if any(p.stacked for p in parameters):
        return "products of mixtures of experts were never timed"
    tokens = batch[0] * batch[1]
    found = {}
    for way, costs in weights.items():
        layers, outside = of_other(activations, tokens, batch[1], rates)
        for p, cost in costs:
            if layer_of(p.name) != p.name:
                layers += _of_weight(p, cost, tokens, rates)
            else:
                outside += _of_weight(p, cost, tokens, rates)
        found[way] = ((layers.checkpointed if checkpointing else layers) + outside).total
    return Speed(
        _plain(card),
        {way: _rounded(seconds) for way, seconds in found.items()},
        {way: _rounded(tokens / seconds) for way, seconds in found.items()},
        _rounded(found["full rank"] / found["subspace"]),
    )


def _of_weight(p: Candidate, cost: LinearCost, tokens: int, rates: Rates) -> Times:
    """Of one parameter. Weight decay is a pass over W once in a period, and is not counted."""
    cost = replace(cost, b=tokens, weight_decay=False)
    own = Times(optimizer=optimizer_bytes(cost) / rates.memory if p.trains else 0)
    if len(p.shape) < 2 or not p.multiplied:
        return own
    return own + of_products(cost, rates, p.trains)


def _plain(card: str) -> str:
    return card.lower().replace(" ", "").replace("-", "")


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
