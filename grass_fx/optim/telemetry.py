"""Reports metrics of the taken weights of a training run, as plain numbers (docs/telemetry.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from grass_fx.ops import along
from grass_fx.optim.update import warmup
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection
from grass_fx.state.subspace import Subspace


def taken(parameters: Iterable[Tensor]) -> dict[str, tuple[Tensor, Subspace]]:
    """The parameters that have a subspace, by name; a repeated name also gets the index."""
    found: dict[str, tuple[Tensor, Subspace]] = {}
    for index, p in enumerate(parameters):
        subspace = registry.get(p)
        if subspace is not None:
            name = registry.name_of(p)
            found[f"{name} ({index})" if name in found else name] = p, subspace
    return found


def stats_of(
    parameters: Iterable[Tensor], update_norm: Callable[[Tensor], Tensor | None]
) -> dict[str, dict[str, float]]:
    """Return the metrics of each taken weight; reads each device once.

    ``update_norm``: returns the norm of a parameter's last update, () on its device, or None.
    """
    result: dict[str, dict[str, float]] = {}
    waiting: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, (p, subspace) in taken(parameters).items():
        history = subspace.history
        result[name] = {
            "age": float(subspace.step - history.drawn),
            "coverage": history.coverage,
        }
        if history.overlap is not None:
            result[name]["overlap"] = history.overlap
        if history.captured is not None:
            result[name]["captured"] = history.captured
        norm = update_norm(p)
        if norm is not None:
            waiting[norm.device].append((name, norm))
    for norms in waiting.values():
        values = torch.stack([norm.double() for _, norm in norms]).tolist()
        for (name, _), value in zip(norms, values, strict=True):
            result[name]["update_norm"] = value
    return result


def adam_update_norm(
    selection: Selection,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
    warmup_steps: int,
) -> Tensor:
    """‖lr · α · ρ · warm-up · Adam(C)‖, the norm of the last step's change of W's rows σ, ().

    ``exp_avg`` and ``exp_avg_sq``, (r, n) or (m, r), and ``age`` (r,) have their values after that
    step. Repeated rows add before the norm is taken.
    """
    dtype = torch.promote_types(exp_avg.dtype, torch.float32)
    ages = age.double()
    gain = lr * scale * warmup(age, warmup_steps) / (1 - beta1**ages)
    if selection.scale is not None:
        gain = gain * selection.scale

    def by_row(values: Tensor) -> Tensor:
        return along(values.to(dtype), selection.dim, exp_avg.dim())

    root = exp_avg_sq.to(dtype).sqrt_() if exp_avg_sq.dtype != dtype else exp_avg_sq.sqrt()
    root.mul_(by_row((1 - beta2**ages).rsqrt())).add_(eps)
    change = torch.div(exp_avg.to(dtype) * by_row(gain), root, out=root)
    if selection.scale is not None:  # rows repeat only with replacement
        _, place = selection.indices.unique(return_inverse=True)
        change = torch.zeros_like(change).index_add_(selection.dim, place, change)
    return torch.linalg.vector_norm(change)
