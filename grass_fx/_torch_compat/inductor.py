"""Inductor's options, compiler, scheduler and table of lowerings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx

from grass_fx._torch_compat.aot import GraphPass
from grass_fx.errors import OptionError

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
except ImportError:  # selfcheck reports it together with everything else that is missing
    CustomGraphPass = object  # type: ignore[misc, assignment]

MakePass = Callable[[tuple[GraphPass, ...]], CustomGraphPass]

BEFORE, AFTER = "joint_custom_pre_pass", "joint_custom_post_pass"
"""Inductor's options for passes on a joint graph: before and after its own passes."""

CUDA_GRAPHS = "triton.cudagraphs"
"""Inductor's option that records its code as CUDA graphs (``mode="reduce-overhead"``)."""


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Config patches for ``mode`` and Inductor's ``options``, checked as torch.compile does."""
    wrapper = torch._TorchCompileInductorWrapper
    try:
        return dict(wrapper(mode=mode, options=dict(options), dynamic=None).config)
    except RuntimeError as error:
        message = str(error).split(", known options are")[0]
        raise OptionError(f'options={{"inductor": ...}}: {message}') from None


def uses_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether code that is compiled under ``patches`` runs as CUDA graphs."""
    from torch._inductor import config

    return bool(patches.get(CUDA_GRAPHS, config.triton.cudagraphs))


def overlapping(patches: Mapping[str, Any], passes: Sequence[Any]) -> dict[str, Any]:
    """``patches`` with ``passes`` on Inductor's scheduler that overlap collectives and computation.

    A string in ``passes`` names one of Inductor's own. If the user configured such passes already,
    ``patches`` stays as it is.
    """
    from torch._inductor import config

    key = "reorder_for_compute_comm_overlap"
    if key in patches or getattr(config, key):
        return dict(patches)
    return {**patches, key: True, f"{key}_passes": list(passes)}


def scheduling_of(node: Any) -> tuple[bool, bool, set[str], set[str]]:
    """Whether a scheduler node starts a collective, whether it waits for one, and two sets: the
    buffers it makes and those it needs (without dependencies that only order collectives)."""
    from torch._inductor.utils import contains_collective, contains_wait

    needs = {d.name for d in node.unmet_dependencies if not getattr(d, "is_fake", False)}
    return contains_collective(node), contains_wait(node), {*node.get_buffer_names()}, needs


def compile_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    patches: Mapping[str, Any],
    make_passes: Mapping[
        str, Callable[[tuple[GraphPass, ...]], CustomGraphPass]
    ] = MappingProxyType({}),
    cacheable: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Inductor's ``compile_fx`` under ``patches``.

    ``make_passes`` has a function for each of Inductor's slots for passes on a joint graph, BEFORE
    and AFTER its own passes (such as padding). It gets the passes that the user has configured
    there, and returns the single object to put there (a list of passes crashes torch 2.11).
    ``cacheable`` maps names to version strings that become part of the cache keys: Python functions
    in the graph, which AOTAutograd would otherwise refuse to cache, and whatever else the code
    depends on.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches = dict(patches)
    for slot, make in make_passes.items():
        users = patches.get(slot, getattr(config, slot)) or ()
        patches[slot] = make(tuple(users) if isinstance(users, (list, tuple)) else (users,))
    key = "unsafe_marked_cacheable_functions"
    patches[key] = {**patches.get(key, getattr(config, key)), **(cacheable or {})}
    return cast("Callable[..., Any]", compile_fx(gm, inputs, config_patches=patches))


def sort_topologically(graph: fx.Graph) -> None:
    """Put nodes behind their arguments; the order stays as it is where it may."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def register_inductor_lowering(op: Any, lower: Callable[..., Any]) -> None:
    """Register ``lower`` as the lowering of ``op``.

    It gets a function that lowers an aten call, then the operator's own arguments.
    """
    from torch._inductor.lowering import lowerings, register_lowering

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return lowerings[target](*args, **kwargs)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        return lower(call, *args, **kwargs)

    register_lowering(op, type_promotion_kind=None)(lowering)


def combined_kernels(count: int) -> dict[str, Any]:
    """Config patches that make one Triton kernel of up to ``count`` independent loops.

    Autotuning is off, because it would copy every tensor that the kernel changes. There is no limit
    on peak memory, because torch 2.13 simulates memory and counts it as growth that inputs live
    until their kernel. Options that this torch does not know are left out.
    """
    from torch._inductor import config

    wanted = {
        "combo_kernels": True,
        "combo_kernels_autotune": 0,
        "combo_kernel_max_num_nodes": count,
        "combo_kernel_peak_memory_pct_threshold": None,
        # Otherwise a loop over runs and one over rows of the same memory are not seen as such.
        "loop_ordering_after_fusion": False,
    }
    return {k: v for k, v in wanted.items() if hasattr(config, k)}


def has_triton() -> bool:
    """Whether Inductor can generate Triton code here."""
    from torch.utils._triton import has_triton

    return bool(has_triton())
