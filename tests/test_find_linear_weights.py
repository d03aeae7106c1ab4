"""find_linear_weights: which parameters are taken, how, and why others are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from grass_fx.config import GrassConfig
from grass_fx.passes.facts import DynamoFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from helpers import Captured, mlp, taken_and_left


class Uses(nn.Module):
    """One (12, 8) parameter, used as ``use`` says."""

    def __init__(self, use, shape=(12, 8), dtype=torch.float32):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape).to(dtype)), use

    def forward(self, *inputs):
        return self.use(self.w, *inputs)


X8, X12 = torch.randn(4, 8), torch.randn(4, 12)

# use, input, the tensor dimension that holds output features
LINEAR_USES = {
    "F.linear": (lambda w, x: F.linear(x, w), X8, 0),
    "F.linear by keyword": (lambda w, x: F.linear(x, weight=w), X8, 0),
    "x @ w.t()": (lambda w, x: x @ w.t(), X8, 0),
    "x @ w.T": (lambda w, x: x @ w.T, X8, 0),
    "x @ w.mT": (lambda w, x: x @ w.mT, X8, 0),
    "x @ w": (lambda w, x: x @ w, X12, 1),
    "w @ x.t()": (lambda w, x: w @ x.t(), X8, 0),
    "mm": (lambda w, x: torch.mm(x, w), X12, 1),
    "x.mm(w)": (lambda w, x: x.mm(w), X12, 1),
    "matmul 3-D": (lambda w, x: torch.matmul(x.view(2, 2, 12), w), X12, 1),
    "addmm": (lambda w, x: torch.addmm(x.new_ones(8), x, w), X12, 1),
    "addmm, w first": (lambda w, x: torch.addmm(x.new_ones(4), w, x.t()), X8, 0),
    "einsum, (in, out)": (lambda w, x: torch.einsum("bi,io->bo", x, w), X12, 1),
    "einsum, (out, in)": (lambda w, x: torch.einsum("oi,bi->bo", w, x), X8, 0),
    "einsum without a result": (lambda w, x: torch.einsum("bi,io", x, w), X12, 1),
    "einsum with an ellipsis": (lambda w, x: torch.einsum("...i,oi->...o", x, w), X8, 0),
    "some rows": (lambda w, x: x[:, :6] @ w[:6], X12, 1),
    "some rows and columns": (lambda w, x: x[:, 2:8] @ w[2:8, ..., 1:], X12, 1),
    "narrow": (lambda w, x: F.linear(x, w.narrow(0, 3, 8)), X8, 0),
    "split and used apart": (
        lambda w, x: torch.cat([F.linear(x, part) for part in w.split([4, 8])], 1), X8, 0
    ),
    "chunks of columns": (lambda w, x: sum(x @ part for part in w.chunk(2, 1)), X12, 1),
    "one of several chunks": (lambda w, x: F.linear(x, torch.chunk(w, 3)[1]), X8, 0),
    "concatenated": (lambda w, x: F.linear(x, torch.cat([w, 2 * x])), X8, 0),
    "transpose": (lambda w, x: x @ w.transpose(0, 1), X8, 0),
    "transpose negative": (lambda w, x: x @ torch.transpose(w, -1, -2), X8, 0),
    "permute": (lambda w, x: x @ w.permute(1, 0), X8, 0),
    "permute that keeps": (lambda w, x: x @ w.permute(0, 1), X12, 1),
    "converted": (lambda w, x: x.double() @ w.to(torch.float64), X12, 1),
    "converted and transposed": (lambda w, x: F.linear(x.bfloat16(), w.bfloat16()), X8, 0),
    "used twice": (lambda w, x: F.linear(F.linear(x, w) @ w, w), X8, 0),
    "times itself": (lambda w, x: x @ (w @ w.t()), X12, 0),
    "in a loop": (lambda w, x: [x := F.linear(x, w) @ w for _ in range(3)][-1], X8, 0),
    "under checkpoint": (
        lambda w, x: checkpoint(lambda x: F.linear(x, w), x, use_reentrant=False), X8, 0
    ),
    "transposed outside checkpoint": (
        lambda w, x: checkpoint(lambda x: x @ w.T, x, use_reentrant=False), X8, 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("name", LINEAR_USES)
def test_a_linear_use_is_taken_pushed_and_right(name, side):
    use, x, out_dim = LINEAR_USES[name]
    model = Uses(use)
    backend = Captured(rank=2, side=side)
    y = torch.compile(model, backend=backend)(x)
    y.square().sum().backward()
    (weight,) = backend.only.found.taken
    assert weight.name == "w"
    assert weight.spec.dim == (out_dim if side == "out" else 1 - out_dim)
    assert backend.only.report.pushed == ["w"], backend.only.report.stopped
    (full,) = torch.autograd.grad(model(x).square().sum(), model.w)
    grad = model.w.grad
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if "transposed" in name else {}
    torch.testing.assert_close(grad.compact, grad.selection.project(full), **tolerance)


OTHER_USES = {
    "embedding": (lambda w, x: F.embedding(x.long().abs() % 12, w), X8, "embedding"),
    "tied to an embedding": (
        lambda w, x: F.embedding(x.long().abs() % 12, w) @ w.T, X8, "embedding"
    ),
    "an elementwise function": (lambda w, x: x @ w.sin(), X12, "sin"),
    "normalised": (lambda w, x: x @ F.normalize(w), X12, "no matrix product"),
    "returned": (lambda w, x: (x @ w, w.t()), X12, "leaves the compiled graph"),
    "one row": (lambda w, x: x @ w + w[0], X12, "getitem"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:grass took no weight")
@pytest.mark.parametrize("name", OTHER_USES)
def test_other_uses_are_left_with_their_reason(name):
    use, x, reason = OTHER_USES[name]

    class Beside(Uses):
        def __init__(self):
            super().__init__(use)
            self.beside = nn.Linear(x.shape[1], 4)

        def forward(self, x):
            return super().forward(x), self.beside(x)

    taken, left = taken_and_left(Beside(), x, rank=2)
    assert taken == ["beside.weight"]
    assert reason in left["w"]


def test_only_trainable_matrices_of_floats_are_considered():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.conv = nn.Conv1d(8, 8, 1)
            self.complex = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
            self.register_buffer("buffer", torch.randn(8, 8))

        def forward(self, x):
            x = self.frozen(self.first(x)) @ self.buffer
            return self.conv(x.unsqueeze(-1)), x.to(torch.complex64) @ self.complex

    backend = Captured(rank=2)
    torch.compile(Mixed(), backend=backend)(torch.randn(4, 8))
    found = backend.only.found
    assert [weight.name for weight in found.taken] == ["first.weight"]
    assert found.unfit == {
        "first.bias": "1 dimension, only matrices are taken",
        "frozen.weight": "frozen",
        "frozen.bias": "frozen",
        "conv.bias": "1 dimension, only matrices are taken",
    }
    assert found.left == {
        "conv.weight": "also used by conv1d, which is no product with a stack of matrices",
        "complex": "dtype torch.complex64 is not a real floating-point type",
    }


def test_include_and_exclude_match_names_relative_to_the_region():
    model, x = mlp(8, 8, 8, 8), torch.randn(4, 8)
    assert taken_and_left(model, x, rank=2, include=["0.*", "2.*"], exclude=["2.weight"]) == (
        ["0.weight"],
        {"2.weight": "excluded by '2.weight'", "4.weight": "not in include"},
    )


def test_a_rank_above_the_dimension_leaves_the_weight_dense():
    taken, left = taken_and_left(mlp(8, 4, 16), torch.randn(4, 8), rank=8)
    assert taken == ["0.weight"]  # 8 of 8: equal to the rank is taken
    assert left == {"2.weight": "rank 8 exceeds its 4 input features"}


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        ({}, [1, 1]),
        ({"side": "in"}, [1, 1]),
        ({"side": "out"}, [0, 0]),
        ({"side": "auto"}, [1, 0]),
    ],
)
def test_input_features_are_selected_unless_told_otherwise(options, dims):
    """side="auto" selects the smaller dimension."""
    backend = Captured(rank=2, **options)
    torch.compile(mlp(8, 16, 8), backend=backend)(torch.randn(4, 8))
    assert [weight.spec.dim for weight in backend.only.found.taken] == dims


def test_a_subclass_parameter_is_left():
    class Odd(torch.Tensor):
        pass

    graph = fx.Graph()
    weights, x = [graph.placeholder(name) for name in ("odd", "plain")], graph.placeholder("x")
    graph.output(tuple(graph.call_function(F.linear, (x, w)) for w in weights))
    odd = nn.Parameter(torch.randn(12, 8).as_subclass(Odd))
    inputs = [odd, nn.Parameter(torch.randn(12, 8)), X8]
    gm = fx.GraphModule(nn.Module(), graph)
    found = find_linear_weights_pass(gm.graph, DynamoFacts(GrassConfig(rank=2), inputs))
    assert [w.name for w in found.taken] == ["plain"]
    assert found.left == {"odd": "a tensor subclass, Odd"}


def test_tied_parameters_are_one_weight():
    model = mlp(8, 8, 8)
    model[2].weight = model[0].weight
    taken, left = taken_and_left(model, torch.randn(4, 8), rank=2)
    assert len(taken) == 1 and not left
