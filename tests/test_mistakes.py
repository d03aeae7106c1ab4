"""Mistakes in a training loop: each is an error or a warning that says what to do, and nothing is
half-changed."""

import copy

import pytest
import torch

import grass_fx
from grass_fx.errors import CompactGradError, GrassWarning, OptionError, SelectionChangedError
from grass_fx.state.registry import registry
from helpers import Captured, mlp

X = torch.randn(7, 8)


def begin(**options):
    model = mlp(8, 12, 6)
    return model, torch.compile(model, backend=Captured(**{"rank": 2, **options}))


MAKERS = [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)]

PLAIN = {
    "SGD": {"lr": 0.1}, "SGD foreach": {"lr": 0.1, "foreach": True},
    "SGD fused": {"lr": 0.1, "fused": True}, "SGD momentum": {"lr": 0.1, "momentum": 0.9},
    "SGD decay": {"lr": 0.1, "weight_decay": 0.1}, "Adam": {}, "Adam foreach": {"foreach": True},
    "Adam fused": {"fused": True}, "AdamW": {}, "AdamW fused": {"fused": True}, "Adafactor": {},
    "RMSprop": {}, "Adagrad": {}, "NAdam": {}, "RAdam": {}, "Rprop": {}, "ASGD": {}, "Adamax": {},
    "Adadelta": {},
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_optimizer_is_told_which_class_to_use(name):
    model, compiled = begin()
    wrapped = getattr(torch.optim, name.split()[0])
    optimizer = wrapped(model.parameters(), **PLAIN[name])
    compiled(X).square().mean().backward()
    before = copy.deepcopy(model[0].weight.detach())
    with pytest.raises(CompactGradError, match=r"grass_fx\.AdamW, or grass_fx\.subspace\("):
        optimizer.step()
    if name not in ("AdamW", "ASGD"):  # which decay the weight before they look at its gradient
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.SGD)])
def test_an_optimizer_over_a_copy_of_the_model_is_an_error(make):
    model, compiled = begin()
    optimizer = make(copy.deepcopy(model).parameters(), lr=1e-2)
    compiled(X).square().mean().backward()
    with pytest.raises(OptionError, match=r"none of this optimizer's parameters .* 0\.weight"):
        optimizer.step()


def test_a_model_that_trained_before_an_optimizer_was_built_is_none_of_its_business():
    old, compiled = begin()  # of an earlier cell of a notebook, say
    compiled(X).square().mean().backward()
    optimizer = grass_fx.AdamW(mlp(8, 6).parameters())
    optimizer.step()  # without gradients: no error, as of any optimizer
    assert old[0].weight.grad is not None


def test_an_error_names_a_few_of_many_weights():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(20)))
    compiled = torch.compile(model, backend=Captured(rank=2))
    optimizer = grass_fx.AdamW(copy.deepcopy(model).parameters())
    compiled(X).square().mean().backward()
    with pytest.raises(OptionError, match="weight, .*weight, ...") as error:
        optimizer.step()
    assert str(error.value).count("weight") < 12


def test_an_optimizer_over_parameters_that_are_used_elsewhere_warns():
    model, compiled = begin()
    other = mlp(8, 6)
    optimizer = grass_fx.AdamW(other.parameters())
    other(X).sum().backward()
    with pytest.warns(GrassWarning, match="no compact gradient has arrived"):
        optimizer.step()


def test_two_optimizers_may_step_in_turns():
    """A step without gradients is torch's: the other optimizer's gradients wait for it."""
    model, compiled = begin()
    first = grass_fx.AdamW(model[0].parameters())
    second = grass_fx.AdamW(model[2].parameters())
    compiled(X).square().mean().backward()
    first.step()
    first.zero_grad()
    first.step()
    second.step()
    steps = [registry.get(model[k].weight).step for k in (0, 2)]
    assert steps == [1, 1]


def test_a_change_of_options_between_two_steps_is_reported_and_starts_anew():
    model, compiled = begin()
    optimizer = grass_fx.AdamW(model.parameters())
    compiled(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=Captured(rank=4))
    with pytest.warns(GrassWarning, match=r"compiled with other options before \(rank 2 -> 4\)"):
        compiled(X).square().mean().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (12, 4)
    assert optimizer.state[model[0].weight]["age"].tolist() == [1] * 4


def test_a_change_of_options_within_a_step_changes_no_weights_subspace():
    model, compiled = begin()
    optimizer = grass_fx.AdamW(model.parameters())
    compiled(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    compiled(X).square().mean().backward(inputs=[model[2].weight])  # of the last weight alone
    before = [registry.get(model[k].weight) for k in (0, 2)]
    other = torch.compile(lambda x: model(x), backend=Captured(rank=4))
    with pytest.raises(OptionError, match=r"^2\.weight: two compiled functions with different"):
        other(X)
    assert before == [registry.get(model[k].weight) for k in (0, 2)]


@pytest.mark.parametrize("make", MAKERS)
def test_a_zeroed_gradient_of_another_rank_is_zeros_of_this_one(make):
    model, compiled = begin()
    optimizer = make(model.parameters(), weight_decay=0)
    compiled(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.warns(GrassWarning, match="compiled with other options"):
        torch.compile(lambda x: model(x), backend=Captured(rank=4))(X)
    before = copy.deepcopy(model)
    optimizer.step()
    for got, want in zip(model.parameters(), before.parameters(), strict=True):
        assert got.dim() == 1 or torch.equal(got, want)
    assert optimizer.state[model[0].weight]["age"].tolist() == [1] * 4


@pytest.mark.parametrize("make", MAKERS)
def test_a_dense_gradient_is_not_projected_onto_rows_that_are_gone(make):
    model, compiled = begin(refresh_every=1)
    optimizer = make(model.parameters())
    compiled(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    model(X).square().mean().backward()  # not the compiled one
    before = copy.deepcopy(model)
    lost = pytest.raises(SelectionChangedError, match=r"^0\.weight: .*set_to_none=True")
    with lost, pytest.warns(GrassWarning, match="came dense"):
        optimizer.step()
    for got, want in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(got, want)
    optimizer.zero_grad()
    compiled(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["the training step", "eager", "aot_eager", "grass"])
def test_a_step_in_a_compiled_function_is_the_same_step(make, how):
    weights = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, compiled = begin(refresh_every=2)
        optimizer = make(model.parameters(), lr=0.1)
        whole, step = compiles and how == "the training step", optimizer.step
        if compiles and not whole:
            backend = Captured(rank=2) if how == "grass" else how
            step = torch.compile(optimizer.step, backend=backend)

        def train_step(net=model if whole else compiled, step=step, zero_grad=optimizer.zero_grad):
            zero_grad()
            net(X).square().mean().backward()
            step()

        if whole:
            train_step = torch.compile(train_step, backend=Captured(rank=2, refresh_every=2))
        for _ in range(5):
            train_step()
        weights.append([p.detach() for p in model.parameters()])
        ages = [optimizer.state[model[k].weight]["age"].max() for k in (0, 2)]
        assert ages[0] == ages[1]
    for got, want in zip(*weights, strict=True):
        assert torch.equal(got, want)


def test_frozen_and_unused_parameters_are_left_alone():
    model, compiled = begin()
    model[0].weight.requires_grad_(False)
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = grass_fx.AdamW([*model.parameters(), unused], weight_decay=0.1)
    frozen = model[0].weight.detach().clone()
    compiled(X).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen) and bool((unused == 1).all())
    assert set(optimizer.state) == {model[0].bias, model[2].weight, model[2].bias}
