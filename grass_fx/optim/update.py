"""The subspace update of docs/method.md, as free functions.

Shapes, for side "out" (dim 0; dim 1 transposed): W (m, n); C and both moments (r, n); σ, ρ and the
ages (r,). Each row has its own age, the number of steps since it was last new. No function here
makes a temporary of W's shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grass_fx.ops import along
from grass_fx.optim import compiled
from grass_fx.optim.rows import add_to_rows_, put_rows_, rows_of
from grass_fx.state.selection import Selection

EXACT = (torch.float32, torch.float64)
"""Weights of these dtypes are updated in their own dtype, all others in float32."""

FUSED_ON = ("cpu", "cuda")
"""The devices on which torch's fused AdamW is used."""


AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""About how many selected elements of less than 32 bits eager code steps together, in float32: few
on a CPU, so that W is still in its cache when it is written."""


@dataclass(frozen=True)
class CompactStep:
    """One taken weight in one step: C, and what changes in place: W, moments and ages."""

    w: Tensor
    compact: Tensor
    selection: Selection
    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: Tensor
    common_age: int | None = None
    """The age of all rows, if they have the same age and it is known on the host."""
    scale: float = 1.0
    """α."""
    seed: Tensor | None = None
    """If given, a bfloat16 W is rounded stochastically with the noise of this seed."""


def in_code(compile: bool | None, selection: Selection, lr: float, device: torch.device) -> bool:
    """Whether code that Inductor generates steps the rows on ``device``."""
    # At lr = 0 only the moments advance, which is not worth compiling.
    return selection.scale is None and lr != 0 and compiled.compiles(compile, device)


def warmup(age: Tensor, warmup_steps: int) -> Tensor:
    """min(1, age / warmup_steps) of each row, age counted from 1; ones if ``warmup_steps`` is 0."""
    age = age.double()
    return torch.ones_like(age) if warmup_steps == 0 else (age / warmup_steps).clamp(max=1)


Part = tuple[Callable[[], None], Sequence[CompactStep]]
"""A part of an update that changes nothing if it fails, and the weights it completes."""


def adam_update_(steps: Iterable[CompactStep], **settings: Any) -> None:
    """W[σ] −= lr · (α · ρ · warm-up · Adam(C) + λ · W[σ]), in place: :func:`adam_operations`."""
    for run, _ in adam_operations(steps, **settings):
        run()


def adam_operations(
    steps: Iterable[CompactStep],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    warmup_steps: int,
    compile: bool | None = False,
) -> Iterator[Part]:
    """The update W[σ] −= lr · (α · ρ · warm-up · Adam(C) + λ · W[σ]), in parts.

    Equation 4; the changes of a repeated row add. Bias correction counts from each row's own start.
    Weight decay is decoupled, without α and warm-up; rows that are not selected decay elsewhere
    (``decay.py``). The ages advance by one. Weights alike in dtype, device and α step together.
    Compiled code does this if ``compile`` says so and no row repeats. Otherwise torch's fused
    kernel does it if all rows have one age. All others go through :func:`_advance`.
    """
    batches = defaultdict(list)
    for step in steps:
        generated = in_code(compile, step.selection, lr, step.w.device)
        fused = not generated and step.selection.scale is None and step.w.device.type in FUSED_ON
        age = step.common_age if fused else None
        kind = step.w.dtype, step.w.device, step.scale, age, generated, step.seed is not None
        batches[kind].append(step)
    decay = lr * weight_decay
    for (dtype, _, scale, age, generated, _), batch in batches.items():
        factors = partial(_row_factors, lr * scale, beta1, beta2, eps, warmup_steps)
        if generated:
            yield from _compiled(batch, factors, beta1, beta2, decay)
        elif age is None:
            advance = partial(_advance, factors, beta1, beta2, lr != 0)
            yield from _advance_and_move(batch, advance, partial(add_rows_, decay=decay))
        else:
            rate = lr * scale * (min(1.0, (age + 1) / warmup_steps) if warmup_steps else 1.0)
            exact = dtype in EXACT
            advance = partial(_advance_fused, age, rate, beta1, beta2, eps, decay, exact)
            yield from _advance_and_move(batch, advance, add_rows_ if exact else _put_rows)


def _advance_and_move(
    batch: Sequence[CompactStep],
    advance: Callable[[Sequence[CompactStep]], list[Tensor]],
    move: Callable[[Tensor, Selection, Tensor, Tensor | None], None],
) -> Iterator[Part]:
    """First advance moments and ages, which gives what to ``move`` each W by; then move them."""
    held: list[Tensor] = []

    def move_next(step: CompactStep) -> None:
        if held:
            move(step.w, step.selection, held[0], step.seed)
            del held[0]

    def advance_all(steps: Sequence[CompactStep]) -> None:
        held.extend(advance(steps))

    for steps in _some_at_a_time(batch):
        yield partial(advance_all, steps), ()
        for step in steps:
            yield partial(move_next, step), (step,)


def _some_at_a_time(batch: Sequence[CompactStep]) -> Iterator[Sequence[CompactStep]]:
    if batch[0].w.dtype in EXACT:
        yield batch
        return
    some: list[CompactStep] = []
    most = AT_ONCE.get(batch[0].w.device.type, 1)
    for step in batch:
        some.append(step)
        if sum(one.compact.numel() for one in some) >= most:
            yield some
            some = []
    if some:
        yield some


def _advance_fused(
    age: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    as_changes: bool,
    batch: Sequence[CompactStep],
) -> list[Tensor]:
    """For rows of one age: torch's AdamW turns −``decay`` · W[σ] into Δ, or W[σ] into its new rows.

    If these are to be rounded stochastically, all is done in float32.
    """
    compacts, firsts, seconds = (
        [getattr(step, name) for step in batch] for name in ("compact", "exp_avg", "exp_avg_sq")
    )
    if as_changes and not decay:
        rows = [torch.zeros_like(compact) for compact in compacts]
    else:
        rows = [rows_of(step.w, step.selection.indices, step.selection.dim) for step in batch]
    if widened := batch[0].seed is not None:
        rows, compacts, firsts, seconds = (
            [t.float() for t in tensors] for tensors in (rows, compacts, firsts, seconds)
        )
    if decay:
        torch._foreach_mul_(rows, -decay if as_changes else 1 - decay)
    steps = torch.full(
        (len(batch),), float(age), dtype=torch.float32, device=batch[0].w.device
    ).unbind()  # the GPU's kernel reads them as float32, whatever their dtype
    adamw(
        rows,
        compacts,
        firsts,
        seconds,
        [],
        list(steps),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    if widened:
        _store(batch, firsts, seconds)
    torch._foreach_add_([step.age for step in batch], 1)
    return rows


def _store(
    batch: Sequence[CompactStep], firsts: Sequence[Tensor], seconds: Sequence[Tensor]
) -> None:
    """Copy moments that were computed in a wider dtype to where they are kept."""
    for step, first, second in zip(batch, firsts, seconds, strict=True):
        step.exp_avg.copy_(first)
        step.exp_avg_sq.copy_(second)


def _row_factors(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    warmup_steps: int,
    batch: Sequence[CompactStep],
) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's gain and floor: Δ = m / (√v · gain + floor). Ages do not count this step yet.

    ``lr`` includes α. With f = −lr · ρ · warm-up / (1 − β₁^age), Adam's
    Δ = f · m / (√v / √(1 − β₂^age) + ε) has
    gain = 1 / (f √(1 − β₂^age)) and floor = ε / f. All rows of the batch are computed at once.
    """
    ages = torch.cat([step.age for step in batch]).double().add_(1)
    f = warmup(ages, warmup_steps) / (1 - beta1**ages) * -lr
    if any(step.selection.scale is not None for step in batch):
        f = f * torch.cat([
            torch.ones_like(step.age, dtype=f.dtype)
            if step.selection.scale is None else step.selection.scale
            for step in batch
        ])  # fmt: skip
    dtype = torch.promote_types(batch[0].w.dtype, torch.float32)
    sizes = [step.age.numel() for step in batch]

    def per_weight(values: Tensor) -> list[Tensor]:
        parts = values.to(dtype).split(sizes)
        return [along(v, s.selection.dim, s.w.dim()) for v, s in zip(parts, batch, strict=True)]

    return per_weight((1 - beta2**ages).rsqrt() / f), per_weight(eps / f)


Factors = Callable[[Sequence[CompactStep]], tuple[list[Tensor], list[Tensor]]]
""":func:`_row_factors` with its settings fixed."""


def _compiled(
    batch: Sequence[CompactStep], factors: Factors, beta1: float, beta2: float, decay: float
) -> Iterator[Part]:
    """Do what :func:`_advance` does and move W, in compiled code; all are rounded or none."""
    rows = [
        compiled.Rows(s.w, s.exp_avg, s.exp_avg_sq, on.indices, s.compact, on.dim, on.run)
        for s in batch
        for on in (s.selection,)
    ]
    known: dict[str, Any] = {}

    def prepare() -> None:
        gains, floors = factors(batch)
        rates = compiled.rates(beta1, beta2, decay, gains[0].dtype, gains[0].device)
        known.update(gains=gains, floors=floors, rates=rates)

    def update(places: Sequence[int]) -> None:
        def of(name: str) -> list[Tensor]:
            return [known[name][k] for k in places]

        chosen = [rows[k] for k in places]
        seeds = [seed for k in places if (seed := batch[k].seed) is not None]
        compiled.update_(chosen, of("gains"), of("floors"), known["rates"], seeds)

    yield prepare, ()
    for places in compiled.together([each.key for each in rows]):
        yield partial(update, places), ()
    yield lambda: torch._foreach_add_([step.age for step in batch], 1), batch


def _advance(
    factors: Factors, beta1: float, beta2: float, moves: bool, batch: Sequence[CompactStep]
) -> list[Tensor]:
    """Advance moments and ages; return each weight's Δ, or none if nothing ``moves`` (lr = 0)."""
    gains, floors = factors(batch)
    dtype = gains[0].dtype
    compacts = [step.compact.to(dtype) for step in batch]
    firsts = [step.exp_avg.to(dtype) for step in batch]
    seconds = [step.exp_avg_sq.to(dtype) for step in batch]
    changes = [torch.empty_like(moment) for moment in seconds] if moves else []
    # From here on nothing allocates memory, so nothing fails for lack of it.
    torch._foreach_lerp_(firsts, compacts, 1 - beta1)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_addcmul_(seconds, compacts, compacts, 1 - beta2)
    if batch[0].exp_avg.dtype != dtype:
        _store(batch, firsts, seconds)
    torch._foreach_add_([step.age for step in batch], 1)
    for second, change in zip(seconds, changes, strict=False):
        torch.sqrt(second, out=change)
    if moves:
        torch._foreach_mul_(changes, list(gains))
        torch._foreach_add_(changes, list(floors))
    for first, change in zip(firsts, changes, strict=False):
        torch.div(first, change, out=change)
    return changes


def add_rows_(
    w: Tensor,
    selection: Selection,
    change: Tensor,
    seed: Tensor | None = None,
    decay: float = 0.0,
) -> None:
    """W[σ] = (1 − ``decay``) · W[σ] + Δ, in place; the changes of a repeated row add.

    If Δ has a wider dtype than W, the sum is rounded once: to nearest, or stochastically with the
    noise of ``seed``.
    """
    if selection.scale is not None:  # rows repeat only with replacement
        selection, change = _combined(selection, change)
    add_to_rows_(w, selection.indices, change, selection.dim, decay, seed)


def _put_rows(w: Tensor, selection: Selection, rows: Tensor, seed: Tensor | None) -> None:
    put_rows_(w, selection.indices, rows, selection.dim, seed)


def _combined(selection: Selection, change: Tensor) -> tuple[Selection, Tensor]:
    """Each row once, with the sum of its changes: equal to the last bit on every process."""
    dim = selection.dim
    indices, place = selection.indices.unique(return_inverse=True)
    shape = list(change.shape)
    shape[dim] = indices.numel()
    total = change.new_zeros(shape)
    if total.is_cuda:  # whose index_add_ adds repeated rows in any order
        _add_in_order(total, dim, place, change)
    else:
        total.index_add_(dim, place, change)
    return replace(selection, indices=indices, scale=None), total


def _add_in_order(into: Tensor, dim: int, places: Tensor, change: Tensor) -> None:
    rows, added = (into, change) if dim == 0 else (into.t(), change.t())
    rows.index_put_((places,), added, accumulate=True)
