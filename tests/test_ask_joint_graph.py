"""ask_joint_graph: weights inside of other functions, taken by what makes their gradient."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_push_chains import STEPS
from torch import fx, nn

import grass_fx
from grass_fx._torch_compat import input_position, look_at_joint_graph
from grass_fx.config import GrassConfig
from grass_fx.passes.ask_joint_graph import ask_joint_graph_pass
from grass_fx.passes.facts import AskFacts
from grass_fx.state.gradient import CompactGrad
from helpers import Captured, mlp, taken_and_left, text, uncached
from other_functions import COLUMNS, LEFT, LINEAR, ONE_SIDE, ROWS, TARGETS, TOKENS, Lookup, Uses


@pytest.fixture
def x():
    return torch.randn(TOKENS, COLUMNS, dtype=torch.float64)


def compared(use, x, **options):
    """One backward, compiled and not: the compiled graphs, the gradient, and the full one."""
    model = Uses(use).double()
    twin, backend = copy.deepcopy(model), Captured(rank=4, **options)
    for each in (torch.compile(model, backend=backend), twin):
        each(x).square().sum().backward()
    return backend, model.w.grad, twin.w.grad


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("name", LINEAR)
def test_it_is_taken_and_pushed_and_right(name, side, x):
    backend, grad, full = compared(LINEAR[name], x, side=side)
    (weight,) = [each for each in backend.only.found.taken if each.name == "w"]
    assert weight.asked and weight.spec.dim == {"in": 1, "out": 0}[side]
    assert not backend.only.report.stopped
    assert isinstance(grad, CompactGrad)
    torch.testing.assert_close(grad.compact, grad.selection.project(full), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["autograd function", pytest.param("cross entropy, fused", marks=pytest.mark.slow)]
)
def test_by_inductor(name, x):
    backend, grad, full = compared(LINEAR[name], x, compiler="inductor")
    assert not backend.only.report.stopped
    torch.testing.assert_close(grad.compact, grad.selection.project(full))


@pytest.mark.parametrize(
    "name", ["cross entropy, fused", pytest.param("cross entropy, tiled", marks=pytest.mark.slow)]
)
def test_a_fused_loss_holds_no_gradient_of_the_heads_shape(name, x):
    graphs = []  # of a user's pass, which sees them after ours
    inductor = {"joint_custom_pre_pass": graphs.append}
    with uncached():
        compared(LINEAR[name], x, compiler="inductor", inductor=inductor)
    (graph,) = graphs
    whole = {(ROWS, COLUMNS), (COLUMNS, ROWS)}
    made = [n for n in graph.nodes if tuple(getattr(n.meta.get("val"), "shape", ())) in whole]
    views = {n.target for n in made if n.op == "call_function"}
    assert len(made) > 1 and views <= {torch.ops.aten.permute.default}  # of the weight


@pytest.mark.parametrize("name", ONE_SIDE)
def test_one_side_may_be_known_alone(name, x):
    use, reason = ONE_SIDE[name]
    backend, grad, full = compared(use, x)
    torch.testing.assert_close(grad.compact, grad.selection.project(full))
    torch._dynamo.reset()
    backend, grad, full = compared(use, x, side="out")
    assert reason in backend.only.found.left["w"]
    torch.testing.assert_close(grad, full)


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_with_both_reasons(name, x):
    use, reason = LEFT[name]
    backend, grad, full = compared(use, x)
    left = backend.only.found.left["w"]
    assert left.startswith("used by ") and reason in left
    torch.testing.assert_close(grad, full)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="of a newer torch")
@pytest.mark.parametrize("chunk", [None, 5])
def test_torchs_own_fused_loss_is_taken_whole_and_left_in_chunks(chunk, x):
    """In chunks it is one operator that makes the gradient itself."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk) if chunk else None

    def use(x, w):
        return F.linear_cross_entropy(x, w, TARGETS, options=options)

    # It warns of itself, at which Dynamo would break the graph.
    with torch._dynamo.config.patch(ignore_logging_functions={warnings.warn}):
        backend, grad, full = compared(use, x)
    if chunk:
        assert ", but torch_nn._linear_cross_entropy" in backend.only.found.left["w"]
        torch.testing.assert_close(grad, full)
    else:
        torch.testing.assert_close(grad.compact, grad.selection.project(full))


def test_a_layer_beside_a_frozen_one_of_bitsandbytes_is_taken():
    bnb = pytest.importorskip("bitsandbytes")

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = bnb.nn.Linear4bit(32, 32, bias=False, compute_dtype=torch.float32)
            self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = Adapted().to("cpu")
    model.base.weight.requires_grad_(False)
    taken, left = taken_and_left(model, torch.randn(4, 32), rank=2)
    assert taken == ["a.weight", "b.weight"] and not left


def test_a_lookup_inside_of_a_function_wants_the_option(x):
    def use(x, w):
        return x @ Lookup.apply(TARGETS, w).t()

    backend, grad, full = compared(use, x)
    assert backend.only.found.left["w"].endswith("; lookups=True takes it")
    torch.testing.assert_close(grad, full)
    torch._dynamo.reset()
    backend, grad, full = compared(use, x, lookups=True)
    assert not backend.only.report.stopped
    torch.testing.assert_close(grad.compact, grad.selection.project(full))


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_a_parametrized_weight_is_taken(x):
    model = nn.Linear(COLUMNS, ROWS).double()
    nn.utils.parametrize.register_parametrization(model, "weight", Doubled())
    taken, left = taken_and_left(model, x, rank=4)
    assert taken == ["parametrizations.weight.original"] and not left


def test_what_the_dynamo_graph_shows_is_not_asked_about(monkeypatch):
    looked = []
    monkeypatch.setattr(
        "grass_fx.passes.pipeline.look_at_joint_graph", lambda *args: looked.append(args)
    )
    x = torch.randn(TOKENS, COLUMNS)
    taken, _ = taken_and_left(mlp(8, 12, 6), x)
    assert len(taken) == 2 and not looked
    taken_and_left(Uses(LINEAR["scaled"]), x)
    assert len(looked) == 1


def test_without_gradients_nothing_is_asked(x):
    model, backend = Uses(LINEAR["autograd function"]).double(), Captured()
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(y, model(x))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(ROWS, COLUMNS))
        self.layer = nn.Linear(COLUMNS, COLUMNS)

    def forward(self, x):
        return F.linear(self.layer(x), 2 * self.w.detach())


def test_a_weight_that_gets_no_gradient_is_left():
    taken, left = taken_and_left(Frozen(), torch.randn(TOKENS, COLUMNS))
    assert taken == ["layer.weight"] and "no gradient reaches it" in left["w"]


def joint_graph(model, x):
    found = []

    def backend(gm, inputs):
        look_at_joint_graph(gm, inputs, found.append)
        return gm

    torch.compile(model, backend=backend)(x)
    return found[0]


def test_the_graph_stays_as_it_is(x):
    graph = joint_graph(Uses(LINEAR["autograd function"]).double(), x)
    before = text(graph)
    places = [n for n in graph.find_nodes(op="placeholder") if n.meta["val"].shape[0] == ROWS]
    positions = [input_position(n) for n in places]
    answers = ask_joint_graph_pass(graph, AskFacts({positions[0]: {0: 4, 1: 4}}))
    assert text(graph) == before
    (answer,) = answers.of.values()
    assert [use.out for use in answer.uses] == [0, 0] and not answer.stops
    assert answers.note == "1 linear, 0 not"
    assert isinstance(graph, fx.Graph)


def test_a_shared_weight_is_asked_about_once(x):
    def use(x, w):
        return LINEAR["autograd function"](x, w) + F.linear(x, w)

    backend, grad, full = compared(use, x)
    assert not backend.only.report.stopped
    torch.testing.assert_close(grad.compact, grad.selection.project(full))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_of_recurrent_layers_are_taken(cell):
    taken, left = taken_and_left(cell(8, 8), torch.randn(4, 8))
    assert taken == ["weight_ih", "weight_hh"] and not left


class Chained(torch.autograd.Function):
    """Whose gradient of w is a product, and then whatever ``chain`` makes of it."""

    @staticmethod
    def forward(ctx, x, w, chain):
        ctx.save_for_backward(x)
        ctx.chain = chain
        return x.sin() + 0 * w.sum()

    @staticmethod
    def backward(ctx, d):
        (x,) = ctx.saved_tensors
        return d, chained(d, x, ctx.chain), None


def chained(d, x, chain):
    g = d.t() @ x
    for name in chain:
        g = STEPS[name](g)
    return g


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(chain=st.lists(st.sampled_from(sorted(STEPS)), max_size=5), dim=st.integers(0, 1))
def test_random_chains_behind_a_function(chain, dim):
    """Taken or left, the gradient is that of the same function uncompiled."""
    torch._dynamo.reset()
    x, chain = torch.randn(7, 6, dtype=torch.float64), tuple(chain)
    w = nn.Parameter(torch.zeros_like(chained(x, x, chain)))
    backend = Captured(rank=2, side="out" if dim == 0 else "in", include=["*w*"])
    run = torch.compile(lambda: Chained.apply(x.exp(), w, chain), backend=backend)
    (want,) = torch.autograd.grad(Chained.apply(x.exp(), w, chain).square().sum(), w)
    run().square().sum().backward()
    if isinstance(w.grad, CompactGrad):
        torch.testing.assert_close(w.grad.compact, w.grad.selection.project(want))
        assert not backend.only.report.stopped
    else:
        torch.testing.assert_close(w.grad, want)


def test_explain_tells_who_has_decided(x):
    model = Uses(LINEAR["autograd function"]).double()
    report = grass_fx.explain(model, x, options={"rank": 4})
    assert report["w"].kernel == "gather + mm (decided by the joint graph)"
    assert report["first.weight"].kernel == "gather + mm"
    left = grass_fx.explain(Uses(LEFT["normalised"][0]).double(), x)["w"]
    assert "normalize" in left.reason and "needed whole" in left.reason


def test_ranks_are_those_of_the_weight(x):
    config = GrassConfig(rank={"w": 2, "*": 4})
    assert config.of("w").rank == 2
    _, grad, _ = compared(LINEAR["scaled"], x, side="in")
    assert grad.compact.shape == (ROWS, 4)
