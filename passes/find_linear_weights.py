"""Find the parameters of a Dynamo graph that are used as linear weights and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from grass_fx._torch_compat import parameter_name
from grass_fx.config import GrassConfig
from grass_fx.subspace import SubspaceSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearWeight:
    """A parameter that is taken."""

    position: int
    """Its position among the graph's inputs."""
    name: str
    """Its name, relative to the compiled region."""
    shape: tuple[int, ...]
    spec: SubspaceSpec


@dataclass
class FoundWeights:
    """Every parameter of a graph: taken, or not and why."""

    taken: list[LinearWeight] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    """Trainable, of two dimensions or more, and not taken: name -> reason."""
    unfit: dict[str, str] = field(default_factory=dict)
    """No candidates, frozen or a vector: name -> reason."""


class _NotLinear(Exception):
    """A use of a parameter that is not a matrix product; the message is the reason."""


# The calls a Dynamo graph may hold: python functions, methods by name, ATen packets.
LINEAR = {torch.nn.functional.linear, torch._C._nn.linear, aten.linear}
MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm", aten.mm, aten.matmul}
ADDMM = {torch.addmm, "addmm", aten.addmm}
EINSUM = {torch.einsum, torch.functional.einsum}
ATTENTION = {torch.nn.functional.multi_head_attention_forward}
IN_ATTENTION = {5, 11, "in_proj_weight", "out_proj_weight",
                "q_proj_weight", "k_proj_weight", "v_proj_weight"}  # fmt: skip
PERMUTE = {torch.permute, "permute", aten.permute}
TRANSPOSE = PERMUTE | {
    torch.t, torch.transpose, torch.swapaxes, torch.swapdims, torch.adjoint,
    "t", "transpose", "swapaxes", "swapdims", "T", "mT", "adjoint",
    aten.t, aten.transpose, aten.numpy_T, aten.mT,
}  # fmt: skip
# Parts of a matrix, and a larger matrix that it is part of.
PARTS = {
    "chunk", "split", "narrow", torch.chunk, torch.split, torch.functional.split, torch.narrow,
    aten.chunk, aten.split, aten.narrow, aten.slice,
}  # fmt: skip
WHOLES = {torch.cat, torch.concat, torch.concatenate, aten.cat}
SAME = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone",
    torch.clone, "requires_grad_",
}  # fmt: skip


def find_linear_weights_pass(
    gm: fx.GraphModule, inputs: Sequence[Any], *, config: GrassConfig
) -> FoundWeights:
    """List the linear weights of a Dynamo graph; the graph stays as it is.

    Taken: a 2-D float parameter that needs a gradient, whose every use is ``x @ W`` or ``x @ W.T``
    (``F.linear``, ``mm``, ``matmul``, ``addmm``, ``einsum``, ``multi_head_attention_forward``; also
    inside activation-checkpointing bodies, through transposes and dtype conversions, in parts and
    concatenated with others), with a selected dimension of at least r.

    Left, with a reason: ``include``/``exclude``, other uses (an embedding tied to a head), sizes,
    and tensors of other kinds. Uses are followed by what they compute, never by module names.
    """
    found = FoundWeights()
    placeholders = gm.graph.find_nodes(op="placeholder")
    names = _unique_names(placeholders)
    for position, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if not isinstance(value, torch.nn.Parameter):
            continue
        name = names[node]
        if not value.requires_grad:
            found.unfit[name] = "frozen"
        elif value.dim() < 2:
            found.unfit[name] = f"{value.dim()} dimension, only matrices are taken"
        else:
            try:
                spec = _spec(node, value, name, config)
                found.taken.append(LinearWeight(position, name, tuple(value.shape), spec))
            except _NotLinear as reason:
                found.left[name] = str(reason)
    return found


def _unique_names(placeholders: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Names relative to the region; nodes whose names collide keep Dynamo's own."""
    names = {node: parameter_name(node) for node in placeholders}
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    return {node: name if counts[name] == 1 else node.name for node, name in names.items()}


def _spec(node: fx.Node, weight: Tensor, name: str, config: GrassConfig) -> SubspaceSpec:
    if reason := config.wants(name):
        raise _NotLinear(reason)
    if weight.dim() != 2:
        raise _NotLinear(f"{weight.dim()} dimensions, only matrices are taken")
    if not weight.is_floating_point():
        raise _NotLinear(f"dtype {weight.dtype} is not a real floating-point type")
    if torch.overrides.is_tensor_like(weight) and type(weight) is not torch.nn.Parameter:
        raise _NotLinear(f"a tensor subclass, {type(weight).__name__}")
    uses = list(_output_dims(node, 0))
    if not uses:
        raise _NotLinear("not used in a matrix product")
    out_dim = uses[0]  # a matrix used both ways is named after its first use
    features = {"out": weight.shape[out_dim], "in": weight.shape[1 - out_dim]}
    side = config.side
    if side == "auto":
        side = "out" if features["out"] <= features["in"] else "in"
    spec = SubspaceSpec.of(config, features[side], out_dim if side == "out" else 1 - out_dim, side)
    if spec.rank > spec.size:
        raise _NotLinear(f"rank {spec.rank} exceeds its {spec.size} {side}put features")
    return spec


def _output_dims(node: fx.Node, flipped: int) -> list[int]:
    """For each use of ``node`` (the parameter, transposed if ``flipped``), its output dimension.

    Raises _NotLinear at the first use that is no matrix product.
    """
    dims: list[int] = []
    for user in node.users:
        dims += _use(node, user, flipped)
    return dims


def _use(node: fx.Node, user: fx.Node, flipped: int) -> list[int]:
    target, args = _called(user), user.args
    if user.op == "output":
        raise _NotLinear("it leaves the compiled graph")
    if target is getattr and args[1] in TRANSPOSE:
        return _output_dims(user, 1 - flipped)
    if _subgraph(user) is not None:
        return _uses_in_body(node, user, flipped)
    if user.op in ("call_function", "call_method"):
        if target in TRANSPOSE and args[0] is node:
            return _output_dims(user, flipped ^ _swaps(user))
        if target in SAME and args[0] is node:
            return _output_dims(user, flipped)
        if _is_part(user, node) or target in WHOLES:
            return _output_dims(user, flipped)
        out = _product_dim(node, user)
        if out is not None:
            return [out ^ flipped]
    what = getattr(target, "__name__", str(target))
    raise _NotLinear(f"also used by {what}, which is no matrix product with it")


def _is_part(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is a matrix made of rows or columns of ``node``, or a tuple of such."""
    if user.args[0] is not node:
        return False
    target = _called(user)
    if target is not operator.getitem:
        return target in PARTS
    if _called(node) in PARTS:
        return True  # one of a tuple
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    return all(i is Ellipsis or isinstance(i, slice) for i in index)


def _called(user: fx.Node) -> Any:
    """What a node calls, whichever overload."""
    target = user.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _product_dim(node: fx.Node, user: fx.Node) -> int | None:
    """The dimension of ``node`` that holds output features in this product, or None."""
    target = _called(user)
    places = [i for i, a in enumerate(user.args) if a is node]
    if node in user.kwargs.values():
        keyword = next(k for k, v in user.kwargs.items() if v is node)
        keywords = {"weight": 1, "other": 1, "mat2": 2 if target in ADDMM else 1}
        places += [keywords[keyword]] if keyword in keywords else [-1]
    if len(places) != 1:
        return None
    place = places[0]
    if target in ATTENTION:
        name = next((k for k, v in user.kwargs.items() if v is node), place)
        return 0 if name in IN_ATTENTION else None
    if target in LINEAR:
        return 0 if place == 1 else None
    if target in MATMUL:
        return {1: 1, 0: 0}.get(place)
    if target in ADDMM:
        return {2: 1, 1: 0}.get(place)
    if target in EINSUM:
        return _einsum_dim(user, place)
    return None


def _einsum_dim(user: fx.Node, place: int) -> int | None:
    """Of an einsum of two operands that contracts one dimension of the weight: the other one."""
    equation = user.args[0]
    if not isinstance(equation, str) or place == 0:
        return None
    left, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # the letters that occur once
        result = "".join(c for c in left if left.count(c) == 1)
    terms = left.split(",")
    if len(terms) != 2 or place > 2:
        return None
    mine, other = terms[place - 1], terms[2 - place]
    kept = [i for i, c in enumerate(mine) if c in result and c not in other]
    summed = [c for c in mine if c in other and c not in result]
    return kept[0] if len(mine) == 2 and len(kept) == len(summed) == 1 else None


def _swaps(user: fx.Node) -> int:
    """1 if this call transposes its matrix, 0 if it leaves the dimensions where they are."""
    dims = user.args[1:] or tuple(user.kwargs.values())
    if dims and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if not dims:
        return 1
    ordered = [d % 2 for d in dims if isinstance(d, int)]
    if len(ordered) != 2:
        raise _NotLinear("transposed in a way that is not understood")
    if _called(user) in PERMUTE:
        return int(ordered != [0, 1])
    return int(ordered[0] != ordered[1])


def _subgraph(user: fx.Node) -> fx.GraphModule | None:
    """The body of a higher-order operator (activation checkpointing), if ``user`` calls one."""
    for arg in user.args:
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            body = getattr(user.graph.owning_module, str(arg.target), None)
            if isinstance(body, fx.GraphModule):
                return body
    return None


def _uses_in_body(node: fx.Node, user: fx.Node, flipped: int) -> list[int]:
    body = _subgraph(user)
    assert body is not None
    operands = [a for a in user.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    inner = body.graph.find_nodes(op="placeholder")
    bodies = [a for a in user.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    if len(bodies) != 1 or len(operands) != len(inner):
        raise _NotLinear(f"used inside {user.target}, whose body is not understood")
    dims: list[int] = []
    for operand, placeholder in zip(operands, inner, strict=True):
        if operand is node:
            dims += _output_dims(placeholder, flipped)
    return dims
