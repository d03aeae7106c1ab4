"""What a training loop does to gradients between backward and step: accumulation and clipping."""

import copy

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from helpers import Captured, mlp


def data(count, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(count, n, generator=gen, dtype=torch.float64) for n in (8, 6)]


def mean_loss(model, x, y):
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("rule", ["cyclic", "multinomial_norm"])
def test_micro_batches_give_the_gradient_of_the_big_batch(compiler, rule, count):
    model = mlp(8, 12, 6).double()
    compiled = torch.compile(
        model, backend=Captured(rank=4, refresh_every=1, selection=rule, compiler=compiler)
    )
    optimizer = grass_fx.AdamW(model.parameters())
    for step in range(2):
        x, y = data(12, seed=step)
        optimizer.zero_grad()
        mean_loss(compiled, x, y).backward()
        big = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        for part in zip(x.chunk(count), y.chunk(count), strict=True):
            (mean_loss(compiled, *part) / count).backward()
        for p, want in zip(model.parameters(), big, strict=True):
            if isinstance(want, CompactGrad):
                assert p.grad.selection.indices is want.selection.indices
                torch.testing.assert_close(p.grad.compact, want.compact)
            else:
                torch.testing.assert_close(p.grad, want)
        optimizer.step()


def test_the_selection_changes_at_step_boundaries_alone():
    model = mlp(8, 12, 6).double()
    compiled = torch.compile(model, backend=Captured(rank=4, refresh_every=2))
    optimizer = grass_fx.AdamW(model.parameters())
    seen = []
    for step in range(6):
        for micro in range(3):
            mean_loss(compiled, *data(4, seed=3 * step + micro)).backward()
            seen.append(registry.get(model[0].weight).period - 1)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [0] * 6 + [1] * 6 + [2] * 6


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_returns_and_uses_the_norm_of_the_compact_entries(norm_type, foreach):
    model = mlp(8, 12, 6).double()
    compiled = torch.compile(model, backend=Captured(rank=4, selection="top"))
    mean_loss(compiled, *data(5)).backward()
    stored = [getattr(p.grad, "compact", p.grad).clone() for p in model.parameters()]
    scores = model[0].weight.grad.scores.clone()
    want = torch.linalg.vector_norm(torch.cat([t.flatten() for t in stored]), norm_type)
    limit = want.item() / 4
    got = nn.utils.clip_grad_norm_(model.parameters(), limit, norm_type, foreach=foreach)
    torch.testing.assert_close(got, want)
    for p, before in zip(model.parameters(), stored, strict=True):
        after = getattr(p.grad, "compact", p.grad)
        torch.testing.assert_close(after, before / 4, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(model[0].weight.grad.scores, scores / 16, rtol=1e-4, atol=1e-9)
    if norm_type == 2.0:  # without replacement it is the norm of the dense gradient that PC is
        dense = [p.grad.to_dense() for p in model.parameters() if p.dim() == 2]
        dense += [p.grad for p in model.parameters() if p.dim() == 1]
        norm = torch.linalg.vector_norm(torch.cat([t.flatten() for t in dense]))
        torch.testing.assert_close(norm.item(), limit, rtol=1e-5, atol=0)


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_values_and_norms_without_clipping(foreach):
    model = mlp(8, 12, 6).double()
    compiled = torch.compile(model, backend=Captured(rank=4))
    mean_loss(compiled, *data(5)).backward()
    before = model[0].weight.grad.compact.clone()
    grads = [p.grad for p in model.parameters()]
    total = nn.utils.get_total_norm(grads, foreach=foreach)
    parts = [getattr(g, "compact", g).flatten() for g in grads]
    torch.testing.assert_close(total, torch.linalg.vector_norm(torch.cat(parts)))
    nn.utils.clip_grad_value_(model.parameters(), 1e-3, foreach=foreach)
    torch.testing.assert_close(model[0].weight.grad.compact, before.clamp(-1e-3, 1e-3))


def test_clipping_by_a_norm_that_is_not_finite_can_be_refused():
    model = mlp(8, 12, 6).double()
    compiled = torch.compile(model, backend=Captured(rank=4))
    x, y = data(5)
    mean_loss(compiled, x * float("inf"), y).backward()
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


# --- stepping in backward -------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def blocks(**options):
    model = nn.Sequential(Block(), Block(), Block()).double()
    for block in model:
        block.compile(backend=Captured(**{"rank": 2, "refresh_every": 2, **options}))
    return model


def run(model, optimizer, steps):
    for step in range(steps):
        x = data(5, seed=step)[0]
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_stepping_in_backward_is_the_same_training(rule, make):
    finals = []
    for early in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = blocks(selection=rule)
        optimizer = make(model.parameters(), lr=1e-2)
        if early:
            grass_fx.step_in_backward(optimizer)
        run(model, optimizer, 6)
        finals.append([p.detach() for p in model.parameters()])
        assert registry.get(model[0].first.weight).step == 6
    for a, b in zip(*finals, strict=True):
        assert torch.equal(a, b)


def test_stepping_in_backward_frees_each_blocks_gradients_before_the_next_come():
    most = {}
    for early in (False, True):
        torch._dynamo.reset()
        model = blocks()
        optimizer = grass_fx.AdamW(model.parameters())
        alive = []

        def count(p, model=model, alive=alive):
            grads = [q.grad for q in model.parameters()]
            alive.append(sum(isinstance(g, CompactGrad) for g in grads))

        if early:
            grass_fx.step_in_backward(optimizer)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(count)
        run(model, optimizer, 1)
        most[early] = max(alive)
    assert most == {False: 6, True: 0}


def unscale(optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    "act",
    [
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda model, optimizer: model(data(5)[0]).sum().backward(),
        lambda model, optimizer: unscale(optimizer),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    ],
    ids=["clipping", "accumulation", "GradScaler", "zeros"],
)
def test_what_comes_too_late_for_a_step_in_backward_is_an_error(act):
    model = blocks()
    optimizer = grass_fx.AdamW(model.parameters())
    grass_fx.step_in_backward(optimizer)
    model(data(5)[0]).sum().backward()
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    with pytest.raises(grass_fx.GrassError, match="step_in_backward"):
        act(model, optimizer)
    for got, want in zip(model.parameters(), before, strict=True):
        assert torch.equal(got, want)


def test_step_in_backward_needs_an_optimizer_of_ours():
    with pytest.raises(ValueError, match=r"grass_fx\.AdamW or a class made by grass_fx\.subspace"):
        grass_fx.step_in_backward(torch.optim.SGD(mlp(8, 6).parameters(), lr=0.1))
