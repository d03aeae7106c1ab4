"""Inductor's kernels, for use inside a lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor


def realized(*values: Any) -> list[Any]:
    """Turn IR values into buffers that a kernel can read; views of buffers stay views."""
    from torch._inductor.ir import ExternKernel

    return [ExternKernel.realize_input(value) for value in values]


def library_call(op: Any, *args: Any) -> Any:
    """Compute an operator with torch's own kernel instead of one that Inductor generates."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def is_multiple(expr: Any, of: int) -> bool:
    """Whether a size is a multiple of ``of`` for all values of its symbols."""
    from torch._inductor.virtualized import V

    return bool(V.graph.sizevars.statically_known_multiple_of(expr, of))


def size_hint(expr: Any) -> int:
    """The value of a size in the example inputs; adds no guard."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(expr, fallback=8192))


def tuning_everything() -> bool:
    """Whether Inductor measures its choices of kernels (``mode="max-autotune"``)."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


@cache
def triton_template(name: str, source: str) -> Any:
    """An Inductor template; cached, because its name must be unique in a process.

    The grid's first axis counts tiles of (m, n), its second SPLIT_K.
    """
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    @SymbolicGridFn
    def grid(m: Any, n: Any, meta: Mapping[str, int], *, cdiv: Any) -> Any:
        return cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), meta["SPLIT_K"], 1

    return TritonTemplate(name=name, grid=grid, source=source)


@cache
def extern_kernel(kernel: Callable[..., Any]) -> Any:
    """A Python function with ``out=`` as a choice for autotuning, beside templates."""
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
    """The output of the fastest choice; if there is only one, nothing is measured.

    ``grid`` is (m, n), by default the last two of ``size``. ``examples`` maps an input's position
    to a function that makes a tensor to measure with, because Inductor fills integers with zeros.
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
    makers = {k: lambda _, make=make: make() for k, make in (examples or {}).items()} or None
    result = autotune_select_algorithm(name, choices, list(inputs), layout, input_gen_fns=makers)
    return result[0] if isinstance(result, tuple) else result  # a tuple since torch 2.12


def in_runs(size: Sequence[Any], dim: int, run: int) -> list[Any]:
    """``size`` with two dimensions for ``dim``, runs and their elements; as it is for runs of 1."""
    return [*size] if run == 1 else [*size[:dim], size[dim] // run, run, *size[dim + 1 :]]


def _place_of(w: Any, indices: Any, dim: int, run: int) -> Callable[[Sequence[Any]], list[Any]]:
    """Where in W an element of W[σ] is; W[σ] is :func:`in_runs`.

    With runs the index is the number of a run times its length, plus the place in it. So Triton
    sees that threads side by side access elements side by side, and makes vectors of them.
    """
    from torch._inductor.virtualized import ops

    load, size = indices.make_loader(), w.get_size()[dim]

    def row(index: Sequence[Any]) -> list[Any]:
        at = ops.indirect_indexing(load([index[dim]]), size, wrap_neg=False)
        return [*index[:dim], at, *index[dim + 1 :]]

    def element(index: Sequence[Any]) -> list[Any]:
        first = load([index[dim] * run])
        number = ops.truncdiv(first, ops.constant(run, indices.get_dtype()))
        at = ops.indirect_indexing(number, size // run, wrap_neg=False)
        return [*index[:dim], at * run + index[dim + 1], *index[dim + 2 :]]

    return row if run == 1 else element


def get_rows(w: Any, indices: Any, dim: int, run: int = 1) -> Any:
    """W[σ], :func:`in_runs`, as a value that is computed in the loop which uses it."""
    from torch._inductor import ir

    load, place = w.make_loader(), _place_of(w, indices, dim, run)
    size = [*w.get_size()[:dim], *indices.get_size(), *w.get_size()[dim + 1 :]]
    return ir.Pointwise.create(
        device=w.get_device(),
        dtype=w.get_dtype(),
        inner_fn=lambda index: load(place(index)),
        ranges=in_runs(size, dim, run),
    )


def put_rows(w: Any, indices: Any, rows: Any, dim: int, run: int = 1) -> None:
    """Lower W[σ] = rows, in place, to one loop that computes and stores the rows; σ has no repeats.

    ``rows`` are :func:`in_runs`. Unlike the lowering of ``index_put_``, it lets them read W[σ]
    within that loop. Other readers of W were lowered before; the layout's constructor makes sure
    that they run first.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    w.realize()
    layout = ir.MutationLayoutSHOULDREMOVE(w)
    scatter = ir.Scatter(
        device=w.get_device(),
        dtype=w.get_dtype(),
        inner_fn=rows.make_loader(),
        ranges=list(rows.get_size()),
        output_indexer=_place_of(w, indices, dim, run),
    )
    buffer = ir.ComputedBuffer(name=None, layout=layout, data=scatter)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
