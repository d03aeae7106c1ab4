"""grass_fx.subspace(X): any optimizer class, on compact rows and dense parameters alike."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import GrassWarning, OptionError
from grass_fx.state.gradient import CompactGrad
from helpers import Captured, mlp


class Lion(torch.optim.Optimizer):
    """A third-party optimizer: sign of an interpolated momentum, decoupled weight decay."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["momentum"].lerp(p.grad, 1 - beta1).sign() * group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)


class WithoutRate(torch.optim.Optimizer):
    """Steps of a size of its own, as Adafactor's by default."""

    def __init__(self, params, lr=None, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.sub_(p.grad.sign() * 0.25)


def train(model, compiled, optimizer, steps, seed=0, sizes=(8, 6)):
    gen = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x, y = (torch.randn(7, n, generator=gen, dtype=torch.float64).to(dtype) for n in sizes)
        optimizer.zero_grad()
        (compiled(x) - y).square().mean().backward()
        optimizer.step()


EVERY = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1,
                                            "nesterov": True}),
    "SGD dampened": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "Adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "Lion": (Lion, {"weight_decay": 0.1}),
}  # fmt: skip
every = pytest.mark.parametrize(("wrapped", "settings"), EVERY.values(), ids=EVERY)


@every
def test_at_full_rank_it_is_the_wrapped_optimizer(wrapped, settings):
    model = mlp(8, 8, 8).double()
    twin = copy.deepcopy(model)
    options = {"rank": 8, "refresh_every": math.inf}
    compiled = torch.compile(model, backend=Captured(**options))
    optimizer = grass_fx.subspace(wrapped)(model.parameters(), warmup_steps=0, **settings)
    train(model, compiled, optimizer, 8, sizes=(8, 8))
    train(twin, twin, wrapped(twin.parameters(), **settings), 8, sizes=(8, 8))
    taken = [p for p in model.parameters() if isinstance(p.grad, CompactGrad)]
    assert [tuple(p.shape) for p in taken] == [(8, 8), (8, 8)]
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_at_full_rank_it_is_muon():
    """Which takes matrices alone, and looks at each as a whole."""
    model = mlp(8, 8, 8, bias=False).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=Captured(rank=8, refresh_every=2))
    optimizer = grass_fx.subspace(torch.optim.Muon)(model.parameters(), warmup_steps=0)
    train(model, compiled, optimizer, 6, sizes=(8, 8))
    train(twin, twin, torch.optim.Muon(twin.parameters()), 6, sizes=(8, 8))
    assert all(isinstance(p.grad, CompactGrad) for p in model.parameters())
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)  # its iteration is in bfloat16


@every
def test_state_exists_only_at_compact_shapes(wrapped, settings):
    model = mlp(8, 12, 6)
    optimizer = grass_fx.subspace(wrapped)(model.parameters(), **settings)
    assert not optimizer.state
    compiled = torch.compile(model, backend=Captured(rank=2, refresh_every=2))
    train(model, compiled, optimizer, 3)
    for weight, dim in ((model[0].weight, 1), (model[2].weight, 0)):
        state = optimizer.state[weight]
        sizes = [v.numel() for v in state.values() if isinstance(v, torch.Tensor)]
        assert max(sizes) <= weight.numel() // weight.shape[dim] * 2
        assert state["indices"].shape == state["age"].shape == (2,)


@pytest.mark.parametrize("on_refresh", ["carry", "reset"])
@pytest.mark.parametrize(
    ("rule", "replacement"),
    [("cyclic", False), ("uniform", False), ("uniform", True), ("top", False),
     ("multinomial_norm", True)],
)  # fmt: skip
def test_wrapped_adamw_is_grass_adamw(rule, replacement, on_refresh):
    """Rows that stay and rows that come get different ages: bias correction must follow them."""
    trained = []
    options = {"rank": 3, "refresh_every": 3, "selection": rule, "replacement": replacement}
    settings = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "scale": 0.7}
    for make in (grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 12, 6).double()
        optimizer = make(model.parameters(), on_refresh=on_refresh, **settings)
        train(model, torch.compile(model, backend=Captured(**options)), optimizer, 16)
        trained.append((model, optimizer))
    (ours, ours_optimizer), (theirs, theirs_optimizer) = trained
    for got, want in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    ages = [o.state[m[0].weight]["age"] for m, o in trained]
    assert torch.equal(*ages)
    if (rule, on_refresh, replacement) == ("uniform", "carry", False):
        steps = theirs_optimizer.state[theirs[0].weight]["per_row_step"]
        assert len(set(ages[0].tolist())) > 1 and torch.equal(steps.long(), ages[0])


def test_factored_state_starts_anew_at_a_refresh():
    model = mlp(8, 12, 6)
    compiled = torch.compile(model, backend=Captured(rank=6, refresh_every=2))
    optimizer = grass_fx.subspace(torch.optim.Adafactor)(model.parameters())
    seen = []
    for _ in range(5):
        train(model, compiled, optimizer, 1)
        seen.append(int(optimizer.state[model[0].weight]["step"]))
    assert seen == [1, 2, 1, 2, 1]


class DecoupledSGD(torch.optim.SGD):
    """After one step it is where SGD with L2 decay is, after two it is not."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


DECAYS = [
    (torch.optim.AdamW, {}, True),
    (Lion, {}, True),
    (torch.optim.Adam, {}, False),
    (torch.optim.Adam, {"decoupled_weight_decay": True}, True),
    (torch.optim.SGD, {}, False),
    (torch.optim.SGD, {"momentum": 0.9, "maximize": True}, False),
    (DecoupledSGD, {"momentum": 0.9}, True),
    (torch.optim.ASGD, {"maximize": True}, False),
    (torch.optim.RAdam, {"maximize": True}, False),
    (torch.optim.RAdam, {"decoupled_weight_decay": True}, True),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}, True),
]


def others_kept(model, before, k):
    """By which factor the rows of layer k that are not selected have shrunk."""
    weight = model[k].weight
    others = torch.ones(len(weight), dtype=torch.bool)
    others[weight.grad.selection.indices] = False
    assert not torch.allclose(weight[~others], before[k].weight[~others])
    return weight[others] / before[k].weight[others]


@pytest.mark.parametrize(("wrapped", "settings", "whole"), DECAYS)
def test_decoupled_decay_reaches_the_whole_weight_and_l2_the_selected_rows(
    wrapped, settings, whole
):
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2, side="out", refresh_every=3))
    settings = {"lr": 0.01, "weight_decay": 0.5, **settings}
    optimizer = grass_fx.subspace(wrapped)(model.parameters(), **settings)
    before = copy.deepcopy(model)
    for decayed in (0, 0, 3):  # steps; the rows that are not selected decay at the end of a period
        train(model, compiled, optimizer, 1)
        kept = others_kept(model, before, 0)
        torch.testing.assert_close(kept, torch.full_like(kept, (1 - 0.01 * 0.5 * whole) ** decayed))


def test_groups_may_decay_differently():
    model = mlp(8, 6, 6)
    compiled = torch.compile(model, backend=Captured(rank=2, side="out", refresh_every=1))
    groups = [{"params": model[k].parameters(), "decoupled_weight_decay": k == 0} for k in (0, 2)]
    optimizer = grass_fx.subspace(torch.optim.NAdam)(groups, lr=0.01, weight_decay=0.5)
    before = copy.deepcopy(model)
    train(model, compiled, optimizer, 1)
    for k in (0, 2):
        kept = others_kept(model, before, k)
        torch.testing.assert_close(kept, torch.full_like(kept, 1 - 0.01 * 0.5 * (k == 0)))


def test_groups_schedulers_closures_and_hooks_work_as_with_torch():
    model = mlp(8, 12, 6)
    compiled = torch.compile(model, backend=Captured(rank=2))
    first = {"params": model[0].parameters(), "lr": 0.0}
    second = {"params": model[2].parameters(), "scale": 0.5}
    # From now on torch has put its hooks around the wrapped class's step.
    torch.optim.AdamW(nn.Linear(2, 2).parameters())
    optimizer = grass_fx.subspace(torch.optim.AdamW)([first, second], lr=1e-2)
    assert [(g["lr"], g["scale"]) for g in optimizer.param_groups] == [(0.0, "auto"), (1e-2, 0.5)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    before = copy.deepcopy(model)

    def closure():
        optimizer.zero_grad()
        loss = compiled(torch.ones(2, 8)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    schedule.step()
    assert calls == ["step"]
    assert optimizer.param_groups[1]["lr"] == 5e-3
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [
        id(p) for p in model.parameters()
    ]


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
@every
def test_it_can_be_saved_and_goes_on_to_the_last_bit(wrapped, settings, way):
    options = {"rank": 3, "refresh_every": 3, "selection": "uniform"}
    model = mlp(8, 12, 6)
    make = grass_fx.subspace(wrapped)
    compiled = torch.compile(model, backend=Captured(**options))
    optimizer = make(model.parameters(), **settings)
    train(model, compiled, optimizer, 4)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = mlp(8, 12, 6)
        again = make(resumed.parameters(), **settings)
        resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
    else:
        pair = (model, optimizer)
        copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        resumed, again = copied
        assert type(again) is make
        again.load_state_dict(optimizer.state_dict())  # the selections of the new parameters
    train(model, compiled, optimizer, 6, seed=1)
    torch._dynamo.reset()
    train(resumed, torch.compile(resumed, backend=Captured(**options)), again, 6, seed=1)
    for got, want in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


def assert_quantised_alike(codes, others, levels, largest, others_largest):
    """Where a moment lies between two levels the last digit of a gradient decides, which is the
    processor's; a later step starts from there. Few numbers, by the widest step of 256 levels."""
    off = (levels[codes.int()] - levels[others.int()]).abs()
    assert off.max() <= 1 / 64 and (off > 0).float().mean() <= 2e-3
    torch.testing.assert_close(largest, others_largest, rtol=1 / 64, atol=0)  # of each block


def assert_stepped_alike(model, twin, lr):
    """All but one number in a thousand by a hundredth of a step, and none by a fifth."""
    off = [
        (p - q).abs().flatten() for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    ]
    off = torch.cat(off)
    assert off.max() <= lr / 5 and (off > lr / 100).float().mean() <= 1e-3


@pytest.mark.slow
def test_eight_bit_adamw_of_torchao():
    torchao = pytest.importorskip("torchao.optim")
    model = mlp(64, 128, 6)
    twin = copy.deepcopy(model)
    options = {"rank": 64, "side": "in", "include": ["0.weight"], "refresh_every": math.inf}
    wrapped, settings = torchao.AdamW8bit, {"lr": 1e-2, "weight_decay": 0.0}
    optimizer = grass_fx.subspace(wrapped)(model.parameters(), warmup_steps=0, **settings)
    train(model, torch.compile(model, backend=Captured(**options)), optimizer, 4, sizes=(64, 6))
    other = wrapped(twin.parameters(), **settings)
    train(twin, twin, other, 4, sizes=(64, 6))
    assert isinstance(model[0].weight.grad, CompactGrad)
    state = optimizer.state[model[0].weight]
    assert state["exp_avg"].codes.dtype == torch.uint8
    theirs = other.state[twin[0].weight]
    for name in ("exp_avg", "exp_avg_sq"):
        got, want = state[name], theirs[name]
        assert_quantised_alike(got.codes, want.codes, want.qmap, got.scale, want.scale)
    assert_stepped_alike(model, twin, settings["lr"])


def test_eight_bit_adamw_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = mlp(64, 128, 6)
    twin = copy.deepcopy(model)
    options = {"rank": 64, "side": "in", "include": ["0.weight"], "refresh_every": 3}
    wrapped, settings = bitsandbytes.optim.AdamW8bit, {"lr": 1e-2}
    optimizer = grass_fx.subspace(wrapped)(model.parameters(), warmup_steps=0, **settings)
    compiled = torch.compile(model, backend=Captured(**options))
    train(model, compiled, optimizer, 3, sizes=(64, 6))
    other = wrapped(twin.parameters(), **settings)
    train(twin, twin, other, 3, sizes=(64, 6))
    state, theirs = optimizer.state[model[0].weight], other.state[twin[0].weight]
    assert (state["state1"].dtype, state["state1"].shape) == (torch.uint8, (128, 64))
    for k in (1, 2):
        codes, largest = (tuple(s[f"{name}{k}"] for s in (state, theirs))
                          for name in ("state", "absmax"))  # fmt: skip
        assert_quantised_alike(*codes, theirs[f"qmap{k}"], *largest)
    assert_stepped_alike(model, twin, settings["lr"])
    train(model, compiled, optimizer, 1, sizes=(64, 6))  # the same selection: no refresh
    assert optimizer.state[model[0].weight]["step"] == 4


def test_quantised_state_starts_anew_at_a_refresh():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = mlp(64, 128, 6)
    compiled = torch.compile(model, backend=Captured(rank=32, refresh_every=3, selection="uniform"))
    optimizer = grass_fx.subspace(bitsandbytes.optim.AdamW8bit)(model.parameters(), lr=1e-2)
    train(model, compiled, optimizer, 3, sizes=(64, 6))
    state = optimizer.state[model[0].weight]
    assert (state["state1"].dtype, state["step"]) == (torch.uint8, 3)
    train(model, compiled, optimizer, 1, sizes=(64, 6))  # its blocks mix rows
    assert optimizer.state[model[0].weight]["step"] == 1


def test_the_class_is_made_once_and_has_the_wrapped_ones_face():
    made = grass_fx.subspace(torch.optim.SGD)
    assert made is grass_fx.subspace(torch.optim.SGD)
    assert issubclass(made, torch.optim.SGD) and made.__name__ == "SubspaceSGD"


class Warm(torch.optim.SGD):
    def __init__(self, params, warmup_steps):
        super().__init__(params)


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [(torch.optim.LBFGS, "does not step parameter by parameter"),
     (torch.optim.SparseAdam, "does not step parameter by parameter"),
     (grass_fx.AdamW, "steps in the subspace already"), (nn.Linear, "class of optimizers"),
     (Warm, "arguments of its own named warmup_steps")],
)  # fmt: skip
def test_classes_that_cannot_be_wrapped_are_errors(wrapped, message):
    with pytest.raises(OptionError, match=message):
        grass_fx.subspace(wrapped)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 0.0), ("warmup_steps", -1), ("on_refresh", "forget")]
)
def test_impossible_hyper_parameters_are_errors(name, value):
    with pytest.raises(OptionError, match=f"SGD: {name}"):
        grass_fx.subspace(torch.optim.SGD)([nn.Parameter(torch.ones(2))], lr=0.1, **{name: value})


def test_a_step_that_fails_leaves_weights_and_state_as_they_were():
    class Failing(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise ZeroDivisionError
            return super().step(closure)

    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2))
    optimizer = grass_fx.subspace(Failing)(model.parameters(), lr=0.1, momentum=0.9)
    train(model, compiled, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.fail = True
    with pytest.raises(ZeroDivisionError):
        train(model, compiled, optimizer, 1)
    after = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert set(optimizer.state) == set(model.parameters())


def test_it_warns_if_no_compact_gradient_has_ever_arrived():
    model = mlp(8, 6)
    with pytest.warns(GrassWarning, match="no compact gradient has arrived"):
        train(model, model, grass_fx.subspace(torch.optim.SGD)(model.parameters(), lr=0.1), 1)


def test_an_optimizer_without_a_rate_steps_the_selected_columns():
    model = mlp(8, 6)
    compiled = torch.compile(model, backend=Captured(rank=2))
    settings = {"weight_decay": 0.1, "warmup_steps": 0, "scale": 1.0}
    optimizer = grass_fx.subspace(WithoutRate)(model.parameters(), **settings)
    before = model[0].weight.detach().clone()
    train(model, compiled, optimizer, 1)
    change = (model[0].weight.detach() - before).abs()
    columns = model[0].weight.grad.selection.indices
    assert columns.numel() == 2
    torch.testing.assert_close(change[:, columns], torch.full((6, 2), 0.25))
    assert change.sum() == change[:, columns].sum()
