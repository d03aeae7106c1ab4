"""Weights of torchao's float8 training: taken, equal to the last bit, and gathered in float8."""

import copy
import dataclasses

import pytest
import torch
from torch import fx, nn

import grass_fx
from grass_fx.ops import SELECT
from grass_fx.passes.push import Push, Stop
from grass_fx.passes.push_scaled_rules import SCALED_RULES
from grass_fx.state.gradient import CompactGrad
from helpers import Captured

float8 = pytest.importorskip("torchao.float8")

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
E4M3 = torch.float8_e4m3fn
aten = torch.ops.aten


def build(recipe, emulate, *sizes):
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    layers = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.SiLU()]
    model = nn.Sequential(*layers[:-1]).bfloat16()
    return float8.convert_to_float8_training(
        model, config=dataclasses.replace(config, emulate=emulate)
    )


CASES = [(recipe, emulate, "aot_eager", "in") for recipe in RECIPES for emulate in (True, False)]
CASES += [
    ("rowwise", False, "aot_eager", "out"),
    pytest.param("rowwise", False, "inductor", "in", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "emulate", "compiler", "side"), CASES)
def test_compact_gradients_are_the_columns_of_the_dense_ones(recipe, emulate, compiler, side):
    model = build(recipe, emulate, 64, 32, 64)
    twin, x = copy.deepcopy(model), torch.randn(48, 64, dtype=torch.bfloat16)
    backend = Captured(rank=16, side=side, compiler=compiler)
    for each, how in ((model, backend), (twin, compiler)):
        torch.compile(each, backend=how)(x).float().square().sum().backward()
    assert all(weight.asked for weight in backend.graphs[0].found.taken)
    assert not any(graph.report.stopped for graph in backend.graphs)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(got.grad, CompactGrad)
        assert torch.equal(got.grad.compact, got.grad.selection.project(want.grad))


def test_training_with_replacement_takes_rho_once():
    model = build("rowwise", False, 64, 32)
    twin, x = copy.deepcopy(model), torch.randn(48, 64, dtype=torch.bfloat16)
    options = {"selection": "uniform", "replacement": True}
    torch.compile(model, backend=Captured(rank=16, **options))(x).float().square().sum().backward()
    torch.compile(twin, backend="aot_eager")(x).float().square().sum().backward()
    (got,), (want,) = model.parameters(), twin.parameters()
    expected = got.grad.selection.project(want.grad.float())
    torch.testing.assert_close(got.grad.compact.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("recipe", "most"), [("rowwise", 0.84), ("rowwise_with_gw_hp", 0.58)])
def test_the_forward_keeps_columns(recipe, most):
    """Of the second layer's input: in float8, or in bfloat16 where its gradient is computed so."""
    model = build(recipe, False, 256, 512, 256)
    x = torch.randn(1024, 256, dtype=torch.bfloat16)
    report = grass_fx.explain(model, x, options={"rank": 0.125})
    before, after = report.activations
    assert after <= most * before
    for weight in report.weights:
        assert weight.status == "pushed" and weight.kernel.endswith("(decided by the joint graph)")
        ratio = weight.after.weight_gradient_flops / weight.before.weight_gradient_flops
        assert ratio == pytest.approx(1 / 8, rel=1e-3)


def scaled_mm(rank, dim):
    """A graph with a selection of a product of float8 factors, and its push."""
    with torch._subclasses.FakeTensorMode():
        graph, shapes = fx.Graph(), {"a": (32, 48), "b": (64, 48), "i": (rank,)}
        nodes = {name: graph.placeholder(name) for name in shapes}
        for name, node in nodes.items():
            dtype = torch.int64 if name == "i" else E4M3
            node.meta["val"] = torch.empty(shapes[name], dtype=dtype)
        ones = [graph.call_function(aten.full.default, (size, 1)) for size in ([32, 1], [1, 64])]
        b = graph.call_function(aten.permute.default, (nodes["b"], [1, 0]))
        args = (nodes["a"], b, *ones, None, None, torch.bfloat16)
        product = graph.call_function(aten._scaled_mm.default, args)
        select = graph.call_function(SELECT, (product, nodes["i"], None, dim))
        graph.output(select)
        for node in (*ones, b, product, select):
            values = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            more = {"dtype": torch.float32} if node in ones else {}
            node.meta["val"] = node.target(*values, **more)
    return product, Push(SCALED_RULES, graph, select, nodes["i"], None, [])


@pytest.mark.parametrize("dim", [0, 1])
def test_the_rule_selects_factor_and_scales_and_keeps_the_layout(dim):
    product, push = scaled_mm(16, dim)
    plan = push.of(product, dim, push.select)
    assert plan.target is aten._scaled_mm.default
    a, b, s_a, s_b = (x.meta["val"] for x in plan.args[:4])
    assert (a.shape, b.shape) == (((16, 48), (48, 64)) if dim == 0 else ((32, 48), (48, 16)))
    assert a.is_contiguous() and b.t().is_contiguous()
    assert (s_a.numel(), s_b.numel()) == ((16, 64) if dim == 0 else (32, 16))


def test_a_rank_that_kernels_do_not_take_stops_with_the_remedy():
    product, push = scaled_mm(20, 1)
    with pytest.raises(Stop, match="takes no 20 rows: make r a multiple of 16"):
        SCALED_RULES[aten._scaled_mm.default](push, product, 1)
    model = build("rowwise", False, 64, 32)
    backend = Captured(rank=8)
    with pytest.warns(grass_fx.GrassWarning, match="make r a multiple of 16"):
        torch.compile(model, backend=backend)(torch.randn(48, 64, dtype=torch.bfloat16))
