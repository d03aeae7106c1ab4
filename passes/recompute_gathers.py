"""Gather sharded weights again in the backward, instead of keeping them from the forward."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push_rules import CONVERSIONS, COPIES, RESHAPES

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

SAME_WEIGHT = {
    c10d.all_gather_into_tensor.default, c10d.wait_tensor.default, operator.getitem,
    aten.permute.default, aten.t.default, aten.transpose.int, aten.slice.Tensor, aten.cat.default,
    aten.split.Tensor, aten.split_with_sizes.default, *RESHAPES, *CONVERSIONS, *COPIES,
}  # fmt: skip
"""Operations that lead from shards to a gathered weight, and to views and casts of it."""

REGION = 100_000
"""An id for our region, far above those of activation checkpointing, which start at 0."""


def recompute_gathers_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Mark the nodes that gather parameters, so that the partitioner keeps only shards.

    Before, all of this is in the forward, and the backward needs ``wait_tensor``::

        all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default(w, 2, '0')
        wait_tensor = torch.ops._c10d_functional.wait_tensor.default(all_gather)

    After: the same nodes with ``meta["recompute"]``, so that the partitioner repeats both in the
    backward. Views and conversions of a gathered parameter are marked, too. Rewritten: the nodes
    that gather.
    """
    shards: set[fx.Node] = set()
    gathered: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder":
            shards.add(node)
        elif node.target not in SAME_WEIGHT or not inputs:
            continue
        elif all(x in gathered for x in inputs):
            gathered.add(node)
        elif all(x in shards for x in inputs):
            gathers = node.target is c10d.all_gather_into_tensor.default
            (gathered if gathers else shards).add(node)
    for node in gathered:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node.meta["ac_graph_id"] = REGION
    return Result([n for n in gathered if n.target is c10d.all_gather_into_tensor.default])
