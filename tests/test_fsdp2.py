"""Weights of torch's own fully_shard: recognised, left, and trained as without grass."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import grass_fx
from grass_fx.errors import GrassWarning
from ranks import spawn

RANKS, STEPS = 2, 3
OPTIONS = {"rank": 4, "compiler": "aot_eager"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(step):
    gen = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=gen, dtype=torch.float64)


def run(rank):
    """One rank."""
    for way in ("whole", "block by block"):
        torch._dynamo.reset()
        train(rank, way)


def train(rank, way):
    """Some steps on this rank's half of the batches, beside a plain model's on the whole."""
    torch.manual_seed(0)
    model = Blocks().double()
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = model
    if way == "whole":
        compiled = torch.compile(model, backend="grass", options=OPTIONS)
    else:
        for block in model.blocks:
            block.compile(backend="grass", options=OPTIONS)
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            part = batch(step).chunk(RANKS)[rank]
            compiled(part).square().mean().backward()
            assert not any(isinstance(p.grad, grass_fx.CompactGrad) for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            plain(batch(step)).square().mean().backward()
            reference.step()
            reference.zero_grad()
    told = {str(each.message) for each in caught if each.category is GrassWarning}
    assert any("up.weight: fsdp2: " in each for each in told), told
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.full_tensor(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_they_train_dense_and_the_warning_says_why():
    spawn(run, RANKS)
