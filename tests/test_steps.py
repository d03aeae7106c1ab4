"""One optimizer step uses one selection, whatever happens inside it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import grass_fx
from grass_fx.config import GrassConfig
from grass_fx.errors import SelectionChangedError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.testing.reference import Reference
from helpers import Captured, mlp

K, STEPS = 2, 5


class Broken(nn.Module):
    """Two graphs, because of a graph break, which share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = (
            nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 6)
        )  # fmt: skip

    def forward(self, x):
        x = torch.tanh(self.shared(self.first(x)))
        torch._dynamo.graph_break()
        return self.last(torch.tanh(self.shared(x)))


def batches(step, count):
    gen = torch.Generator().manual_seed(step)
    pairs = [(8, 6)] * count
    return [tuple(torch.randn(5, n, generator=gen, dtype=torch.float64) for n in p) for p in pairs]


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


# How the gradients of a step come about: (compiled model, batches of the step) -> None.
def three_micro_batches(model, data):
    for batch in data:
        loss_of(model, batch).backward()


def two_forwards_before_a_backward(model, data):
    losses = [loss_of(model, batch) for batch in data]
    sum(losses).backward()


def retained_graph(model, data):
    for batch in data:
        loss = loss_of(model, batch) / 2
        loss.backward(retain_graph=True)
        loss.backward()


def checkpointed_from_outside(model, data):
    for batch in data:
        loss_of(lambda x: checkpoint(model, x, use_reentrant=False), batch).backward()


def input_gradients_in_between(model, data):
    for x, y in data:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model, (x, y)), x)
        assert gradient.abs().sum() > 0
        loss_of(model, (x, y)).backward(inputs=list(model.parameters()))


WAYS = [
    three_micro_batches,
    two_forwards_before_a_backward,
    retained_graph,
    checkpointed_from_outside,
    input_gradients_in_between,
]


@pytest.mark.parametrize("rule", ["cyclic", "multinomial_norm"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("shape", ["one graph", pytest.param("two graphs", marks=pytest.mark.slow)])
def test_a_step_is_the_references_step(compiler, rule, way, shape):
    # Inductor itself asks for this where a graph is retained, with or without grass.
    with torch._functorch.config.patch(donated_buffer=way is not retained_graph):
        follow_the_reference(compiler, rule, way, shape)


def follow_the_reference(compiler, rule, way, shape):
    model = (mlp(8, 8, 6) if shape == "one graph" else Broken()).double()
    twin = copy.deepcopy(model)
    options = {"rank": 2, "refresh_every": K, "selection": rule, "side": "out"}
    compiled = torch.compile(model, backend=Captured(compiler=compiler, **options))
    adamw = {"lr": 1e-2, "warmup_steps": 2}
    optimizer = grass_fx.AdamW(model.parameters(), **adamw)
    taken = {n: 0 for n, p in model.named_parameters() if p.dim() == 2}
    reference = Reference(twin, taken, GrassConfig(**options), **adamw)
    generations = []
    for step in range(STEPS):
        data = batches(step, 3)
        optimizer.zero_grad()
        way(compiled, data)
        grads = [p.grad for p in model.parameters() if p.dim() == 2]
        assert all(isinstance(g, CompactGrad) for g in grads)
        generations.append(grads[0].selection.draw)
        optimizer.step()
        reference.step([lambda m, b=batch: loss_of(m, b) for batch in data])
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert generations == ([0, 0, 1, 1, 2] if rule == "cyclic" else [0, 1, 1, 2, 2])


def test_scores_of_a_weight_shared_by_two_graphs_are_the_sum_of_both():
    model, (x, y) = Broken().double(), batches(0, 1)[0]
    compiled = torch.compile(model, backend=Captured(rank=2, selection="top", side="out"))
    loss_of(compiled, (x, y)).backward()
    uses = [model.shared.weight.detach().clone().requires_grad_() for _ in range(2)]
    hidden = torch.tanh(model.first(x) @ uses[0].t())
    loss = (model.last(torch.tanh(hidden @ uses[1].t())) - y).square().mean()
    squares = [g.square().sum(1) for g in torch.autograd.grad(loss, uses)]
    torch.testing.assert_close(model.shared.weight.grad.scores, sum(squares).float())


@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_a_selection_changed_between_forward_and_backward_is_an_error(compiler, rule):
    model = mlp(8, 6).double()  # one layer: its backward does not read W, which the step changes
    options = {"rank": 2, "refresh_every": 1, "selection": rule, "compiler": compiler}
    compiled = torch.compile(model, backend="grass", options=options)
    optimizer = grass_fx.AdamW(model.named_parameters())
    loss_of(compiled, batches(0, 1)[0]).backward()
    late = loss_of(compiled, batches(1, 1)[0])
    optimizer.step()
    with pytest.raises(SelectionChangedError, match=r"\.weight: its selection changed between"):
        late.backward()


def test_a_gradient_kept_past_a_refresh_still_tells_the_truth():
    model = mlp(8, 8, 6).double()
    backend = Captured(rank=2, refresh_every=1, side="out")
    compiled = torch.compile(model, backend=backend)
    optimizer = grass_fx.AdamW(model.parameters())
    twin = copy.deepcopy(model)
    batch = batches(0, 1)[0]
    loss_of(compiled, batch).backward()
    kept = model[0].weight.grad
    optimizer.step()
    optimizer.zero_grad()
    loss_of(compiled, batch).backward()
    (full,) = torch.autograd.grad(loss_of(twin, batch), twin[0].weight)
    assert model[0].weight.grad.selection.draw == kept.selection.draw + 1
    torch.testing.assert_close(kept.compact, full[kept.selection.indices])
    torch.testing.assert_close(kept.to_dense()[kept.selection.indices], kept.compact)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none):
    model = mlp(8, 8, 6).double()
    twin = copy.deepcopy(model)
    trained = []
    for m, none in ((model, True), (twin, set_to_none)):
        torch._dynamo.reset()
        compiled = torch.compile(m, backend=Captured(rank=2, refresh_every=2, selection="top"))
        optimizer = grass_fx.AdamW(m.parameters(), lr=1e-2)
        for step in range(5):
            loss_of(compiled, batches(step, 1)[0]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=none)
        trained.append([p.detach() for p in m.parameters()])
    for got, want in zip(*trained, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_zeroed_gradient_of_a_refreshed_weight_steps_in_the_new_subspace():
    """zero_grad(set_to_none=False), then a step that does not use the weight: as torch, a step of
    zeros; the moments must not fall back to the old rows."""
    model = mlp(8, 8, 6).double()
    compiled = torch.compile(model, backend=Captured(rank=2, refresh_every=1))
    optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2)
    loss_of(compiled, batches(0, 1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    current = registry.get(model[0].weight).selection
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert state["indices"] is current.indices and not state["exp_avg"].any()


def test_scores_that_are_not_finite_keep_the_selection_and_are_asked_again():
    model = mlp(8, 8, 6).double()
    compiled = torch.compile(model, backend=Captured(rank=2, refresh_every=3, selection="top"))
    optimizer = grass_fx.AdamW(model.parameters(), lr=0.0)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        batch = batches(step, 1)[0]
        loss_of(compiled, batch).backward()
        grad = model[0].weight.grad
        if step == 0:
            grad.scores[3] = float("inf")
        seen.append((grad.selection.draw, grad.scores is not None))
        optimizer.step()
    assert seen == [(0, True), (0, True), (1, False), (1, True), (2, False), (2, False)]


def test_a_step_that_grad_scaler_skips_is_no_step():
    model = mlp(8, 8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2, refresh_every=2, selection="top"))
    optimizer = grass_fx.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, seen = torch.randn(5, 8), []
    for step in range(4):
        optimizer.zero_grad()
        loss = compiled(x).square().mean() * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        grad = model[0].weight.grad
        seen.append((grad.selection.draw, grad.scores is not None))
        before = model[0].weight.clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[0].weight) == (step == 1)
    assert seen == [(0, True), (1, False), (1, False), (1, True)]
    assert registry.get(model[0].weight).step == 3
