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
from grass_fx.ops import ADD_ROWS, DROPPED, along, rounded
from grass_fx.ops.bits import shifted
from grass_fx.optim.rounding import noise
from grass_fx.state.transfers import send
from grass_fx.state.units import run_length

TOGETHER = 8
"""The most weights that one compiled function updates; for 16 Inductor makes several kernels."""

FUNCTIONS = 256
"""The number of compiled functions that a process keeps."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides, dtype and device: what compiled code depends on in a tensor."""

RowsKey = tuple["int | None", int, tuple[Layout, ...]]
"""What compiled code depends on in one weight's :class:`Rows`: their dim, run and layouts."""


@dataclass(frozen=True)
class Rows:
    """One weight's tensors: W and both moments, which change, C, and σ along ``dim``.

    Of a dense parameter everything moves: C is its gradient, and there are no σ and ``dim``.
    """

    w: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    indices: Tensor | None
    compact: Tensor
    dim: int | None
    run: int = 1
    """The length of the runs in which σ comes, which begin at multiples of it."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of :func:`update_function`."""
        every = self.w, self.exp_avg, self.exp_avg_sq, self.compact
        return every if self.indices is None else (*every, self.indices)

    @property
    def key(self) -> RowsKey:
        """What compiled code depends on in these rows."""
        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in self.tensors)
        stride = None if self.dim is None else self.w.stride(self.dim)
        run = run_length(self.run, stride, self.w.itemsize)
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
    rates: Tensor,
    seeds: Sequence[Tensor],
) -> None:
    """Update the moments, then the selected rows, of at most :data:`TOGETHER` weights in place.

    No row may repeat. The computation is in the dtype of ``gains``.
    Δ = m / (√v · gain + floor), with one gain and floor for each selected row, or for all of a
    dense parameter; W[σ] = (1 − lr · λ) · W[σ] + Δ.
    ``rates``: from :func:`rates`. ``seeds``: one of
    ``rounding_seed`` for each weight, or none at all; with seeds, bfloat16 weights are rounded
    stochastically.
    """
    device = gains[0].device
    inputs = [t.detach() for row_set in rows for t in row_set.tensors]
    inputs += [torch.cat([v.flatten() for v in values]) for values in (gains, floors)]
    inputs.append(rates)
    if seeds:
        inputs.append(send(torch.stack(list(seeds)), device))
    function = compiled(tuple(row_set.key for row_set in rows), gains[0].dtype, bool(seeds))
    with torch.no_grad():
        function(*inputs)


def scale_(w: Tensor, factors: Tensor, seed: Tensor) -> None:
    """Multiply a 16-bit W by ``factors``, float32 of (1, n) or (m, 1); round stochastically."""
    inputs = [w.detach(), factors, send(seed, w.device)]
    layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    with torch.no_grad():
        _scaling(layouts)(*inputs)


@lru_cache(maxsize=FUNCTIONS)
def _scaling(layouts: tuple[Layout, ...]) -> Callable[..., Any]:
    def scale(w: Tensor, factors: Tensor, seed: Tensor) -> None:
        w.copy_(rounded(w.float() * factors, noise(seed, w.shape), w.dtype))

    return _generated(scale, layouts)


def move_rest_(
    w: Tensor, factors: Tensor, rates: Tensor, live: Tensor, seed: Tensor, planes: Sequence[Tensor]
) -> None:
    """W = ``factors`` · W + ``rates`` · sign of the ``planes``, where ``live``: see rest.py."""
    inputs = [w.detach(), factors, rates, live, send(seed, w.device), *planes]
    layouts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    with torch.no_grad():
        _moving(layouts)(*inputs)


@lru_cache(maxsize=FUNCTIONS)
def _moving(layouts: tuple[Layout, ...]) -> Callable[..., Any]:
    return _generated(move_rest, layouts)


def move_rest(
    w: Tensor, factors: Tensor, rates: Tensor, live: Tensor, seed: Tensor, *planes: Tensor
) -> None:
    """What :func:`move_rest_` compiles: one loop that reads W and writes it."""
    m, n = w.shape
    votes = torch.zeros((), dtype=torch.int32, device=w.device)
    for power, plane in enumerate(planes):
        votes = votes + shifted(plane, n) * 2**power
    ahead = 2 * votes[:, :-1] - votes[:, -1:]
    signs = ahead.reshape(-1, n)[:m].sign() * live.repeat_interleave(n // live.shape[1], 1)
    moved = w.to(factors.dtype) * factors + signs * rates
    if w.dtype in DROPPED:
        moved = rounded(moved, noise(seed, w.shape), w.dtype)
    w.copy_(moved)


def rates(
    beta1: float, beta2: float, decay: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (1 − β₁, β₂, 1 − β₂, 1 − lr · λ), (4,), for :func:`update_`."""
    values = [1 - beta1, beta2, 1 - beta2, 1 - decay]
    return send(torch.tensor(values, dtype=dtype, device="cpu"), device)


@lru_cache(maxsize=FUNCTIONS)
def compiled(keys: tuple[RowsKey, ...], dtype: torch.dtype, rounds: bool) -> Callable[..., Any]:
    """Return Inductor's code of :func:`update_function` for weights with these keys."""
    function = update_function([key[:2] for key in keys], rounds)
    return _generated(function, layouts(keys, dtype, rounds))


def _generated(function: Callable[..., None], layouts: Sequence[Layout]) -> Callable[..., Any]:
    """Return Inductor's code of a function that changes some of its inputs in place."""
    # Imported here, because both load Inductor.
    from grass_fx import _torch_compat as compat
    from grass_fx.compile import lowering

    lowering.register()
    graph, fakes = compat.trace_static(function, layouts)
    patches, versions = compat.combined_kernels(TOGETHER), {"grass_fx": source_hash()}
    with torch.no_grad():
        return compat.compile_inductor(graph, fakes, patches, cacheable=versions)


def layouts(keys: Sequence[RowsKey], dtype: torch.dtype, rounds: bool) -> list[Layout]:
    """Return the layouts of all inputs of :func:`update_function`."""
    result = [layout for *_, weight_layouts in keys for layout in weight_layouts]
    device = result[0][3]
    total = sum(1 if dim is None else tensors[4][0].numel() for dim, _, tensors in keys)
    for size in (total, total, 4):
        result.append((torch.Size([size]), (1,), dtype, device))
    if rounds:
        result.append((torch.Size([len(keys), 2]), (2, 1), torch.int32, device))
    return result


def update_function(kinds: Sequence[tuple[int | None, int]], rounds: bool) -> Callable[..., None]:
    """Return the update as a function of tensors: :attr:`Rows.tensors` of each weight, then gains,
    floors, :func:`rates` and, if it ``rounds``, seeds (weights, 2).

    ``kinds``: the dim and run of each weight.
    """
    dims, runs = [dim for dim, _ in kinds], [run for _, run in kinds]

    def update(*inputs: Tensor) -> None:
        left = iter(inputs)
        weights = [[next(left) for _ in range(4 if dim is None else 5)] for dim in dims]
        gains, floors, rates = next(left), next(left), next(left)
        seeds = next(left).unbind() if rounds else ()
        first_rate, second_decay, second_rate, kept = rates.unbind()
        moments, changes, start = [], [], 0
        for dim, (w, exp_avg, exp_avg_sq, compact, *indices) in zip(dims, weights, strict=True):
            count = 1 if dim is None else indices[0].numel()
            gain, floor = (
                t[start] if dim is None else along(t.narrow(0, start, count), dim, w.dim())
                for t in (gains, floors)
            )
            start += count
            c, first, second = (t.to(gains.dtype) for t in (compact, exp_avg, exp_avg_sq))
            first = first + (c - first) * first_rate
            second = second * second_decay + c * c * second_rate
            moments.append((exp_avg, first))
            moments.append((exp_avg_sq, second))
            changes.append(first / (second.sqrt() * gain + floor))
        bits = [noise(seed, changes[k].shape) for k, seed in enumerate(seeds)]
        selected = [k for k, dim in enumerate(dims) if dim is not None]
        if selected:
            ws, indices = ([weights[k][j] for k in selected] for j in (0, 4))
            of = [changes[k] for k in selected], [bits[k] for k in selected if bits]
            where = [dim for dim in dims if dim is not None], [runs[k] for k in selected]
            ADD_ROWS(ws, indices, *of, *where, kept)
        for k, dim in enumerate(dims):
            if dim is None:
                (w, *_), change = weights[k], changes[k]
                wide = w.to(change.dtype) * kept + change
                w.copy_(rounded(wide, bits[k]) if bits else wide)
        for moment, value in moments:
            moment.copy_(value)

    return update
