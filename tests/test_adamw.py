"""grass_fx.AdamW: dense parameters as torch's, taken weights in their subspace, state and its round
trip."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grass_fx
from grass_fx.errors import GrassWarning, OptionError, StateError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from helpers import Captured, mlp


def train(model, compiled, optimizer, steps, seed=0):
    """A few steps on random data; returns the losses."""
    gen, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x, y = torch.randn(7, 8, generator=gen), torch.randn(7, 6, generator=gen)
        dtype = next(model.parameters()).dtype
        loss = (compiled(x.to(dtype)) - y.to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("settings", [{}, {"maximize": True},
                                      {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6,
                                       "weight_decay": 0.3}])  # fmt: skip
@pytest.mark.filterwarnings("ignore:no compact gradient")
def test_dense_parameters_step_as_torchs_to_the_last_bit(settings, foreach):
    ours, theirs = mlp(8, 12, 6), None
    theirs = copy.deepcopy(ours)
    train(ours, ours, grass_fx.AdamW(ours.parameters(), foreach=foreach, **settings), 5)
    train(theirs, theirs, torch.optim.AdamW(theirs.parameters(), foreach=foreach, **settings), 5)
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, want)


def test_state_of_a_taken_weight_has_the_compact_shape_and_nothing_more():
    model = mlp(8, 12, 6)
    backend = Captured(rank=4, selection="uniform", replacement=True)
    optimizer = grass_fx.AdamW(model.parameters())
    train(model, torch.compile(model, backend=backend), optimizer, 1)
    state = optimizer.state[model[0].weight]
    assert state["pending_decay"].item() == 1 - 1e-3 * 1e-2
    assert {k: (tuple(v.shape), v.dtype) for k, v in state.items()} == {
        "exp_avg": ((12, 4), torch.float32),
        "exp_avg_sq": ((12, 4), torch.float32),
        "age": ((4,), torch.int64),
        "indices": ((4,), torch.int64),
        "scale": ((4,), torch.float32),
        "generation": ((), torch.int64),
        "pending_decay": ((), torch.float64),
    }
    assert {k: tuple(v.shape) for k, v in optimizer.state[model[0].bias].items()} == {
        "step": (),
        "exp_avg": (12,),
        "exp_avg_sq": (12,),
    }


def test_only_the_selected_rows_move_without_weight_decay():
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2, side="out"))
    optimizer = grass_fx.AdamW(model.parameters(), weight_decay=0.0)
    before = model[0].weight.detach().clone()
    train(model, compiled, optimizer, 3)
    moved = (model[0].weight != before).any(1).nonzero().flatten()
    assert torch.equal(moved, model[0].weight.grad.selection.indices)


@pytest.mark.parametrize(
    ("make", "fixed"),
    [(grass_fx.AdamW, {"weight_decay": 0.0}), (grass_fx.subspace(torch.optim.SGD), {"lr": 0.1})],
    ids=["AdamW", "wrapped"],
)
def test_scale_and_warm_up_touch_the_compact_update_only(make, fixed):
    def first_step(**settings):
        torch.manual_seed(1)
        torch._dynamo.reset()
        model = mlp(8, 6).double()
        before = copy.deepcopy(model)
        compiled = torch.compile(model, backend=Captured(rank=2, side="out"))
        train(model, compiled, make(model.parameters(), **fixed, **settings), 1)
        (layer,), (old,) = model, before
        return layer.weight - old.weight, layer.bias - old.bias

    plain, bias = first_step(warmup_steps=0, scale=1.0)
    scaled, scaled_bias = first_step(warmup_steps=0, scale=0.5)
    warmed, warmed_bias = first_step(warmup_steps=4, scale=1.0)
    automatic, automatic_bias = first_step(warmup_steps=0)  # two of six rows train
    torch.testing.assert_close(scaled, plain * 0.5)
    torch.testing.assert_close(warmed, plain / 4)
    # SGD's steps grow with the gradient: there "auto" is 1.
    torch.testing.assert_close(automatic, plain * (3 if make is grass_fx.AdamW else 1))
    for other in (scaled_bias, warmed_bias, automatic_bias):
        assert torch.equal(bias, other)


def test_groups_have_rates_of_their_own():
    model = mlp(8, 12, 6)
    compiled = torch.compile(model, backend=Captured(rank=2))
    first = {"params": model[0].parameters(), "lr": 0.0}
    optimizer = grass_fx.AdamW([first, {"params": model[2].parameters(), "lr": 1e-2}])
    before = copy.deepcopy(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(model, compiled, optimizer, 2)
    schedule.step()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_reset_starts_all_rows_anew_even_if_they_stay():
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=6, side="out", refresh_every=2))
    for on_refresh, age in (("reset", 1), ("carry", 3)):
        optimizer = grass_fx.AdamW(model.parameters(), on_refresh=on_refresh)
        while registry.get(model[0].weight) and registry.get(model[0].weight).step % 2:
            train(model, compiled, optimizer, 1)
        optimizer = grass_fx.AdamW(model.parameters(), on_refresh=on_refresh)
        train(model, compiled, optimizer, 3)
        assert set(optimizer.state[model[0].weight]["age"].tolist()) == {age}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "replacement"),
    [("cyclic", False), ("top", False), ("uniform", True), ("multinomial_norm", True)],
)
def test_state_dict_round_trips_the_run_and_its_selection(rule, replacement, dtype):
    options = {"rank": 2, "refresh_every": 3, "selection": rule, "replacement": replacement}
    whole = mlp(8, 600, 6).to(dtype)  # indices above 256, which bfloat16 cannot hold
    part = copy.deepcopy(whole)

    def begin(model):
        compiled = torch.compile(model, backend=Captured(side="out", **options))
        return compiled, grass_fx.AdamW(model.parameters(), lr=1e-2, warmup_steps=2)

    compiled, optimizer = begin(whole)
    want = train(whole, compiled, optimizer, 4) + train(whole, compiled, optimizer, 5, seed=1)

    torch._dynamo.reset()
    compiled, optimizer = begin(part)
    got = train(part, compiled, optimizer, 4)
    buffer = io.BytesIO()
    torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    torch._dynamo.reset()
    resumed = mlp(8, 600, 6).to(dtype)
    resumed.load_state_dict(saved["model"])
    compiled, optimizer = begin(resumed)
    optimizer.load_state_dict(saved["optimizer"])
    got += train(resumed, compiled, optimizer, 5, seed=1)
    assert got == want
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_a_selection_that_does_not_fit_changes_nothing():
    first, second = mlp(8, 12, 6), mlp(8, 12, 6)
    optimizers = []
    for model, rank in ((first, 2), (second, 4)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=Captured(rank=rank))
        optimizers.append(grass_fx.AdamW(model.named_parameters()))
        train(model, compiled, optimizers[-1], 2)
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(StateError, match=r"0.weight: .* has 2 rows of 8 .* for 4 rows"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    after = optimizers[1].state_dict()
    for key, state in before["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(after["state"][key][name], value, rtol=0, atol=0)


def test_it_warns_once_if_no_compact_gradient_has_ever_arrived():
    model = mlp(8, 6)
    optimizer = grass_fx.AdamW(model.parameters())
    optimizer.step()  # no gradient at all: nothing to say yet
    with pytest.warns(GrassWarning, match="no compact gradient has arrived") as caught:
        train(model, model, optimizer, 3)
    assert len(caught) == 1


def test_a_dense_gradient_of_a_taken_weight_is_projected_and_reported():
    model = mlp(8, 6).double()
    twin = copy.deepcopy(model)
    for m, run in ((model, None), (twin, "eager in the second step")):
        torch._dynamo.reset()
        compiled = torch.compile(m, backend=Captured(rank=2, side="out"))
        optimizer = grass_fx.AdamW(m.parameters())
        train(m, compiled, optimizer, 1)
        if run:
            with pytest.warns(GrassWarning, match=r"0.weight|weight has its .* projected"):
                train(m, m, optimizer, 1, seed=1)
        else:
            train(m, compiled, optimizer, 1, seed=1)
    for got, want in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_dense_gradient_added_to_a_compact_one_is_reported():
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2))
    optimizer = grass_fx.AdamW(model.parameters())
    x = torch.randn(7, 8)
    for penalty, loss in (
        (model[0].weight.square().sum(), compiled(x).sum()),
        (0, compiled(x).sum()),
    ):
        optimizer.zero_grad()
        (loss + penalty).backward()
        assert model[0].weight.grad.projected == (penalty != 0)
    optimizer.step()  # that of the first was gone
    loss = compiled(x).sum() + model[0].weight.square().sum()
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    with pytest.warns(GrassWarning, match="is stepped in a subspace, but its gradient came dense"):
        optimizer.step()


def test_a_step_that_failed_leaves_no_count_behind():
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2, refresh_every=math.inf))
    optimizer = grass_fx.AdamW(model.parameters(), lr=0.1, warmup_steps=0)
    x = torch.randn(3, 8)
    compiled(x).sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    whole, state["exp_avg_sq"] = state["exp_avg_sq"], torch.zeros(6, 2, device="meta")
    with pytest.raises(RuntimeError):
        optimizer.step()
    state["exp_avg_sq"] = whole
    twin, theirs = copy.deepcopy((model, optimizer))  # which reads the ages where they are
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = copy.deepcopy(p.grad)
    optimizer.step()
    theirs.step()
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_a_checkpoint_of_torchs_adamw_goes_on_in_the_subspace(make):
    model = mlp(8, 6)
    before = torch.optim.AdamW(model.parameters(), lr=0.03)
    train(model, model, before, 1)
    optimizer = make(model.parameters(), scale=0.5)
    optimizer.load_state_dict(before.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["scale"], group["on_refresh"]) == (0.03, 0.5, "carry")
    with pytest.warns(GrassWarning, match="dense until now"):
        train(model, torch.compile(model, backend=Captured(rank=2)), optimizer, 1)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (6, 2)


@pytest.mark.filterwarnings("ignore:no compact gradient")
def test_complex_dense_parameters_step_as_torchs():
    steps = []
    for make in (grass_fx.AdamW, torch.optim.AdamW):
        parameter = nn.Parameter(torch.arange(4) * (1 - 2j))
        optimizer = make([parameter], lr=0.1, foreach=True)
        for _ in range(3):
            optimizer.zero_grad()
            (parameter * (1 + 2j)).abs().square().sum().backward()
            optimizer.step()
        steps.append(parameter.detach())
    assert torch.equal(*steps)


def test_weight_decay_is_not_lost_in_bfloat16_if_rounding_is_stochastic():
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    nn.init.ones_(model[0].weight)
    compiled = torch.compile(model, backend=Captured(rank=8))
    optimizer = grass_fx.AdamW(
        model.parameters(), lr=1e-2, weight_decay=0.1, stochastic_rounding=True
    )
    for _ in range(50):
        optimizer.zero_grad()
        (compiled(torch.randn(4, 64).bfloat16()) * 0).sum().backward()
        optimizer.step()
    # 4096 weights, each rounded 50 times by up to 2^-9: the mean's deviation is below 1e-3.
    assert model[0].weight.double().mean().item() == pytest.approx((1 - 1e-3) ** 50, abs=2e-3)


def test_a_weight_that_was_dense_until_now_moves_into_its_subspace():
    model = mlp(8, 6)
    optimizer = grass_fx.AdamW(model.parameters())
    with pytest.warns(GrassWarning):
        train(model, model, optimizer, 1)
    with pytest.warns(GrassWarning, match="dense until now"):
        train(model, torch.compile(model, backend=Captured(rank=2)), optimizer, 1)
    assert isinstance(model[0].weight.grad, CompactGrad)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (6, 2)
    assert "step" not in optimizer.state[model[0].weight]


def test_a_closure_is_evaluated_and_its_loss_returned():
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2))
    optimizer = grass_fx.AdamW(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = compiled(torch.ones(2, 8)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", "fast"), ("betas", (1.0, 0.9)), ("betas", 0.9), ("eps", -1e-8),
     ("eps", None), ("maximize", 2), ("weight_decay", -0.1), ("scale", 0.0),
     ("warmup_steps", -1), ("on_refresh", "forget")],
)  # fmt: skip
def test_impossible_hyper_parameters_are_errors(name, value):
    with pytest.raises(OptionError, match=name):
        grass_fx.AdamW([nn.Parameter(torch.ones(2))], **{name: value})
    with pytest.raises(OptionError, match=name):
        grass_fx.AdamW([{"params": [nn.Parameter(torch.ones(2))], name: value}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foreach": True, "fused": True}, "foreach=True and fused=True exclude each other"),
        ({"foreach": True, "lr": torch.tensor(0.1)}, "foreach=True does not take lr as a tensor"),
        ({"lr": torch.ones(2)}, "lr=.* is out of range"),
    ],
)
def test_what_torchs_adamw_refuses_is_refused_before_any_step(options, message):
    with pytest.raises((ValueError, RuntimeError)):
        torch.optim.AdamW([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(OptionError, match=message):
        grass_fx.AdamW([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("dtype", "settings", "options"),
    [
        (torch.float32, {}, {}),
        (torch.float32, {}, {"selection": "uniform", "replacement": True}),
        (torch.float32, {"compile": True}, {}),
        (torch.bfloat16, {"stochastic_rounding": True}, {}),
    ],
    ids=["eager", "replacement", "generated code", "rounded"],
)
def test_to_maximize_is_to_minimize_the_negative(dtype, settings, options):
    """To the last bit, of compact and dense parameters; in one group of two."""
    finals = []
    for up in (True, False):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 12, 6).to(dtype)
        backend = Captured(**{"rank": 4, "refresh_every": 2, **options})
        compiled = torch.compile(model, backend=backend)
        groups = [
            {"params": model[0].parameters(), "maximize": up},
            {"params": model[2].parameters()},
        ]
        optimizer = grass_fx.AdamW(groups, lr=1e-2, warmup_steps=2, **settings)
        gen = torch.Generator().manual_seed(0)
        for _ in range(5):
            optimizer.zero_grad()
            compiled(torch.randn(7, 8, generator=gen).to(dtype)).square().mean().backward()
            if not up:
                for p in model[0].parameters():
                    p.grad.mul_(-1)
            optimizer.step()
        finals.append([*model.parameters(), *(optimizer.state[p]["exp_avg"] for p in
                                              model.parameters())])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("amsgrad", r"grass_fx\.subspace\(torch\.optim\.AdamW\) takes amsgrad=True"),
        ("capturable", "reduce-overhead"),
        ("differentiable", r"torch\.optim\.AdamW on a model that is not compiled"),
    ],
)
def test_what_it_lacks_of_torchs_adamw_says_why_and_what_to_use(name, instead):
    parameter = nn.Parameter(torch.ones(2))
    for value in (False, None):
        grass_fx.AdamW([parameter], **{name: value})
    message = f"AdamW does not take {name}=True: .*{instead}"
    with pytest.raises(OptionError, match=message):
        grass_fx.AdamW([parameter], **{name: True})
    with pytest.raises(OptionError, match=message):
        grass_fx.AdamW([{"params": [parameter], name: True}])
    optimizer = grass_fx.AdamW([parameter])
    with pytest.raises(OptionError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: True})
    assert len(optimizer.param_groups) == 1


def test_the_wrapped_adamw_has_the_maximum_that_ours_lacks():
    """What the message of amsgrad=True promises: full rank is torch's."""
    model = mlp(8, 6, bias=False).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=Captured(rank=8, refresh_every=2))
    settings = {"lr": 1e-2, "amsgrad": True}
    optimizer = grass_fx.subspace(torch.optim.AdamW)(model.parameters(), warmup_steps=0, **settings)
    train(model, compiled, optimizer, 5)
    train(twin, twin, torch.optim.AdamW(twin.parameters(), **settings), 5)
    torch.testing.assert_close(model[0].weight, twin[0].weight)


def test_amsgrad_by_its_place_is_not_taken_for_a_scale():
    arguments = 1e-3, (0.9, 0.999), 1e-8, 0.01, True
    torch.optim.AdamW([nn.Parameter(torch.ones(2))], *arguments)
    with pytest.raises(OptionError, match="where torch.optim.AdamW has amsgrad"):
        grass_fx.AdamW([nn.Parameter(torch.ones(2))], *arguments)


class FullSized(TorchDispatchMode):
    """Names of operators that return a new tensor of one of the given shapes, and no view."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes, self.seen = set(shapes), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in given}
        for t in tree_leaves(result):
            sized = isinstance(t, torch.Tensor) and t.shape in self.shapes
            if sized and t.untyped_storage().data_ptr() not in memory:
                self.seen.append(str(func))
        return result


@pytest.mark.parametrize("rule", ["cyclic", "uniform", "uniform with replacement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [grass_fx.AdamW, partial(grass_fx.AdamW, stochastic_rounding=True),
     grass_fx.subspace(torch.optim.AdamW)],
    ids=["AdamW", "rounded", "wrapped"],
)  # fmt: skip
def test_a_step_makes_no_tensor_of_a_taken_weights_shape(make, dtype, rule):
    model = mlp(8, 12, 6, bias=False).to(dtype)
    options = {"selection": rule.split()[0], "replacement": "with" in rule}
    compiled = torch.compile(model, backend=Captured(rank=3, refresh_every=2, **options))
    optimizer = make(model.parameters(), weight_decay=0.1)
    for _ in range(5):
        compiled(torch.randn(5, 8).to(dtype)).square().sum().backward()
        with FullSized(*(p.shape for p in model.parameters())) as watch:
            optimizer.step()
        optimizer.zero_grad()
        assert watch.seen == []
