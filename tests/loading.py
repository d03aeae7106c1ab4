"""What tests of loading share: models in training, and all that a load could change."""

import copy

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import StateError
from grass_fx.state.registry import registry
from helpers import Captured, mlp

WrappedAdamW = grass_fx.subspace(torch.optim.AdamW)


class Stack(nn.Module):
    """Two matrices in one weight, between layers as mlp has them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x):
        return torch.bmm(self.first(x).expand(2, -1, -1), self.w.mT)

    def __getitem__(self, _):
        return self.first


def begin(make=grass_fx.AdamW, dtype=torch.float32, model=None, **options):
    torch._dynamo.reset()
    model = mlp(8, 12, 6).to(dtype) if model is None else model
    backend = Captured(**{"rank": 6, "refresh_every": 3, **options})
    compiled = torch.compile(model, backend=backend)
    return model, compiled, make(model.parameters(), lr=1e-2)


def train(model, compiled, optimizer, steps, seed=0):
    gen = torch.Generator().manual_seed(seed)
    run = compiled if hasattr(optimizer, "stats") else model
    for _ in range(steps):
        x = torch.randn(7, 8, generator=gen, dtype=model[0].weight.dtype)
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()


def everything(model, optimizer):
    """All that a load could change, as copies, and the objects that must stay the same ones."""
    numbers = copy.deepcopy(
        (
            model.state_dict(),
            [optimizer.state.get(p) for p in model.parameters()],
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            [dict(registry.saved_state(p)) for p in model.parameters()],
        )
    )
    groups = optimizer.param_groups
    hooks = (
        *optimizer._optimizer_load_state_dict_pre_hooks.values(),
        *optimizer._optimizer_load_state_dict_post_hooks.values(),
    )
    subspaces = [registry.get(p) for p in model.parameters()]
    objects = [optimizer.state, groups, *groups, *hooks, *subspaces]
    objects += [s.selection for s in subspaces if s is not None]
    return numbers, objects


def same(a, b):
    if isinstance(a, torch.Tensor):
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(((a == b) | ((a != a) & (b != b))).all())  # not a number is itself
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused(model, optimizer, saved, message, error=StateError):
    """Loading ``saved`` is this error, and everything is as before, the state dict too."""
    before, kept = everything(model, optimizer), copy.deepcopy(saved)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    after = everything(model, optimizer)
    assert same(before[0], after[0]) and same(saved, kept)
    assert all(a is b for a, b in zip(before[1], after[1], strict=True))
