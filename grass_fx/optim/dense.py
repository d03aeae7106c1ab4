"""Steps dense parameters exactly as torch's own AdamW does, to the last bit; or, in bfloat16, with
the result rounded stochastically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grass_fx.optim import compiled
from grass_fx.optim.rounding import parts_of, round_stochastically
from grass_fx.state.transfers import send


def count_as_torch(steps: Any, p: Tensor, fused: bool) -> Tensor:
    """``steps`` as torch's AdamW keeps them: a tensor of the device and dtype that it requires."""
    if fused:
        return torch.as_tensor(steps, dtype=torch.float32, device=p.device)
    if isinstance(steps, Tensor):
        return steps
    exact = torch.get_default_dtype() == torch.float64
    return torch.tensor(float(steps), dtype=torch.float64 if exact else torch.float32, device="cpu")


def step_as_torch(
    params: Any, grads: Any, firsts: Any, seconds: Any, steps: Any, group: Mapping[str, Any]
) -> None:
    """Make one step of torch's AdamW with the options of ``group``, on lists of equal length."""
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        firsts,
        seconds,
        [],
        steps,
        amsgrad=False,
        maximize=bool(group["maximize"]),
        has_complex=any(map(torch.is_complex, params)),
        beta1=beta1,
        beta2=beta2,
        **{k: group[k] for k in ("lr", "eps", "weight_decay", "foreach", "fused")},
    )


@dataclass(frozen=True)
class Rounded:
    """A dense bfloat16 parameter in one step: its tensors, torch's count, and the noise's seed."""

    w: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    seed: Tensor

    @property
    def rows(self) -> compiled.Rows:
        """What generated code changes and reads."""
        return compiled.Rows(self.w, self.exp_avg, self.exp_avg_sq, None, self.grad, None)


def rounded_operations(
    params: Mapping[Tensor, Rounded], group: Mapping[str, Any]
) -> Iterator[tuple[Callable[[], Any], tuple[Tensor, ...]]]:
    """Make torch's AdamW step in float32 and round the parameters stochastically, part by part.

    Yields functions that change nothing if they fail, and the parameters that each completes. Code
    that Inductor generates does it if the group's ``compile`` says so, else torch's own step does
    it on copies of parts.
    """
    generated = [p for p in params if compiled.compiles(group["compile"], p.device)]
    yield from _generated(generated, [params[p] for p in generated], group)
    for p, one in params.items():
        if compiled.compiles(group["compile"], p.device):
            continue
        for rows, first in parts_of(one.w):
            yield partial(_step_part, one, rows, first, {**group, "fused": None}), ()
        yield partial(one.step.add_, 1), (p,)


def _step_part(one: Rounded, rows: Any, first: int, group: Mapping[str, Any]) -> None:
    stored = [t[rows] for t in (one.w, one.grad, one.exp_avg, one.exp_avg_sq)]
    w, grad, m, v = (t.float() for t in stored)
    step_as_torch([w], [grad], [m], [v], [one.step.clone()], group)
    w = round_stochastically(w, one.seed, first=first)
    for kept, new in zip((stored[0], *stored[2:]), (w, m, v), strict=True):
        kept.copy_(new)


def _generated(
    params: Sequence[Tensor], steps: Sequence[Rounded], group: Mapping[str, Any]
) -> Iterator[tuple[Callable[[], Any], tuple[Tensor, ...]]]:
    known: dict[str, Tensor] = {}
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]

    def prepare() -> None:
        device = params[0].device
        count = torch.stack([one.step for one in steps]).double().add_(1)
        f = -lr / (1 - beta1**count)
        factors = torch.stack([(1 - beta2**count).rsqrt() / f, group["eps"] / f]).float()
        known["gains"], known["floors"] = send(factors, device)
        known["rates"] = compiled.rates(
            beta1, beta2, lr * group["weight_decay"], torch.float32, device
        )

    def update(places: Sequence[int]) -> None:
        chosen = [steps[k] for k in places]
        gains, floors = ([known[name][k] for k in places] for name in ("gains", "floors"))
        rows = [one.rows for one in chosen]
        compiled.update_(rows, gains, floors, known["rates"], [one.seed for one in chosen])
        torch._foreach_add_([one.step for one in chosen], 1)

    if params:
        yield prepare, ()
    for places in compiled.together([one.rows.key for one in steps]):
        yield partial(update, places), tuple(params[k] for k in places)
