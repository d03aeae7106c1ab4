"""Differentiates and rewrites a Dynamo graph, and reports on the parameters in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import sympy  # type: ignore[import-untyped]
from torch import Tensor, fx, nn

from grass_fx import _torch_compat as compat
from grass_fx.compile.lowering.selected_mm import GATHER, way
from grass_fx.config import GrassConfig
from grass_fx.inspect.excerpts import draw
from grass_fx.inspect.findings import Cost, GraphNode
from grass_fx.inspect.kept import Kept
from grass_fx.inspect.products import Lookup, Product, WeightProducts, weight_products
from grass_fx.inspect.sizes import sizes_of_symbols
from grass_fx.ops import MM_SIGNS, SELECTED_MM
from grass_fx.passes.facts import DynamoFacts, JointFacts, TapFacts
from grass_fx.passes.find_linear_weights import FoundWeights
from grass_fx.passes.observers import PushReport
from grass_fx.passes.pipeline import AOT, Event, GrassPasses, find, tapped
from grass_fx.passes.push_norms import wants_tiles
from grass_fx.passes.signature import LinearWeight, Signature, Variant
from grass_fx.state.spec import SubspaceSpec

FIRST_ALL = "mm, then gather"
BOTH = "tiles, with signs"
INDEX_ADD = "index add"
DECIDED = " (decided by the joint graph)"
UNREACHED = "no gradient reaches it in this graph"


@dataclass
class TracedWeight:
    """The result of one graph for a parameter."""

    taken: LinearWeight | None
    reason: str
    """Why it is not pushed, or not taken; empty if it is pushed."""
    before: Cost = Cost()
    after: Cost = Cost()
    """Costs of products only; gradient, state and all-reduce do not depend on a graph."""
    kernel: str | None = None
    pictures: dict[str, tuple[GraphNode, ...]] = field(default_factory=dict)
    scoring_step: Any = 0
    """Bytes of the full gradient that a scoring step forms."""
    lookup: SubspaceSpec | None = None
    """What the option ``lookups`` would give it."""


@dataclass
class TracedGraph:
    """The result of :func:`trace`; ``weights`` is keyed by input position."""

    weights: dict[int, TracedWeight]
    symbols: dict[str, int | None]
    sources: dict[int, str]
    """Where each parameter was in the frame, by input position."""
    before: Kept = field(default_factory=Kept)
    after: Kept = field(default_factory=Kept)

    def rename(self, symbols: Mapping[str, str]) -> None:
        """Rename symbols in all amounts."""
        if not symbols:
            return
        new = {sympy.Symbol(name): sympy.Symbol(other) for name, other in symbols.items()}

        def renamed(amount: Any) -> Any:
            return amount.subs(new) if hasattr(amount, "subs") else amount

        for weight in self.weights.values():
            weight.before, weight.after = weight.before.map(renamed), weight.after.map(renamed)
            weight.scoring_step = renamed(weight.scoring_step)
        for kept in (self.before, self.after):
            kept.map(renamed)


def trace(gm: fx.GraphModule, inputs: Sequence[Any], config: GrassConfig) -> TracedGraph | None:
    """Trace a graph at full rank and as rewritten; None if it is no training graph.

    Only one variant is traced, without scores. The costs of scoring are computed from it.
    """
    if not any(isinstance(value, Tensor) for value in inputs):
        return None
    found = find(gm, DynamoFacts(config, inputs))
    places = enumerate(gm.graph.find_nodes(op="placeholder"))
    sources = {
        place: compat.input_source(node)
        for place, node in places
        if isinstance(inputs[place], nn.Parameter)
    }
    graph = TracedGraph({}, sizes_of_symbols(inputs), sources)
    plain = compat.copy_dynamo_graph(gm)
    compat.compile_aot_eager(plain, inputs, None, on_partition=graph.before.add)
    signature = Signature(found.taken, len(inputs))
    variant = Variant(signing=config.signs_every > 1)  # which holds the most
    taps, extended = tapped(gm, TapFacts(config, inputs, signature, variant))
    tracer = _Tracer(config, found, signature, inputs)
    passes = GrassPasses(JointFacts.of(config, signature), [tracer])
    compat.compile_aot_eager(taps, extended, passes, on_partition=tracer.partitioned)
    if not tracer.parts:
        return None
    graph.after.add(*tracer.parts)
    graph.weights = tracer.weights()
    return graph


class _Tracer:
    """Observes a run of the passes: the joint graph before and after, and its two halves."""

    def __init__(
        self, config: GrassConfig, found: FoundWeights, signature: Signature, inputs: Sequence[Any]
    ) -> None:
        self.config, self.found = config, found
        self.taken = {weight.position: weight for weight in found.taken}
        self.added = {weight.position: signature.places(weight) for weight in found.taken}
        self.parameters = {
            place: value
            for place, value in enumerate(inputs)
            if isinstance(value, nn.Parameter) and value.requires_grad
        }
        patches = compat.inductor_patches(config.mode, config.inductor)
        self.tunes = bool(patches.get("max_autotune") or patches.get("max_autotune_gemm"))
        names = {places["indices"]: f"{place}" for place, places in self.added.items()}
        self.push = PushReport(names)
        self.parts: tuple[fx.GraphModule, ...] = ()
        self.before: dict[int, _Measured] = {}
        self.after: dict[int, _Measured] = {}

    def __call__(self, graph: fx.Graph, event: Event) -> None:
        """Measure the graph before the passes and after each; the last measurement counts."""
        self.push(graph, event)
        if event.by is AOT:
            self.before = self.after = self._measured(graph)
        elif event.result.count or event.result.stopped:
            self.after = self._measured(graph)

    def partitioned(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        """Keep the forward and the backward graph."""
        self.parts = forward, backward

    def _measured(self, graph: fx.Graph) -> dict[int, _Measured]:
        labels = {place: role for places in self.added.values() for role, place in places.items()}
        measured = {}
        for place, parameter in self.parameters.items():
            if parameter.dim() < 2:
                continue
            proxy = self.added[place]["d"] if place in self.added else None
            products = weight_products(graph, place, proxy)
            if products is not None:
                labels[place] = "weight"
                picture = draw(products.path, labels) if proxy is not None else ()
                ways = {self._way(product) for product in products.weight_gradient}
                measured[place] = _Measured.of(products, picture, ways)
                del labels[place]
        return measured

    def _way(self, product: Product) -> str:
        """How the backend computes a product of the weight gradient."""
        if isinstance(product, Lookup):
            return INDEX_ADD
        if product.node.target == MM_SIGNS:
            return BOTH
        if product.node.target != SELECTED_MM:
            return GATHER
        dim = cast("int", product.node.args[4])
        factor = product.factors[dim]
        strides = factor.stride(dim), factor.stride(1 - dim)
        return way(factor.device.type, factor.dtype, strides, self.tunes)

    def weights(self) -> dict[int, TracedWeight]:
        """The result for each trainable parameter, by input position."""
        again = {n.name for n in self.parts[1].graph.nodes if n.op == "call_function"}
        left = iter(self.found.left.items())
        unfit = iter([r for r in self.found.unfit.values() if r != "frozen"])
        answer: dict[int, TracedWeight] = {}
        for place, value in self.parameters.items():
            weight, name = self.taken.get(place), ""
            before, after = (at.get(place, _Measured()) for at in (self.before, self.after))
            if weight is None:
                name, reason = next(left) if value.dim() > 1 else ("", next(unfit))
            else:
                reason = self.push.stopped.get(f"{place}", "")
                if not reason and not after.picture:  # the pushed gradient became constant zeros
                    reason = UNREACHED
            traced = TracedWeight(weight, reason, before.cost(again), after.cost(again))
            traced.lookup = self.found.lookups.get(name)
            if weight is not None:
                traced.pictures = {"before": before.picture, "after": after.picture}
                if f"{place}" in self.push.stopped:
                    traced.kernel = FIRST_ALL
                elif after.ways:
                    traced.kernel = ", ".join(after.ways)
                if traced.kernel and weight.asked:
                    traced.kernel += DECIDED
                if self.config.signs_every > 1:
                    self._average_signs(traced, weight)
                if weight.spec.scores == "gradient":
                    self._add_scoring(traced, value, weight.spec.scoring_period)
            answer[place] = traced
        return answer

    def _average_signs(self, traced: TracedWeight, weight: LinearWeight) -> None:
        """Average FLOPs over the steps, of which one in ``rest_every`` makes the full product."""
        compact = traced.before.weight_gradient_flops * weight.spec.rank / weight.spec.size
        with_signs, every = traced.after.weight_gradient_flops, self.config.signs_every
        mean = compact + (with_signs - compact) / every
        traced.after = replace(traced.after, weight_gradient_flops=mean)

    def _add_scoring(self, traced: TracedWeight, weight: Tensor, period: int | float) -> None:
        """Add scoring: one step in K forms the full gradient, or C and tiles of the full one."""
        tiles = weight.dim() == 2 and wants_tiles(weight, self.config.scoring)
        tiles = tiles and "push_norms" not in self.config.disable_passes
        traced.scoring_step = 0 if tiles else weight.nbytes
        if period == math.inf:
            return
        amounts = {}
        for kind in ("weight_gradient_flops", "weight_gradient_bytes"):
            full, compact = (getattr(cost, kind) for cost in (traced.before, traced.after))
            more = full if tiles and not traced.reason else full - compact
            amounts[kind] = compact + more / period
        traced.after = replace(traced.after, **amounts)


@dataclass
class _Measured:
    """A weight's products as amounts, because the graph will still change."""

    forward: list[tuple[str, Any, Any]] = field(default_factory=list)
    """(name, FLOPs, bytes) of each product."""
    rest: Cost = Cost()
    picture: tuple[GraphNode, ...] = ()
    ways: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, products: WeightProducts, picture: tuple[GraphNode, ...], ways: set[str]
    ) -> _Measured:
        """The amounts of ``products``."""
        rest = Cost(
            input_gradient_flops=sum(p.flops for p in products.input_gradient),
            input_gradient_bytes=sum(p.bytes for p in products.input_gradient),
            weight_gradient_flops=sum(p.flops for p in products.weight_gradient),
            weight_gradient_bytes=sum(p.bytes for p in products.weight_gradient),
        )
        forward = [(p.node.name, p.flops, p.bytes) for p in products.forward]
        return cls(forward, rest, picture, (*sorted(ways),))

    def cost(self, again: set[str]) -> Cost:
        """The total cost; products that the backward computes ``again`` count twice."""
        times = [(1 + (name in again), flops, size) for name, flops, size in self.forward]
        flops, size = (sum(product[0] * product[k] for product in times) for k in (1, 2))
        return self.rest + Cost(forward_flops=flops, forward_bytes=size)
