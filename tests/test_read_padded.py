"""read_padded: what Inductor has padded is not stored a second time for a selected product."""

import math

import pytest
import torch
from expecttest import assert_expected_inline
from test_push_selection import traced
from torch import nn
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput, TangentAOTInput

from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.pipeline import LATE, GrassPasses
from grass_fx.passes.read_padded import read_padded_pass
from helpers import Captured, text

aten = torch.ops.aten
B, M, N, R = 6, 5, 8, 3


def tensors(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


INPUTS = (*tensors((B, N), (B, M), (M, N)), torch.arange(R))


def read(function, *inputs):
    """The graph after the pass, its result, and proof that the numbers are the same."""
    gm = traced(function, *inputs)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name.startswith("tangents"):
            node.meta["desc"] = TangentAOTInput(PlainAOTOutput(0))
    want = gm(*inputs)
    result = read_padded_pass(gm.graph, JointFacts())
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), want, rtol=0, atol=0)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return gm.graph, result.count


def padded(x, *sizes):
    return aten.constant_pad_nd.default(x, [*sizes])


def backward(x, d, w, indices):
    """A compact product before the product for which D is padded, as Inductor leaves them."""
    kept = SELECT(x, indices, None, 1)
    c = aten.mm.default(aten.permute.default(aten.view.default(d, [B, M]), [1, 0]), kept)
    dx = aten.mm.default(padded(aten.view.default(d, [B, M]), 0, 3), padded(w, 0, 0, 0, 3))
    return c, dx


def test_a_product_reads_the_copy_that_is_padded_for_another():
    graph, count = read(backward, *INPUTS)
    assert count == 1
    assert_expected_inline(
        text(graph),
        """\
def forward(self, x_1, d_1, w_1, indices_1):
    select = torch.ops.grass.select.default(x_1, indices_1, None, 1)
    view_1 = torch.ops.aten.view.default(d_1, [6, 5])
    constant_pad_nd = torch.ops.aten.constant_pad_nd.default(view_1, [0, 3])
    slice_1 = torch.ops.aten.slice.Tensor(constant_pad_nd, 1, 0, 5)
    permute_1 = torch.ops.aten.permute.default(slice_1, [1, 0])
    mm = torch.ops.aten.mm.default(permute_1, select)
    constant_pad_nd_1 = torch.ops.aten.constant_pad_nd.default(w_1, [0, 0, 0, 3])
    mm_1 = torch.ops.aten.mm.default(constant_pad_nd, constant_pad_nd_1)
    return (mm, mm_1)
""",
    )


def both(x, d, w, indices):
    """Padded in both dimensions, and read through a permutation."""
    other = torch.ones(N + 3, 2, dtype=x.dtype)
    return aten.mm.default(padded(x, 0, 3, 0, 2), other), SELECTED_MM(
        aten.t.default(d), x, indices, None, 1
    )


def stack(x, d, w, indices):
    x = x.view(2, 3, N)
    pads = aten.constant_pad_nd.default(x, [0, 1])
    other = torch.ones(2, N + 1, 2, dtype=x.dtype)
    return aten.bmm.default(pads, other), SELECT(x, indices, None, 2)


@pytest.mark.parametrize("function", [both, stack])
def test_padding_in_any_dimension_is_left_out(function):
    graph, count = read(function, *INPUTS)
    assert count == 1
    (pad,) = graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
    assert any(user.target is aten.slice.Tensor for user in pad.users)


def of_another(x, d, w, indices):
    return aten.mm.default(padded(w, 0, 3), d.t().new_ones(N + 3, 2)), SELECTED_MM(
        aten.t.default(d), x, indices, None, 1
    )


def through_another_view(x, d, w, indices):
    pads = padded(aten.view.default(x, [N, B]), 0, 2)
    return aten.mm.default(pads, x.new_ones(B + 2, 2)), SELECT(x, indices, None, 1)


def cut(x, d, w, indices):
    return aten.mm.default(padded(x, 0, -3), x.new_ones(N - 3, 2)), SELECT(x, indices, None, 1)


def dense(x, d, w, indices):
    pads = padded(x, 0, 3)
    return aten.mm.default(pads, x.new_ones(N + 3, 2)), aten.mm.default(aten.t.default(d), x)


def early(x, tangents_1, w, indices):
    """A gather of the forward, and a copy that only the backward makes."""
    kept = SELECT(x, indices, None, 1)
    return kept, aten.mm.default(padded(aten.mul.Tensor(x, 1.0), 0, 3).t(), tangents_1)


def unpadded(x, d, w, indices):
    return SELECTED_MM(aten.t.default(d), x, indices, None, 1)


def inference(x, d, w, indices):
    return aten.mm.default(padded(x, 0, 3), padded(aten.t.default(w), 0, 0, 0, 3))


def in_front(x, d, w, indices):
    """Inductor pads at the end."""
    return aten.mm.default(padded(x, 3, 0), x.new_ones(N + 3, 2)), SELECT(x, indices, None, 1)


def for_others_too(x, d, w, indices):
    """A model's own padding, which is no copy for a product."""
    return padded(x, 0, 3).sum(0), SELECT(x, indices, None, 1)


def through_a_reshape(x, d, w, indices):
    """Of a part of the padded tensor that view does not exist."""
    x = x.view(2, 3, N)
    pads = aten.constant_pad_nd.default(x, [0, 0, 1, 0])
    product = aten.bmm.default(pads, w.t().expand(2, N, M))
    return product, SELECT(aten.view.default(x, [B, N]), indices, None, 1)


OTHERS = [
    in_front,
    for_others_too,
    through_a_reshape,
    of_another,
    through_another_view,
    cut,
    dense,
    early,
    unpadded,
    inference,
]


@pytest.mark.parametrize("function", OTHERS)
def test_other_readers_and_other_copies_stay(function):
    graph, count = read(function, *INPUTS)
    assert count == 0 and not graph.find_nodes(op="call_function", target=aten.slice.Tensor)


def test_the_cache_knows_of_it():
    facts = JointFacts(), JointFacts(disabled=("read_padded",))
    assert len({GrassPasses(each, passes=LATE).uuid() for each in facts}) == 2


# --- generated code -------------------------------------------------------------------------------


KINDS = "reads", "gathers", "writes"


class Gated(nn.Module):
    """The feed-forward layer of a LLaMA block."""

    def __init__(self, ffn, width=128):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Shifted(nn.Module):
    """A model that pads in time what a layer reads, by as much as its other input says."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x, by):
        x = torch.tanh(self.embed(x))
        shifted = nn.functional.pad(x, (0, 0, by.shape[0], 0))[:, : x.shape[1]]
        flat = nn.functional.pad(x.flatten(0, 1), (0, 0, 0, 3))  # as a product's factor
        return self.layer(x).sum() + (shifted * x).sum() + (flat @ flat.new_ones(8, 2)).sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_models_own_padding_stays(dynamic):
    model, x, by = Shifted().double(), torch.randn(3, 4, 6).double(), torch.ones(2)
    torch.compile(model, backend=Captured(rank=4), dynamic=dynamic)(x, by).backward()
    weights = [model.embed.weight, model.layer.weight]
    full = torch.autograd.grad(model(x, by), weights)
    for w, g in zip(weights, full, strict=True):
        torch.testing.assert_close(w.grad.compact, w.grad.selection.project(g))


@pytest.mark.parametrize("ffn", [5461, 11008, 13824, 5504])
def test_nothing_is_stored_twice_where_inductor_pads(ffn):
    pytest.importorskip("triton")
    from grass_fx.testing.launches import launches
    from grass_fx.testing.training_code import training_code

    if torch.cuda.is_available():
        pytest.skip("the virtual GPU is for machines without one")
    model, x = Gated(ffn).bfloat16(), torch.randn(2, 32, 128).bfloat16()
    odd, sizes = ffn == 5461, range(64 * ffn, 64 * (ffn + 8) + 1)

    def passes(options):
        """How often tensors of all tokens and all hidden features are read, gathered, written."""
        modules = training_code(model, [x], options, pads=True)
        found = [launch for module in modules for launch in launches(module)]
        kinds = ([memory for launch in found for memory in getattr(launch, k)] for k in KINDS)
        return tuple(sum(math.prod(m.shape) in sizes for m in memories) for memories in kinds)

    full, grass = passes(None), passes({"rank": 0.125})
    assert passes({"rank": 0.125, "rest": "sign"})[2] <= full[2]
    # gate, up and their product; their gradients, at full rank once for each of two products, and
    # twice more to fill the padding of each; torch 2.15 fills more
    assert full[0] >= 11 and full[2] >= (12 if odd else 6)
    assert grass == (10, 1, 6)
