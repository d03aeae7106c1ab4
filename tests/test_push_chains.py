"""Random chains of everything a selection can pass: the same numbers as selecting afterwards."""

import operator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_push_selection import products, traced

from grass_fx.ops import SELECT
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.push_selection import push_selection_pass

aten = torch.ops.aten


def product(d, x):
    return aten.mm.default(aten.permute.default(d, [1, 0]), x)


def vector(g, dim):
    """As long as ``g`` is along ``dim``, made of what is in the graph; none of it zero."""
    shape = [1, 1]
    shape[dim] = g.shape[dim]
    return aten.view.default(torch.arange(1.0, g.shape[dim] + 1, dtype=g.dtype), shape)


def other_product(g):
    """Another product of g's shape."""
    a = torch.ones(g.shape[0], 3, dtype=g.dtype).cumsum(0)
    return aten.mm.default(a, torch.ones(3, g.shape[1], dtype=g.dtype).cumsum(1))


def in_zeros(g, dim, stack=False):
    shape = [2, *g.shape] if stack else list(g.shape)
    shape[dim] += 0 if stack else 2
    zeros = aten.full.default(shape, 0, dtype=g.dtype)
    if stack:
        return aten.select.int(aten.select_scatter.default(zeros, g, 0, 1), 0, 1)
    return aten.slice_scatter.default(zeros, g, dim, 1, g.shape[dim] + 1)


def batched(g):
    g = aten.expand.default(aten.unsqueeze.default(g, 0), [2, *g.shape])
    return aten.sum.dim_IntList(g, [0])


def batched_product(g):
    a = aten.unsqueeze.default(g, 0)
    eye = torch.eye(g.shape[1], dtype=g.dtype)
    b = aten.expand.default(aten.unsqueeze.default(eye, 0), [2, *eye.shape])
    a = aten.clone.default(aten.expand.default(a, [2, *g.shape]))
    return aten.sum.dim_IntList(aten.bmm.default(a, aten.clone.default(b)), [0])


def at_most(g, dim):
    return min(2, g.shape[dim] - 1)


STEPS = {
    "permute": lambda g: aten.permute.default(g, [1, 0]),
    "t": aten.t.default,
    "transpose": lambda g: aten.transpose.int(g, 0, 1),
    "view": lambda g: aten.view.default(aten.clone.default(g), [1, *g.shape])[0],
    "merge": lambda g: aten.reshape.default(aten.reshape.default(g, [-1]), list(g.shape)),
    "neg": aten.neg.default,
    "number": lambda g: aten.mul.Tensor(g, 0.5),
    "convert": lambda g: aten._to_copy.default(g, dtype=torch.float64),
    "times rows": lambda g: aten.mul.Tensor(g, vector(g, 0)),
    "times columns": lambda g: aten.mul.Tensor(vector(g, 1), g),
    "over rows": lambda g: aten.div.Tensor(g, vector(g, 0)),
    "times a matrix": lambda g: aten.mul.Tensor(g, other_product(g)),
    "plus": lambda g: aten.add.Tensor(g, other_product(g), alpha=2),
    "minus": lambda g: aten.sub.Tensor(other_product(g), g),
    "plus rows": lambda g: aten.add.Tensor(g, vector(g, 0)),
    "cat 0": lambda g: aten.cat.default([g, other_product(g)], 0),
    "cat 1": lambda g: aten.cat.default([other_product(g), g], 1),
    "slice 0": lambda g: aten.slice.Tensor(g, 0, at_most(g, 0), g.shape[0]),
    "slice 1": lambda g: aten.slice.Tensor(g, 1, at_most(g, 1), g.shape[1]),
    "split 0": lambda g: operator.getitem(aten.split.Tensor(g, max(1, g.shape[0] - 1), 0), 0),
    "split 1": lambda g: operator.getitem(aten.split.Tensor(g, max(1, g.shape[1] - 1), 1), 0),
    "pad 0": lambda g: in_zeros(g, 0),
    "pad 1": lambda g: in_zeros(g, 1),
    "stack": lambda g: in_zeros(g, 0, stack=True),
    "batch": batched,
    "bmm": batched_product,
    "addmm": lambda g: aten.addmm.default(g, g, torch.eye(g.shape[1], dtype=g.dtype), alpha=2),
    "sin": aten.sin.default,
}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("dim", [0, 1])
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(chain=st.lists(st.sampled_from(sorted(STEPS)), max_size=7), data=st.data())
def test_random_chains_select_what_select_after_would(dim, scaled, chain, data):
    d, x, *_ = products()

    def gradient():
        g = product(d, x)
        for name in chain:
            g = STEPS[name](g)
        return g

    size = gradient().shape[dim]
    rows = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size))
    scale = torch.rand(len(rows), dtype=torch.float64) + 0.5 if scaled else None

    def run(d, x, indices, scale):
        g = product(d, x)
        for name in chain:
            g = STEPS[name](g)
        return SELECT(g, indices, scale, dim)

    indices = torch.tensor(sorted(rows))
    gm = traced(run, d, x, indices, scale)
    push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    want = SELECT(gradient(), indices, scale, dim)
    torch.testing.assert_close(gm(d, x, indices, scale), want, rtol=1e-10, atol=1e-10)
