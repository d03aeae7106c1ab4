"""Models that are written, called or sized in a way that others are not: as exact as any."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grass_fx
from grass_fx.state.gradient import CompactGrad
from helpers import Captured, mlp


def assert_exact(model, compiled, *inputs):
    """Each gradient is autograd's, of a taken weight its selected rows."""
    twin = copy.deepcopy(model)
    twin(*inputs).square().sum().backward()
    model.zero_grad()
    compiled(*inputs).square().sum().backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        if isinstance(got.grad, CompactGrad):
            torch.testing.assert_close(got.grad.compact, got.grad.selection.project(want.grad))
        else:
            torch.testing.assert_close(got.grad, want.grad)


class Weight(nn.Module):
    """What ``function`` makes of an input and a weight."""

    def __init__(self, function, *shape):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(*shape, dtype=torch.float64)), function

    def forward(self, *inputs):
        return self.function(self.w, *inputs)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


BY_KEYWORD = {
    "linear": lambda w, x: F.linear(input=x, weight=w),
    "transposed": lambda w, x: torch.matmul(input=x, other=torch.t(input=w)),
    "first factor": lambda w, x: torch.mm(input=w, mat2=x.T).T,
    "concatenated": lambda w, x: F.linear(x, torch.cat(tensors=[w, x])),
}


@pytest.mark.parametrize("how", BY_KEYWORD)
@pytest.mark.parametrize("side", ["in", "out"])
def test_arguments_may_have_names(how, side):
    model = Weight(BY_KEYWORD[how], 16, 24)
    backend = Captured(rank=4, side=side)
    assert_exact(model, torch.compile(model, backend=backend), numbers(5, 24))
    assert [weight.name for weight in backend.only.found.taken] == ["w"]


def test_a_table_by_keyword_is_dense_for_its_reason():
    model = Weight(lambda w, i: F.embedding(input=i, weight=w), 16, 24)
    (weight,) = grass_fx.explain(model, torch.arange(5)).weights
    assert weight.reason.startswith(
        "used by embedding, which is no matrix product with it; lookups"
    )


@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_a_model_may_turn_gradients_on_itself(rule, compiler):
    def within(w, x):
        with torch.no_grad():
            factor = x @ w.T
        with torch.enable_grad():
            return torch.tanh(x @ w.T) * factor

    model, backend = Weight(within, 16, 24), Captured(rank=4, selection=rule, compiler=compiler)
    compiled = torch.no_grad()(torch.compile(model, backend=backend))
    assert_exact(model, compiled, numbers(5, 24))
    assert isinstance(model.w.grad, CompactGrad)
    assert (model.w.grad.scores is None) == (rule == "cyclic")


SLICED = {
    "columns": (lambda w, x: F.linear(x, w[:, : x.shape[-1]]), lambda n: (4, n)),
    "rows": (lambda w, x: x @ w[: x.shape[0]].T, lambda n: (n, 24)),
}


@pytest.mark.parametrize("how", SLICED)
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_part_may_be_as_large_as_an_input(how, side):
    function, shape = SLICED[how]
    model = Weight(function, 16, 24)
    compiled = torch.compile(model, backend=Captured(rank=4, side=side))
    for n in (12, 8, 10):
        assert_exact(model, compiled, numbers(*shape(n)))
    assert isinstance(model.w.grad, CompactGrad)


@pytest.mark.parametrize("times", [3, pytest.param(220, marks=pytest.mark.slow)])
def test_a_weight_may_be_used_in_every_step_of_a_long_loop(times):
    def loop(w, x):
        for _ in range(times):
            x = torch.tanh(x @ w.T)
        return x

    model, backend = Weight(loop, 8, 8), Captured(rank=4)
    assert_exact(model, torch.compile(model, backend=backend), numbers(3, 8))
    assert backend.only.report.pushed == ["w"] and not backend.only.report.stopped


EMPTY = {
    "no first rows": lambda w, x: F.linear(x, torch.cat([w[:0], w])),
    "no rows": lambda w, x: x @ w.T + (x @ w[8:].T).sum(),
    "narrow": lambda w, x: x @ w.T + (x @ w.narrow(0, 3, 0).T).sum(),
    "nothing else": lambda w, x: F.linear(x, w[16:]),
    "no columns": lambda w, x: F.linear(x, w) + F.linear(x[:, : len(x) - 3], w[:, : len(x) - 3]),
    "an end before the start": lambda w, x: F.linear(x, w) + F.linear(x[:, 5:3], w[:, 5:3]),
    "both empty": lambda w, x: F.linear(x, torch.cat([w[:0], w[5:3], w, w[16:]])),
}


@pytest.mark.parametrize("how", EMPTY)
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_part_of_a_weight_may_be_empty(how, side):
    model = Weight(EMPTY[how], 16, 24)
    assert_exact(model, torch.compile(model, backend=Captured(rank=4, side=side)), numbers(3, 24))
    assert isinstance(model.w.grad, CompactGrad)


class Between(nn.Module):
    """A matrix times a vector and a bias, ``function`` of it, and another matrix."""

    def __init__(self, function):
        super().__init__()
        self.w, self.v = (nn.Parameter(numbers(*shape)) for shape in ((16, 24), (8, 16)))
        self.b, self.function = nn.Parameter(numbers(16)), function

    def forward(self, x):
        return F.linear(self.function(self.w @ x + self.b), self.v)


def euler(h):
    for _ in range(60):
        h = h - 1e-3 * (h * h * h - h)
    return h


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("function", [euler, torch.tanh])
def test_what_stops_below_a_vector_forms_no_full_gradient(function, side):
    """In :func:`euler` paths double at each step: a search along all of them would not end."""
    model, backend = Between(function), Captured(rank=4, side=side)
    assert_exact(model, torch.compile(model, backend=backend), numbers(24))
    assert "w" in backend.only.report.pushed and "w" not in backend.only.report.stopped


@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_sent_to_matrices_may_be_any_number_or_none(dynamic):
    model = Weight(lambda w, x, to: x @ w[to], 3, 8, 16)
    compiled = torch.compile(model, backend=Captured(rank=4), dynamic=dynamic)
    for count in (5, 3, 0):
        to = torch.randint(3, (count,))
        assert_exact(model, compiled, numbers(count, 2, 8), to)
        assert isinstance(model.w.grad, CompactGrad)


RULES = [("cyclic", False), ("uniform", True), ("top", False), ("multinomial_norm", True)]


@pytest.mark.parametrize(("rule", "replacement"), RULES)
@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
def test_another_default_device_changes_nothing(rule, replacement, make):
    if make is not grass_fx.AdamW and torch.__version__ < "2.13":
        pytest.skip("torch's own AdamW puts its counts on the default device")
    weights = []
    for default in ("cpu", "meta"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = mlp(8, 12, 6).bfloat16(), torch.randn(5, 8).bfloat16()
        more = {"stochastic_rounding": True} if make is grass_fx.AdamW else {}
        optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1, **more)
        backend = Captured(rank=4, selection=rule, replacement=replacement, refresh_every=2)
        compiled = torch.compile(model, backend=backend)
        with torch.device(default):
            for _ in range(4):
                compiled(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
            assert len(optimizer.stats()) == 2
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_kernels_that_cached_code_calls_by_name_are_there_before_any_lowering():
    code = (
        "from grass_fx.compile import lowering; lowering.register();"
        "from torch._inductor.select_algorithm import extern_kernels;"
        "print(extern_kernels.grass_gather_then_mm.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "gather_then_mm", run.stderr
