"""The subspace AdamW update as code that Inductor generates.

Moments, change, gather, sum, stochastic rounding and scatter are one loop for each weight. On a GPU
the loops of up to :data:`TOGETHER` weights are one Triton kernel. Learning rates, decay rates and
seeds are inputs, so only new shapes cause a compilation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grass_fx.compile.sources import source_hash
from grass_fx.ops import ADD_ROWS, along
from grass_fx.optim.rounding import noise
from grass_fx.state.transfers import send
from grass_fx.state.units import run_length

TOGETHER = 8
"""The most weights that one compiled function updates; for 16 Inductor makes several kernels."""

FUNCTIONS = 256
"""The number of compiled functions that a process keeps."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides, dtype and device: what compiled code depends on in a tensor."""

RowsKey = tuple[int, int, tuple[Layout, ...]]
"""What compiled code depends on in one weight's :class:`Rows`: their dim, run and layouts."""


@dataclass(frozen=True)
class Rows:
    """One weight's tensors: W and both moments, which change, σ along ``dim``, and C."""

    w: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    indices: Tensor
    compact: Tensor
    dim: int
    run: int = 1
    """The length of the runs in which σ comes, which begin at multiples of it."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of :func:`update_function`."""
        return self.w, self.exp_avg, self.exp_avg_sq, self.indices, self.compact

    @property
    def key(self) -> RowsKey:
        """What compiled code depends on in these rows."""
        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in self.tensors)
        run = run_length(self.run, self.w.stride(self.dim), self.w.itemsize)
        return self.dim, run, layouts


def compiles(compile: bool | None, device: torch.device) -> bool:
    """Whether compiled code updates rows on ``device``; None: only on a GPU that has Triton."""
    if compile is not None or device.type != "cuda":
        return bool(compile)
    from grass_fx import _torch_compat as compat

    return compat.has_triton()


def together(keys: Sequence[RowsKey]) -> Iterator[list[int]]:
    """Yield the positions in ``keys`` of the rows that one function updates together.

    Rows with equal keys are grouped as far as possible, so that the layers of a model share a
    function. The leftovers of all keys are grouped together.
    """
    alike = defaultdict(list)
    for k, key in enumerate(keys):
        alike[key].append(k)
    left = []
    for places in alike.values():
        full = len(places) // TOGETHER * TOGETHER
        for k in range(0, full, TOGETHER):
            yield places[k : k + TOGETHER]
        left += places[full:]
    for k in range(0, len(left), TOGETHER):
        yield left[k : k + TOGETHER]


def update_(
    rows: Sequence[Rows],
    gains: Sequence[Tensor],
    floors: Sequence[Tensor],
    decay: Tensor,
    seeds: Sequence[Tensor],
) -> None:
    """Update the moments, then the selected rows, of at most :data:`TOGETHER` weights in place.

    No row may repeat. The computation is in the dtype of ``gains``.
    Δ = m / (√v · gain + floor), with one gain and floor for each selected row. ``seeds``: one of
    ``draw_seed`` for each weight, or none at all; with seeds, bfloat16 weights are rounded
    stochastically.
    """
    device = gains[0].device
    inputs = [t.detach() for row_set in rows for t in row_set.tensors]
    inputs += [torch.cat([v.flatten() for v in values]) for values in (gains, floors)]
    inputs.append(decay)
    if seeds:
        inputs.append(send(torch.stack(list(seeds)), device))
    function = compiled(tuple(row_set.key for row_set in rows), gains[0].dtype, bool(seeds))
    with torch.no_grad():
        function(*inputs)


def decay_rates(beta1: float, beta2: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (1 − β₁, β₂, 1 − β₂), (3,), for :func:`update_`."""
    return send(torch.tensor([1 - beta1, beta2, 1 - beta2], dtype=dtype, device="cpu"), device)


@lru_cache(maxsize=FUNCTIONS)
def compiled(keys: tuple[RowsKey, ...], dtype: torch.dtype, rounds: bool) -> Callable[..., Any]:
    """Return Inductor's code of :func:`update_function` for weights with these keys."""
    # Imported here, because both load Inductor.
    from grass_fx import _torch_compat as compat
    from grass_fx.compile import lowering

    lowering.register()
    graph, fakes = compat.trace_static(
        update_function([key[:2] for key in keys], rounds), layouts(keys, dtype, rounds)
    )
    patches, versions = compat.combined_kernels(TOGETHER), {"grass_fx": source_hash()}
    with torch.no_grad():
        return compat.compile_inductor(graph, fakes, patches, cacheable=versions)


def layouts(keys: Sequence[RowsKey], dtype: torch.dtype, rounds: bool) -> list[Layout]:
    """Return the layouts of all inputs of :func:`update_function`."""
    result = [layout for *_, weight_layouts in keys for layout in weight_layouts]
    device = result[0][3]
    total = sum(indices[0].numel() for *_, (_, _, _, indices, _) in keys)
    for size in (total, total, 3):
        result.append((torch.Size([size]), (1,), dtype, device))
    if rounds:
        result.append((torch.Size([len(keys), 2]), (2, 1), torch.int32, device))
    return result


def update_function(kinds: Sequence[tuple[int, int]], rounds: bool) -> Callable[..., None]:
    """Return the update as a function of tensors: :attr:`Rows.tensors` of each weight, then gains,
    floors, (1 − β₁, β₂, 1 − β₂) and, if it ``rounds``, seeds (weights, 2).

    ``kinds``: the dim and run of each weight.
    """
    dims, runs = [dim for dim, _ in kinds], [run for _, run in kinds]

    def update(*inputs: Tensor) -> None:
        gains, floors, decay = inputs[5 * len(dims) : 5 * len(dims) + 3]
        first_rate, second_decay, second_rate = decay.unbind()
        weights = [inputs[5 * k : 5 * k + 5] for k in range(len(dims))]
        moments, changes, start = [], [], 0
        for dim, (w, exp_avg, exp_avg_sq, indices, compact) in zip(dims, weights, strict=True):
            part = start, indices.numel()
            gain, floor = (along(t.narrow(0, *part), dim, w.dim()) for t in (gains, floors))
            start += indices.numel()
            c, first, second = (t.to(gains.dtype) for t in (compact, exp_avg, exp_avg_sq))
            first = first + (c - first) * first_rate
            second = second * second_decay + c * c * second_rate
            moments.append((exp_avg, first))
            moments.append((exp_avg_sq, second))
            changes.append(first / (second.sqrt() * gain + floor))
        seeds = inputs[-1].unbind() if rounds else ()
        bits = [noise(seed, changes[k].shape) for k, seed in enumerate(seeds)]
        ADD_ROWS([w[0] for w in weights], [w[3] for w in weights], changes, bits, dims, runs)
        for moment, value in moments:
            moment.copy_(value)

    return update
