"""The operators: PᵀG, GP and the norms of G, with and without G."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from grass_fx import ops
from grass_fx.ops import MM_SQUARED_NORMS, SELECT, SELECTED_MM, SQUARED_NORMS, along

M, N, TOKENS = 6, 5, 7
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SELECTIONS = {
    "sorted": [0, 2, 4],
    "one": [3],
    "repeated": [1, 1, 4, 4],
    "unsorted": [4, 0, 3],
    "more_than_rows": [0, 0, 1, 2, 3, 4, 4],
}


def randn(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def factors(dtype=torch.float64, tokens=TOKENS, transposed=True):
    """``a`` (m, b), for a weight gradient the transposed view of D, and ``b`` (b, n)."""
    a = randn(tokens, M, dtype=dtype).t()
    return a if transposed else a.contiguous(), randn(tokens, N, dtype=dtype, seed=1)


def rho(indices, dtype=torch.float64):
    return torch.arange(1, indices.numel() + 1).to(dtype) / 3


def projection(indices, scale, size):
    """P (size, r): column j is ρ_j at row σ_j (equation 1)."""
    p = torch.zeros(size, indices.numel(), dtype=torch.float64)
    for j, row in enumerate(indices.tolist()):
        p[row, j] = 1 if scale is None else scale[j]
    return p


def projected(g, indices, scale, dim):
    p = projection(indices, scale, g.shape[dim])
    return p.T @ g if dim == 0 else g @ p


every_dim = pytest.mark.parametrize("dim", [0, 1])
with_and_without_scale = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
every_selection = pytest.mark.parametrize("rows", SELECTIONS.values(), ids=SELECTIONS.keys())


@every_dim
@with_and_without_scale
@every_selection
def test_select_is_the_projection(rows, scaled, dim):
    g, indices = randn(M, N), torch.tensor(rows)
    scale = rho(indices) if scaled else None
    expected = projected(g, indices, scale, dim)
    torch.testing.assert_close(SELECT(g, indices, scale, dim), expected, rtol=0, atol=1e-12)


@every_dim
@with_and_without_scale
@every_selection
@pytest.mark.parametrize("transposed", [False, True])
def test_selected_mm_is_the_projection_of_the_product(rows, scaled, dim, transposed):
    (a, b), indices = factors(transposed=transposed), torch.tensor(rows)
    scale = rho(indices) if scaled else None
    expected = projected(a @ b, indices, scale, dim)
    actual = SELECTED_MM(a, b, indices, scale, dim)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_select_works_on_stacks(dim):
    g, indices = randn(3, M, N), torch.tensor([2, 0, 2])
    scale = rho(indices)
    expected = torch.stack([s * g.select(dim, i) for i, s in zip(indices, scale, strict=True)], dim)
    torch.testing.assert_close(SELECT(g, indices, scale, dim), expected, rtol=0, atol=1e-12)


@every_dim
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_has_the_dtype_of_g_and_is_rounded_once(dtype, dim):
    g, indices = randn(M, N, dtype=dtype), torch.tensor([0, 3, 3])
    scale = rho(indices, torch.float32)  # ρ is float32 whatever the weight is
    exact = g.index_select(dim, indices).double() * along(scale, dim, 2).double()
    wide = torch.promote_types(dtype, torch.float32)
    selected = SELECT(g, indices, scale, dim)
    assert selected.dtype == dtype
    assert torch.equal(selected, exact.to(wide).to(dtype))


@every_dim
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_operators_agree_in_every_dtype(dtype, dim):
    (a, b), indices = factors(dtype), torch.tensor([0, 3, 3])
    scale = rho(indices, torch.float32)
    made = SELECTED_MM(a, b, indices, scale, dim)
    torch.testing.assert_close(made, SELECT(a @ b, indices, scale, dim))


@every_dim
@with_and_without_scale
def test_no_tokens_make_a_zero_gradient(scaled, dim):
    (a, b), indices = factors(tokens=0), torch.tensor([0, 3, 3])
    compact = SELECTED_MM(a, b, indices, rho(indices) if scaled else None, dim)
    assert torch.equal(compact, torch.zeros((3, N) if dim == 0 else (M, 3), dtype=torch.float64))


@every_dim
@with_and_without_scale
@pytest.mark.parametrize(
    ("dtype", "transposed"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False)], ids=str
)
def test_opcheck(dtype, transposed, scaled, dim):
    (a, b), indices = factors(dtype, transposed=transposed), torch.tensor([0, 3, 3])
    scale = rho(indices, torch.float32) if scaled else None
    opcheck(SELECT, (a, indices, scale, dim))
    opcheck(SELECTED_MM, (a, b, indices, scale, dim))


@every_dim
@with_and_without_scale
def test_opcheck_without_tokens(scaled, dim):
    (a, b), indices = factors(tokens=0), torch.tensor([0, 3])
    opcheck(SELECTED_MM, (a, b, indices, rho(indices) if scaled else None, dim))


def expressions(shape):
    """Symbolic sizes, to be compared without guarding on them."""
    return [size.node.expr for size in shape]


@every_dim
@with_and_without_scale
def test_fake_shapes_are_symbolic_in_the_batch(scaled, dim):
    indices = torch.tensor([0, 3, 3])
    scale = [rho(indices)] if scaled else []

    def both(a, b, indices, *scale):
        scale = scale[0] if scale else None
        return SELECTED_MM(a, b, indices, scale, dim), SELECT(a.t(), indices, scale, 1)

    traced = make_fx(both, tracing_mode="symbolic")(*factors(), indices, *scale)
    a, b, sigma = (n.meta["val"] for n in traced.graph.find_nodes(op="placeholder")[:3])
    (made,) = traced.graph.find_nodes(op="call_function", target=SELECTED_MM)
    (selected,) = traced.graph.find_nodes(op="call_function", target=SELECT)
    (m, tokens), n, r = a.shape, b.shape[1], sigma.shape[0]
    assert not tokens.node.expr.is_number  # b stayed symbolic
    assert expressions(made.meta["val"].shape) == expressions([r, n] if dim == 0 else [m, r])
    assert expressions(selected.meta["val"].shape) == expressions([tokens, r])
    for count in (0, 1, 2, TOKENS, 64):
        inputs = (*factors(tokens=count), indices, *scale)
        for actual, real in zip(traced(*inputs), both(*inputs), strict=True):
            assert torch.equal(actual, real)


@every_dim
@pytest.mark.parametrize("rows", [[1], [0, 4], [2, 2, 2, 2]], ids=str)
def test_fake_metadata_equals_real(rows, dim):
    (a, b), indices = factors(torch.bfloat16), torch.tensor(rows)
    meta = [t.to("meta") for t in (a, b, indices)]
    for real, fake in (
        (SELECT(a, indices, None, dim), SELECT(meta[0], meta[2], None, dim)),
        (SELECTED_MM(a, b, indices, None, dim), SELECTED_MM(*meta, None, dim)),
    ):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_a_graph_can_only_hold_a_product_of_matrices_selected_along_one_of_its_dimensions():
    a, b, indices = (t.to("meta") for t in (*factors(), torch.tensor([0, 3])))
    for wrong in ((a, b, indices, None, 2), (a[None], b, indices, None, 0)):
        with pytest.raises(RuntimeError, match="two matrices and dim 0 or 1"):
            SELECTED_MM(*wrong)


@every_dim
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("part", [1, 2 * N, 1 << 18], ids=["one row", "two rows", "at once"])
def test_squared_norms_with_and_without_the_gradient(part, dtype, dim, monkeypatch):
    monkeypatch.setattr(ops, "PART", part)
    a, b = factors(dtype)
    expected = (a.double() @ b.double()).square().sum(1 - dim).float()
    for got in (SQUARED_NORMS(a @ b, dim), MM_SQUARED_NORMS(a, b, dim)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps + 1e-6, atol=0)


@every_dim
def test_opcheck_of_norms(dim):
    for tokens in (TOKENS, 0):
        opcheck(MM_SQUARED_NORMS, (*factors(tokens=tokens), dim))
    for scoring in ("auto", "tiles"):
        opcheck(SQUARED_NORMS, (randn(M, N), dim, scoring))
    expected = randn(M, N, 3).square().sum((0, 2) if dim else (1, 2)).float()
    torch.testing.assert_close(SQUARED_NORMS(randn(M, N, 3), dim), expected)
