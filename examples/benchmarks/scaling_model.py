"""A model of a training step on several GPUs: compute, bytes, latency and overlap.

`scaling.py` prints its tables. Everything here is arithmetic in seconds and bytes.

Compute is that of `grass_fx.inspect.speed`, of a micro-batch of b tokens:

    products    6 b N / (FLOP/s) at full rank, for N elements of all linear weights: a third each
                for forward, input gradients and weight gradients. With grass the last third is
                what remains of it, by FLOPs or by bytes, and the gathers.
    attention   7 b s h L / (FLOP/s), causal: h the hidden size, L layers, s tokens of a sequence.
    pointwise   bytes / (bytes/s), for norms, rotation, SwiGLU and loss: 4 times what is saved.
    optimizer   bytes / (bytes/s). As it was when it was measured: with a pass over W in each step.

Collectives, by the alpha-beta model of a ring (R. Thakur, R. Rabenseifner, W. Gropp: Optimization
of Collective Communication Operations in MPICH. International Journal of High Performance Computing
Applications 19(1), 49-66, 2005). An all-gather or a reduce-scatter of S bytes over p processes
takes (p - 1) (alpha + S / (p beta)), and an all-reduce twice as long. alpha is in seconds for a
message, beta in bytes/s of one process. Between nodes every GPU of a node is in a ring of its own,
for 1/8 of the bytes. `trees` stands for the recursive halving and doubling of the same paper: as
many bytes, and log2 p messages in place of p - 1.

Overlap. F and B are the seconds of forward and backward, a is the number of micro-batches:

    DDP         The last backward averages, in k buckets of 25 MiB that take c seconds each. The
                step is a (F + B) + max(c, B/k + k c - B) and the optimizer.
    grass's     As DDP, but each taken weight is a bucket, and dense parameters are averaged when
    own         the backward ends. With no_sync everything is averaged when the last backward ends,
                and nothing overlaps. The faster of the two counts.
    FSDP2 and   With f and b of compute, g of gathering and s of reduction in each layer, a forward
    HSDP        takes root + g + (L - 1) max(f, g) + f, and a backward
                max(b, g) + (L - 1) max(b, g + s) + s + root. With set_requires_gradient_sync(False)
                s = 0 in all micro-batches but the last. The faster that fits in memory counts.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grass_fx.config import GrassConfig
from grass_fx.distributed.data_parallel import BUCKET_BYTES
from grass_fx.inspect.activations import of_decoder
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.shapes import Decoder
from grass_fx.inspect.speed import Rates, Times, of_other, of_products, optimizer_bytes
from llama import SIZES

WAYS = ("data parallel", "HSDP", "FSDP2")
RANKS = (0.125, 0.25)
MEMORY = 76e9
"""Bytes of an 80 GB card beside what CUDA, NCCL and fragmentation take; assumed."""
SHARDS = 8
"""GPUs of a node, and of a group of shards in HSDP."""


@dataclass(frozen=True)
class Held:
    """Bytes of some parameters: of weights, gradients and state, and what the optimizer moves."""

    weights: float = 0
    gradients: float = 0
    state: float = 0
    moved: float = 0

    def __add__(self, other: "Held") -> "Held":
        return Held(*(a + b for a, b in zip(self.all, other.all, strict=True)))

    def __mul__(self, factor: float) -> "Held":
        return Held(*(factor * each for each in self.all))

    @property
    def all(self) -> tuple[float, ...]:
        return self.weights, self.gradients, self.state, self.moved


@dataclass(frozen=True)
class Shape:
    """A LLaMA. ``kv`` is the width of keys and values."""

    hidden: int
    ffn: int
    layers: int
    vocab: int
    kv: int

    @property
    def layer(self) -> tuple[tuple[int, int], ...]:
        """(m, n) of a layer's linear weights."""
        wide, narrow = (self.hidden, self.hidden), (self.kv, self.hidden)
        up, down = (self.ffn, self.hidden), (self.hidden, self.ffn)
        return wide, narrow, narrow, wide, up, up, down

    @property
    def head(self) -> tuple[int, int]:
        return self.vocab, self.hidden

    @property
    def decoder(self) -> Decoder:
        heads = self.hidden // 64
        return Decoder(self.vocab, self.hidden, self.ffn, self.layers, heads, heads, 64)


def shape(size: str, layers: int | None = None) -> Shape:
    if size == "70b":  # its keys and values are grouped, which examples/llama.py does not do
        return Shape(8192, 28672, 80, 32000, 1024)
    it = SIZES[size]
    return Shape(it.hidden, it.ffn, layers or it.layers, it.vocab, it.hidden)


@cache
def cost(m: int, n: int, rank: float | None, itemsize: int) -> LinearCost:
    r = n if rank is None else GrassConfig(rank=rank).rank_of(n)
    return LinearCost(m=m, n=n, r=r, itemsize=itemsize)


def held(matrices: tuple[tuple[int, int], ...], rank: float | None, itemsize: int) -> Held:
    """``rank`` is that of grass, which takes all of these weights, or None at full rank."""
    total = Held()
    for m, n in matrices:
        it = cost(m, n, rank, itemsize)
        if rank is None:
            own = it.full_gradient_bytes, it.full_state_bytes
        else:
            own = it.gradient_bytes, it.state_bytes
        total += Held(it.weight_bytes, *own, optimizer_bytes(it))
    return total


@dataclass(frozen=True)
class Model:
    """The bytes of a shape, by what is gathered and reduced together."""

    shape: Shape
    rank: float | None
    itemsize: int = 2

    @cached_property
    def layer(self) -> Held:
        norms = held(((1, self.shape.hidden),) * 2, None, self.itemsize)
        return held(self.shape.layer, self.rank, self.itemsize) + norms

    @cached_property
    def root(self) -> Held:
        """Embedding, last norm and head."""
        embedding = held((self.shape.head, (1, self.shape.hidden)), None, self.itemsize)
        return held((self.shape.head,), self.rank, self.itemsize) + embedding

    @cached_property
    def all(self) -> Held:
        return self.layer * self.shape.layers + self.root

    @property
    def dense(self) -> float:
        """Bytes of gradients that grass's data_parallel averages when the backward ends."""
        norms = (2 * self.shape.layers + 1) * self.shape.hidden
        return (math.prod(self.shape.head) + norms) * self.itemsize

    @cached_property
    def elements(self) -> int:
        """N: of all linear weights."""
        layer = sum(m * n for m, n in self.shape.layer)
        return self.shape.layers * layer + math.prod(self.shape.head)

    def gathered(self, part: Held) -> float:
        """Bytes of a gathering, which is in bfloat16 on GPUs whatever the shards are."""
        return part.weights * min(1, 2 / self.itemsize)


model_of = cache(Model)


@cache
def compute(rates: Rates, model: Model, tokens: int, seq: int, recompute: bool = False) -> Times:
    """Seconds of one process's micro-batch, and of the optimizer for the whole model.

    ``recompute``: activation checkpointing, another forward of the layers in the backward.
    """
    it = model.shape
    layer, head = (
        [of_products(replace(cost(*each, model.rank, 2), b=tokens), rates) for each in matrices]
        for matrices in (it.layer, (it.head,))
    )
    inside, loss = of_other(of_decoder(it.decoder, tokens, 2), tokens, seq, rates)
    layers = sum(layer, Times()) * it.layers + inside
    optimizer = Times(optimizer=model.all.moved / rates.memory)
    return (layers.checkpointed if recompute else layers) + sum(head, Times()) + loss + optimizer


@dataclass(frozen=True)
class Network:
    """Bytes/s of a GPU, in each direction, and seconds a message, within a node and between."""

    name: str
    inner: float
    outer: float
    inner_latency: float = 5e-6
    outer_latency: float = 2e-5
    node: int = SHARDS
    trees: bool = False
    """Between nodes log2 p messages instead of p - 1."""

    def gather(self, size: float, ranks: int, across: bool = False) -> float:
        """An all-gather or reduce-scatter of ``size`` bytes; ``across``: one GPU of each node."""
        inside = 1 if across else min(ranks, self.node)
        nodes = ranks // inside
        messages = math.log2(nodes) if self.trees else nodes - 1
        between = messages * self.outer_latency + passed(size / inside, nodes) / self.outer
        return (inside - 1) * self.inner_latency + passed(size, inside) / self.inner + between

    def all_reduce(self, size: float, ranks: int, across: bool = False) -> float:
        return 2 * self.gather(size, ranks, across)


def passed(size: float, ranks: int) -> float:
    """Bytes that each of ``ranks`` processes sends in an all-gather: (p - 1) S / p."""
    return (ranks - 1) * size / ranks


def in_buckets(size: float, network: Network, ranks: int) -> tuple[int, float]:
    """How many buckets, and the seconds of each."""
    count = max(1, round(size / BUCKET_BYTES))
    return count, network.all_reduce(size / count, ranks)


def data_parallel(
    model: Model, work: Times, network: Network, ranks: int, micro: int = 1, once: bool = True
) -> float:
    """Seconds of a step; ``once``: gradients are averaged once, not in each micro-batch."""
    computed, gradients = work.forward + work.backward, model.all.gradients
    if model.rank is None:
        count, each = in_buckets(gradients, network, ranks)
        exposed = max(each, work.backward / count + count * each - work.backward)
    elif once and micro > 1:
        exposed = math.prod(in_buckets(gradients, network, ranks))
    else:
        count = 7 * model.shape.layers + 1
        each = network.all_reduce((gradients - model.dense) / count, ranks)
        exposed = max(each, work.backward / count + count * each - work.backward)
        exposed += math.prod(in_buckets(model.dense, network, ranks))
    return micro * computed + (1 if once else micro) * exposed + work.optimizer


def sharded(
    model: Model, work: Times, network: Network, ranks: int, group: int,
    micro: int = 1, once: bool = True,
) -> float:  # fmt: skip
    """Seconds of a step under FSDP2 in groups of ``group`` shards; fewer than ``ranks``: HSDP."""
    layers, replicas = model.shape.layers, ranks // group
    across = network.node > 1

    def reduce(size: float) -> float:
        return network.gather(size, group) + network.all_reduce(size / group, replicas, across)

    gather = network.gather(model.gathered(model.layer), group)
    root = network.gather(model.gathered(model.root), group)
    f, b = work.forward / layers, work.backward / layers
    forward = root + gather + (layers - 1) * max(f, gather) + f

    def backward(s: float, last: float) -> float:
        return max(b, gather) + (layers - 1) * max(b, gather + s) + s + last

    reducing = backward(reduce(model.layer.gradients), reduce(model.root.gradients))
    others = backward(0, 0) if once else reducing
    return micro * forward + (micro - 1) * others + reducing + work.optimizer / group


def saved_bytes(model: Model, tokens: int, recompute: bool, itemsize: int = 2) -> float:
    """Bytes of activations, roughly.

    A compiled layer saves 7h + 3 ffn numbers a token at full rank. With grass it saves 5h + 2 ffn,
    and r/n of 6h + ffn. Checkpointing saves h, and all of the layer that is computed again. Logits
    and their gradient are 2 vocab.
    """
    it = model.shape
    layer = 7 * it.hidden + 3 * it.ffn
    if model.rank is not None:
        layer = 5 * it.hidden + 2 * it.ffn + model.rank * (6 * it.hidden + it.ffn)
    layers = it.hidden * it.layers + layer if recompute else layer * it.layers
    return itemsize * tokens * (layers + 2 * it.vocab)


def held_bytes(
    model: Model, tokens: int, group: int, recompute: bool, unsharded: bool = False
) -> float:
    """Bytes on a GPU. ``unsharded``: an accumulated gradient that no process has reduced yet.

    If the model is sharded, two layers and the root are gathered, and the gradient of one layer is
    not reduced yet. If it is not, and held in float32, there is a copy of the weights in bfloat16.
    """
    whole = model.all
    total = (whole.weights + whole.gradients + whole.state) / group
    total += saved_bytes(model, tokens, recompute)
    if group > 1:
        gathered = model.gathered(model.layer * 2 + model.root)
        return total + gathered + (whole if unsharded else model.layer).gradients
    return total + (model.gathered(whole) if model.itemsize > 2 else 0)


@dataclass(frozen=True)
class Setting:
    """What a GPU does in a micro-batch. ``itemsize`` is of weights, gradients and moments."""

    device: Rates
    tokens: int = 8192
    seq: int = 1024
    itemsize: int = 2

    def step(
        self, model: Model, way: str, network: Network, ranks: int, micro: int, recompute: bool
    ) -> float | None:
        """Seconds of a step, accumulated in the faster way that fits; None if neither does."""
        group = {"data parallel": 1, "HSDP": SHARDS, "FSDP2": ranks}[way]
        work = compute(self.device, model, self.tokens, self.seq, recompute)
        found = []
        for once in (True, False)[: 1 + (micro > 1)]:
            if held_bytes(model, self.tokens, group, recompute, once and micro > 1) > MEMORY:
                continue
            if way == "data parallel":
                found.append(data_parallel(model, work, network, ranks, micro, once))
            else:
                found.append(sharded(model, work, network, ranks, group, micro, once))
        return min(found, default=None)

    def cell(
        self, it: Shape, way: str, network: Network, ranks: int, micro: int
    ) -> tuple[list[float | None], bool]:
        """Seconds at full rank, r = 1/8 and 1/4, and whether activations are computed again.

        All three do the same there, so that no ratio has grass's smaller memory in it: as many as
        possible have to fit, and then full rank has to be fast.
        """
        models = [model_of(it, rank, self.itemsize) for rank in (None, *RANKS)]
        kept, again = (
            [self.step(each, way, network, ranks, micro, recompute) for each in models]
            for recompute in (False, True)
        )

        def order(times: list[float | None]) -> tuple:
            return times.count(None), *(each or math.inf for each in times)

        return (again, True) if order(again) < order(kept) else (kept, False)
