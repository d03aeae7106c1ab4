"""accumulate_lookups: rows of a lookup are added into the product to which its weight is tied."""

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from test_push_lookup_rules import TOKENS, D, N, V, zeros
from test_push_selection import count, traced
from torch import nn

from grass_fx.ops import SELECT
from grass_fx.passes.accumulate_lookups import accumulate_lookups_pass
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.pipeline import GrassPasses
from grass_fx.passes.push_selection import push_selection_pass
from helpers import Captured, text, uncached

aten, prims = torch.ops.aten, torch.ops.prims
COLUMNS = torch.tensor([0, 2, 3])
HEAD = torch.randn(6, V, dtype=torch.float64)  # the D of the head


def accumulated(gradient, *inputs):
    """The graph after both passes, and the number of rewrites; in float64 its numbers stay."""

    def selected(columns, *factors):
        return SELECT(gradient(*factors), columns, None, 1)

    gm = traced(selected, COLUMNS, *inputs)
    want = gm(COLUMNS, *inputs)
    push_selection_pass(gm.graph, JointFacts())
    result = accumulate_lookups_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    if want.dtype == torch.float64:
        torch.testing.assert_close(gm(COLUMNS, *inputs), want, rtol=1e-12, atol=1e-12)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return gm, result.count


def product(head, d):
    return aten.mm.default(aten.permute.default(head, [1, 0]), aten.reshape.default(d, [6, N]))


def rows(d, tokens):
    return aten.index_put.default(zeros(V, N), [tokens], d, True)


def lines(gm):
    return text(gm.graph).replace("torch.ops.", "").replace(".default", "")


def test_rows_are_added_into_the_product():
    def gradient(head, d, tokens):
        return aten.add.Tensor(rows(d, tokens), product(head, d))

    gm, changed = accumulated(gradient, HEAD, D, TOKENS)
    assert_expected_inline(
        lines(gm),
        """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1):
    permute = aten.permute(arg1_1, [1, 0])
    view = aten.view(arg2_1, [6, 4])
    select_1 = grass.select(arg2_1, arg0_1, None, 2)
    selected_mm = grass.selected_mm(permute, view, arg0_1, None, 1)
    _unsafe_index_put = aten._unsafe_index_put(selected_mm, [arg3_1], select_1, True)
    return _unsafe_index_put
""",
    )
    assert changed == 1


def test_what_a_mask_leaves_out_is_not_added():
    """As Inductor's embedding, whose indices may point anywhere under the mask."""

    def gradient(head, d, tokens):
        mask = aten.unsqueeze.default(tokens < V, -1)
        other = aten._unsafe_masked_index_put_accumulate.default(zeros(V, N), mask, [tokens], d)
        return aten.add.Tensor(product(head, d), other)

    gm, changed = accumulated(gradient, HEAD, D, TOKENS + 3)
    assert_expected_inline(
        lines(gm),
        """\
def forward(self, arg0_1, arg1_1, arg2_1, arg3_1):
    lt = aten.lt.Scalar(arg3_1, 7)
    unsqueeze = aten.unsqueeze(lt, -1)
    permute = aten.permute(arg1_1, [1, 0])
    view = aten.view(arg2_1, [6, 4])
    selected_mm = grass.selected_mm(permute, view, arg0_1, None, 1)
    select_1 = grass.select(arg2_1, arg0_1, None, 2)
    full_2 = aten.full([], 0, dtype = torch.float64, device = device(type='cpu'))
    where = aten.where.self(unsqueeze, select_1, full_2)
    full_3 = aten.full([], 0, dtype = torch.int64, device = device(type='cpu'))
    full_4 = aten.full([], 6, dtype = torch.int64, device = device(type='cpu'))
    maximum = aten.maximum(arg3_1, full_3)
    minimum = aten.minimum(maximum, full_4)
    _unsafe_index_put = aten._unsafe_index_put(selected_mm, [minimum], where, True)
    return _unsafe_index_put
""",
    )
    assert changed == 1


@pytest.mark.parametrize("kind", ["masked in float32", "in bfloat16"])
def test_halves_are_added_in_float32_and_rounded_once(kind):
    """Also over two lookups, and where a sum in 16 bits would lose all but the first few."""
    tokens, like = torch.full((2, 400), 3), torch.bfloat16
    d, head = torch.full((2, 400, N), 2.0**-8, dtype=like), torch.ones(800, V, dtype=like)

    def looked_up(d, tokens):
        if kind == "in bfloat16":
            start = aten.full.default([V, N], 0, dtype=like)
            return aten.index_put.default(start, [tokens], d, True)
        d = prims.convert_element_type.default(d, torch.float32)
        mask = aten.unsqueeze.default(tokens != 0, -1)
        start = aten.full.default([V, N], 0, dtype=torch.float32)
        wide = aten._unsafe_masked_index_put_accumulate.default(start, mask, [tokens], d)
        return prims.convert_element_type.default(wide, like)

    def gradient(head, d, tokens):
        product = aten.mm.default(aten.t.default(head), aten.reshape.default(d, [800, N]))
        once = aten.add.Tensor(product, looked_up(d, tokens))
        return aten.add.Tensor(looked_up(d, tokens), once)

    gm, changed = accumulated(gradient, head, d, tokens)
    want = torch.full((V, 3), 800 / 256)
    want[3] *= 3
    assert changed == 2 and torch.equal(gm(COLUMNS, head, d, tokens), want.to(like))


STAYS = {
    "a factor": lambda a, b, d, x: aten.add.Tensor(a, b, alpha=2),
    "a number": lambda a, b, d, x: aten.add.Tensor(b, 1.0),
    "a product that others need": lambda a, b, d, x: aten.add.Tensor(aten.add.Tensor(a, b), a),
    "rows that others need": lambda a, b, d, x: aten.mul.Tensor(aten.add.Tensor(a, b), b),
    "rows that replace": lambda a, b, d, x: aten.add.Tensor(
        a, aten.index_put.default(zeros(V, N), [x[0, :2]], d[0, :2])
    ),
    "rows that are added to others": lambda a, b, d, x: aten.add.Tensor(
        a, aten.index_put.default(aten.neg.default(b), [x], d, True)
    ),
    "a sum that is broadcast": lambda a, b, d, x: aten.add.Tensor(
        aten.sum.dim_IntList(a, [0], True), b
    ),
}
"""Of the product a, the rows b, D and the tokens x."""


@pytest.mark.parametrize("name", STAYS)
def test_other_sums_stay_as_they_are(name):
    def gradient(head, d, tokens):
        return STAYS[name](product(head, d), rows(d, tokens), d, tokens)

    gm, changed = accumulated(gradient, HEAD, D, TOKENS)
    assert changed == 0 and count(gm.graph, aten._unsafe_index_put.default) == 0


def test_the_gradient_of_a_weight_that_is_left_dense_stays_as_it_is():
    def gradient(head, d, tokens):
        return aten.add.Tensor(product(head, d), rows(d, tokens))

    gm = traced(gradient, HEAD, D, TOKENS)
    before = text(gm.graph)
    assert accumulate_lookups_pass(gm.graph, JointFacts()).count == 0
    assert text(gm.graph) == before


def test_the_cache_knows_of_it():
    uuids = {GrassPasses(JointFacts(with_lookups=each)).uuid() for each in (True, False)}
    assert len(uuids) == 2


# --- whole models ---------------------------------------------------------------------------------


class Model(nn.Module):
    """A table that is looked up twice and tied to the head, and one that is neither."""

    def __init__(self):
        super().__init__()
        self.tied, self.other = nn.Embedding(20, 8, padding_idx=3), nn.Embedding(20, 8)

    def forward(self, tokens):
        x = self.tied(tokens) + self.tied.weight[tokens.flip(-1)] + self.other(tokens)
        return torch.tanh(x) @ self.tied.weight.T


def test_nothing_of_the_size_of_a_table_is_made_in_a_step():
    graphs, tokens, model = [], torch.tensor([[1, 3, 3], [0, 11, 3]]), Model().double()
    twin = copy.deepcopy(model)
    twin(tokens).square().sum().backward()
    after = {"joint_custom_pre_pass": graphs.append}  # it sees graphs after our passes
    backend = Captured(rank=4, lookups=True, compiler="inductor", inductor=after)
    with uncached():
        torch.compile(model, backend=backend)(tokens).square().sum().backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        selected = got.grad.selection.project(want.grad)
        torch.testing.assert_close(got.grad.compact, selected, rtol=1e-12, atol=1e-12)
    (graph,) = graphs
    views = (aten.view.default, aten.permute.default, aten.t.default)
    made = [n for n in graph.nodes if n.op == "call_function" and n.target not in views]
    shapes = [n.meta["val"].shape for n in made]
    assert (20, 8) not in shapes and (8, 20) not in shapes and (20, 4) in shapes
    # Two lookups go into the product; only that of the other table begins with zeros.
    assert count(graph, aten._unsafe_index_put.default) == 2
    starts = [n for n in made if n.target is aten.full.default and n.meta["val"].dim() == 2]
    assert len(starts) == 1


def test_an_inference_graph_has_no_lookup_to_add(tmp_path):
    backend = Captured(rank=4, lookups=True, dump_dir=str(tmp_path))
    with torch.no_grad():
        torch.compile(Model(), backend=backend)(torch.tensor([[1, 2]]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_adds_into_the_product(dtype):
    """In generated code. Rows in bfloat16 are added in float32, which takes a copy of that."""
    pytest.importorskip("triton")
    from grass_fx.testing.virtual_gpu import generate, tapped_backward

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 16, dtype=dtype))

        def forward(self, tokens):
            return torch.tanh(self.table[tokens]) @ self.table.T

    backward = tapped_backward(Tied(), torch.randint(20, (3, 7)), rank=8, lookups=True)
    module = generate(backward.graph, backward.likes)
    assert module.buffers.count(("20", "8")) == (1 if dtype == torch.float32 else 3)
    assert ("20", "16") not in module.buffers and module.extern_calls == ["mm", "mm"]
    assert "tl.atomic_add" in module.code
