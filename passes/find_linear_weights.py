"""Find the parameters of a Dynamo graph that are used only as linear weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from grass_fx._torch_compat import (
    fsdp_weight,
    is_fake,
    managed_by_fsdp,
    parameter_name,
    real_value,
)
from grass_fx.config import GrassConfig
from grass_fx.passes.facts import Answer, DynamoFacts, Result
from grass_fx.passes.linear_uses import NotLinear, Unknown, Use, output_dims_of_stack, uses_of
from grass_fx.passes.signature import LinearWeight
from grass_fx.state.by_name import ByName
from grass_fx.state.fsdp2 import adopted, owner_of
from grass_fx.state.records import known
from grass_fx.state.replicas import replicas_of
from grass_fx.state.sharding import Shards, common_parts, sharding_of
from grass_fx.state.spec import SubspaceSpec


class LookedUp(NotLinear):
    """A weight whose rows are looked up; ``spec`` is what the option ``lookups`` would give it."""

    def __init__(self, by: str, spec: SubspaceSpec | None) -> None:
        remedy = "" if spec is None else "; lookups=True takes it"
        super().__init__(f"used by {by}, which is no matrix product with it{remedy}")
        self.spec = spec


@dataclass
class FoundWeights(Result):
    """All parameters of a graph: those that are taken, and why the others are not."""

    taken: list[LinearWeight] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    """Name -> reason, for trainable parameters with two or more dimensions that are not taken."""
    positions: dict[str, int] = field(default_factory=dict)
    """Name -> position among the graph's inputs, for the parameters in ``left``."""
    unwanted: set[str] = field(default_factory=set)
    """The names in ``left`` that ``include`` or ``exclude`` rules out."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Name -> reason, for parameters that are no candidates: frozen ones and vectors."""
    by_name: ByName = field(default_factory=ByName)
    """What the patterns of options by names match."""
    unknown: dict[int, dict[int, int]] = field(default_factory=dict)
    """Position -> dimension -> how much of it would be selected, for weights about which to ask the
    joint graph."""
    lookups: dict[str, SubspaceSpec] = field(default_factory=dict)
    """Name -> spec, for those in ``left`` that the option ``lookups`` would take."""


def find_linear_weights_pass(graph: fx.Graph, facts: DynamoFacts) -> FoundWeights:
    """List the linear weights of a Dynamo graph; the graph stays as it is.

    Taken are 2-D float parameters that need a gradient, if every use is ``x @ W`` or ``x @ W.T``
    and the selected dimension is at least r. Such uses are ``F.linear``, ``mm``, ``matmul``,
    ``addmm``, ``einsum`` and ``multi_head_attention_forward``, also inside activation-checkpointing
    bodies, through transposes and dtype conversions, in parts, and concatenated with others. Taken
    are also stacks of matrices (e, m, n), used by ``bmm``, ``matmul``, ``baddbmm``, ``einsum``,
    grouped products or one matrix at a time. Each matrix has its own selection, along m.

    With the option ``lookups`` rows may be looked up as well, by ``embedding``, ``index_select`` or
    a tensor of indices, if these rows are not what would be selected.

    Left, with a reason, are parameters that ``include``/``exclude`` rule out, that have other uses,
    or that do not fit by size or kind of tensor. The pass looks at what operations compute, never
    at module names.
    """
    config = facts.config
    placeholders = graph.find_nodes(op="placeholder")
    names = _unique_names(placeholders)
    all_names = {node: (name, *_name_in_optimizer(node)) for node, name in names.items()}
    found = FoundWeights(by_name=ByName(config, [*itertools.chain(*all_names.values())]))
    for position, (node, value) in enumerate(zip(placeholders, facts.inputs, strict=True)):
        if not isinstance(value, torch.nn.Parameter):
            continue
        name = names[node]
        if not value.requires_grad:
            found.unfit[name] = "frozen"
        elif value.dim() < 2:
            found.unfit[name] = f"{value.dim()} dimension, only matrices are taken"
        else:
            own, answer = all_names[node], facts.answers.get(position)
            try:
                if reason := config.wants(*own):
                    found.unwanted.add(name)
                    raise NotLinear(reason)
                spec = _spec(node, value, config.of(*own), answer)
                if spec.shards is None:
                    spec = replace(spec, group=_group_of(node, config))
                taken = LinearWeight(position, name, tuple(value.shape), spec, answer is not None)
                found.taken.append(taken)
                found.by_name.taken.append(own)
            except NotLinear as reason:
                if isinstance(reason, Unknown) and answer is None:
                    dims = range(2) if value.dim() == 2 else range(1, 2)
                    rank_of = config.of(*own).rank_of
                    found.unknown[position] = {dim: rank_of(value.shape[dim]) for dim in dims}
                found.left[name], found.positions[name] = str(reason), position
                if isinstance(reason, LookedUp) and reason.spec is not None:
                    found.lookups[name] = reason.spec
    counts = len(found.taken), len(found.left), len(found.unfit)
    found.note = "{} taken, {} left, {} others".format(*counts)
    return found


def _group_of(node: fx.Node, config: GrassConfig) -> str | None:
    """The name of the process group that averages a weight's gradient in the graph."""
    if config.process_group is not None:
        return str(config.process_group.group_name)
    weight = real_value(node)
    replicas = None if weight is None else replicas_of.get(weight)
    return None if replicas is None else replicas.group.group_name


def _name_in_optimizer(node: fx.Node) -> list[str]:
    """The parameter's name in its optimizer, if there is one.

    After a graph break, or with regional compilation, names in a graph are relative to a part of
    the model. The optimizer knows the model's own names if it was built with ``named_parameters()``
    before the first step.
    """
    weight = real_value(node)
    record = known(owner_of(weight)) if isinstance(weight, Tensor) else None
    return [] if record is None or record.name is None else [record.name]


def _unique_names(placeholders: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Names relative to the compiled region; nodes whose names collide keep Dynamo's names."""
    names = {node: parameter_name(node) for node in placeholders}
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    return {node: name if counts[name] == 1 else node.name for node, name in names.items()}


def _spec(
    node: fx.Node, weight: Tensor, config: GrassConfig, answer: Answer | None
) -> SubspaceSpec:
    if weight.dim() not in (2, 3):
        raise NotLinear(f"{weight.dim()} dimensions, only matrices and stacks of them are taken")
    if not weight.is_floating_point():
        raise NotLinear(f"dtype {weight.dtype} is not a real floating-point type")
    plain = type(weight) is torch.nn.Parameter or is_fake(weight)
    if torch.overrides.is_tensor_like(weight) and not plain:
        raise NotLinear(
            "a DTensor, as of tensor parallelism"
            if isinstance(weight, DTensor)
            else f"a tensor subclass, {type(weight).__name__}"
        )
    shards = None
    if managed_by_fsdp(node):
        known = None if (real := real_value(node)) is None else fsdp_weight(real)
        if known is None:
            raise NotLinear("fsdp2: the parameter that it is gathered from is not known")
        if (reason := known.refusal()) is not None:
            raise NotLinear(f"fsdp2: {reason}")
        shards = sharding_of[adopted(known)].shards
    spec, lookup = _spec_of_uses(node, weight, config, answer)
    _check_size(spec)
    if shards is not None:
        spec = _sharded(spec, weight, shards)
    if lookup and not config.lookups:
        raise LookedUp(lookup, spec)
    return spec


def _spec_of_uses(
    node: fx.Node, weight: Tensor, config: GrassConfig, answer: Answer | None
) -> tuple[SubspaceSpec, str]:
    """The spec of a weight from its uses, and the name of a lookup among them, or ""."""
    if weight.dim() == 3:
        return _spec_of_stack(node, weight, config, answer), ""
    uses = _uses(node, answer)
    lookups = [use for use in uses if use.lookup]
    out_dim = [*lookups, *uses][0].out  # a matrix used both ways is named after its first use
    features = {"out": weight.shape[out_dim], "in": weight.shape[1 - out_dim]}
    side = config.side
    if side == "auto":
        side = "out" if features["out"] <= features["in"] else "in"
    dim = out_dim if side == "out" else 1 - out_dim
    _check_stop(answer, dim)
    spec = SubspaceSpec.of(config, features[side], dim, side)
    for use in lookups:
        if dim == use.out and not config.lookups:
            raise LookedUp(use.lookup, None)
        if dim == use.out:
            raise NotLinear(
                f"used by {use.lookup}, and side={side!r} would select among its rows: side='in' "
                "takes it"
            )
    return spec, lookups[0].lookup if lookups else ""


def _uses(node: fx.Node, answer: Answer | None) -> list[Use]:
    """The uses of a matrix, from the Dynamo graph unless the joint graph was asked."""
    uses = uses_of(node, 0) if answer is None else answer.uses
    if not uses:
        _check_stop(answer, *(answer.stops if answer else ()))
        raise NotLinear("not used in a matrix product")
    return uses


def _check_stop(answer: Answer | None, *dims: int) -> None:
    """Raise NotLinear if the joint graph has a reason against a selection of these dimensions."""
    reasons = [] if answer is None else [answer.stops[dim] for dim in dims if dim in answer.stops]
    if reasons:
        parts = [part for reason in reasons for part in reason.split("; ")]
        raise NotLinear("; ".join(dict.fromkeys(parts)))


def _sharded(spec: SubspaceSpec, weight: Tensor, shards: Shards) -> SubspaceSpec:
    """The spec of a weight sharded along dimension 0: all processes select equally many rows."""
    if weight.shape[0] % shards.ranks:
        raise NotLinear(f"its dimension of {weight.shape[0]} is not alike on {shards.ranks} ranks")
    if weight.dim() == 3 or spec.dim != 0:
        return replace(spec, shards=shards)
    parts = common_parts(shards, spec.size, spec.block, spec.rank)
    if parts is None:
        raise NotLinear(
            f"rank {spec.rank} of {spec.size} in blocks of {spec.block} is not alike on "
            f"{shards.ranks} ranks: a rank that is a multiple of {shards.ranks * spec.block} is"
        )
    return replace(spec, shards=shards, parts=parts)


def _check_size(spec: SubspaceSpec) -> None:
    if spec.block > spec.size:
        raise NotLinear(f"block {spec.block} exceeds its {spec.size} {spec.side}put features")
    if spec.rank > spec.size:
        raise NotLinear(f"rank {spec.rank} exceeds its {spec.size} {spec.side}put features")


def _spec_of_stack(
    node: fx.Node, weight: Tensor, config: GrassConfig, answer: Answer | None
) -> SubspaceSpec:
    """The spec of a stack (e, m, n): rows of each matrix are selected, whatever ``side`` says."""
    if not weight.is_contiguous():
        raise NotLinear("a stack of matrices that is not contiguous")
    if answer is None:
        dims = output_dims_of_stack(node, 0)
    else:
        dims = [use.out for use in answer.uses]
        _check_stop(answer, 1)
    if not dims:
        raise NotLinear("not used in a matrix product")
    side = "out" if dims[0] == 1 else "in"
    return SubspaceSpec.of(config, weight.shape[1], 1, side, weight.shape[0])
