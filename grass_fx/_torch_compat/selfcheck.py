"""The private torch interfaces grass_fx needs, and an error that names those that are missing.

Every private import of this package is in :data:`NEEDS`; ``tests/test_selfcheck.py`` checks that.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch

from grass_fx.errors import UnsupportedTorchError

SUPPORTED = "2.11 to 2.15"
"""The versions of torch with which grass_fx is checked, as in pyproject.toml."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "reading and copying Dynamo's graphs": (
        "torch._guards.detect_fake_mode",
        "torch._guards.CompileContext.current_compile_id",
        "torch._guards.CompileId.frame_id",
        "torch._guards.CompileId.frame_compile_id",
        "torch._dynamo.symbolic_convert.tls",
        "torch._C._set_grad_enabled",
        "torch._dynamo.backends.registry._BACKENDS",
        "torch._dynamo.backends.registry._COMPILER_FNS",
        "torch._dynamo.backends.registry.lookup_backend",
        "torch._dynamo.backends.registry.register_backend(compiler_fn, name)",
    ),
    "grass_fx.explain": (
        "torch._dynamo.config.automatic_dynamic_shapes",
        "torch._dynamo.config.recompile_limit",
        "torch._dynamo.config.accumulated_recompile_limit",
        "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
        "torch._C._dynamo.eval_frame._debug_get_cache_entry_list",
        "torch._C._dynamo.eval_frame.reset_code",
    ),
    "graphs in torch's structured trace": (
        "torch._logging._internal.trace_structured(metadata_fn, payload_fn)",
        "torch.utils._pytree.tree_unflatten",
    ),
    "differentiating a graph": (
        "torch._functorch._aot_autograd.descriptors.PlainAOTInput.idx",
        "torch._functorch._aot_autograd.descriptors.GradAOTOutput.grad_of",
        "torch._functorch._aot_autograd.descriptors.TangentAOTInput",
        "torch._functorch._aot_autograd.utils.make_boxed_func",
        "torch._functorch.partitioners.min_cut_rematerialization_partition(compiler)",
        "torch._dynamo.backends.common.aot_autograd"
        "(fw_compiler, bw_compiler, decompositions, partition_fn)",
        "torch._inductor.decomposition.select_decomp_table",
    ),
    "models without data": (
        "torch._subclasses.FakeTensorMode",
        "torch._subclasses.fake_tensor.FakeTensor",
    ),
    "tracing the optimizer's update": (
        "torch._subclasses.FakeTensorMode(shape_env, static_shapes)",
        "torch.fx.experimental.proxy_tensor.make_fx",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv",
    ),
    "compiling with Inductor": (
        "torch._TorchCompileInductorWrapper(mode, options, dynamic)",
        "torch._inductor.compile_fx.compile_fx(config_patches)",
        "torch._inductor.custom_graph_pass.CustomGraphPass.uuid",
        "torch._inductor.config.joint_custom_pre_pass",
        "torch._inductor.config.joint_custom_post_pass",
        "torch._inductor.pattern_matcher.stable_topological_sort",
        "torch._inductor.config.unsafe_marked_cacheable_functions",
        "torch._inductor.config.triton.cudagraphs",
        "torch.utils._triton.has_triton",
    ),
    "collectives beside computation": (
        "torch._inductor.config.reorder_for_compute_comm_overlap",
        "torch._inductor.config.reorder_for_compute_comm_overlap_passes",
        "torch._inductor.utils.contains_collective",
        "torch._inductor.utils.contains_wait",
    ),
    "lowering the operators of grass_fx": (
        "torch._inductor.lowering.lowerings",
        "torch._inductor.lowering.register_lowering(type_promotion_kind)",
        "torch._inductor.lowering.fallback_handler(add_to_fallback_set)",
        "torch._inductor.ir.ExternKernel.realize_input",
        "torch._inductor.ir.FixedLayout",
        "torch._inductor.virtualized.V",
        "torch._inductor.virtualized.ops",
        "torch._inductor.sizevars.SizeVarAllocator.statically_known_multiple_of",
        "torch._inductor.sizevars.SizeVarAllocator.optimization_hint(fallback)",
        "torch._inductor.config.max_autotune",
        "torch._inductor.config.max_autotune_gemm",
    ),
    "Triton kernels among Inductor's choices": (
        "torch._inductor.select_algorithm.SymbolicGridFn",
        "torch._inductor.select_algorithm.TritonTemplate(name, grid, source)",
        "torch._inductor.select_algorithm.TritonTemplate.maybe_append_choice"
        "(input_nodes, layout, call_sizes)",
        "torch._inductor.select_algorithm.ExternKernelChoice(name)",
        "torch._inductor.select_algorithm.ExternKernelChoice.bind",
        "torch._inductor.select_algorithm.autotune_select_algorithm(input_gen_fns)",
    ),
    "writing an optimizer's rows": (
        "torch._inductor.ir.MutationLayoutSHOULDREMOVE",
        "torch._inductor.ir.Scatter(device, dtype, inner_fn, ranges, output_indexer)",
        "torch._inductor.ir.ComputedBuffer(name, layout, data)",
        "torch._inductor.graph.GraphLowering.register_buffer",
        "torch._inductor.graph.GraphLowering.register_operation",
    ),
    "training on several processes": (
        "torch.nn.parallel.DistributedDataParallel._get_active_ddp_module",
        "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "torch._C._current_graph_task_id",
        "torch.autograd.Variable._execution_engine.queue_callback",
    ),
}
"""Purpose -> the names it needs. Brackets hold the keywords with which a function is called."""

FOR_WORDS = (
    "torch._dynamo.utils.get_compilation_metrics",
    "torch._dynamo.convert_frame.input_codes",
    "torch._dynamo.config.disable",
    "torch._dynamo.eval_frame._stance",
)
"""Interfaces for the text of warnings (frames.py). Without them warnings only say less."""

FOR_FSDP2 = ("torch.distributed._composable_state._module_state_mapping",)
"""Interfaces for weights under FSDP2 (fsdp.py). Without them such weights train dense."""


@cache
def selfcheck() -> None:
    """Look for every private torch interface that grass_fx needs, once per process.

    This imports Inductor.

    Raises:
        UnsupportedTorchError: something is missing; the message lists every missing name, and what
            it is needed for.
    """
    with warnings.catch_warnings():  # torch warns about its own modules; users need not see that
        warnings.simplefilter("ignore")
        check(NEEDS)


def check(needs: Mapping[str, Iterable[str]]) -> None:
    """Do the work of :func:`selfcheck` for a list like :data:`NEEDS`."""
    missing = [
        f"{name}, for {purpose}"
        for purpose, names in needs.items()
        for name in names
        if not _is_there(name)
    ]
    if missing:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} lacks what grass_fx needs of it: {'; '.join(missing)}. "
            f"grass_fx is checked with torch {SUPPORTED}: install one of these, or a grass_fx that "
            "knows this torch."
        )


def _is_there(name: str) -> bool:
    """Whether a name of :data:`NEEDS` exists and accepts its keywords."""
    path, _, keywords = name.removesuffix(")").partition("(")
    found = _resolved(path.split("."))
    return found is not None and all(_takes(found, k) for k in re.findall(r"\w+", keywords))


def _resolved(parts: list[str]) -> Any:
    """The object with this dotted name, or None; imports the longest part that is a module."""
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = _attribute(found, part)
        return found
    return None


def _attribute(owner: Any, name: str) -> Any:
    """An attribute, or the annotation of a dataclass's field; None only if there is neither."""
    missing = object()
    found = getattr(owner, name, missing)
    if found is missing:
        return getattr(owner, "__dataclass_fields__", {}).get(name)
    return True if found is None else found


def _takes(function: Any, keyword: str) -> bool:
    """Whether ``function`` accepts this keyword, as far as its signature tells."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code has no signature
        return True
    kinds = {p.name: p.kind for p in parameters}
    return keyword in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values()
