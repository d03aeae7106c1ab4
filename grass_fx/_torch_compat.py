"""The only file that touches private torch. Each entry says what it uses, and since when it is so.

Imports of Inductor and AOTAutograd stand inside functions: importing grass_fx loads neither.
Checked with torch 2.11 to 2.15; features are probed, versions are not compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass

from grass_fx.errors import OptionError, UnsupportedTorchError

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


@contextmanager
def compiled_apart(
    function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None
) -> Iterator[Callable[..., Any]]:
    """``torch.compile(function)`` that leaves no trace in what is compiled before or after it.

    It teaches Dynamo no dynamic sizes. Dynamo's cache of a function that it compiled here and never
    before, be it a copy of ``function`` or one called after a graph break, is emptied at the end:
    its entries would count towards the limit of recompilations.
    """
    from torch._dynamo import config
    from torch._dynamo.symbolic_convert import InstructionTranslator

    fresh: dict[CodeType, bool] = {}

    def watching(*args: Any, **kwargs: Any) -> Any:
        code = InstructionTranslator.current_tx().f_code
        fresh.setdefault(code, not torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))
        return backend(*args, **kwargs)

    settings: dict[str, Any] = {"automatic_dynamic_shapes": False}
    settings |= dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 1 << 16)
    try:
        with config.patch(settings):
            yield torch.compile(function, backend=watching, dynamic=dynamic)
    finally:
        for code in (code for code, new in fresh.items() if new):
            torch._C._dynamo.eval_frame.reset_code(code)


def mark_added_placeholder(node: fx.Node) -> None:
    """A placeholder of ours has no source in the user's frame, and a value of one address.

    CUDA graphs read such an input where it lies, as they do parameters, instead of copying it.
    """
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def parameter_name(node: fx.Node) -> str:
    """The name of a placeholder's parameter, relative to the compiled region.

    Dynamo's source of a parameter reads ``L['self']._modules['layers']...._parameters['weight']``;
    other spellings fall back to what the placeholder is called.
    """
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else source.name
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return ".".join(parts) if parts else re.sub(r"^[lLgG]_", "", node.name).rstrip("_")


def managed_by_fsdp(node: fx.Node) -> bool:
    """Whether a placeholder's parameter belongs to a module that FSDP gathers and shards by hooks.

    What arrives is an ordinary Parameter; its module is marked, and Dynamo's source leads there.
    """
    from torch._dynamo import symbolic_convert

    translator = getattr(symbolic_convert.tls, "current_tx", None)
    source = getattr(node, "_dynamo_source", None)
    if translator is None or source is None:
        return False
    frame, owner = translator.output.root_tx, source.name.rpartition("._parameters[")[0]
    try:
        module = eval(owner, {"L": frame.f_locals, "G": frame.f_globals})
    except Exception:  # no name of a module's parameter, or another spelling
        return False
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of a backend's example inputs."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(values)
    if mode is None:
        raise UnsupportedTorchError("the backend was called without torch.compile's fake inputs.")
    return mode


def trace_static(
    function: Callable[..., Any],
    layouts: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype, torch.device]],
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A function of tensors as a graph of constant sizes, and the fakes it was traced with.

    ``layouts``: (shape, strides, dtype, device) of each tensor. Though no size is a symbol, there
    is a ShapeEnv: Inductor caches nothing without one.
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


def current_compilation() -> tuple[int, int] | None:
    """Which frame is being compiled, and its how many-th compilation; torch writes ``3/0``."""
    from torch._guards import CompileContext

    found: Any = CompileContext.current_compile_id()
    return None if found is None else (found.frame_id, found.frame_compile_id)


def real_value(node: fx.Node) -> Any:
    """What arrived for a placeholder of a Dynamo graph; None where Dynamo no longer knows it."""
    return getattr(node.meta.get("grapharg"), "example", None)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add ``text()`` to torch's structured trace (``TORCH_TRACE``); not called without one."""
    from torch._logging._internal import trace_structured

    about = {"name": name, "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text)


def argument_counts(gm: fx.GraphModule) -> list[int] | None:
    """How many placeholders each argument of a joint graph holds, in a list; None: all are flat."""
    from torch.utils._pytree import tree_unflatten

    if not hasattr(gm, "_in_spec"):
        return None
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [len(argument) for argument in tree_unflatten(placeholders, gm._in_spec)]


# --- AOTAutograd ----------------------------------------------------------------------------------


def input_position(node: fx.Node) -> int | None:
    """Which of the backend's inputs a joint graph's placeholder is (``meta["desc"]``), if known."""
    return getattr(node.meta.get("desc"), "idx", None)


def gradient_of_input(graph: fx.Graph, position: int) -> fx.Node | None:
    """The node of a joint graph that is the gradient of one of the backend's inputs."""
    output = graph.output_node()
    (values,) = output.args
    for value, desc in zip(cast("Sequence[Any]", values), output.meta["desc"], strict=True):
        if getattr(getattr(desc, "grad_of", None), "idx", None) == position:
            return value if isinstance(value, fx.Node) else None
    return None


def compile_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    joint_pass: GraphPass | None,
    on_backward: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
    on_partition: Callable[[fx.GraphModule, fx.GraphModule], None] | None = None,
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions and partitioner; the graphs run as they are.

    ``on_backward`` may look at the backward graph, and returns what is to run for it;
    ``on_partition`` sees both halves. The joint pass is the first act of the partitioner.
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


# --- several processes ----------------------------------------------------------------------------


def running_ddp() -> Any:
    """The DistributedDataParallel whose forward is running, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()


def averaged_by(ddp: Any) -> Sequence[Tensor]:
    """The parameters that a DistributedDataParallel has in its buckets."""
    return cast("Sequence[Tensor]", ddp._module_parameters)


def ignore_in_ddp(model: torch.nn.Module, names: list[str]) -> None:
    """Let a DistributedDataParallel of ``model`` leave these parameters alone."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def current_backward() -> int:
    """The number of the backward that is running."""
    return int(torch._C._current_graph_task_id())


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward has accumulated all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


# --- Inductor -------------------------------------------------------------------------------------


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Config patches for ``mode`` and Inductor's ``options``, checked as torch.compile does."""
    wrapper = torch._TorchCompileInductorWrapper
    try:
        return dict(wrapper(mode=mode, options=dict(options), dynamic=None).config)
    except RuntimeError as error:
        message = str(error).split(", known options are")[0]
        raise OptionError(f'options={{"inductor": ...}}: {message}') from None


SET_GRAD_ENABLED = torch._C._set_grad_enabled
CUDA_GRAPHS = "triton.cudagraphs"
"""Inductor's option that records its code as CUDA graphs (``mode="reduce-overhead"``)."""


def uses_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether what is compiled under ``patches`` runs as CUDA graphs."""
    from torch._inductor import config

    return bool(patches.get(CUDA_GRAPHS, config.triton.cudagraphs))


def overlapping(patches: Mapping[str, Any], passes: Sequence[Any]) -> dict[str, Any]:
    """``patches``, and passes on Inductor's scheduler, of its own by name, for collectives to run
    beside computation. What a user configures of such passes comes first."""
    from torch._inductor import config

    key = "reorder_for_compute_comm_overlap"
    if key in patches or getattr(config, key):
        return dict(patches)
    return {**patches, key: True, f"{key}_passes": list(passes)}


def scheduling_of(node: Any) -> tuple[bool, bool, set[str], set[str]]:
    """Whether a scheduler node starts a collective or waits for one; what it makes; and what it
    needs, but for what only keeps collectives in order."""
    from torch._inductor.utils import contains_collective, contains_wait

    needs = {d.name for d in node.unmet_dependencies if not getattr(d, "is_fake", False)}
    return contains_collective(node), contains_wait(node), {*node.get_buffer_names()}, needs


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
    python functions in the graph, of which others keep AOTAutograd from caching, and whatever else
    the code depends on to version strings: they are a part of what the caches go by.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches = dict(patches)
    if make_pass is not None:
        theirs = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass) or ()
        theirs = tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)
        patches["joint_custom_pre_pass"] = make_pass(theirs)
    key = "unsafe_marked_cacheable_functions"
    patches[key] = {**patches.get(key, getattr(config, key)), **(cacheable or {})}
    return cast("Callable[..., Any]", compile_fx(gm, inputs, config_patches=patches))


def register_inductor_lowering(op: Any, lower: Callable[..., Any]) -> None:
    """``lower`` gets a function that lowers an aten call, then the operator's own arguments."""
    from torch._inductor.lowering import lowerings, register_lowering

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return lowerings[target](*args, **kwargs)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        return lower(call, *args, **kwargs)

    register_lowering(op, type_promotion_kind=None)(lowering)


# --- Inductor's kernels, for use inside a lowering ------------------------------------------------


def realized(*values: Any) -> list[Any]:
    """IR values as buffers that a kernel can read; views of buffers stay views."""
    from torch._inductor.ir import ExternKernel

    return [ExternKernel.realize_input(value) for value in values]


def library_call(op: Any, *args: Any) -> Any:
    """An operator computed by torch's own kernel, instead of one that Inductor generates."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def is_multiple(expr: Any, of: int) -> bool:
    """Whether a size is a multiple of ``of``, whatever its symbols are."""
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.statically_known_multiple_of(expr, of))


def size_hint(expr: Any) -> int:
    """What a size was in the example inputs; adds no guard."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(expr, fallback=8192))


def tuning_everything() -> bool:
    """Whether Inductor is to measure its choices (``mode="max-autotune"``)."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


@cache
def triton_template(name: str, source: str) -> Any:
    """A template of Inductor, whose names are unique in a process: hence the cache.

    Tiles of (m, n) are on the grid's first axis, SPLIT_K on its second.
    """
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    @SymbolicGridFn
    def grid(m: Any, n: Any, meta: Mapping[str, int], *, cdiv: Any) -> Any:
        return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), meta["SPLIT_K"], 1

    return TritonTemplate(name=name, grid=grid, source=source)


@cache
def extern_kernel(kernel: Callable[..., Any]) -> Any:
    """A python function, with ``out=``, as a choice beside templates."""
    from torch._inductor.select_algorithm import ExternKernelChoice

    return ExternKernelChoice(kernel, name=f"grass_{kernel.__name__}")


def choose_kernel(
    name: str,
    inputs: Sequence[Any],
    size: Sequence[Any],
    dtype: Any,
    templates: Sequence[tuple[Any, Mapping[str, Any]]],
    externs: Sequence[tuple[Any, Mapping[str, Any]]] = (),
    grid: Sequence[Any] | None = None,
    examples: Mapping[int, Callable[[], Tensor]] | None = None,
) -> Any:
    """The output of the fastest choice; of the only one without measuring.

    ``grid`` is (m, n), by default the last two of ``size``. ``examples`` make inputs, by place, to
    measure with: integers would be zeros. Since 2.12 Inductor returns the choice as well.
    """
    from torch._inductor.ir import FixedLayout
    from torch._inductor.select_algorithm import autotune_select_algorithm

    layout = FixedLayout(inputs[0].get_device(), dtype, list(size))
    choices: list[Any] = []
    sizes = list(size[-2:] if grid is None else grid)
    for template, options in templates:
        template.maybe_append_choice(
            choices, input_nodes=list(inputs), layout=layout, call_sizes=sizes, **options
        )
    for extern, options in externs:
        choices.append(extern.bind(list(inputs), layout, **options))
    made = {k: lambda _, make=make: make() for k, make in (examples or {}).items()} or None
    result = autotune_select_algorithm(name, choices, list(inputs), layout, input_gen_fns=made)
    return result[0] if isinstance(result, tuple) else result


def put_rows(w: Any, indices: Any, rows: Any, dim: int) -> None:
    """W[σ] = rows, in place, for rows that do not repeat; one loop computes and stores them.

    Unlike the lowering of ``index_put_`` it lets ``rows`` read W[σ] within that loop. What else
    reads W was lowered before and is stored first: the layout's constructor sees to that.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V, ops

    w.realize()
    layout = ir.MutationLayoutSHOULDREMOVE(w)
    load, size = indices.make_loader(), w.get_size()[dim]

    def place(index: Sequence[Any]) -> list[Any]:
        row = ops.indirect_indexing(load([index[dim]]), size, wrap_neg=False)
        return [*index[:dim], row, *index[dim + 1 :]]

    scatter = ir.Scatter(
        device=w.get_device(),
        dtype=w.get_dtype(),
        inner_fn=rows.make_loader(),
        ranges=list(rows.get_size()),
        output_indexer=place,
    )
    buffer = ir.ComputedBuffer(name=None, layout=layout, data=scatter)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)


def combined_kernels(count: int) -> dict[str, Any]:
    """Config patches: up to ``count`` independent loops become one Triton kernel, unmeasured.

    Measuring would copy every tensor that the kernel changes. What a version does not know is left
    out; 2.13 simulates memory, and counts as growth that inputs live until their kernel.
    """
    from torch._inductor import config

    wanted = {
        "combo_kernels": True,
        "combo_kernels_autotune": 0,
        "combo_kernel_max_num_nodes": count,
        "combo_kernel_peak_memory_pct_threshold": None,
    }
    return {k: v for k, v in wanted.items() if hasattr(config, k)}


def has_triton() -> bool:
    """Whether Inductor can generate Triton code here."""
    from torch.utils._triton import has_triton

    return bool(has_triton())
