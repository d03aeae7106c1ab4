"""tap_weights: every use of a linear weight goes through a tap; the value stays."""

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from grass_fx.config import GrassConfig
from grass_fx.passes.facts import DynamoFacts, TapFacts
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from grass_fx.passes.pipeline import tapped
from grass_fx.passes.signature import Signature, Variant, proxy_of
from helpers import Captured, mlp


class Tapping:
    """A backend that shows a graph before and after the pass, and runs the original."""

    signature = Signature

    def __init__(self, scoring=False, **options):
        self.config, self.scoring = GrassConfig(**options), scoring

    def __call__(self, gm, inputs):
        found = find_linear_weights_pass(gm.graph, DynamoFacts(self.config, inputs))
        self.original, self.before = gm, str(gm.code).strip()
        signature = self.signature(found.taken, len(inputs))
        facts = TapFacts(self.config, inputs, signature, Variant(scoring=self.scoring))
        self.tapped, self.inputs = tapped(gm, facts)
        return gm.forward


def code(gm) -> str:
    """A graph's statements, without types, clean-up and the long common parts of names."""
    lines = (line.split(";  ")[0] for line in gm.code.strip().splitlines())
    lines = (re.sub(r" : torch[\w.]+", "", line) for line in lines)
    lines = (re.sub(r"[lL]_(self|fn)_parameters_|grass_fx_passes_taps_", "", x) for x in lines)
    lines = (re.sub(r"(?<=[(,] )(\w+) = |(?<=\()(\w+) = ", r"\1\2=", x) for x in lines)  # keywords
    return "\n".join(x for x in lines if not re.match(r" +(\w+) = \1$", x)) + "\n"


def real_inputs(tapping, model, x):
    """The tapped graph's real inputs, in its order."""
    given = {tuple(p.shape): p for p in model.parameters()}
    given[tuple(x.shape)] = x
    count = len(tapping.original.graph.find_nodes(op="placeholder"))
    values = [given[tuple(v.shape)] for v in tapping.inputs[:count]]
    for added in tapping.inputs[count:]:
        if added.dtype == torch.int64:
            values.append(torch.tensor([1, 5]))
        else:
            values.append(proxy_of(added.shape, added.dtype, added.device).requires_grad_())
    return values


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.relu(x @ self.w) @ self.w.t()


def test_rewrites_one_linear_and_keeps_its_value():
    model, x = nn.Linear(8, 6, bias=False), torch.randn(4, 8)
    tapping = Tapping(rank=2, side="out")
    y = torch.compile(model, backend=tapping)(x)
    assert_expected_inline(
        code(tapping.original),
        """\
def forward(self, weight_, L_args_0_):
    l_args_0_ = L_args_0_
    linear = torch._C._nn.linear(l_args_0_, weight_, None)
    return (linear,)
""",
    )
    assert_expected_inline(
        code(tapping.tapped),
        """\
def forward(self, weight_, L_args_0_, weight_d, weight_indices):
    l_args_0_ = L_args_0_
    tap = tap(weight_, dim=0, d=weight_d, indices=weight_indices)
    linear = torch._C._nn.linear(l_args_0_, tap, None)
    return (linear,)
""",
    )
    inputs = real_inputs(tapping, model, x)
    (tapped,) = tapping.tapped(*inputs)
    torch.testing.assert_close(tapped, y, rtol=0, atol=0)
    d = next(a for a in inputs if a.shape == (2, 8) and a.requires_grad)
    tapped.square().sum().backward()
    full = torch.autograd.grad(model(x).square().sum(), model.weight)[0]
    torch.testing.assert_close(d.grad, full[torch.tensor([1, 5])])
    assert model.weight.grad is None


def test_scoring_variant_has_the_same_inputs_and_yields_row_norms():
    model, x = nn.Linear(8, 6, bias=False), torch.randn(4, 8)
    tapping = Tapping(rank=2, side="out", selection="top", scoring=True)
    torch.compile(model, backend=tapping)(x)
    assert_expected_inline(
        code(tapping.tapped),
        """\
def forward(self, weight_, L_args_0_, weight_d, weight_e, weight_indices):
    l_args_0_ = L_args_0_
    tap = tap(weight_, dim=0, scoring='auto', d=weight_d, e=weight_e, indices=weight_indices)
    linear = torch._C._nn.linear(l_args_0_, tap, None)
    return (linear,)
""",
    )
    inputs = real_inputs(tapping, model, x)
    (tapped,) = tapping.tapped(*inputs)
    tapped.square().sum().backward()
    full = torch.autograd.grad(model(x).square().sum(), model.weight)[0]
    e = next(a for a in inputs if a.shape == (6,))
    torch.testing.assert_close(e.grad, full.square().sum(1))
    regular = Tapping(rank=2, side="out", selection="top")
    torch._dynamo.reset()
    torch.compile(model, backend=regular)(x)
    graphs = tapping.tapped.graph, regular.tapped.graph
    scoring_names, names = ([n.name for n in g.find_nodes(op="placeholder")] for g in graphs)
    assert scoring_names == names


def test_a_shared_weight_gets_one_tap_for_all_its_uses():
    tapping = Tapping(rank=2, side="in")
    torch.compile(Tied(), backend=tapping)(torch.randn(4, 8))
    assert_expected_inline(
        code(tapping.tapped),
        """\
def forward(self, w_, L_x_, w_d, w_indices):
    l_x_ = L_x_
    tap = tap(w_, dim=0, d=w_d, indices=w_indices)
    matmul = l_x_ @ tap
    relu = torch.relu(matmul)
    t = tap.t()
    matmul_1 = relu @ t
    return (matmul_1,)
""",
    )


def test_no_weight_no_tap():
    tapping = Tapping(rank=2, exclude=["*"])
    torch.compile(nn.Linear(8, 6), backend=tapping)(torch.randn(4, 8))
    assert code(tapping.tapped) == code(tapping.original)


def test_dynamos_own_graph_is_not_touched():
    tapping = Tapping(rank=2)
    torch.compile(mlp(8, 16, 12), backend=tapping)(torch.randn(4, 8))
    assert str(tapping.original.code).strip() == tapping.before
    assert code(tapping.tapped) != code(tapping.original)


def test_proxies_cost_no_memory():
    proxy = proxy_of((4096, 4096), torch.float32, torch.device("cpu"))
    assert proxy.shape == (4096, 4096)
    assert proxy.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("replacement", [False, True])
def test_scale_is_an_input_only_with_replacement(replacement):
    tapping = Tapping(rank=2, selection="uniform", replacement=replacement)
    torch.compile(nn.Linear(8, 6, bias=False), backend=tapping)(torch.randn(4, 8))
    names = [n.name for n in tapping.tapped.graph.find_nodes(op="placeholder")]
    assert any(name.endswith("_scale") for name in names) == replacement


def test_an_inference_graph_is_not_tapped():
    model, x = mlp(8, 16, 12), torch.randn(4, 8)
    backend = Captured(rank=4)
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
    (graph,) = backend.graphs
    assert not hasattr(graph, "found")
    torch.testing.assert_close(y, model(x))
