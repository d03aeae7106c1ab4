"""The peers that grass is measured beside: their optimizers, and the bytes that they hold."""

import importlib
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import grass_fx
from grass_fx.config import GrassConfig

MODULES = {"adamw8bit": "torchao.optim", "galore": "galore_torch", "apollo": "apollo_torch"}


def why_missing(peer: str) -> str:
    """What keeps a peer's package from being imported; empty if nothing does, or it has none."""
    try:
        if module := MODULES.get(peer):
            importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ""


def adamw8bit(parameters: list[nn.Parameter], **settings) -> torch.optim.Optimizer:
    return importlib.import_module(MODULES["adamw8bit"]).AdamW8bit(parameters, **settings)


def galore(groups: list[dict], **settings) -> torch.optim.Optimizer:
    module = importlib.import_module(MODULES["galore"])
    return module.GaLoreAdamW(groups, no_deprecation_warning=True, **settings)


def apollo(groups: list[dict], **settings) -> torch.optim.Optimizer:
    """In groups as GaLore's; scaling by channel, random projections and scale 1, as its README
    advises."""
    module = importlib.import_module(MODULES["apollo"])
    low = {"proj": "random", "scale_type": "channel"}
    groups = [group | (low if "rank" in group else {}) for group in groups]
    return module.APOLLOAdamW(groups, **settings)


def galore_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    rank: int | float,
    projected: Callable[[str, nn.Parameter], bool],
    gap: float = 200,
) -> list[dict]:
    """A group for each parameter; the projected ones get new projectors every `gap` steps."""
    low = {"update_proj_gap": gap, "scale": 1, "proj_type": "std"}
    return [
        {"params": [p]} | (low | {"rank": rows(p, rank)} if projected(name, p) else {})
        for name, p in named
    ]


def project_every(optimizer: torch.optim.Optimizer, gap: float) -> None:
    """Change GaLore's gap for the projectors that exist."""
    for state in optimizer.state.values():
        if "projector" in state:
            state["projector"].update_proj_gap = gap


def rows(weight: nn.Parameter, rank: int | float) -> int:
    return GrassConfig(rank=rank).rank_of(min(weight.shape))


def nbytes(value) -> int:
    """Of a tensor, a CompactGrad, a quantized state or one of GaLore's projectors; else 0."""
    if isinstance(value, grass_fx.CompactGrad):
        return nbytes(value.compact) + nbytes(value.scores)
    if not isinstance(value, torch.Tensor) or type(value).__name__ == "SpentGrad":
        return nbytes(value.ortho_matrix) if hasattr(value, "ortho_matrix") else 0
    if is_traceable_wrapper_subclass(value):
        return sum(nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes
