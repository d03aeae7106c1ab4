"""Steps dense parameters exactly as torch's own AdamW does, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


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
