"""push_norms: the norms of a weight gradient are taken tile by tile, from its factors."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_push_selection import B, M, N, count, products, traced
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grass_fx.ops import MM_SQUARED_NORMS, SELECT, SELECTED_MM, SQUARED_NORMS
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.push_norms import LARGE_GRADIENT, NO_PRODUCT, push_norms_pass, wants_tiles
from grass_fx.passes.push_selection import push_selection_pass
from helpers import Captured, mlp, text

aten, prims = torch.ops.aten, torch.ops.prims
ROWS, COLUMNS = torch.tensor([0, 2, 4]), torch.tensor([0, 2])


def pushed(function, *inputs):
    """The graph after both passes and how many norms moved, once the numbers are proven equal."""
    gm = traced(function, *inputs)
    want = gm(*inputs)
    moved = push_norms_pass(gm.graph, JointFacts()).count
    push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), want, rtol=1e-6, atol=1e-6)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return gm.graph, moved


def test_rewrites_the_gradient_of_a_scoring_step():
    def gradient(d, x, indices):
        g = aten.permute.default(aten.mm.default(aten.permute.default(x, [1, 0]), d), [1, 0])
        return SELECT(g, indices, None, 0), SQUARED_NORMS(g, 0, "tiles")

    d, x, *_ = products()
    gm = traced(gradient, d, x, ROWS)
    assert_expected_inline(
        text(gm.graph),
        """\
def forward(self, d_1, x_1, indices_1):
    permute = torch.ops.aten.permute.default(x_1, [1, 0])
    mm = torch.ops.aten.mm.default(permute, d_1)
    permute_1 = torch.ops.aten.permute.default(mm, [1, 0])
    select = torch.ops.grass.select.default(permute_1, indices_1, None, 0)
    squared_norms = torch.ops.grass.squared_norms.default(permute_1, 0, 'tiles')
    return (select, squared_norms)
""",
    )
    graph, moved = pushed(gradient, d, x, ROWS)
    assert_expected_inline(
        text(graph),
        """\
def forward(self, d_1, x_1, indices_1):
    permute = torch.ops.aten.permute.default(x_1, [1, 0])
    selected_mm = torch.ops.grass.selected_mm.default(permute, d_1, indices_1, None, 1)
    permute_2 = torch.ops.aten.permute.default(selected_mm, [1, 0])
    mm_squared_norms = torch.ops.grass.mm_squared_norms.default(permute, d_1, 1)
    return (permute_2, mm_squared_norms)
""",
    )
    assert moved == 1


@pytest.mark.parametrize("scoring", ["tiles", "gradient"])
def test_norms_stand_where_their_gradient_is_made(scoring):
    def backward(d, x, w):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        below = aten.relu.default(aten.mm.default(d, w))  # what other layers go on with
        return below, SQUARED_NORMS(g, 1, scoring)

    d, x, *_ = products()
    graph, moved = pushed(backward, d, x, torch.randn(M, N, dtype=torch.float64))
    names = [node.name for node in graph.nodes]
    name = "mm_squared_norms" if scoring == "tiles" else "squared_norms"
    assert names.index(name) < names.index("relu") and moved == (scoring == "tiles")


CHAINS = {
    "nothing": lambda g: g,
    "t": lambda g: aten.t.default(aten.t.default(g)),
    "permute": lambda g: aten.permute.default(aten.permute.default(g, [1, 0]), [1, 0]),
    "view": lambda g: aten.view.default(aten.view.default(g, [M, N, 1]), [M, N]),
    "convert": lambda g: prims.convert_element_type.default(g, torch.float64),
    "clone": lambda g: aten.alias.default(aten.clone.default(g)),
    "bmm": None,
}


def by_chain(name, d, x):
    """A gradient, behind what changes no number."""
    if CHAINS[name] is not None:
        return CHAINS[name](aten.mm.default(aten.permute.default(d, [1, 0]), x))
    a, b = (aten.unsqueeze.default(t, 0) for t in (aten.t.default(d), x))
    return aten.view.default(aten.bmm.default(a, b), [M, N])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", CHAINS)
def test_norms_move_below_what_changes_no_value(name, dim):
    def gradient(d, x, indices):
        g = by_chain(name, d, x)
        return SELECT(g, indices, None, dim), SQUARED_NORMS(g, dim, "tiles")

    d, x, *_ = products()
    graph, moved = pushed(gradient, d, x, torch.tensor([0, 2]))
    assert moved == count(graph, MM_SQUARED_NORMS) == count(graph, SELECTED_MM) == 1
    assert not [
        n for n in graph.nodes if n.op == "call_function" and n.meta["val"].numel() == M * N
    ]


STAYS = {
    "scaled": lambda g, g2: aten.mul.Tensor(g, 2.0),
    "a weight used twice": lambda g, g2: aten.add.Tensor(g, g2),
    "merged dimensions": lambda g, g2: aten.view.default(aten.view.default(g, [M * N]), [M, N]),
}


def no_plain_product(name, *pairs):
    """A gradient whose factors no pass finds."""
    return STAYS[name](*(aten.mm.default(aten.permute.default(d, [1, 0]), x) for d, x in pairs))


@pytest.mark.parametrize("name", STAYS)
def test_other_gradients_are_formed_once_for_both(name):
    def gradient(d, x, d2, x2, indices):
        g = no_plain_product(name, (d, x), (d2, x2))
        return SELECT(g, indices, None, 0), SQUARED_NORMS(g, 0, "tiles")

    graph, moved = pushed(gradient, *products(), ROWS)
    assert moved == 0 and count(graph, SELECT) == count(graph, SQUARED_NORMS) == 1


def test_a_gradient_that_is_needed_whole_anyway_is_not_computed_twice():
    def gradient(d, x):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        return SQUARED_NORMS(g, 0, "tiles"), aten.sin.default(g)

    d, x, *_ = products()
    _, moved = pushed(gradient, d, x)
    assert moved == 0


@pytest.mark.parametrize("scoring", ["gradient", "auto"])
def test_a_small_gradient_is_formed_unless_tiles_are_asked_for(scoring):
    def gradient(d, x):
        return SQUARED_NORMS(aten.mm.default(aten.permute.default(d, [1, 0]), x), 1, scoring)

    d, x, *_ = products()
    _, moved = pushed(gradient, d, x)
    assert moved == 0


def test_tiles_are_for_large_gradients_on_a_gpu():
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        size = LARGE_GRADIENT // 2
        large, small = (torch.empty(1, n, dtype=torch.bfloat16) for n in (size, size - 1))
        on_gpu = [torch.empty_like(t, device="cuda") for t in (large, small)]
    assert [wants_tiles(g) for g in (large, small, *on_gpu)] == [False, False, True, False]
    assert wants_tiles(small, "tiles") and not wants_tiles(on_gpu[0], "gradient")


def test_a_graph_without_norms_stays_as_it_is():
    gm = traced(lambda x, w: torch.relu(x @ w), torch.randn(B, N), torch.randn(N, M))
    before = text(gm.graph)
    assert push_norms_pass(gm.graph, JointFacts()).count == 0 and text(gm.graph) == before


class Shapes(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {(func, tuple(t.shape)) for t in tree_leaves(out) if torch.is_tensor(t)}
        return out


@pytest.mark.parametrize("side", [pytest.param("out", marks=pytest.mark.slow), "in"])
@pytest.mark.parametrize("kind", ["aot_eager", "inductor"])
def test_a_scoring_step_of_tiles_gives_the_same_scores_and_selections(kind, side):
    model, x = mlp(24, 40, 16), torch.randn(9, 24)
    grads = {}
    for scoring in ("gradient", "tiles"):
        torch._dynamo.reset()
        model.zero_grad()
        backend = Captured(rank=8, selection="top", side=side, scoring=scoring, compiler=kind)
        torch.compile(model, backend=backend)(x).square().mean().backward()
        grads[scoring] = [p.grad for p in model.parameters() if p.dim() == 2]
    for whole, tiled in zip(*grads.values(), strict=True):
        assert whole.scores is not None
        torch.testing.assert_close(tiled.scores, whole.scores)
        torch.testing.assert_close(tiled.compact, whole.compact)


@pytest.mark.parametrize("scoring", ["gradient", "tiles"])
def test_tiles_form_no_full_gradient_in_a_scoring_step(scoring):
    model, x = mlp(24, 40, 16), torch.randn(9, 24)
    backend = Captured(rank=8, selection="top", scoring=scoring)
    loss = torch.compile(model, backend=backend)(x).square().mean()
    with Shapes() as shapes:
        loss.backward()
    full = {(24, 40), (40, 24), (16, 40), (40, 16)}
    made = {shape for func, shape in shapes.seen if func is aten.mm.default}
    assert made & full if scoring == "gradient" else not made & full


def test_an_inference_graph_has_no_norms(tmp_path):
    backend = Captured(rank=4, selection="top", scoring="tiles", dump_dir=str(tmp_path))
    with torch.no_grad():
        torch.compile(mlp(8, 16, 12), backend=backend)(torch.randn(4, 8))
    assert not list(tmp_path.iterdir())


# --- norms of a factor ----------------------------------------------------------------------------


def test_norms_of_inputs_need_no_gradient():
    def gradient(d, x, indices):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        return SELECT(g, indices, None, 1), SQUARED_NORMS(g, 1, "input")

    d, x, *_ = products()
    gm = traced(gradient, d, x, COLUMNS)
    push_norms_pass(gm.graph, JointFacts())
    push_selection_pass(gm.graph, JointFacts())
    gm.recompile()
    assert_expected_inline(
        text(gm.graph),
        """\
def forward(self, d_1, x_1, indices_1):
    permute = torch.ops.aten.permute.default(d_1, [1, 0])
    selected_mm = torch.ops.grass.selected_mm.default(permute, x_1, indices_1, None, 1)
    squared_norms_1 = torch.ops.grass.squared_norms.default(x_1, 1)
    return (selected_mm, squared_norms_1)
""",
    )
    compact, scores = gm(d, x, COLUMNS)
    torch.testing.assert_close(compact, (d.t() @ x)[:, COLUMNS])
    torch.testing.assert_close(scores, x.square().sum(0).float())


def summed(d, x):
    one = aten.mm.default(aten.permute.default(d, [1, 0]), x)
    two = aten.mm.default(aten.permute.default(x, [1, 0]), d)
    return aten.add.Tensor(one, aten.permute.default(two, [1, 0]))


def turned(d, x):
    """One transposed and converted sum, as of a weight that is turned once and used twice."""
    return prims.convert_element_type.default(aten.permute.default(summed(x, d), [1, 0]), d.dtype)


def converted(d, x):
    g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
    return prims.convert_element_type.default(g, torch.float32)


def batched(d, x):
    g = aten.bmm.default(d.t().unsqueeze(0), x.unsqueeze(0))
    return aten.squeeze.dim(g, 0)


@pytest.mark.parametrize(
    ("function", "times"),
    [(summed, 2), (turned, 2), (converted, 1), (batched, 1)],
    ids=["sum", "turned sum", "conversion", "batch"],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_the_factor_is_found_below_sums_conversions_and_batches(function, times, dim):
    d, x, *_ = products()
    gm = traced(lambda d, x: SQUARED_NORMS(function(d, x), dim, "input"), d, x)
    result = push_norms_pass(gm.graph, JointFacts())
    gm.recompile()
    assert result.count == 1 and not result.stopped
    want = times * (d, x)[dim].square().sum(0).float()
    torch.testing.assert_close(gm(d, x), want)


def test_a_gradient_that_is_no_product_is_scored_by_its_own_norms():
    def gradient(d, x, indices):
        g = aten.mul.Tensor(aten.mm.default(aten.permute.default(d, [1, 0]), x), 0.5)
        return SELECT(g, indices, None, 1), SQUARED_NORMS(g, 1, "input")

    d, x, *_ = products()
    gm = traced(gradient, d, x, COLUMNS)
    result = push_norms_pass(gm.graph, JointFacts())
    gm.recompile()
    assert result.count == 0 and [n.name for n in result.stopped] == ["indices_1"]
    torch.testing.assert_close(gm(d, x, COLUMNS)[1], (d.t() @ x / 2).square().sum(0).float())


class Scaled(nn.Module):
    """A weight whose gradient is no plain product."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return F.linear(x, self.weight * 2)


def test_what_is_scored_by_gradients_is_reported(caplog):
    model, x = Scaled(), torch.randn(5, 8)
    backend = Captured(rank=2, selection="input_norm")
    with caplog.at_level("WARNING", "grass_fx"):
        torch.compile(model, backend=backend)(x).square().sum().backward()
    assert backend.only.report.scored_by_gradient == {"weight": NO_PRODUCT}
    assert "gradients, not inputs, are scored for weight: its gradient is no" in caplog.text
    (g,) = torch.autograd.grad(model(x).square().sum(), [model.weight])
    torch.testing.assert_close(model.weight.grad.scores, g.square().sum(0))


def test_a_scoring_step_by_inputs_keeps_selected_columns_too(caplog):
    model = mlp(8, 16, 12)
    with caplog.at_level("DEBUG", "grass_fx"):
        torch.compile(model, backend=Captured(rank=4, selection="input_norm"))(torch.randn(32, 8))
    kept = [line for line in caplog.messages if line.startswith("keep_selected")]
    assert len(kept) == 2 and all(", 1 kept)" in line for line in kept)
