"""Compact gradients that a graph makes with other strides than a weight's: steps are the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import grass_fx
from grass_fx.state.selection import matrix

OPTIONS = {"rank": 4, "compiler": "aot_eager"}


class Model(nn.Module):
    def __init__(self, forward, *shapes):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        made = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]
        self.weights = nn.ParameterList(made)
        self.function = forward

    def forward(self, x):
        return self.function(x, *list(self.weights))  # a list: Dynamo of 2.11 unpacks nothing else


def after(steps, make, forward, shapes, x, **options):
    """The weights after some steps on ever the same batch."""
    torch._dynamo.reset()
    model = Model(forward, *shapes)
    compiled = torch.compile(model, backend="grass", options={**OPTIONS, **options})
    optimizer = make(model.parameters(), lr=0.1, warmup_steps=0)
    for _ in range(steps):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def fused(params, **settings):
    return grass_fx.subspace(torch.optim.AdamW)(params, fused=True, **settings)


@pytest.mark.parametrize("make", [grass_fx.AdamW, fused])
@pytest.mark.parametrize(
    ("odd", "plain", "shapes"),
    [
        # C is a slice of a larger one
        (
            lambda x, *w: x @ torch.cat(w, 1),
            lambda x, *w: torch.cat([x @ each for each in w], 1),
            [(16, 8)] * 3,
        ),
        # C is the transpose of what was made
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), functional.linear, [(12, 16)]),
    ],
)
def test_steps_do_not_depend_on_how_the_gradient_lies_in_memory(make, odd, plain, shapes):
    x = torch.randn(5, 16, dtype=torch.float64)
    for options in ({"refresh_every": 2}, {"refresh_every": 2, "selection": "top"}):
        got = after(7, make, odd, shapes, x, **options)
        want = after(7, make, plain, shapes, x, **options)
        for each, other in zip(got, want, strict=True):
            torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_experts_stored_as_out_by_in_are_stepped(make):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model = Model(lambda x, w: torch.bmm(x, w.transpose(1, 2)), (3, 16, 8))
    compiled = torch.compile(model, backend="grass", options=OPTIONS)
    optimizer = make(model.parameters(), lr=0.1, warmup_steps=0, weight_decay=0, scale=1.0)
    (w,) = model.parameters()
    before = w.detach().clone()
    (full,) = torch.autograd.grad(model(x).square().mean(), w)
    with torch.autograd.detect_anomaly(check_nan=True):
        compiled(x).square().mean().backward()
    torch.testing.assert_close(w.grad.compact, w.grad.selection.project(full))
    across = full.transpose(1, 2).contiguous().transpose(1, 2)  # a dense one may lie anyhow
    torch.testing.assert_close(w.grad.selection.project(across), w.grad.compact)
    optimizer.step()
    rows = matrix(w.grad.to_dense()).abs().sum(1) > 0
    assert rows.sum() == 3 * 4
    moved = matrix(before - w.detach())  # Adam's first step is the rate times the sign
    torch.testing.assert_close(moved, 0.1 * matrix(w.grad.to_dense()).sign(), rtol=1e-4, atol=1e-6)
