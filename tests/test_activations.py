"""Activations that explain counts."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import grass_fx

OPTIONS = {"rank": 8}


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
    assert there.weights == here.weights
    assert {w.reason for w in there.weights if w.taken} == {""}
    assert all(p.is_meta for p in model.parameters()) and not model.factor.is_meta
