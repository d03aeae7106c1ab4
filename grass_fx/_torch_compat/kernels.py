"""Inductor's kernels, for use inside a lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor


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
