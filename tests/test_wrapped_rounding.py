"""bfloat16 weights under wrapped optimizers: what X keeps, and in which dtype."""

import copy

import pytest
import torch

import grass_fx
from grass_fx.optim import probe
from helpers import Captured, mlp


class Factored(torch.optim.Optimizer):
    """Momentum of the parameter's dtype and factors of its square, as Adafactor with beta1 has."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, self.state[p], group["lr"])

    def move(self, p, state, lr):
        if not state:
            state["m"], state["row"] = torch.zeros_like(p), torch.zeros_like(p[..., 0])
        state["m"].lerp_(p.grad, 0.1)
        state["row"].lerp_(p.grad.square().mean(-1), 0.1)
        p.sub_(lr * state["m"])


class InFloat32(Factored):
    """Keeps a float32 moment of bfloat16 parameters on purpose."""

    def move(self, p, state, lr):
        v = state.setdefault("v", torch.zeros_like(p, dtype=torch.float32))
        v.lerp_(p.grad.float().square(), 0.001)
        p.sub_((lr * p.grad.float() / (v.sqrt() + 1e-8)).to(p.dtype))


class Rounds(Factored):
    """Has an option of our option's name, on by default."""

    def __init__(self, params, lr=1e-3, stochastic_rounding=True):
        torch.optim.Optimizer.__init__(
            self, params, {"lr": lr, "stochastic_rounding": stochastic_rounding}
        )


def trained(make, steps=3, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mlp(8, 12, 6).bfloat16()
    run = torch.compile(model, backend=Captured(rank=4, refresh_every=2, selection="uniform"))
    optimizer = make(model.parameters(), **options)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            run(torch.randn(5, 8).bfloat16()).float().square().sum().backward()
            optimizer.step()

    train(steps)
    return model, optimizer, train


def dtypes_of(optimizer):
    return {
        name: value.dtype
        for state in optimizer.state.values()
        if "indices" in state
        for name, value in state.items()
        if name in ("m", "row", "v", "row_var", "col_var", "exp_avg", "exp_avg_sq")
    }


CLASSES = [Factored, InFloat32, torch.optim.Adafactor, torch.optim.AdamW, torch.optim.NAdam]


@pytest.mark.parametrize("wrapped", CLASSES)
def test_state_keeps_the_dtypes_that_x_gives_it(wrapped):
    plain = mlp(8, 12, 6).bfloat16()
    own = wrapped(plain.parameters())
    plain(torch.randn(5, 8).bfloat16()).square().sum().backward()
    own.step()
    want = {k: v.dtype for k, v in own.state[plain[0].weight].items() if torch.is_tensor(v)}
    _, optimizer, _ = trained(grass_fx.subspace(wrapped))
    for name, dtype in dtypes_of(optimizer).items():
        assert dtype == want[name], name


@pytest.mark.parametrize("wrapped", CLASSES)
@pytest.mark.parametrize("first", [False, None])
def test_state_loads_again_and_rounding_may_change_in_mid_run(wrapped, first):
    model, optimizer, train = trained(grass_fx.subspace(wrapped), stochastic_rounding=first)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(2)
    before = dtypes_of(optimizer)
    optimizer.param_groups[0]["stochastic_rounding"] = None if first is False else False
    train(3)
    assert dtypes_of(optimizer) == before
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_option_of_x_of_the_same_name_keeps_its_default():
    _, optimizer, _ = trained(grass_fx.subspace(Rounds), steps=1)
    assert optimizer.param_groups[0]["stochastic_rounding"] is True
    _, optimizer, _ = trained(grass_fx.subspace(Rounds), steps=1, stochastic_rounding=False)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False


@pytest.mark.parametrize(
    ("wrapped", "options", "grows"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.RAdam, {}, True),
        (torch.optim.RMSprop, {}, True),
        (torch.optim.Adafactor, {}, True),
        (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}, False),
        (torch.optim.Muon, {}, False),
    ],
)
def test_auto_scale_is_for_steps_whose_size_does_not_depend_on_the_gradient(
    wrapped, options, grows
):
    assert probe.Wrapped(wrapped, (), options, {}).ask(probe.keeps_its_size, {}) == grows
    moved = []
    for scale in ("auto", 1.0):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).double()
        run = torch.compile(model, backend=Captured(rank=2))
        make = grass_fx.subspace(wrapped)
        settings = {**options, "scale": scale, "warmup_steps": 0, "weight_decay": 0.0}
        optimizer = make(model.parameters(), **settings)
        before = model[0].weight.detach().clone()
        run(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        moved.append((model[0].weight.detach() - before).norm())
    torch.testing.assert_close(moved[0], moved[1] * (4 if grows else 1))
