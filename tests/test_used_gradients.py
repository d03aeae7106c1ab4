"""A gradient that a step has used and nobody zeroed, when the next backward comes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import GrassWarning, SelectionChangedError
from grass_fx.state.registry import registry
from helpers import Captured

MAKERS = [grass_fx.AdamW, grass_fx.subspace(torch.optim.SGD)]


def gan(make, zeroes, steps=9, refresh_every=3, **options):
    """The order of the DCGAN tutorial: the generator's loss runs through D, which has stepped."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    models = generator, critic = nn.Linear(8, 16), nn.Linear(16, 8)
    options = {"rank": 4, "refresh_every": refresh_every, **options}
    g = torch.compile(lambda z: torch.tanh(generator(z)), backend=Captured(**options))
    d = torch.compile(lambda x: critic(x).square().mean(), backend=Captured(**options))
    of_g, of_d = (make(model.parameters(), lr=1e-2) for model in models)
    for _ in range(steps):
        critic.zero_grad()
        d(torch.randn(4, 16)).backward()
        fake = g(torch.randn(4, 8))
        (-d(fake.detach())).backward()
        of_d.step()
        if zeroes:
            critic.zero_grad()
        generator.zero_grad()
        d(fake).backward()
        of_g.step()
    return models


@pytest.mark.parametrize("options", [{}, {"selection": "top"}, {"refresh_every": 1}], ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_a_gan_trains_as_if_the_critics_gradient_had_been_zeroed(make, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrassWarning)
        wants = gan(make, zeroes=True, **options)
    with pytest.warns(GrassWarning) as seen:
        gots = gan(make, zeroes=False, **options)
    for got, want in zip(gots, wants, strict=True):
        assert registry.get(got.weight).step == registry.get(want.weight).step == 9
        for p, q in zip(got.parameters(), want.parameters(), strict=True):
            assert torch.equal(p, q)
    (only,) = [each for each in seen if issubclass(each.category, GrassWarning)]
    assert "used by optimizer.step() and was not zeroed" in str(only.message)
    assert only.filename == __file__


def begin(**options):
    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False).double()
    compiled = torch.compile(model, backend=Captured(rank=2, **options))
    return model, compiled, grass_fx.AdamW(model.parameters(), lr=0.0)


X = torch.randn(5, 8, dtype=torch.float64)


def test_it_warns_at_the_first_such_backward_once():
    model, compiled, optimizer = begin(refresh_every=100)
    compiled(X).sum().backward()
    optimizer.step()
    with pytest.warns(GrassWarning, match=r"weight: its gradient has been used .*zero_grad\(\)"):
        compiled(X).sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(X).sum().backward()


def test_while_the_selection_stays_the_sum_is_torchs():
    model, compiled, optimizer = begin(refresh_every=100)
    compiled(X).sum().backward()
    optimizer.step()
    once = model.weight.grad.compact.clone()
    with pytest.warns(GrassWarning, match="not zeroed"):
        compiled(2 * X).sum().backward()
    torch.testing.assert_close(model.weight.grad.compact, 3 * once)
    assert not model.weight.grad.used


def test_a_gradient_that_no_step_has_used_is_an_error_as_ever():
    """Micro-batches over which the selection changed, since another optimizer stepped."""
    model, compiled, optimizer = begin(refresh_every=1)
    compiled(X).sum().backward()
    kept = model.weight.grad.clone()
    optimizer.step()
    model.weight.grad = kept
    with pytest.raises(SelectionChangedError, match=r"^weight: .*zero_grad"):
        compiled(X).sum().backward()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_zeroed_gradient_is_not_used(set_to_none):
    model, compiled, optimizer = begin(refresh_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            compiled(X).sum().backward()
            assert not model.weight.grad.used
            optimizer.step()
            assert model.weight.grad.used
            optimizer.zero_grad(set_to_none=set_to_none)
    assert registry.get(model.weight).step == 4


def test_one_gradient_in_two_optimizers_ends_one_step():
    model, compiled, first = begin(refresh_every=2)
    second = grass_fx.AdamW(model.parameters(), lr=0.0)
    for step in range(6):
        first.zero_grad()
        compiled(X).sum().backward()
        first.step()
        second.step()
        assert registry.get(model.weight).step == step + 1
        assert registry.get(model.weight).period == 1 + (step + 1) // 2
    assert all(o.state[model.weight]["age"].min() == 2 for o in (first, second))


@pytest.mark.parametrize(
    "remade",
    [
        lambda g: g * 1,
        lambda g: g.clone(),
        copy.deepcopy,
        lambda g: pickle.loads(pickle.dumps(g)),
        lambda g: g.data,
    ],
)
def test_a_gradient_that_was_made_again_ends_the_step_too(remade):
    model, compiled, optimizer = begin(refresh_every=2)
    for step in range(5):
        optimizer.zero_grad()
        compiled(X).sum().backward()
        model.weight.grad = remade(model.weight.grad)
        optimizer.step()
        assert registry.get(model.weight).step == step + 1
    assert registry.get(model.weight).period == 3


def masters(model):
    """float32 copies that an optimizer steps, as mixed-precision recipes keep them by hand."""
    return [nn.Parameter(p.detach().float()) for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"selection": "top"}, {"replacement": True}], ids=str)
def test_master_weights_step_as_the_weights_do(options):
    if options.get("replacement"):
        options["selection"] = "uniform"
    runs = []
    for by_hand in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6))
        run = torch.compile(model, backend=Captured(rank=4, refresh_every=2, **options))
        held = masters(model) if by_hand else list(model.parameters())
        optimizer = grass_fx.AdamW(held, lr=1e-2)
        for step in range(7):
            model.zero_grad()
            torch.manual_seed(step)
            run(torch.randn(5, 8)).square().mean().backward()
            if by_hand:
                for master, p in zip(held, model.parameters(), strict=True):
                    master.grad = p.grad.float().clone()
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(held, model.parameters(), strict=True):
                    p.copy_(master)
        # What keys the draws differs: without an optimizer of its own it is the order of first use.
        runs.append([registry.get(model[k].weight) for k in (0, 2)])
        assert [s.step for s in runs[-1]] == [7, 7]
        assert all(registry.get(p) is registry.get(q) for p, q in
                   zip(held, model.parameters(), strict=True) if p.dim() == 2)  # fmt: skip
        assert optimizer.stats().keys() == {"0.weight", "2.weight"} or not by_hand
    assert [s.period for s in runs[0]] == [s.period for s in runs[1]]


def test_a_resumed_run_of_master_weights_goes_on():
    def begin():
        torch.manual_seed(0)
        model = nn.Linear(8, 12, bias=False)
        run = torch.compile(model, backend=Captured(rank=2, refresh_every=2))
        held = masters(model)
        return model, run, held, grass_fx.AdamW(held, lr=1e-2)

    def train(model, run, held, optimizer, steps):
        for _ in range(steps):
            model.zero_grad()
            run(X.float()).square().mean().backward()
            held[0].grad = model.weight.grad.float()
            optimizer.step()
            model.weight.data.copy_(held[0])

    model, run, held, optimizer = begin()
    train(model, run, held, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    torch._dynamo.reset()
    again = begin()
    again[-1].load_state_dict(saved)
    with pytest.warns(GrassWarning, match="is of the selection before"):
        train(*again, 1)
    train(*again, 2)
    assert registry.get(again[0].weight).step == 8
