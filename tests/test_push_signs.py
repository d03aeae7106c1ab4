"""push_signs: the signs of a weight gradient are taken tile by tile, from its factors."""

from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from test_push_norms import CHAINS, STAYS, Shapes, by_chain, no_plain_product
from test_push_selection import B, M, N, count, products, traced

from grass_fx.ops import MM_SIGNS, SELECT, SELECTED_MM, SIGNS, SQUARED_NORMS, mm_signs, signs
from grass_fx.ops import select as selected
from grass_fx.ops.bits import packed_shape
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.pipeline import GrassPasses
from grass_fx.passes.push_norms import push_norms_pass
from grass_fx.passes.push_selection import push_selection_pass
from grass_fx.passes.push_signs import push_signs_pass
from helpers import Captured, interpreted_by_triton, mlp, text

aten, prims = torch.ops.aten, torch.ops.prims
ROWS = torch.tensor([0, 2, 4])


def same(left, right):
    """Whether two results are alike; signs by their bits, which no float comparison may judge."""
    for a, b in zip(left, right, strict=True):
        if a.dtype == torch.float32:
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def pushed(function, *inputs):
    """The graph after the passes and their result, once the numbers are proven equal."""
    gm = traced(function, *inputs)
    want = gm(*inputs)
    push_norms_pass(gm.graph, JointFacts())
    result = push_signs_pass(gm.graph, JointFacts())
    push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    same(gm(*inputs), want)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return gm.graph, result


def test_rewrites_the_gradient_of_a_linear():
    def gradient(d, x, indices):
        g = aten.permute.default(aten.mm.default(aten.permute.default(x, [1, 0]), d), [1, 0])
        return SELECT(g, indices, None, 0), SIGNS(g, 0)

    d, x, *_ = products()
    graph, result = pushed(gradient, d, x, ROWS)
    assert_expected_inline(
        text(graph),
        """\
def forward(self, d_1, x_1, indices_1):
    permute = torch.ops.aten.permute.default(x_1, [1, 0])
    permute_2 = torch.ops.aten.permute.default(d_1, [1, 0])
    permute_3 = torch.ops.aten.permute.default(permute, [1, 0])
    mm_signs = torch.ops.grass.mm_signs.default(permute_2, permute_3, indices_1, None, 0)
    getitem = mm_signs[0]
    getitem_1 = mm_signs[1]
    return (getitem, getitem_1)
""",
    )
    assert [node.name for node in result.rewritten] == ["indices_1"]


@pytest.mark.parametrize("name", CHAINS)
def test_signs_move_below_what_changes_no_sign(name):
    def gradient(d, x, indices):
        g = by_chain(name, d, x)
        return SELECT(g, indices, None, 0), SIGNS(g, 0)

    d, x, *_ = products()
    graph, result = pushed(gradient, d, x, torch.tensor([0, 2]))
    assert result.count == count(graph, MM_SIGNS) == 1 and count(graph, SELECTED_MM) == 0
    values = [n.meta["val"] for n in graph.nodes if n.op == "call_function"]
    assert not [v for v in values if isinstance(v, torch.Tensor) and v.numel() == M * N]


@pytest.mark.parametrize("name", STAYS)
def test_other_gradients_are_formed(name):
    def gradient(d, x, d2, x2, indices):
        g = no_plain_product(name, (d, x), (d2, x2))
        return SELECT(g, indices, None, 0), SIGNS(g, 0)

    graph, result = pushed(gradient, *products(), ROWS)
    assert result.count == 0 and count(graph, SELECT) == count(graph, SIGNS) == 1


def test_a_compact_gradient_keeps_the_dtype_of_its_weight():
    """As with autocast, where products have another dtype."""

    def gradient(d, x, indices):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        g = prims.convert_element_type.default(g, torch.float64)
        return SELECT(g, indices, None, 1), SIGNS(g)

    d, x = (t.float() for t in products()[:2])
    graph, result = pushed(gradient, d, x, torch.tensor([0, 2]))
    assert result.count == 1 and count(graph, aten.mm.default) == 0


@pytest.mark.parametrize("scoring", ["gradient", "tiles"])
def test_a_scoring_step_forms_the_gradient_for_both_or_for_none(scoring):
    def gradient(d, x, indices):
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        return SELECT(g, indices, None, 0), SIGNS(g, 0), SQUARED_NORMS(g, 0, scoring)

    d, x, *_ = products()
    graph, _ = pushed(gradient, d, x, ROWS)
    assert count(graph, MM_SIGNS) == (scoring == "tiles")
    assert count(graph, aten.mm.default) == (scoring == "gradient")


def test_a_graph_without_signs_stays_as_it_is():
    gm = traced(lambda x, w: torch.relu(x @ w), torch.randn(B, N), torch.randn(N, M))
    before = text(gm.graph)
    assert push_signs_pass(gm.graph, JointFacts()).count == 0 and text(gm.graph) == before


def test_facts_about_signs_are_part_of_cache_keys():
    assert len({GrassPasses(JointFacts(with_signs=each)).uuid() for each in (True, False)}) == 2


def test_an_inference_graph_has_no_signs(tmp_path):
    backend = Captured(rank=4, rest="sign", dump_dir=str(tmp_path))
    with torch.no_grad():
        torch.compile(mlp(8, 16, 12), backend=backend)(torch.randn(4, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_no_full_gradient_is_ever_made(compiler):
    model, x = mlp(24, 40, 16), torch.randn(9, 24)
    run = torch.compile(model, backend=Captured(rank=8, rest="sign", compiler=compiler))
    loss = run(x).square().mean()
    with Shapes() as shapes:
        loss.backward()
    assert any(func is MM_SIGNS for func, _ in shapes.seen)
    full = {(24, 40), (40, 24), (16, 40), (40, 16)}
    assert not {shape for func, shape in shapes.seen if func is aten.mm.default} & full


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7), (128, 32), (300, 70), (385, 20000), (1, 1), (700, 513)])
def test_parts_yield_what_the_whole_gradient_does(shape, dim):
    m, n = shape
    a, b = torch.randn(m, 9), torch.randn(9, n)
    a[m // 2] = 0
    b[:, n // 2] = 0
    indices = torch.arange(shape[dim])[:: 3 if shape[dim] > 3 else 1].repeat_interleave(2)
    scale = torch.rand(len(indices))
    compact, got = mm_signs(a, b, indices, scale, dim)
    assert got.shape == (packed_shape(m, n) if dim else packed_shape(n, m))
    assert torch.equal(got.view(torch.int32), signs(a @ b, dim).view(torch.int32))
    torch.testing.assert_close(compact, selected(a @ b, indices, scale, dim))


def test_a_gradient_of_no_size_has_neither_selection_nor_signs():
    compact, got = mm_signs(torch.randn(4, 0), torch.randn(0, 5), torch.tensor([1]), None, 1)
    assert not compact.any() and compact.shape == (4, 1) and not got.view(torch.int32).any()
    for shape in ((0, 40), (40, 0)):  # of any layout
        for g in (torch.randn(shape), torch.randn(shape[::-1]).t()):
            assert not signs(g).view(torch.int32).any()


# --- on a GPU -------------------------------------------------------------------------------------

SHAPES = [(256, 96, 64, 1), (300, 201, 77, 1), (33, 140, 40, 0)]  # m, n, tokens, dim


def of_linear(dim, d, x):
    indices = torch.arange(0, (d, x)[dim].shape[1], 4, device=x.device)
    return MM_SIGNS(d.t(), x, indices, None, dim)


@pytest.fixture(scope="module")
def interpreted():
    """What the kernel computes, and the exact gradients, by shape."""
    pytest.importorskip("triton")
    from grass_fx.testing.virtual_gpu import generate

    torch.manual_seed(0)
    cases, wants = [], []
    for m, n, tokens, dim in SHAPES:
        d, x = torch.randn(tokens, m), torch.randn(tokens, n)
        d[:, m // 2], x[:, n // 2] = 0, 0
        module = generate(partial(of_linear, dim), [d, x])
        assert [kernel.is_template for kernel in module.kernels].count(True) == 1
        assert (str(m), str(n)) not in module.buffers and module.extern_calls == ["mm"]
        words = packed_shape(m, n) if dim else packed_shape(n, m)
        assert tuple(map(str, words)) in module.buffers
        cases.append((module.code, [d, x]))
        wants.append(d.double().t() @ x.double())
    return dict(zip(SHAPES, zip(interpreted_by_triton(cases), wants, strict=True), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_packs_the_signs_of_the_exact_gradient(interpreted, shape):
    (compact, got), want = interpreted[shape]
    assert torch.equal(got.view(torch.int32), signs(want, shape[3]).view(torch.int32))
    picked = want[:, ::4] if shape[3] else want[::4]
    torch.testing.assert_close(compact, picked.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_runs_on_tensor_cores_and_spills_nothing(capability):
    pytest.importorskip("triton")
    from grass_fx.testing.kernels import SHARED_MEMORY, compile_kernel
    from grass_fx.testing.virtual_gpu import generate

    like = torch.bfloat16
    module = generate(partial(of_linear, 1), [((4096, 2048), like), ((4096, 5461), like)])
    (kernel,) = [each for each in module.kernels if each.is_template]
    made = compile_kernel(kernel, capability)
    assert made.tensor_cores and made.spilled == 0 and made.shared <= SHARED_MEMORY[capability]
    assert ("16", "129", "171") in module.buffers  # 1/16 of a bfloat16 gradient, and 1 %
    assert ("2048", "5461") not in module.buffers
