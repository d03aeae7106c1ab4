"""With every row selected, an optimizer in the subspace is the optimizer: r = n changes nothing.

Each configuration of torch's own test database, and a few in the ordinary suite, trains a small
model eagerly under X and compiled under ``grass_fx.subspace(X)``, in float64, over selections that
are drawn anew and hold what they held. All that differs is in :data:`DIFFERENCES`.
"""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import OptionError
from grass_fx.state.gradient import CompactGrad
from optimizer_database import REFUSED, SOME, every, ours, some

DIFFERENCES = {
    ("Adafactor", "stack"): "it factors each matrix of a stack for itself; outside graphs a stack "
    "is one matrix, of all their rows",
    **{
        (name, model): "it is refused: it does not step each parameter on a dense gradient"
        for name in REFUSED
        for model in ("matrices", "stack")
    },
}
"""(class, model): why r = n is not X. Each is tried, and has to differ."""

OURS = "grass_fx.AdamW"

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
OF_MUON = {"rtol": 1e-3, "atol": 1e-5}  # its iteration is in bfloat16


class Matrices(nn.Module):
    """Selected along either dimension; without vectors, which Muon refuses."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 2)

    def forward(self, x):
        return torch.tanh(x @ self.experts).sum(0)


MODELS = {"matrices": Matrices, "stack": Stack}


def loss_of(model, x):
    return (model(x) - x.flip(1)).square().mean()


def compiled_loss(rule, refresh_every):
    options = {"rank": 6, "side": "auto", "selection": rule, "refresh_every": refresh_every}
    return torch.compile(loss_of, backend="grass", options={**options, "compiler": "aot_eager"})


# With "reset" moments start anew by intention where a selection is drawn: there the first stays.
LOSSES = {
    ("cyclic", "carry"): compiled_loss("cyclic", 3),
    ("top", "carry"): compiled_loss("top", 2),
    ("cyclic", "reset"): compiled_loss("cyclic", math.inf),
}


@pytest.fixture(autouse=True, scope="module")
def _fresh():
    """In place of the one for every test: all models here share their compiled code."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(make, options, model, loss=loss_of, steps=8):
    torch.manual_seed(0)
    model = MODELS[model]().double()
    optimizer = make(model.parameters(), **copy.deepcopy(options))
    gen = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, torch.randn(12, 6, generator=gen, dtype=torch.float64)).backward()
        compact = [isinstance(p.grad, CompactGrad) for p in model.parameters()]
        assert all(compact) if loss is not loss_of else not any(compact)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def compare(name, model, rule, on_refresh, configurations):
    """Raises AssertionError where a configuration differs, naming it."""
    wrapped = getattr(torch.optim, "AdamW" if name == OURS else name)
    make = grass_fx.AdamW if name == OURS else grass_fx.subspace(wrapped)
    given = configurations(wrapped.__name__)
    close = OF_MUON if name == "Muon" else CLOSE
    for options in ours(given) if name == OURS else given:
        own = {"warmup_steps": 0, "on_refresh": on_refresh}
        want = trained(wrapped, options, model)
        got = trained(make, {**options, **own}, model, LOSSES[rule, on_refresh])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(
                a, b, **close, msg=lambda m, o=options: f"{name}(**{o}): {m}"
            )


def situations():
    found = []
    for name in [*SOME, OURS]:
        for model in MODELS:
            for rule, on_refresh in LOSSES:
                if (name, model) in DIFFERENCES or (name, model) == ("Muon", "stack"):
                    continue  # Muon takes matrices alone
                found.append((name, model, rule, on_refresh))
    return pytest.mark.parametrize(("name", "model", "rule", "on_refresh"), found)


@situations()
def test_with_all_rows_it_is_x_in_some_configurations(name, model, rule, on_refresh):
    compare(name, model, rule, on_refresh, some)


@pytest.mark.slow
@situations()
def test_with_all_rows_it_is_x_in_every_configuration(name, model, rule, on_refresh):
    compare(name, model, rule, on_refresh, every)


@pytest.mark.parametrize(("name", "model"), DIFFERENCES)
def test_what_differs_does(name, model):
    wrapped = getattr(torch.optim, name)
    if name in REFUSED:
        with pytest.raises(OptionError, match=f"{name} does not step parameter by parameter"):
            grass_fx.subspace(wrapped)
    else:
        with pytest.raises(AssertionError, match="not close"):
            compare(name, model, "cyclic", "reset", some)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_with_all_rows_generated_code_steps_as_torchs_adamw(model):
    options = {"lr": 0.01, "weight_decay": 0.1}
    want = trained(torch.optim.AdamW, options, model)
    own = {"warmup_steps": 0, "compile": True}
    got = trained(grass_fx.AdamW, {**options, **own}, model, LOSSES["cyclic", "carry"])
    torch.testing.assert_close(got, want, **CLOSE)


OPTIONS = [
    name
    for name in inspect.signature(torch.optim.AdamW).parameters
    if name not in ("params", "capturable")  # graphs of a GPU alone
]


@pytest.mark.parametrize("option", OPTIONS)
def test_adamw_takes_what_torchs_takes_or_says_why_not(option):
    value = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}.get(option, True)
    parameters = [nn.Parameter(torch.ones(2))]
    try:
        optimizer = grass_fx.AdamW(parameters, **{option: value})
    except OptionError as error:
        assert option in str(error) and "torch.optim.AdamW" in str(error)
    else:
        assert optimizer.param_groups[0][option] == value
