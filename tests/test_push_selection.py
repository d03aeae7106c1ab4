"""push_selection: select of a weight gradient becomes the product of what it selects."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.fx.experimental.proxy_tensor import make_fx

from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.push_selection import push_selection_pass
from helpers import Captured, mlp, text

aten, prims = torch.ops.aten, torch.ops.prims
B, M, N, R = 6, 5, 4, 3


def traced(function, *inputs):
    """``function``'s graph on ``inputs``, with shapes known."""
    return make_fx(function, tracing_mode="fake")(*inputs)


def products():
    """D (b, m), X (b, n) and a second pair, float64."""
    return [torch.randn(B, size, dtype=torch.float64) for size in (M, N, M, N)]


def pushed(function, *inputs):
    """The graph before and after the pass, its result, and proof that the numbers are the same."""
    gm = traced(function, *inputs)
    before, want = text(gm.graph), gm(*inputs)
    result = push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), want, rtol=1e-12, atol=1e-12)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return before, gm.graph, result


def count(graph, target) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def test_rewrites_the_weight_gradient_of_a_linear():
    def gradient(d, x, indices):
        g = aten.permute.default(aten.mm.default(aten.permute.default(x, [1, 0]), d), [1, 0])
        return aten.mul.Tensor(SELECT(g, indices, None, 0), 2.0)

    d, x, *_ = products()
    before, graph, result = pushed(gradient, d, x, torch.tensor([0, 2, 4]))
    assert_expected_inline(
        before,
        """\
def forward(self, d_1, x_1, indices_1):
    permute = torch.ops.aten.permute.default(x_1, [1, 0])
    mm = torch.ops.aten.mm.default(permute, d_1)
    permute_1 = torch.ops.aten.permute.default(mm, [1, 0])
    select = torch.ops.grass.select.default(permute_1, indices_1, None, 0)
    mul = torch.ops.aten.mul.Tensor(select, 2.0)
    return mul
""",
    )
    assert_expected_inline(
        text(graph),
        """\
def forward(self, d_1, x_1, indices_1):
    permute = torch.ops.aten.permute.default(x_1, [1, 0])
    selected_mm = torch.ops.grass.selected_mm.default(permute, d_1, indices_1, None, 1)
    permute_2 = torch.ops.aten.permute.default(selected_mm, [1, 0])
    mul = torch.ops.aten.mul.Tensor(permute_2, 2.0)
    return mul
""",
    )
    assert [n.name for n in result.rewritten] == ["indices_1"] and not result.stopped


def test_a_product_stands_where_its_factors_are_made():
    def backward(d, x, w, indices):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        below = aten.relu.default(aten.mm.default(d, w))  # what other layers go on with
        return below, SELECT(g, indices, None, 0)

    d, x, *_ = products()
    _, graph, _ = pushed(backward, d, x, torch.randn(M, N, dtype=torch.float64), torch.arange(R))
    names = [node.name for node in graph.nodes]
    assert names.index("selected_mm") < names.index("relu")


def test_two_uses_of_one_weight_both_become_compact():
    def gradient(d, x, d2, x2, indices, scale):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        g2 = aten.mm.default(aten.permute.default(d2, [1, 0]), x2)
        return SELECT(aten.add.Tensor(g, g2), indices, scale, 1)

    scale = torch.rand(R, dtype=torch.float64)
    before, graph, result = pushed(gradient, *products(), torch.tensor([0, 1, 1]), scale)
    assert_expected_inline(
        before,
        """\
def forward(self, d_1, x_1, d2_1, x2_1, indices_1, scale_1):
    permute = torch.ops.aten.permute.default(d_1, [1, 0])
    mm = torch.ops.aten.mm.default(permute, x_1)
    permute_1 = torch.ops.aten.permute.default(d2_1, [1, 0])
    mm_1 = torch.ops.aten.mm.default(permute_1, x2_1)
    add = torch.ops.aten.add.Tensor(mm, mm_1)
    select = torch.ops.grass.select.default(add, indices_1, scale_1, 1)
    return select
""",
    )
    assert_expected_inline(
        text(graph),
        """\
def forward(self, d_1, x_1, d2_1, x2_1, indices_1, scale_1):
    permute = torch.ops.aten.permute.default(d_1, [1, 0])
    permute_1 = torch.ops.aten.permute.default(d2_1, [1, 0])
    selected_mm = torch.ops.grass.selected_mm.default(permute, x_1, indices_1, scale_1, 1)
    selected_mm_1 = torch.ops.grass.selected_mm.default(permute_1, x2_1, indices_1, scale_1, 1)
    add_1 = torch.ops.aten.add.Tensor(selected_mm, selected_mm_1)
    return add_1
""",
    )
    assert result.rewritten and not result.stopped


CHAINS = {
    "nothing": lambda g: g,
    "t": lambda g: aten.t.default(aten.t.default(g)),
    "transpose": lambda g: aten.transpose.int(aten.transpose.int(g, 0, 1), -1, -2),
    "permute": lambda g: aten.permute.default(aten.permute.default(g, [1, 0]), [-1, -2]),
    "view": lambda g: aten.view.default(aten.view.default(g, [1, M, N, 1]), [M, N]),
    "reshape": lambda g: aten.reshape.default(aten.reshape.default(g, [M, 1, N]), [M, N]),
    "squeeze": lambda g: aten.squeeze.dim(aten.unsqueeze.default(g, 1), 1),
    "unsafe_view": lambda g: aten._unsafe_view.default(g, [M, N]),
    "convert": lambda g: prims.convert_element_type.default(g, torch.float64),
    "to_copy": lambda g: aten._to_copy.default(g, dtype=torch.float64),
    "clone": lambda g: aten.clone.default(g),
    "alias": lambda g: aten.alias.default(aten.detach.default(g)),
    "mul": lambda g: aten.mul.Tensor(aten.mul.Scalar(g, 3.0), 0.5),
    "mul by a 0-d tensor": lambda g: aten.mul.Tensor(aten.full.default([], 3.0), g),
    "div": lambda g: aten.div.Tensor(aten.div.Scalar(g, 3.0), 0.5),
    "neg": lambda g: aten.neg.default(g),
    "add": lambda g: aten.add.Tensor(g, g * 1.0, alpha=2),
    "bmm": None,
}


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("name", CHAINS)
def test_every_rule_keeps_the_numbers(name, dim, scaled):
    chain = CHAINS[name]

    def gradient(d, x, d2, x2, indices, scale):
        if chain is not None:
            g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        if chain is None:
            a, b = (aten.unsqueeze.default(t, 0) for t in (aten.t.default(d), x))
            g = aten.view.default(aten.bmm.default(a, b), [M, N])
        elif name == "add":
            g = aten.add.Tensor(g, aten.mm.default(aten.permute.default(d2, [1, 0]), x2), alpha=2)
        else:
            g = chain(g)
        return SELECT(g, indices, scale if scaled else None, dim)

    scale = torch.rand(R, dtype=torch.float64)
    inputs = (*products(), torch.tensor([0, 2, 2]), scale)
    _, graph, result = pushed(gradient, *inputs)
    assert result.rewritten and not result.stopped
    assert count(graph, SELECT) == 0
    assert count(graph, SELECTED_MM) == (2 if name == "add" else 1)
    full = [n for n in graph.nodes if n.op == "call_function" and n.meta["val"].shape == (M, N)]
    assert not full


STOPS = {
    "no rule for aten.sin.default": lambda g: aten.sin.default(g),
    "div is no product": lambda g: aten.div.Tensor(aten.ones.default([N]), g),
    "mul is no product": lambda g: aten.mul.Tensor(g, g),
    "no rule for aten.cumsum.default": lambda g: aten.cumsum.default(g, 0),
    "splits or merges": lambda g: aten.view.default(aten.view.default(g, [M * N]), [M, N]),
    "adds a number": lambda g: aten.add.Tensor(g, 1.0),
}


@pytest.mark.parametrize("reason", STOPS)
def test_an_unknown_operation_stops_the_selection_with_its_reason(reason):
    def gradient(d, x, indices):
        g = STOPS[reason](aten.mm.default(aten.permute.default(d, [1, 0]), x))
        return SELECT(g, indices, None, 0)

    d, x, *_ = products()
    _, graph, result = pushed(gradient, d, x, torch.tensor([0, 2, 4]))
    assert not result.rewritten
    assert reason in next(iter(result.stopped.values()))
    assert count(graph, aten.mm.default) == 1 and count(graph, SELECT) == 1


def test_one_use_that_stops_does_not_hinder_the_other():
    def gradient(d, x, d2, x2, indices):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        g2 = aten.sin.default(aten.mm.default(aten.permute.default(d2, [1, 0]), x2))
        return SELECT(aten.add.Tensor(g, g2), indices, None, 0)

    _, graph, result = pushed(gradient, *products(), torch.tensor([0, 2, 4]))
    assert count(graph, SELECT) == count(graph, SELECTED_MM) == 1
    assert "no rule for aten.sin.default" in next(iter(result.stopped.values()))


def test_a_gradient_that_is_needed_whole_is_left_alone():
    def gradient(d, x, indices):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        return SELECT(g, indices, None, 0), aten.sum.dim_IntList(aten.mul.Tensor(g, g), [1])

    d, x, *_ = products()
    before, graph, result = pushed(gradient, d, x, torch.tensor([0, 2, 4]))
    assert text(graph) == before
    assert "mm is needed whole by mul" in next(iter(result.stopped.values()))


def test_a_gradient_that_comes_from_outside_stops():
    def gradient(g, indices):
        return SELECT(g, indices, None, 0)

    before, graph, result = pushed(gradient, torch.randn(M, N), torch.tensor([1]))
    assert text(graph) == before
    assert list(result.stopped.values()) == ["its gradient is an input of the graph"]


def test_a_graph_without_selections_stays_as_it_is():
    gm = traced(lambda x, w: torch.relu(x @ w), torch.randn(B, N), torch.randn(N, M))
    before = text(gm.graph)
    result = push_selection_pass(gm.graph, JointFacts())
    assert text(gm.graph) == before
    assert not result.rewritten and not result.stopped


def test_an_inference_graph_has_nothing_to_push(tmp_path):
    model, x = mlp(8, 16, 12), torch.randn(4, 8)
    backend = Captured(rank=4, dump_dir=str(tmp_path))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert not list(tmp_path.iterdir())
