"""push_rules: what a selection becomes below each operation."""

import operator

import torch
from expecttest import assert_expected_inline
from test_push_selection import B, M, N, products, traced

from grass_fx.ops import SELECT
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.push_rules import RULES
from grass_fx.passes.push_selection import push_selection_pass
from helpers import text

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
ROWS = torch.tensor([0, 2, 3])
TESTED = set()


def product(d, x):
    return aten.mm.default(aten.permute.default(d, [1, 0]), x)


def rewritten(gradient, dim=0, inputs=None, rows=ROWS, scale=None):
    """The body of the graph once ``select(gradient(d, x, ...))`` is pushed; its numbers stay."""

    def run(indices, scale, *factors):
        return SELECT(gradient(*factors), indices, scale, dim)

    factors = products() if inputs is None else inputs
    gm = traced(run, rows, scale, *factors)
    TESTED.update(n.target for n in gm.graph.nodes)
    want = gm(rows, scale, *factors)
    result = push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(rows, scale, *factors), want, rtol=1e-12, atol=1e-12)
    assert not result.stopped
    lines = text(gm.graph).replace("torch.ops.", "").replace(".default", "").splitlines()
    return "\n".join(line.strip() for line in lines[1:]) + "\n"


def test_mm():
    assert_expected_inline(
        rewritten(lambda d, x, *_: product(d, x)),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
return selected_mm
""",
    )


def test_bmm_of_one():
    def gradient(d, x, *_):
        a, b = aten.unsqueeze.default(aten.t.default(d), 0), aten.unsqueeze.default(x, 0)
        return aten.squeeze.dim(aten.bmm.default(a, b), 0)

    assert_expected_inline(
        rewritten(gradient),
        """\
t = aten.t(arg2_1)
unsqueeze = aten.unsqueeze(t, 0)
unsqueeze_1 = aten.unsqueeze(arg3_1, 0)
squeeze_1 = aten.squeeze.dim(unsqueeze, 0)
squeeze_2 = aten.squeeze.dim(unsqueeze_1, 0)
selected_mm = grass.selected_mm(squeeze_1, squeeze_2, arg0_1, None, 0)
unsqueeze_2 = aten.unsqueeze(selected_mm, 0)
reshape = aten.reshape(unsqueeze_2, [3, 4])
return reshape
""",
    )


def batch():
    return [torch.randn(2, M, B, dtype=torch.float64), torch.randn(2, B, N, dtype=torch.float64)]


def test_bmm_and_sum():
    """A weight that was expanded to a batch."""

    def gradient(a, b):
        return aten.sum.dim_IntList(aten.bmm.default(a, b), [0])

    assert_expected_inline(
        rewritten(gradient, 0, batch(), scale=torch.rand(3).double()),
        """\
select_1 = grass.select(arg2_1, arg0_1, arg1_1, 1)
bmm_1 = aten.bmm(select_1, arg3_1)
sum_2 = aten.sum.dim_IntList(bmm_1, [0])
return sum_2
""",
    )
    assert_expected_inline(
        rewritten(gradient, 1, batch()),
        """\
select_1 = grass.select(arg3_1, arg0_1, None, 2)
bmm_1 = aten.bmm(arg2_1, select_1)
sum_2 = aten.sum.dim_IntList(bmm_1, [0])
return sum_2
""",
    )


def test_bmm_along_the_batch():
    assert_expected_inline(
        rewritten(aten.bmm.default, 0, batch(), torch.tensor([1]), torch.rand(1).double()),
        """\
select_1 = grass.select(arg2_1, arg0_1, arg1_1, 0)
select_2 = grass.select(arg3_1, arg0_1, None, 0)
bmm_1 = aten.bmm(select_1, select_2)
return bmm_1
""",
    )


def test_addmm():
    def gradient(d, x, *_):
        c = aten.mm.default(aten.t.default(d), x)
        return aten.addmm.default(c, aten.t.default(d), x, beta=2, alpha=3)

    assert_expected_inline(
        rewritten(gradient, 1),
        """\
t = aten.t(arg2_1)
t_1 = aten.t(arg2_1)
selected_mm = grass.selected_mm(t_1, arg3_1, arg0_1, None, 1)
selected_mm_1 = grass.selected_mm(t, arg3_1, arg0_1, None, 1)
mul = aten.mul.Tensor(selected_mm_1, 2)
mul_1 = aten.mul.Tensor(selected_mm, 3)
add = aten.add.Tensor(mul_1, mul)
return add
""",
    )


def test_baddbmm():
    def gradient(a, b):
        return aten.baddbmm.default(aten.bmm.default(a, b), a, b)

    assert_expected_inline(
        rewritten(gradient, 1, batch()),
        """\
select_1 = grass.select(arg2_1, arg0_1, None, 1)
bmm_1 = aten.bmm(select_1, arg3_1)
select_2 = grass.select(arg2_1, arg0_1, None, 1)
bmm_2 = aten.bmm(select_2, arg3_1)
add = aten.add.Tensor(bmm_1, bmm_2)
return add
""",
    )


def test_add_and_sub():
    def gradient(d, x, d2, x2):
        g, g2 = product(d, x), product(d2, x2)
        return aten.sub.Tensor(aten.add.Tensor(g, g2, alpha=2), g2)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
permute_1 = aten.permute(arg4_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
selected_mm_1 = grass.selected_mm(permute_1, arg5_1, arg0_1, None, 0)
add_1 = aten.add.Tensor(selected_mm, selected_mm_1, alpha = 2)
sub_1 = aten.sub.Tensor(add_1, selected_mm_1)
return sub_1
""",
    )


def test_mul_by_numbers():
    def gradient(d, x, *_):
        return aten.div.Scalar(aten.mul.Scalar(aten.mul.Tensor(product(d, x), 2.0), 3.0), 5.0)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
mul_2 = aten.mul.Tensor(selected_mm, 2.0)
mul_3 = aten.mul.Scalar(mul_2, 3.0)
div_1 = aten.div.Scalar(mul_3, 5.0)
return div_1
""",
    )


def test_mul_along_the_kept_dimension():
    def gradient(d, x, d2, x2):
        return aten.mul.Tensor(product(d, x), aten.sum.dim_IntList(x2, [0]))

    assert_expected_inline(
        rewritten(gradient, scale=torch.rand(3).double()),
        """\
permute = aten.permute(arg2_1, [1, 0])
sum_1 = aten.sum.dim_IntList(arg5_1, [0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, arg1_1, 0)
mul_1 = aten.mul.Tensor(selected_mm, sum_1)
return mul_1
""",
    )


def test_mul_and_div_along_the_selected_dimension():
    """The factor's rows are selected without ρ, which counts once."""

    def gradient(d, x, d2, x2):
        factor = aten.unsqueeze.default(aten.sum.dim_IntList(d2, [0]), 1)
        return aten.div.Tensor(aten.mul.Tensor(factor, product(d, x)), factor)

    assert_expected_inline(
        rewritten(gradient, scale=torch.rand(3).double()),
        """\
sum_1 = aten.sum.dim_IntList(arg4_1, [0])
unsqueeze = aten.unsqueeze(sum_1, 1)
permute = aten.permute(arg2_1, [1, 0])
select_1 = grass.select(unsqueeze, arg0_1, arg1_1, 0)
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
mul_1 = aten.mul.Tensor(select_1, selected_mm)
select_2 = grass.select(unsqueeze, arg0_1, None, 0)
div_1 = aten.div.Tensor(mul_1, select_2)
return div_1
""",
    )


def test_outer_product():
    """The gradient of a matrix times a vector."""

    def gradient(d, x, *_):
        return aten.mul.Tensor(aten.unsqueeze.default(aten.sum.dim_IntList(d, [0]), 1), x[0])

    assert_expected_inline(
        rewritten(gradient),
        """\
sum_1 = aten.sum.dim_IntList(arg2_1, [0])
unsqueeze = aten.unsqueeze(sum_1, 1)
select = aten.select.int(arg3_1, 0, 0)
select_2 = grass.select(unsqueeze, arg0_1, None, 0)
mul_1 = aten.mul.Tensor(select_2, select)
return mul_1
""",
    )


def test_neg():
    assert_expected_inline(
        rewritten(lambda d, x, *_: aten.neg.default(product(d, x))),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
neg_1 = aten.neg(selected_mm)
return neg_1
""",
    )


def test_permute_t_and_transpose():
    def gradient(d, x, *_):
        return aten.transpose.int(aten.t.default(aten.permute.default(product(d, x), [1, 0])), 0, 1)

    assert_expected_inline(
        rewritten(gradient, 1),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
permute_2 = aten.permute(selected_mm, [1, 0])
t_1 = aten.t(permute_2)
transpose_1 = aten.transpose.int(t_1, 0, 1)
return transpose_1
""",
    )


def test_two_permutes_that_cancel():
    def gradient(d, x, *_):
        return aten.permute.default(aten.permute.default(product(d, x), [1, 0]), [1, 0])

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
return selected_mm
""",
    )


def test_views():
    def gradient(d, x, *_):
        g = aten.view.default(product(d, x), [M, N // 2, 2])
        g = aten.reshape.default(aten.unsqueeze.default(g, 0), [1, M, N])
        return aten._unsafe_view.default(aten.squeeze.dims(g, [0]), [M, N])

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
reshape = aten.reshape(selected_mm, [3, 2, 2])
reshape_1 = aten.reshape(reshape, [1, 3, 2, 2])
reshape_2 = aten.reshape(reshape_1, [1, 3, 4])
reshape_3 = aten.reshape(reshape_2, [3, 4])
reshape_4 = aten.reshape(reshape_3, [3, 4])
return reshape_4
""",
    )


def test_expand():
    def gradient(d, x, *_):
        return aten.expand.default(aten.unsqueeze.default(product(d, x), 0), [3, M, N])

    assert_expected_inline(
        rewritten(gradient, 1, scale=torch.rand(3).double()),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, arg1_1, 0)
reshape = aten.reshape(selected_mm, [1, 3, 4])
expand_1 = aten.expand(reshape, [3, 3, 4])
return expand_1
""",
    )


def test_expand_along_the_selected_dimension():
    def gradient(d, x, *_):
        return aten.expand.default(aten.sum.dim_IntList(product(d, x), [0], True), [M, N])

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
mm = aten.mm(permute, arg3_1)
sum_1 = aten.sum.dim_IntList(mm, [0], True)
expand_1 = aten.expand(sum_1, [3, 4])
return expand_1
""",
    )


def test_conversions_and_copies():
    def gradient(d, x, *_):
        g = aten.clone.default(product(d, x))
        g = torch.ops.prims.convert_element_type.default(g, torch.float64)
        return aten._to_copy.default(aten.alias.default(g), dtype=torch.float64)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
convert_element_type_1 = prims.convert_element_type(selected_mm, torch.float64)
_to_copy_1 = aten._to_copy(convert_element_type_1, dtype = torch.float64)
return _to_copy_1
""",
    )


def test_slice():
    """Two weights that were concatenated; each has a part of one gradient."""

    def gradient(d, x, *_):
        return aten.slice.Tensor(aten.slice.Tensor(product(d, x), 0, 1, M), 1, 1, N)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
add = aten.add.Tensor(arg0_1, 1)
selected_mm = grass.selected_mm(permute, arg3_1, add, None, 0)
slice_3 = aten.slice.Tensor(selected_mm, 1, 1, 4, 1)
return slice_3
""",
    )


def test_split():
    def gradient(d, x, *_):
        g = aten.split_with_sizes.default(product(d, x), [1, M - 1], 0)
        return operator.getitem(aten.split.Tensor(operator.getitem(g, 1), 2, 1), 1)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
add = aten.add.Tensor(arg0_1, 1)
selected_mm = grass.selected_mm(permute, arg3_1, add, None, 0)
slice_1 = aten.slice.Tensor(selected_mm, 1, 2, 4)
return slice_1
""",
    )


def test_cat_along_the_kept_dimension():
    def gradient(d, x, d2, x2):
        return aten.cat.default([product(d, x), product(d2, x2)], 1)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
permute_1 = aten.permute(arg4_1, [1, 0])
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
selected_mm_1 = grass.selected_mm(permute_1, arg5_1, arg0_1, None, 0)
cat_1 = aten.cat([selected_mm, selected_mm_1], 1)
return cat_1
""",
    )


def test_cat_along_the_selected_dimension():
    """Parts of a weight that are used apart, as in cross attention."""

    def gradient(d, x, d2, x2):
        return aten.cat.default([product(d, x), product(d2, x2)])

    assert_expected_inline(
        rewritten(gradient, rows=torch.tensor([0, M, 2 * M - 1])),
        """\
permute = aten.permute(arg2_1, [1, 0])
permute_1 = aten.permute(arg4_1, [1, 0])
remainder = aten.remainder.Scalar(arg0_1, 5)
selected_mm = grass.selected_mm(permute, arg3_1, remainder, None, 0)
sub = aten.sub.Tensor(arg0_1, 5)
remainder_1 = aten.remainder.Scalar(sub, 5)
selected_mm_1 = grass.selected_mm(permute_1, arg5_1, remainder_1, None, 0)
eq = aten.eq.Tensor(remainder_1, sub)
reshape = aten.reshape(eq, [-1, 1])
where = aten.where.self(reshape, selected_mm_1, selected_mm)
return where
""",
    )


def test_slice_scatter():
    """A part of a weight that is used; the rest has no gradient."""

    def gradient(d, x, *_):
        zeros = aten.full.default([M + 3, N], 0, dtype=torch.float64)
        return aten.slice_scatter.default(zeros, product(d, x), 0, 2, M + 2)

    assert_expected_inline(
        rewritten(gradient, rows=torch.tensor([1, 2, M + 1, M + 2])),
        """\
permute = aten.permute(arg2_1, [1, 0])
full_1 = aten.full([4, 4], 0, dtype = torch.float64)
sub = aten.sub.Tensor(arg0_1, 2)
remainder = aten.remainder.Scalar(sub, 5)
selected_mm = grass.selected_mm(permute, arg3_1, remainder, None, 0)
eq = aten.eq.Tensor(remainder, sub)
reshape = aten.reshape(eq, [-1, 1])
where = aten.where.self(reshape, selected_mm, full_1)
return where
""",
    )


def test_select_and_its_scatter():
    """One matrix of a stack."""

    def gradient(d, x, *_):
        zeros = aten.full.default([3, M, N], 0, dtype=torch.float64)
        stack = aten.select_scatter.default(zeros, product(d, x), 0, 1)
        return aten.select.int(stack, 0, 1)

    assert_expected_inline(
        rewritten(gradient),
        """\
permute = aten.permute(arg2_1, [1, 0])
full_1 = aten.full([3, 3, 4], 0, dtype = torch.float64)
selected_mm = grass.selected_mm(permute, arg3_1, arg0_1, None, 0)
select_scatter_1 = aten.select_scatter(full_1, selected_mm, 0, 1)
select_2 = aten.select.int(select_scatter_1, 0, 1)
return select_2
""",
    )


def test_every_rule_has_its_golden():
    """But for collectives, which tests/test_collectives.py runs in a process group."""
    collectives = {
        c10d.all_reduce.default,
        c10d.wait_tensor.default,
        c10d.reduce_scatter_tensor.default,
    }
    # make_fx takes these two apart; other tracers do not.
    assert set(RULES) - collectives - {aten.reshape.default, aten.detach.default} <= TESTED
