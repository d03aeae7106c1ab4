"""AOTAutograd: joint graphs, their inputs and outputs, and compilation without Inductor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, fx

GraphPass = Callable[[fx.Graph], None]


def trace_static(
    function: Callable[..., Any],
    layouts: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype, torch.device]],
) -> tuple[fx.GraphModule, list[Tensor]]:
    """Trace a function of tensors with constant sizes; return the graph and its fake inputs.

    ``layouts`` gives (shape, strides, dtype, device) for each tensor. There is a ShapeEnv although
    no size is symbolic, because Inductor caches nothing without one.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True), torch.no_grad():
        fakes = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype, device in layouts
        ]
        return make_fx(function)(*fakes), fakes


def without_data(device: str) -> AbstractContextManager[Any]:
    """Within it, new tensors have a device, but no data: models of any size take no memory.

    Unlike on the meta device, operators are chosen as on the device that is named.
    """
    from torch._subclasses import FakeTensorMode

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device(device))
        return stack.pop_all()


def is_fake(value: Any) -> bool:
    """Whether it is a tensor without data, made in ``without_data``."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def argument_counts(gm: fx.GraphModule) -> list[int] | None:
    """The number of placeholders in each argument of a joint graph; None if arguments are flat."""
    from torch.utils._pytree import tree_unflatten

    if not hasattr(gm, "_in_spec"):
        return None
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [len(argument) for argument in tree_unflatten(placeholders, gm._in_spec)]


def input_position(node: fx.Node) -> int | None:
    """The position of a joint graph's placeholder among the backend's inputs, if it is known.

    It is read from ``meta["desc"]``.
    """
    return getattr(node.meta.get("desc"), "idx", None)


def is_tangent(node: fx.Node) -> bool:
    """Whether a joint graph's placeholder is an output's gradient, or part of such a gradient."""
    from torch._functorch._aot_autograd.descriptors import TangentAOTInput

    desc: Any = node.meta.get("desc")
    while hasattr(desc, "base"):  # a tensor inside a subclass, such as DTensor
        desc = desc.base
    return isinstance(desc, TangentAOTInput)


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """All nodes of a joint graph that depend on the gradient of an output."""
    return _dependents(graph, is_tangent)


def nodes_from_input(graph: fx.Graph, position: int) -> set[fx.Node]:
    """All nodes of a joint graph that depend on one of the backend's inputs."""
    return _dependents(graph, lambda node: input_position(node) == position)


def _dependents(graph: fx.Graph, of: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The placeholders for which ``of`` is true, and all nodes that depend on them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        first = node.op == "placeholder" and of(node)
        if first or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def gradient_of_input(graph: fx.Graph, position: int) -> fx.Node | None:
    """The node of a joint graph that is the gradient of one of the backend's inputs."""
    output = graph.output_node()
    (values,) = output.args
    for value, desc in zip(cast("Sequence[Any]", values), output.meta["desc"], strict=True):
        if getattr(getattr(desc, "grad_of", None), "idx", None) == position:
            return value if isinstance(value, fx.Node) else None
    return None


class _Seen(Exception):
    """Ends a compilation whose joint graph has been looked at."""


def look_at_joint_graph(
    gm: fx.GraphModule, inputs: Sequence[Tensor], look: Callable[[fx.Graph], None]
) -> None:
    """Call ``look`` with the joint graph of a Dynamo graph, which is compiled no further.

    An inference graph has none, and is not looked at.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        look(joint.graph)
        raise _Seen

    def stop(graph: fx.GraphModule, _: Any) -> Any:
        raise _Seen

    decompositions = select_decomp_table()
    backend = aot_autograd(fw_compiler=stop, decompositions=decompositions, partition_fn=partition)
    with contextlib.suppress(_Seen):
        backend(gm, inputs)


def compile_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    joint_pass: GraphPass | None,
    on_backward: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
    on_partition: Callable[[fx.GraphModule, fx.GraphModule], None] | None = None,
) -> Callable[..., Any]:
    """Run AOTAutograd with Inductor's decompositions and partitioner, but execute graphs eagerly.

    ``joint_pass`` runs right before the partitioner. ``on_partition`` gets the forward and the
    backward graph. ``on_backward`` gets the backward graph and returns the callable to run for it.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if joint_pass is not None:
            joint_pass(joint.graph)
            joint.graph.lint()
            joint.recompile()
        parts = min_cut_rematerialization_partition(
            joint, joint_inputs, **{**kwargs, "compiler": "inductor"}
        )
        if on_partition is not None:
            on_partition(*parts)
        return parts

    def run(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    def run_backward(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward if on_backward is None else on_backward(graph))

    backend = aot_autograd(
        fw_compiler=run,
        bw_compiler=run_backward,
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    return backend(gm, inputs)
