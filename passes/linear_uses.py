"""Decides whether the uses of a parameter in a Dynamo graph are linear.

The search looks at what operations compute, never at module names. It passes through transposes,
conversions and parts until it meets a product or a lookup, which is a product with one-hot rows.
Any other operation raises :class:`NotLinear` with the reason.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten


class NotLinear(Exception):
    """A use of a parameter that is not a matrix product; the message is the reason."""


class Unknown(NotLinear):
    """A use that a Dynamo graph does not show to be linear; the joint graph may."""


class Use(NamedTuple):
    """A product or a lookup."""

    out: int
    """Which dimension of the parameter holds output features; of a lookup, the one of its rows."""
    lookup: str = ""
    """The name of a lookup; empty for a product."""


# The calls a Dynamo graph may hold: Python functions, names of methods, and ATen packets.
LINEAR = {torch.nn.functional.linear, torch._C._nn.linear, aten.linear}
MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm", aten.mm, aten.matmul}
ADDMM = {torch.addmm, "addmm", aten.addmm}
EINSUM = {torch.einsum, torch.functional.einsum}
ATTENTION = {torch.nn.functional.multi_head_attention_forward}
IN_ATTENTION = {5, 11, "in_proj_weight", "out_proj_weight",
                "q_proj_weight", "k_proj_weight", "v_proj_weight"}  # fmt: skip
# lookups of rows -> the names of their arguments
EMBEDDINGS = {
    torch.nn.functional.embedding: ("indices", "weight", "padding_idx", "max_norm", "norm_type",
                                    "scale_grad_by_freq", "sparse"),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
    aten.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
}  # fmt: skip
INDEX_SELECTS = {torch.index_select, "index_select", aten.index_select}
PERMUTE = {torch.permute, "permute", aten.permute}
TRANSPOSE = PERMUTE | {
    torch.t, torch.transpose, torch.swapaxes, torch.swapdims, torch.adjoint,
    "t", "transpose", "swapaxes", "swapdims", "T", "mT", "adjoint",
    aten.t, aten.transpose, aten.numpy_T, aten.mT,
}  # fmt: skip
# Operations that take parts of a matrix, and operations that make it part of a larger one.
PARTS = {
    "chunk", "split", "narrow", torch.chunk, torch.split, torch.functional.split, torch.narrow,
    aten.chunk, aten.split, aten.narrow, aten.slice,
}  # fmt: skip
WHOLES = {torch.cat, torch.concat, torch.concatenate, aten.cat}
SAME = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone",
    torch.clone, "requires_grad_",
}  # fmt: skip


def uses_of(node: fx.Node, flipped: int) -> list[Use]:
    """The uses of ``node``, which is the parameter, or the transposed one if ``flipped`` is 1.

    Raises NotLinear at the first one that is no matrix product and no lookup.
    """
    uses: list[Use] = []
    for user in node.users:
        uses += _uses_by(node, user, flipped)
    return uses


def _uses_by(node: fx.Node, user: fx.Node, flipped: int) -> list[Use]:
    target, args = _called(user), user.args
    if user.op == "output":
        raise NotLinear("it leaves the compiled graph")
    if target is getattr and args[1] in TRANSPOSE:
        return uses_of(user, 1 - flipped)
    if _subgraph(user) is not None:
        return _uses_in_body(node, user, flipped)
    if user.op in ("call_function", "call_method"):
        if target in TRANSPOSE and _first(user) is node:
            return uses_of(user, flipped ^ _swaps(user))
        if target in SAME and _first(user) is node:
            return uses_of(user, flipped)
        if _is_part(user, node) or target in WHOLES:
            return uses_of(user, flipped)
        out = _product_dim(node, user)
        if out is not None:
            return [Use(out ^ flipped)]
        rows = _looked_up_dim(node, user)
        if rows is not None:
            return [Use(rows ^ flipped, named(target))]
    raise Unknown(f"used by {named(target)}, which is no matrix product with it")


def named(target: Any) -> str:
    """What reports call an operation."""
    return getattr(target, "__name__", str(target))


def _is_part(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is a matrix of rows or columns of ``node``, or a tuple of such matrices."""
    if not user.args or user.args[0] is not node:
        return False
    target = _called(user)
    if target is not operator.getitem:
        return target in PARTS
    if _called(node) in PARTS:
        return True  # one matrix of the tuple
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    return all(i is Ellipsis or isinstance(i, slice) for i in index)


def _first(user: fx.Node) -> Any:
    """The first argument of a call, which may be passed as ``input=``."""
    return user.args[0] if user.args else user.kwargs.get("input")


def _called(user: fx.Node) -> Any:
    """The target of a node; overloads of an operator count as the same."""
    target = user.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _product_dim(node: fx.Node, user: fx.Node) -> int | None:
    """The dimension of ``node`` that holds output features in this product, or None."""
    target = _called(user)
    places = [i for i, a in enumerate(user.args) if a is node]
    if node in user.kwargs.values():
        keyword = next(k for k, v in user.kwargs.items() if v is node)
        added = target in ADDMM
        keywords = {"weight": 1, "other": 1, "input": 0, "mat1": 1, "mat2": 2 if added else 1}
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


def _looked_up_dim(node: fx.Node, user: fx.Node) -> int | None:
    """The dimension of ``node`` whose rows this call looks up by a tensor of indices, or None."""
    target = _called(user)
    if target in EMBEDDINGS:
        given = dict(zip(EMBEDDINGS[target], user.args, strict=False)) | user.kwargs
        if given.get("weight") is not node:
            return None
        if given.get("max_norm") is not None:
            raise NotLinear(f"used by {named(target)} with max_norm, which changes it")
        if given.get("sparse"):
            raise NotLinear(
                f"used by {named(target)} with sparse=True: sparse=False lets it train compact"
            )
        return 0
    if target in INDEX_SELECTS and _first(user) is node:
        dim = user.kwargs.get("dim", user.args[1] if len(user.args) > 1 else None)
        return dim % 2 if isinstance(dim, int) else None
    if target is operator.getitem and user.args[0] is node:
        index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        indices = [k for k, i in enumerate(index) if _is_indices(i)]
        rest = [i for i in index if i is not Ellipsis and i != slice(None)]
        if len(indices) == len(rest) == 1 and Ellipsis not in index[: indices[0]]:
            return indices[0]
    return None


def _is_indices(argument: Any) -> bool:
    value = getattr(argument, "meta", {}).get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _einsum_dim(user: fx.Node, place: int, stacked: bool = False) -> int | None:
    """The weight's output dimension, if this einsum of two operands sums over the other one.

    Otherwise None. With ``stacked`` the weight's first dimension counts matrices, and must be in
    all three terms.
    """
    equation = _first(user)
    if not isinstance(equation, str) or place == 0:
        return None
    left, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # then the result has the letters that occur once
        result = "".join(c for c in left if left.count(c) == 1)
    terms = left.split(",")
    if len(terms) != 2 or place > 2:
        return None
    own, other = terms[place - 1], terms[2 - place]
    kept = [i for i, c in enumerate(own) if c in result and c not in other]
    summed = [c for c in own if c in other and c not in result]
    if stacked and not (own[:1] in other and own[:1] in result):
        return None
    return kept[0] if len(own) == 2 + stacked and len(kept) == len(summed) == 1 else None


def _swaps(user: fx.Node) -> int:
    """1 if this call transposes its matrix, 0 if it keeps the order of dimensions."""
    dims = user.args[1:] or tuple(v for k, v in user.kwargs.items() if k != "input")
    if dims and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if not dims:
        return 1
    ordered = [d % 2 for d in dims if isinstance(d, int)]
    if len(ordered) != 2:
        raise Unknown("transposed in a way that is not understood")
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


def _uses_in_body(node: fx.Node, user: fx.Node, flipped: int) -> list[Use]:
    body = _subgraph(user)
    assert body is not None
    operands = [a for a in user.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    inner = body.graph.find_nodes(op="placeholder")
    bodies = [a for a in user.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    if len(bodies) != 1 or len(operands) != len(inner):
        raise Unknown(f"used inside {user.target}")
    uses: list[Use] = []
    for operand, placeholder in zip(operands, inner, strict=True):
        if operand is node:
            uses += uses_of(placeholder, flipped)
    return uses


# --- stacks of matrices, (e, m, n) ----------------------------------------------------------------

BATCHED = {torch.bmm, torch.matmul, operator.matmul, "bmm", "matmul", aten.bmm, aten.matmul}
ADDED = {torch.baddbmm, "baddbmm", aten.baddbmm}
GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}  # torch's and transformers'
UNBOUND = {torch.unbind, "unbind", aten.unbind}


def output_dims_of_stack(node: fx.Node, flipped: int) -> list[int]:
    """For each use of a stack (e, m, n): which of its dimensions, 1 or 2, holds output features."""
    dims: list[int] = []
    for user in node.users:
        dims += _use_of_stack(node, user, flipped)
    return dims


def _use_of_stack(node: fx.Node, user: fx.Node, flipped: int) -> list[int]:
    target, args = _called(user), user.args
    if user.op == "output":
        raise NotLinear("it leaves the compiled graph")
    if user.op in ("call_function", "call_method") and args and args[0] is node:
        if (target is getattr and args[1] == "mT") or target in TRANSPOSE:
            return output_dims_of_stack(user, flipped ^ _swaps_in_stack(user))
        if target in SAME:
            return output_dims_of_stack(user, flipped)
        if target in UNBOUND and not any(args[1:]) and not user.kwargs:
            return [d for part in user.users for d in _output_dims_of_one(part, flipped)]
        if target is operator.getitem and isinstance(args[1], int):
            return _output_dims_of_one(user, flipped)
        if target is operator.getitem and isinstance(args[1], fx.Node):
            return output_dims_of_stack(user, flipped)  # indexed by the matrix of each token
    out = _product_dim_of_stack(node, user)
    if out is None:
        raise Unknown(f"used by {named(target)}, which is no product with a stack of matrices")
    return [3 - out if flipped else out]


def _output_dims_of_one(matrix: fx.Node, flipped: int) -> list[int]:
    """The same for one matrix of the stack."""
    uses = uses_of(matrix, flipped)
    for use in uses:
        if use.lookup:
            raise NotLinear(f"used by {use.lookup}, which is no product with a stack of matrices")
    return [1 + use.out for use in uses]


def _product_dim_of_stack(node: fx.Node, user: fx.Node) -> int | None:
    """The dimension of the stack that holds output features in this product, or None."""
    target = _called(user)
    places = [i for i, a in enumerate(user.args) if a is node]
    if len(places) != 1 or node in user.kwargs.values():
        return None
    place = places[0]
    if target in BATCHED:
        return {1: 2, 0: 1}.get(place)
    if target in ADDED:
        return {2: 2, 1: 1}.get(place)
    if getattr(target, "__name__", "") in GROUPED:
        return 2 if place == 1 else None
    if target in EINSUM:
        return _einsum_dim(user, place, stacked=True)
    return None


def _swaps_in_stack(user: fx.Node) -> int:
    """1 if this call transposes the matrices of a stack, 0 if it keeps them."""
    dims = user.args[1:] if _called(user) is not getattr else ()
    if dims and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    ordered = [d % 3 for d in dims if isinstance(d, int)]
    if not dims or sorted(ordered) == [1, 2]:
        return 1
    if ordered in ([0, 1, 2], [0, 2, 1]):
        return int(ordered == [0, 2, 1])
    raise Unknown("a stack of matrices, transposed in a way that is not understood")
