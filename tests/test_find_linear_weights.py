"""find_linear_weights: which parameters are taken, how, and why others are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from grass_fx.config import GrassConfig
from grass_fx.passes.facts import DynamoFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from helpers import Captured, mlp, taken_and_left, uncached


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
    "tied to an embedding": (
        lambda w, x: F.embedding(x.long().abs() % 12, w) @ w.T, X8, "embedding"
    ),
    "a function of its rows": (lambda w, x: x @ w.softmax(0), X12, "softmax"),
    "normalised": (lambda w, x: x @ F.normalize(w), X12, "no matrix product"),
    "returned": (lambda w, x: (x @ w, w.t()), X12, "leaves the compiled graph"),
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
        "conv.weight": "used by conv1d, which is no product with a stack of matrices; no rule for "
        "aten.convolution_backward.default",
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


# --- lookups --------------------------------------------------------------------------------------

TOKENS = torch.tensor([[1, 3, 3], [0, 11, 3]])

# a use of a (12, 8) table, and the name that reports have for it
LOOKUPS = {
    "F.embedding": (lambda w, x: F.embedding(x, w), "embedding"),
    "F.embedding by keyword": (lambda w, x: F.embedding(input=x, weight=w), "embedding"),
    "torch.embedding": (lambda w, x: torch.embedding(w, x), "embedding"),
    "torch.embedding by keyword": (
        lambda w, x: torch.embedding(indices=x, weight=w, padding_idx=3), "embedding"
    ),
    "padding_idx": (lambda w, x: F.embedding(x, w, 3), "embedding"),
    "scale_grad_by_freq": (
        lambda w, x: F.embedding(x, w, scale_grad_by_freq=True), "embedding"
    ),
    "w[x]": (lambda w, x: w[x], "getitem"),
    "w[x] of 32 bits": (lambda w, x: w[x.int()], "getitem"),
    "w[x, :]": (lambda w, x: w[x, :], "getitem"),
    "w[x, ...]": (lambda w, x: w[x, ...], "getitem"),
    "w.T[:, x]": (lambda w, x: w.T[:, x], "getitem"),
    "w.index_select": (lambda w, x: w.index_select(0, x[0]), "index_select"),
    "w.T.index_select": (lambda w, x: w.T.index_select(-1, x[0]), "index_select"),
    "torch.index_select by keyword": (
        lambda w, x: torch.index_select(input=w, dim=-2, index=x[0]), "index_select"
    ),
    "some rows": (lambda w, x: F.embedding(x % 5, w[4:9]), "embedding"),
    "some columns": (lambda w, x: w[:, 2:7][x], "getitem"),
    "parts": (lambda w, x: torch.cat([part[x % 6] for part in w.chunk(2)]), "getitem"),
    "concatenated": (lambda w, x: F.embedding(x, torch.cat([w, torch.ones(3, 8)])), "embedding"),
    "converted": (lambda w, x: F.embedding(x, w.float()), "embedding"),
    "under checkpoint": (
        lambda w, x: checkpoint(lambda x: w[x].sin(), x, use_reentrant=False), "getitem"
    ),
    "as a factor": (lambda w, x: w[x[0]] @ w[x[1]].T, "getitem"),
    "twice": (lambda w, x: 4 * w[x] + w[x.flip(-1)], "getitem"),
    "tied": (lambda w, x: F.embedding(x, w, 3) @ w.T, "embedding"),
    "tied to x @ w": (lambda w, x: F.linear(w[x], w) @ w, "getitem"),
    "tied, twice": (lambda w, x: (4 * w[x] + w[x.flip(-1)]).tanh() @ w.T, "getitem"),
}  # fmt: skip
IN_INDUCTOR = ["padding_idx", "scale_grad_by_freq", "w.T[:, x]", "parts", "tied", "tied, twice"]


class Tables(nn.Module):
    """A (12, 8) table for each of these uses, of numbers that can be indices as well."""

    def __init__(self, uses):
        super().__init__()
        self.uses = uses
        self.tables = nn.ParameterList(3 * torch.rand(12, 8, dtype=torch.float64) for _ in uses)

    def forward(self, x):
        return [use(w, x) for use, w in zip(self.uses, self.tables, strict=True)]


def weighted(results):
    """A loss to which each element of each result has another gradient."""
    return sum((y * torch.arange(y.numel()).view(y.shape).cos()).sum() for y in results)


def finder(model):
    """What ``find_linear_weights`` finds in a model that looks up TOKENS, by options."""
    graphs = []

    def backend(gm, inputs):
        graphs.append((gm, inputs))
        return gm.forward

    torch.compile(model, backend=backend)(TOKENS)
    ((gm, inputs),) = graphs

    def find(**options):
        config = GrassConfig(**{"rank": 2, **options})
        return find_linear_weights_pass(gm.graph, DynamoFacts(config, inputs))

    return find


def fates_of(uses):
    """The selected dimension for each use, or the reason why it is left, by options."""
    find = finder(Tables(uses))

    def fates_by(**options):
        found = find(**options)
        fates = {weight.name: weight.spec.dim for weight in found.taken} | found.left
        assert {*found.lookups} == {
            name for name, why in found.left.items() if "; lookups=True" in why
        }
        return [fates[f"tables.{k}"] for k in range(len(uses))]

    return fates_by


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, LOOKUPS),
        ({"compiler": "inductor"}, IN_INDUCTOR),
        ({"rank": 4, "block": 2}, IN_INDUCTOR),
        ({"selection": "uniform", "replacement": True}, IN_INDUCTOR),
        ({"selection": "top", "scoring": "tiles"}, IN_INDUCTOR),  # whose first step scores
        ({"side": "auto"}, IN_INDUCTOR),
    ],
    ids=lambda given: str(given) if len(given) < 3 else "",
)
def test_lookups_are_taken_pushed_and_right(options, names):
    model = Tables([LOOKUPS[name][0] for name in names])
    backend = Captured(lookups=True, **{"rank": 3, **options})
    with uncached():
        weighted(torch.compile(model, backend=backend)(TOKENS)).backward()
    assert len(backend.only.report.pushed) == len(names), backend.only.report.stopped
    fulls = torch.autograd.grad(weighted(model(TOKENS)), [*model.parameters()])
    for name, w, full in zip(names, model.parameters(), fulls, strict=True):
        grad, bound = w.grad, 1e-6 if name == "converted" else 1e-13
        assert (grad.selection.dim, grad.scores is None) == (1, "top" not in options.values())
        error = (grad.compact - grad.selection.project(full)).abs().max()
        assert error <= bound * full.abs().max(), name


def test_lookups_are_right_under_autocast_and_with_symbolic_sizes():
    """The product of the head is in bfloat16, and so is its gradient; that of the lookup is not."""
    names = ["padding_idx", "tied", "tied, twice"]
    model = Tables([LOOKUPS[name][0] for name in names]).float()
    compiled = torch.compile(model, backend=Captured(rank=3, lookups=True), dynamic=True)
    for tokens in (TOKENS, TOKENS.repeat(1, 2), TOKENS[0]):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, want = weighted(compiled(tokens)), weighted(model(tokens))
        loss.backward()
        fulls = torch.autograd.grad(want, [*model.parameters()])
        for w, full in zip(model.parameters(), fulls, strict=True):
            error = (w.grad.compact - w.grad.selection.project(full)).abs().max()
            assert error <= 2**-7 * full.abs().max()


def test_only_the_option_takes_a_lookup_and_only_for_its_width():
    find = fates_of([use for use, _ in LOOKUPS.values()])
    whats = [f"used by {by}, which is no matrix product with it" for _, by in LOOKUPS.values()]
    assert find(lookups=True) == [1] * len(LOOKUPS)
    assert find() == [f"{what}; lookups=True takes it" for what in whats]
    assert find(side="out") == whats
    assert find(side="out", lookups=True) == [
        f"used by {by}, and side='out' would select among its rows: side='in' takes it"
        for _, by in LOOKUPS.values()
    ]


NO_PRODUCT = "which is no matrix product with it"
OTHER_LOOKUPS = [
    (lambda w, x: F.embedding(x, w, None, 1.0), "embedding with max_norm, which changes it"),
    (lambda w, x: F.embedding(x, w, sparse=True),
     "embedding with sparse=True: sparse=False lets it train compact"),
    (lambda w, x: torch.embedding(w, x, -1, False, True),
     "embedding with sparse=True: sparse=False lets it train compact"),
    (lambda w, x: w[3], f"getitem, {NO_PRODUCT}"),
    (lambda w, x: w[x, x % 8], f"getitem, {NO_PRODUCT}"),
    (lambda w, x: w[x, 0], f"getitem, {NO_PRODUCT}"),
    (lambda w, x: w[torch.ones(12, dtype=torch.bool)],
     f"getitem, {NO_PRODUCT}"),
    (lambda w, x: F.embedding_bag(x, w), f"embedding_bag, {NO_PRODUCT}"),
    (lambda w, x: F.embedding(x, 2 * w), f"mul, {NO_PRODUCT}"),
    (lambda w, x: F.embedding(w.to(torch.int64), torch.ones(9, 8)), f"embedding, {NO_PRODUCT}"),
    (lambda w, x: torch.ones(9, 8)[w.to(torch.int64)], f"getitem, {NO_PRODUCT}"),
]  # fmt: skip


def test_other_lookups_are_left_with_their_reason():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # for the mask
        find = fates_of([use for use, _ in OTHER_LOOKUPS])
    reasons = [f"used by {reason}" for _, reason in OTHER_LOOKUPS]
    assert find() == find(lookups=True) == find(lookups=True, side="out") == reasons


def test_the_dimension_of_a_lookup_is_not_selected():
    """Columns may be looked up as well; where both are, no side fits, and none is promised."""
    columns, both = (lambda w, x: w[:, x % 8]), (lambda w, x: w[x].sum() + w[:, x % 8])
    find, what = fates_of([columns, both]), f"used by getitem, {NO_PRODUCT}"
    assert find() == [f"{what}; lookups=True takes it", what] and find(side="out") == [what] * 2
    refused = (
        "used by getitem, and side={!r} would select among its rows: side='in' takes it".format
    )
    assert find(lookups=True) == [0, refused("in")]
    assert find(lookups=True, side="out") == [refused("out")] * 2


def test_what_does_not_fit_is_promised_to_nobody():
    left = {"w": "rank 9 exceeds its 8 input features"}
    find = finder(Uses(lambda w, x: w[x]))
    for lookups in (False, True):
        found = find(rank=9, lookups=lookups)
        assert found.left == left and not found.lookups


def test_rows_of_a_stack_are_not_looked_up():
    find = finder(Uses(lambda w, x: w[1][x], (3, 12, 8)))
    left = {"w": "used by getitem, which is no product with a stack of matrices"}
    assert find(lookups=True).left == find().left == left
