"""Blocks drawn twice: σ repeats them one after the other, (0, 1, 0, 1, 4, 5)."""

import copy

import pytest
import torch

import grass_fx
from grass_fx.config import GrassConfig
from grass_fx.optim.carry import places
from grass_fx.optim.update import add_rows_
from grass_fx.state.selection import Selection
from grass_fx.testing.reference import Reference
from helpers import Captured, mlp

TWICE = torch.tensor([0, 1, 0, 1, 4, 5])


def selection(indices=TWICE):
    return Selection(indices, torch.full(indices.shape, 0.5), 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_their_changes_add_up(dtype):
    w = torch.zeros(6, 1, dtype=dtype)
    add_rows_(w, selection(), torch.arange(1.0, 7.0)[:, None])
    assert w.flatten().tolist() == [1 + 3, 2 + 4, 0, 0, 5, 6]


def test_rows_are_found_again():
    new = torch.tensor([2, 3, 4, 5, 4, 5, 0, 1])
    place, fresh = places(selection(), selection(new))
    assert fresh.tolist() == [True, True, False, False, False, False, False, False]
    assert TWICE[place[~fresh]].equal(new[~fresh])


def test_a_lifted_gradient_projects_to_itself():
    compact = torch.tensor([1.0, 2.0, 1.0, 2.0, 5.0, 6.0])[:, None]  # alike rows are alike
    lifted = selection().lift(compact, torch.Size([6, 1]))
    assert lifted.flatten().tolist() == [2, 4, 0, 0, 10, 12]
    torch.testing.assert_close(selection().project(lifted), compact)


def test_training_follows_the_reference():
    """In float64, over refreshes that keep some rows, which carry their moments."""
    torch._dynamo.reset()
    model = mlp(8, 8, 6).double()
    twin = copy.deepcopy(model)
    options = {
        "rank": 4, "block": 2, "replacement": True, "selection": "uniform", "refresh_every": 2,
        "side": "out",
    }  # fmt: skip
    compiled = torch.compile(model, backend=Captured(**options))
    adamw = {"lr": 1e-2, "warmup_steps": 2}
    optimizer = grass_fx.AdamW(model.parameters(), **adamw)
    taken = {name: 0 for name, p in model.named_parameters() if p.dim() == 2}
    reference = Reference(twin, taken, GrassConfig(**options), **adamw)
    repeated = kept = 0
    before = {}
    for step in range(12):
        gen = torch.Generator().manual_seed(step)
        x = torch.randn(5, 8, generator=gen, dtype=torch.float64)
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        for name, weight in model.named_parameters():
            if name in taken:
                rows = weight.grad.selection.indices.tolist()
                repeated += rows != sorted(rows)
                kept += bool({*rows} & {*before.get(name, [])}) and rows != before[name]
                before[name] = rows
        optimizer.step()
        reference.step([lambda m, x=x: m(x).square().mean()])
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert repeated and kept  # or it tried nothing
