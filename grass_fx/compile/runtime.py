"""The callable that Dynamo runs: it picks the variant, passes selections, delivers gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grass_fx._torch_compat import (
    FSDPWeight,
    averaged_by,
    current_backward,
    fsdp_weights,
    running_ddp,
)
from grass_fx.compile.buckets import Arrived, buckets
from grass_fx.errors import (
    CompactGradError,
    DistributedError,
    OptionError,
    SelectionChangedError,
    warn,
)
from grass_fx.passes.find_linear_weights import FoundWeights
from grass_fx.passes.observers import PushReport
from grass_fx.passes.signature import Signature, Variant
from grass_fx.state.fsdp2 import accumulate, adopted, check_call, owner_of
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.gradient.votes import Votes
from grass_fx.state.registry import Demand, Left, registry
from grass_fx.state.selection import Selection
from grass_fx.state.subspace import Subspace, graph_inputs

MANY_CALLS = 1000
"""How many sets of weights a graph remembers as reported to the registry."""

PATIENCE = 1000
"""A warning comes after this many backwards of a weight without an optimizer step."""


def _warn_unfinished(name: str) -> None:
    warn(
        f"{name}: {PATIENCE} backwards have brought it gradients since an optimizer of grass_fx "
        "last stepped with one, and without such a step its selection never changes. A step "
        "written by hand, or by another optimizer with weight.grad.to_dense(), trains the first "
        "selection only: use grass_fx.AdamW, or grass_fx.subspace(X) for a torch optimizer class X."
    )


@dataclass(frozen=True)
class _Delivery:
    """One call of a graph: the weights' subspaces and their selections in its forward."""

    signature: Signature
    subspaces: Sequence[Subspace]
    selections: Sequence[Selection]
    stored: list[Tensor]
    """The graph's proxies. The first call makes them, and all calls share them."""
    averaged: bool
    """Whether the graph averages gradients over the processes of a group."""
    copies: bool
    """Whether to copy gradients, because the next call overwrites their memory."""
    values: Sequence[Tensor]
    """What the graph is given for the weights; for FSDP2's, the gathered parameters."""
    gathered: Sequence[FSDPWeight | None] | None
    """Those of the weights that FSDP2 gathers; None if there are none."""

    def grad(
        self, k: int, compact: Tensor, scores: Tensor | None, signs: Tensor | None, shape: Any
    ) -> CompactGrad:
        """The gradient of the k-th weight."""
        subspace = self.subspaces[k]
        if subspace.sharding is not None:
            compact = subspace.sharding.whole(compact)
        averaged = self.averaged and self.signature.weights[k].spec.group is not None
        votes = None if signs is None else Votes((signs,))
        return CompactGrad(
            compact, self.selections[k], shape, scores, local=not averaged, owner=subspace,
            votes=votes,
        )  # fmt: skip


class DeliverGradients(torch.autograd.Function):
    """Makes the proxies of a call, and turns their gradients into the weights' CompactGrads.

    One autograd node serves all weights of a graph. Its inputs are the weights, and its outputs
    are the proxies of the signature.
    """

    @staticmethod
    def forward(ctx: Any, delivery: _Delivery, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.delivery, ctx.shapes = delivery, [w.shape for w in weights]
        if not delivery.stored:
            # Two threads may both do this, which does no harm.
            delivery.stored[:] = delivery.signature.proxies(delivery.values)
        return tuple(proxy.detach() for proxy in delivery.stored)

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Disabled for Dynamo, which would trace it when a whole training step is compiled.
        delivery: _Delivery = ctx.delivery
        if torch.is_grad_enabled():  # without an error the gradient would silently be a constant
            raise CompactGradError(
                f"{delivery.subspaces[0].name}: a gradient with create_graph=True. A compiled "
                "graph is differentiated once: compute this loss with the model itself, which is "
                "not compiled."
            )
        backward = current_backward()
        found: list[Found | None] = []
        for k, places in enumerate(delivery.signature.proxy_places):
            subspace, compact = delivery.subspaces[k], grads[places["d"]]
            if compact is None:
                found.append(None)
                continue
            # Contiguous, as autograd keeps gradients, because optimizer steps read it in order.
            signs = grads[places["b"]] if "b" in places and subspace.signs_due else None
            if delivery.copies:
                compact = compact.clone(memory_format=torch.contiguous_format)
                signs = signs if signs is None else signs.clone()
            else:
                compact = compact.contiguous()
            _note_arrival(subspace, delivery.selections[k], backward)
            # A graph scores all its weights if one is due; the others' scores are dropped.
            scores = grads[places["e"]] if "e" in places and subspace.scoring_due else None
            found.append((compact, scores, signs))
        if delivery.gathered is not None:
            found = _apart(delivery, delivery.gathered, found, ctx.shapes)
        return (
            None,
            *(each and delivery.grad(k, *each, ctx.shapes[k]) for k, each in enumerate(found)),
        )


def _note_arrival(subspace: Subspace, selection: Selection, backward: int) -> None:
    """A gradient of ``selection`` has arrived, which has to be the current one."""
    if subspace.selection.generation != selection.generation:
        raise SelectionChangedError(
            f"{subspace.name}: its selection changed between a forward and its backward "
            f"(from {selection.draw} to {subspace.selection.draw}). Call "
            "backward before optimizer.step(), and compile every graph that uses the "
            "weight with the same options."
        )
    subspace.delivered = True
    if subspace.backward != backward:
        subspace.backward, subspace.unfinished = backward, subspace.unfinished + 1
        if subspace.unfinished == PATIENCE:
            _warn_unfinished(subspace.name)


Found = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""What a backward has brought for one weight: C, scores and signs."""


def _apart(
    delivery: _Delivery,
    gathered: Sequence[FSDPWeight | None],
    found: Sequence[Found | None],
    shapes: Sequence[Any],
) -> list[Found | None]:
    """Send FSDP2's weights to be reduced over processes, and return the others."""

    def deliver(k: int, weight: FSDPWeight, compact: Tensor, scores: Tensor | None) -> None:
        accumulate(weight.sharded, delivery.grad(k, compact, scores, None, shapes[k]))

    arrived = [
        Arrived(
            weight,
            delivery.subspaces[k],
            delivery.selections[k],
            *each[:2],
            partial(deliver, k, weight),
        )
        for k, (weight, each) in enumerate(zip(gathered, found, strict=True))
        if weight is not None and each is not None
    ]
    buckets.reduce(arrived)
    pairs = zip(gathered, found, strict=True)
    return [each if weight is None else None for weight, each in pairs]


class LeftWeights:
    """Tells the registry which weights a graph leaves dense, and why.

    Weights are known only when the graph is called, because one graph can serve many layers.
    """

    def __init__(self, found: FoundWeights) -> None:
        self._left = {
            place: Left(name, found.left[name], name in found.unwanted)
            for name, place in found.positions.items()
        }
        self._by_name = found.by_name
        self._known: set[tuple[int, ...]] = set()

    def note(self, args: Sequence[Any]) -> None:
        """Report the weights among these inputs of a call, unless they were reported before."""
        ids = tuple(id(args[place]) for place in self._left)
        if ids in self._known:
            return
        if len(self._known) > MANY_CALLS:  # most of them have ids of weights that are gone
            self._known.clear()
        self._known.add(ids)
        for place, left in self._left.items():
            weight = owner_of(args[place])
            registry.note_left(weight, left)
            self._by_name.note(weight)


class GrassCallable:
    """A compiled training graph with its taken weights.

    ``found`` and ``report`` say which weights were taken and pushed, and why others were not. A
    weight's subspace is looked up by the Parameter that a call passes, so that one graph can serve
    many layers. ``graphs`` has the regular variant. If the rule needs scores, it also has the
    scoring variant. If the weights have a process group, it also has local variants, for
    micro-batches whose gradients are averaged later. ``cuda_graphs`` says that the regular variant
    runs as CUDA graphs. Their outputs live only until the next call, and so gradients, which may be
    accumulated for longer, are copied.
    """

    def __init__(
        self,
        signature: Signature,
        graphs: Mapping[Variant, Callable[..., Any]],
        found: FoundWeights,
        report: PushReport,
        cuda_graphs: bool = False,
    ) -> None:
        self.signature, self.graphs = signature, dict(graphs)
        self.found, self.report, self.cuda_graphs = found, report, cuda_graphs
        self._averages_some = any(variant.local for variant in graphs)
        self._signs_some = any(variant.signing for variant in graphs)
        self._has_signs = any(weight.spec.rest for weight in signature.weights)
        specs, names = [w.spec for w in signature.weights], [w.name for w in signature.weights]
        self._demand = Demand(registry, specs, names, found.by_name)
        self._left = LeftWeights(found) if found.left else None
        self._ddp: weakref.ref[Any] | None = None
        self._bucketed: set[int] = set()
        self._stored: list[Tensor] = []

    def __call__(self, *args: Any) -> Any:
        signature = self.signature
        if self._has_signs and torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            raise OptionError(
                f'{signature.weights[0].name}: rest="sign" and detect_anomaly: signs leave the '
                "backward as bits of floats, of which some look like NaN. Use "
                'detect_anomaly(check_nan=False), or rest="none".'
            )
        values = [args[weight.position] for weight in signature.weights]
        params, gathered = values, fsdp_weights(values)
        if gathered is not None:
            pairs = zip(values, gathered, strict=True)
            params = [value if weight is None else adopted(weight) for value, weight in pairs]
        subspaces = self._demand(params)
        if gathered is not None:
            buckets.forget_failed()
            for value, weight, subspace in zip(values, gathered, subspaces, strict=True):
                if weight is not None:
                    check_call(weight, value, subspace.name)
        if self._left is not None:
            self._left.note(args)
        replicas = subspaces[0].replicas
        self._check_ddp(params, subspaces)
        # Subspaces note this, not graphs: one process may compile again alone, for another size.
        if replicas is not None and not all(s.agreed for s in subspaces):
            # Names of groups may differ, because each process of a mesh has its own groups.
            specs = [replace(s.spec, group=None, shards=None) for s in subspaces]
            own = [f"{s.name}: {spec}" for s, spec in zip(subspaces, specs, strict=True)]
            replicas.agree("options", own, "Compile every process's model with the same options.")
            for subspace in subspaces:
                subspace.agreed = True
        inputs = graph_inputs(subspaces, [p.device for p in params])
        selections = [s.selection for s in subspaces]
        scoring = signature.with_scores and any(s.scoring_due for s in subspaces)
        averaged = self._averages_some and self._averages(params, subspaces)
        delivery = _Delivery(
            signature,
            subspaces,
            selections,
            self._stored,
            averaged,
            self.cuda_graphs and not scoring,
            values,
            gathered,
        )
        with torch.enable_grad():  # the graph may turn gradients on itself
            # FSDP2's weights are given as they are gathered: autograd brings these no gradient.
            proxies = DeliverGradients.apply(delivery, *values)
        local = self._averages_some and not averaged
        signing = self._signs_some and any(s.signs_due for s in subspaces)
        graph = self.graphs[Variant(scoring, local, signing)]
        return graph(*args, *signature.added(proxies, inputs))

    def _check_ddp(self, params: Sequence[Tensor], subspaces: Sequence[Subspace]) -> None:
        """Raise if these weights are in the buckets of a DistributedDataParallel."""
        ddp = running_ddp()
        if ddp is None:
            return
        if self._ddp is None or self._ddp() is not ddp:
            self._ddp, self._bucketed = weakref.ref(ddp), {id(p) for p in averaged_by(ddp)}
        for p, subspace in zip(params, subspaces, strict=True):
            if id(p) in self._bucketed:
                model = getattr(ddp.module, "_orig_mod", ddp.module)
                raise CompactGradError(
                    f"{subspace.name} gets a compact gradient, and DistributedDataParallel has it "
                    "in a bucket of full ones. Call grass_fx.distributed.data_parallel(model) "
                    "before DistributedDataParallel(model), with the same model, here "
                    f"{type(model).__name__}: for a part of it DistributedDataParallel knows "
                    "nothing of the call."
                )

    def _averages(self, params: Sequence[Tensor], subspaces: Sequence[Subspace]) -> bool:
        """Whether this call's graph averages gradients; otherwise they are averaged afterwards.

        If the weights have gradients already, the sum is averaged afterwards, which costs no more
        than averaging one gradient.
        """
        replicas = subspaces[0].replicas
        if replicas is None:
            raise DistributedError(
                f"{subspaces[0].name}: the option process_group averages its compact gradient, and "
                "nothing averages those of other parameters. Call "
                "grass_fx.distributed.data_parallel(model, process_group) before the first step."
            )
        held = (p.grad for p in params)
        empty = all(g is None or (isinstance(g, CompactGrad) and g.zeroed) for g in held)
        return replicas.syncs() and empty
