"""The subspace update of docs/method.md, as free functions.

Shapes, for side "out" (dim 0; dim 1 transposed): W (m, n); C and both moments (r, n); σ, ρ and the
ages (r,). Each row has its own age, the number of steps since it was last new. No function here
makes a temporary of W's shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grass_fx.ops import PART, along
from grass_fx.optim import compiled
from grass_fx.optim.rounding import draw_seed, round_stochastically
from grass_fx.state.selection import Selection

FUSED_ON = ("cpu", "cuda")
"""The devices on which torch's fused AdamW is used."""


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
    rounding: torch.Generator | None = None
    """If given, a bfloat16 W is rounded stochastically with random numbers from here."""


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
    """W[σ] −= lr · α · ρ · warm-up · Adam(C), in place; settings: see :func:`adam_operations`."""
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
    scale: float,
    warmup_steps: int,
    compile: bool | None = False,
) -> Iterator[Part]:
    """The update W[σ] −= lr · α · ρ · warm-up · Adam(C) (equation 4; repeated rows add), in parts.

    Bias correction counts from each row's own start. Weight decay is decoupled: lr · λ on the whole
    W, without α and warm-up. The ages advance by one. Weights of one dtype and device are stepped
    together. Compiled code does this if ``compile`` says so and no row repeats. Otherwise torch's
    fused kernel does it if all rows have one age. All others go through :func:`_advance`, in
    float32 and one by one if the weights have less than 32 bits.
    """
    batches = defaultdict(list)
    for step in steps:
        generated = in_code(compile, step.selection, lr, step.w.device)
        plain = not generated and step.rounding is None and step.w.device.type in FUSED_ON
        age = step.common_age if plain else None
        rounds = generated and step.rounding is not None
        batches[step.w.dtype, step.w.device, age, generated, rounds].append(step)
    for (dtype, _, age, generated, _), batch in batches.items():
        decay = 1 - lr * weight_decay
        if age is not None:
            warm = min(1.0, (age + 1) / warmup_steps) if warmup_steps else 1.0
            fused = partial(_advance_fused, age, lr * scale * warm, beta1, beta2, eps)
            yield from _advance_and_move(batch, fused, decay)
            continue
        factors = partial(_row_factors, lr, beta1, beta2, eps, scale, warmup_steps)
        if generated:
            yield from _compiled(batch, factors, beta1, beta2, decay)
            continue
        exact = dtype in (torch.float32, torch.float64)
        size = len(batch) if exact else 1
        advance = partial(_advance, factors, beta1, beta2, lr != 0)
        for k in range(0, len(batch), size):
            yield from _advance_and_move(batch[k : k + size], advance, decay)


def _advance_and_move(
    batch: Sequence[CompactStep],
    advance: Callable[[Sequence[CompactStep]], list[Tensor]],
    decay: float,
) -> Iterator[Part]:
    """First advance all moments and ages, which gives each weight's Δ; then move W by weight."""
    changes: list[Tensor] = []

    def move(step: CompactStep) -> None:
        if changes:
            add_rows_(step.w, step.selection, changes[0], step.rounding)
            del changes[0]

    yield lambda: changes.extend(advance(batch)), ()
    yield partial(_decay, batch, decay), ()
    for step in batch:
        yield partial(move, step), (step,)


def _decay(batch: Sequence[CompactStep], factor: float) -> None:
    """Multiply each W of the batch by ``factor``; round stochastically where the step does."""
    if factor == 1:
        return
    if plain := [step.w for step in batch if step.rounding is None]:
        torch._foreach_mul_(plain, factor)
    for step in batch:
        if step.rounding is None:
            continue
        size = min(PART, step.w.numel() // 8)  # numbers in float32 at a time
        for part in step.w.split(max(1, size // step.w.shape[1])):
            part.copy_(round_stochastically(part.float() * factor, step.rounding))


def _advance_fused(
    age: int, lr: float, beta1: float, beta2: float, eps: float, batch: Sequence[CompactStep]
) -> list[Tensor]:
    """For rows of one age: torch's AdamW on zeros of C's shape turns them into Δ."""
    changes = [torch.zeros_like(step.compact) for step in batch]
    steps = torch.full(
        (len(batch),), float(age), dtype=torch.float32, device=batch[0].w.device
    ).unbind()  # the GPU's kernel reads them as float32, whatever their dtype
    adamw(
        changes,
        [step.compact for step in batch],
        [step.exp_avg for step in batch],
        [step.exp_avg_sq for step in batch],
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
    torch._foreach_add_([step.age for step in batch], 1)
    for step, change in zip(batch, changes, strict=True):
        if step.selection.scale is not None:
            change.mul_(along(step.selection.scale, step.selection.dim, change.dim()))
    return changes


def _row_factors(
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
    warmup_steps: int,
    batch: Sequence[CompactStep],
) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's gain and floor: Δ = m / (√v · gain + floor). Ages do not count this step yet.

    With f = −lr · α · ρ · warm-up / (1 − β₁^age), Adam's Δ = f · m / (√v / √(1 − β₂^age) + ε) has
    gain = 1 / (f √(1 − β₂^age)) and floor = ε / f. All rows of the batch are computed at once.
    """
    ages = torch.cat([step.age for step in batch]).double().add_(1)
    f = warmup(ages, warmup_steps) / (1 - beta1**ages) * (-lr * scale)
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
        rates = compiled.decay_rates(beta1, beta2, gains[0].dtype, gains[0].device)
        known.update(gains=gains, floors=floors, rates=rates)

    def draw() -> None:
        known["seeds"] = [draw_seed(s.rounding) for s in batch if s.rounding is not None]

    def update(places: Sequence[int]) -> None:
        def of(name: str) -> list[Tensor]:
            return [known[name][k] for k in places] if known[name] else []

        chosen = [rows[k] for k in places]
        compiled.update_(chosen, of("gains"), of("floors"), known["rates"], of("seeds"))

    yield prepare, ()
    yield partial(_decay, batch, decay), ()
    yield draw, ()
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
    for step, first, second in zip(batch, firsts, seconds, strict=True):
        if step.exp_avg.dtype != dtype:
            step.exp_avg.copy_(first)
            step.exp_avg_sq.copy_(second)
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
    w: Tensor, selection: Selection, change: Tensor, rounding: torch.Generator | None = None
) -> None:
    """W[σ] += Δ, in place; repeated rows add.

    If Δ has a wider dtype than W, the sum is rounded once: to nearest, or stochastically with
    random numbers from ``rounding``.
    """
    dim, indices = selection.dim, selection.indices
    if change.dtype == w.dtype:
        # Without alpha: with it, a CPU takes thirty times as long along columns.
        _add_at(w, selection, indices, change)
        return
    if selection.scale is not None:  # rows repeat only with replacement
        indices, place = indices.unique(return_inverse=True)
        shape = list(change.shape)
        shape[dim] = indices.numel()
        change = _add_at(change.new_zeros(shape), selection, place, change)
    rows = w.index_select(dim, indices).to(change.dtype).add_(change)
    if rounding is not None and w.dtype == torch.bfloat16:
        rows = round_stochastically(rows, rounding)
    w.index_copy_(dim, indices, rows.to(w.dtype))


def _add_at(into: Tensor, selection: Selection, places: Tensor, change: Tensor) -> Tensor:
    """``into[places] += change``, equal to the last bit on every process that does it.

    Places repeat only with replacement. A GPU's index_add_ adds repeated ones in any order.
    """
    if into.is_cuda and selection.scale is not None:
        return _add_in_order(into, selection.dim, places, change)
    return into.index_add_(selection.dim, places, change)


def _add_in_order(into: Tensor, dim: int, places: Tensor, change: Tensor) -> Tensor:
    rows, added = (into, change) if dim == 0 else (into.t(), change.t())
    rows.index_put_((places,), added, accumulate=True)
    return into
