"""Tap each linear weight of a Dynamo graph: its value stays, its gradient becomes compact."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from grass_fx._torch_compat import copy_dynamo_graph, fake_mode_of, mark_added_placeholder
from grass_fx.ops import SELECT, SQUARED_NORMS
from grass_fx.passes.find_linear_weights import LinearWeight, gathered
from grass_fx.state.spec import SubspaceSpec, scale_dtype

c10d = torch.ops._c10d_functional


How = tuple[tuple[Any, ...], ...]
"""Collectives: ("all_reduce", group) or ("reduce_scatter", group, number of processes)."""


class Tap(torch.autograd.Function):
    """Forward: the weight itself. Backward: PᵀG as the gradient of the proxy d, nothing for W."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        d: Tensor,
        e: Tensor | None,
        indices: Tensor,
        scale: Tensor | None,
        dim: int,
        *more: Any,
    ) -> Tensor:
        """``more``: nothing, the block of the selection, the block and how to score, or both and
        how to average over processes and what these score (``score_sync``)."""
        ctx.save_for_backward(indices, scale)
        ctx.dim, ctx.block, ctx.scoring, ctx.group = dim, more[:1], more[1:2], more[2:]
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, _selected(ctx, g, *ctx.group[:1]), *_no_gradients(ctx, 4)


class ScoringTap(Tap):
    """A tap that also yields s_i = ‖g_i‖², as the gradient of the proxy e: nothing is mutated."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        how, score_sync = ctx.group or ((), None)
        if score_sync == "gradient":  # every process needs it whole
            g = average(g, tuple(("all_reduce", group) for _, group, *_ in how))
            how = tuple(step for step in how if step[0] == "reduce_scatter")
        compact = _selected(ctx, g, how)
        if g.dim() == 3:  # a stack: the norms of all its rows
            scores = SQUARED_NORMS(g.flatten(0, 1), 0, *ctx.scoring)
        else:
            scores = SQUARED_NORMS(g, ctx.dim, *ctx.scoring)
        return None, compact, scores, *_no_gradients(ctx, 3)


def _selected(ctx: Any, g: Tensor, how: How = ()) -> Tensor:
    """C, averaged over processes: selected first, so that nothing else travels."""
    indices, scale = ctx.saved_tensors
    compact = SELECT(g, indices, scale, ctx.dim, *ctx.block)
    return average(compact, how)


def _no_gradients(ctx: Any, count: int) -> tuple[None, ...]:
    """Those of ``count`` arguments, and of the optional ones."""
    return (None,) * (count + len(ctx.block + ctx.scoring + ctx.group))


def _how(spec: SubspaceSpec) -> How:
    """How to average a weight's gradient."""
    if spec.shards is not None:
        replicas = tuple(("all_reduce", group) for group in spec.shards.replicas)
        return (("reduce_scatter", spec.shards.group, spec.shards.ranks), *replicas)
    return () if spec.group is None else (("all_reduce", spec.group),)


def average(x: Tensor, how: How) -> Tensor:
    """The mean of ``x`` over processes, or this one's part of it along dimension 0.

    In operators that Inductor schedules.
    """
    for name, group, *ranks in how:
        x = x.contiguous()
        if name == "reduce_scatter":
            x = c10d.reduce_scatter_tensor(x, "avg", *ranks, group)
        else:
            x = c10d.all_reduce(x, "avg", group)
        x = c10d.wait_tensor(x)
    return x


# Module-level functions, so that the caches can name them (_torch_compat.compile_inductor).
def tap(*args: Any) -> Tensor:
    """The tap of a regular step."""
    with torch.enable_grad():  # a graph may turn gradients on after its taps
        return Tap.apply(*args)


def scoring_tap(*args: Any) -> Tensor:
    """The tap of a scoring step."""
    with torch.enable_grad():
        return ScoringTap.apply(*args)


def proxy_of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element that claims ``shape``: what receives a gradient and is never read."""
    return torch.empty_strided(tuple(shape), (0,) * len(shape), dtype=dtype, device=device)


def proxies(weight: LinearWeight, w: Tensor, with_scores: bool) -> list[Tensor]:
    """The proxies of one weight: d of C's shape, and e (size,) float32 if the rule needs scores."""
    made = [proxy_of(weight.spec.own_compact_shape(w.shape), w.dtype, w.device)]
    if with_scores:
        made.append(proxy_of([weight.spec.rows], torch.float32, w.device))
    return made


def added_positions(
    weights: Sequence[LinearWeight], count: int, *, with_scores: bool
) -> dict[int, dict[str, int]]:
    """Where a tapped graph has its added inputs, which follow ``count`` of its own.

    Weight's position -> role ("d", "e", "indices", "scale") -> position.
    """
    places: dict[int, dict[str, int]] = {}
    for weight in weights:
        roles = ["d", "e", "indices"] if with_scores else ["d", "indices"]
        if weight.spec.replacement:
            roles.append("scale")
        places[weight.position] = {role: count + k for k, role in enumerate(roles)}
        count += len(roles)
    return places


def tap_weights_pass(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    weights: Sequence[LinearWeight],
    *,
    with_scores: bool = False,
    scoring: str | None = None,
    score_sync: str | None = None,
) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of the graph in which every use of a linear weight goes through its tap.

    Before::

        linear = torch._C._nn.linear(x, weight, bias)

    After::

        tap = grass_fx_passes_tap_weights_tap(weight, weight_d, None, weight_indices, None, 0)
        linear = torch._C._nn.linear(x, tap, bias)

    The added inputs follow the graph's own, weight by weight: d, e (``with_scores``), indices, and
    scale (with replacement). Returns the graph and the inputs, fake ones for the added.
    ``scoring`` (as in ``GrassConfig``) makes the scoring variant, which has the same inputs and the
    same forward. ``score_sync`` (as in ``GrassConfig``) lets the taps average over the weights'
    process groups; the compact gradient is selected first, so that nothing else travels.
    """
    gm = copy_dynamo_graph(gm)
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    last = placeholders[-1]
    extra: list[Any] = []
    taps: list[tuple[fx.Node, tuple[Any, ...]]] = []
    with fake_mode_of(inputs):
        for weight in weights:
            w, value = placeholders[weight.position], inputs[weight.position]
            fresh: dict[str, Any] = {"d": None, "e": None, "indices": None, "scale": None}
            values = dict(zip(("d", "e"), proxies(weight, value, with_scores), strict=False))
            values = {k: v.requires_grad_() for k, v in values.items()}
            shape = weight.spec.indices_shape
            values["indices"] = torch.empty(shape, dtype=torch.int64, device=value.device)
            if weight.spec.replacement:
                exact = scale_dtype(value.dtype)
                values["scale"] = torch.empty(shape, dtype=exact, device=value.device)
            for role, example in values.items():
                with graph.inserting_after(last):
                    last = graph.placeholder(f"{w.name.strip('_')}_{role}")
                last.meta["example_value"] = example
                mark_added_placeholder(last)
                fresh[role] = last
                extra.append(example)
            more: tuple[Any, ...] = (weight.spec.block,) if weight.spec.block > 1 else ()
            if scoring not in (None, "auto"):
                more = weight.spec.block, scoring
            how = _how(weight.spec)
            if score_sync is not None and how:
                more = weight.spec.block, scoring or "auto", how, score_sync
            operands = (*fresh.values(), weight.spec.dim, *more)
            taps += [(full, operands) for full in gathered(w)]
    for node in placeholders:  # Dynamo's own are cleaned up, and a copy would keep what they hold
        node.meta.pop("grapharg", None)
    body = last.next
    for w, operands in taps:
        with graph.inserting_before(body if w.op == "placeholder" else w.next):
            value = w
            if w.op != "placeholder":  # gathered: no gradient is to go that way, not even zeros
                value = graph.call_method("detach", (w,))
                value.meta["example_value"] = w.meta["example_value"]
            made_by = scoring_tap if scoring is not None else tap
            tapped = graph.call_function(made_by, (value, *operands))
        tapped.meta["example_value"] = w.meta.get("example_value")
        w.replace_all_uses_with(tapped, delete_user_cb=partial(_is_none_of, (tapped, value)))
    graph.lint()
    gm.recompile()
    return gm, [*inputs, *extra]


def _is_none_of(nodes: tuple[fx.Node, ...], user: fx.Node) -> bool:
    return not any(user is node for node in nodes)
