"""Activations that explain counts: by module, and of models without data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import grass_fx

OPTIONS = {"rank": 8}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.up(self.norm(x))
        torch._dynamo.graph_break()
        return self.down(F.silu(x))


class Blocks(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.layers[0].square.weight if block is Whole else self.head.weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Whole(Block):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.square(self.down(F.silu(self.up(self.norm(x)))))


@pytest.mark.parametrize("block", [Block, Whole])
def test_activations_are_those_of_the_modules_that_made_them(block):
    """One graph serves several blocks, or one graph has all of them and a tied weight."""
    report = grass_fx.explain(Blocks(block), torch.randn(6, 16), options=OPTIONS)
    saved = {row.module: (row.before, row.after) for row in report.saved}
    assert tuple(map(sum, zip(*saved.values(), strict=True))) == report.activations
    assert None not in saved
    for k in range(2):
        assert saved[f"layers.{k}.up"] == (6 * 32 * 4,) * 2  # silu's derivative needs all of it
    if block is Whole:
        assert saved["layers.1.square"] == (6 * 16 * 4, 6 * 8 * 4)  # the head's input
        assert saved["layers.1.norm"] == (6 * (16 + 1) * 4, 6 * (8 + 1) * 4)  # and the roots
    names = [name for name, _ in report.saved_groups()]
    assert "layers.*.up" in names and len(names) < len(saved)
    assert report.to_dict()["saved"][0]["module"] == report.saved[0].module


class Loss(nn.Module):
    """A checkpointed layer, a tensor that is no buffer, and a loss."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(16, 32, bias=False), nn.Linear(32, 12)
        self.factor = torch.ones(32)

    def forward(self, x, labels):
        x = checkpoint(lambda x: torch.tanh(self.up(x)), x * 2, use_reentrant=False)
        return F.cross_entropy(self.head(x * self.factor), labels)


def test_a_model_with_a_loss_on_the_meta_device_is_explained_as_on_a_cpu():
    """On the meta device torch differentiates no cross_entropy."""
    model, x, labels = Loss(), torch.randn(6, 16), torch.randint(12, (6,))
    here = grass_fx.explain(model, x, labels, options=OPTIONS)
    there = grass_fx.explain(model.to("meta"), x.to("meta"), labels.to("meta"), options=OPTIONS)
    assert there.activations == here.activations and 0 not in here.activations
    assert there.weights == here.weights and there.saved == here.saved
    assert {w.reason for w in there.weights if w.taken} == {""}
    assert (there.subject.device, here.subject.device) == ("meta", "cpu")
    assert all(p.is_meta for p in model.parameters()) and not model.factor.is_meta
    made = {row.module: row.after for row in there.saved}
    assert made[None] == 32 * 4  # the factor, which no module made
