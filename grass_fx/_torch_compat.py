"""The only file that touches private torch. Each entry says what it uses, and since when it is so.

Imports of Inductor and AOTAutograd stand inside functions: importing grass_fx loads neither.
Checked with torch 2.11 to 2.15; features are probed, versions are not compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from grass_fx.errors import OptionError, UnsupportedTorchError

__all__ = [
    "CustomGraphPass",
    "compile_aot_eager",
    "compile_inductor",
    "copy_dynamo_graph",
    "fake_mode_of",
    "inductor_patches",
    "input_position",
    "mark_added_placeholder",
    "parameter_name",
    "register_inductor_lowering",
]

GraphPass = Callable[[fx.Graph], None]

# --- Dynamo ---------------------------------------------------------------------------------------


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that AOTAutograd takes: Dynamo still reads its own.

    AOTAutograd looks for ``_param_name_to_source`` and every placeholder's ``_dynamo_source``,
    which a copy of the nodes does not carry.
    """
    result = copy.deepcopy(gm)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    old, new = (g.graph.find_nodes(op="placeholder") for g in (gm, result))
    for ours, theirs in zip(new, old, strict=True):
        ours._dynamo_source = getattr(theirs, "_dynamo_source", None)
    return result


def mark_added_placeholder(node: fx.Node) -> None:
    """A placeholder of ours has no source in the user's frame."""
    node._dynamo_source = None


def parameter_name(node: fx.Node) -> str:
    """The name of a placeholder's parameter, relative to the compiled region.

    Dynamo's source of a parameter reads ``L['self']._modules['layers']...._parameters['weight']``;
    other spellings fall back to what the placeholder is called.
    """
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else source.name
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return ".".join(parts) if parts else re.sub(r"^[lLgG]_", "", node.name).rstrip("_")


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of a backend's example inputs."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(values)
    if mode is None:
        raise UnsupportedTorchError("the backend was called without torch.compile's fake inputs.")
    return mode


# --- AOTAutograd ----------------------------------------------------------------------------------


def input_position(node: fx.Node) -> int | None:
    """Which of the backend's inputs a joint graph's placeholder is (``meta["desc"]``), if known."""
    return getattr(node.meta.get("desc"), "idx", None)


def compile_aot_eager(
    gm: fx.GraphModule, inputs: Sequence[Tensor], joint_pass: GraphPass | None
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions and partitioner; the graphs run as they are.

    The joint pass runs as the first act of the partitioner, which works in every version.
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
        return min_cut_rematerialization_partition(
            joint, joint_inputs, **{**kwargs, "compiler": "inductor"}
        )

    def run(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    return backend(gm, inputs)


# --- Inductor -------------------------------------------------------------------------------------


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Config patches for ``mode`` and Inductor's ``options``, checked as torch.compile does."""
    wrapper = torch._TorchCompileInductorWrapper
    try:
        return dict(wrapper(mode=mode, options=dict(options), dynamic=None).config)
    except RuntimeError as error:
        message = str(error).split(", known options are")[0]
        raise OptionError(f'options={{"inductor": ...}}: {message}') from None


def compile_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    patches: Mapping[str, Any],
    make_pass: Callable[[tuple[GraphPass, ...]], CustomGraphPass] | None = None,
    cacheable: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Inductor's ``compile_fx`` under ``patches``.

    ``make_pass`` gets the passes the user has configured in the slot and returns the one object to
    put there (a list of passes crashes torch 2.11). The slot is the *pre* pass: before Inductor's
    own patterns (padding, noop removal), so that all compilers see one graph. ``cacheable`` maps
    python functions in the graph to version strings: others keep AOTAutograd from caching.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches = dict(patches)
    if make_pass is not None:
        theirs = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
        if theirs is None:
            theirs = ()
        elif not isinstance(theirs, (list, tuple)):
            theirs = (theirs,)
        patches["joint_custom_pre_pass"] = make_pass(tuple(theirs))
    if cacheable:
        key = "unsafe_marked_cacheable_functions"
        patches[key] = {**patches.get(key, getattr(config, key)), **cacheable}
    compiled: Any = compile_fx(gm, inputs, config_patches=patches)
    return compiled


def register_inductor_lowering(op: Any, lower: Callable[..., Any]) -> None:
    """``lower`` gets a function that lowers an aten call, then the operator's own arguments."""
    from torch._inductor.lowering import lowerings, register_lowering

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return lowerings[target](*args, **kwargs)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        return lower(call, *args, **kwargs)

    register_lowering(op, type_promotion_kind=None)(lowering)
