"""keep_selected: of X the forward keeps what the backward selects, where nothing else needs it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_push_selection import count, traced
from torch import nn
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput, TangentAOTInput
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import grass_fx
from grass_fx.compile.lowering.selected_mm import GATHER, MEASURED, way
from grass_fx.inspect import tracing
from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.keep_selected import keep_selected_pass
from grass_fx.passes.pipeline import GrassPasses
from grass_fx.state.gradient import CompactGrad
from helpers import Captured, text

aten = torch.ops.aten
B, M, N, R = 6, 5, 8, 3


def kept(function, *inputs, **more):
    """The graph after the pass, the number of products, and proof that the numbers are the same."""
    gm = traced(function, *inputs)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name.startswith("tangents"):  # as AOTAutograd marks the gradients of outputs
            node.meta["desc"] = TangentAOTInput(PlainAOTOutput(0))
    for node in gm.graph.nodes:
        node.meta.update(more if node.target is aten.mul.Tensor else {})
    want = gm(*inputs)
    changed = keep_selected_pass(gm.graph, JointFacts()).count
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), want, rtol=1e-12, atol=1e-12)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    return gm.graph, changed


def tensors(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


INPUTS = (*tensors((2, 3, N), (N, M), (B, M)), torch.arange(R))


def step(x, w, tangents_1, indices):
    """A product of the forward, of a view of what is made there, and its weight gradient."""
    hidden = aten.mul.Tensor(x, 2.0)
    y = aten.mm.default(aten.view.default(hidden, [B, N]), w)
    d = aten.permute.default(tangents_1, [1, 0])
    return y, SELECTED_MM(d, aten.view.default(hidden, [B, N]), indices, None, 1)


def test_the_forward_gathers_and_the_backward_multiplies():
    graph, changed = kept(step, *INPUTS)
    assert_expected_inline(
        text(graph),
        """\
def forward(self, x_1, w_1, tangents_1_1, indices_1):
    mul = torch.ops.aten.mul.Tensor(x_1, 2.0)
    view = torch.ops.aten.view.default(mul, [6, 8])
    mm = torch.ops.aten.mm.default(view, w_1)
    view_1 = torch.ops.aten.view.default(mul, [6, 8])
    select_default = torch.ops.grass.select.default(view_1, indices_1, None, 1)
    permute = torch.ops.aten.permute.default(tangents_1_1, [1, 0])
    mm_1 = torch.ops.aten.mm.default(permute, select_default)
    return (mm, mm_1)
""",
    )
    assert changed == 1


def test_a_weight_stored_as_in_by_out_is_no_different():
    def turned(x, w, tangents_1, indices):
        hidden = aten.view.default(aten.mul.Tensor(x, 2.0), [B, N])
        y = aten.mm.default(hidden, w)
        return y, SELECTED_MM(aten.permute.default(hidden, [1, 0]), tangents_1, indices, None, 0, 2)

    graph, changed = kept(turned, *INPUTS[:3], torch.arange(4))
    assert changed == 1
    (select,) = graph.find_nodes(op="call_function", target=SELECT)
    assert select.meta["val"].shape == (B, 4) and select.args[3:] == (1, 2)


def test_rho_scales_the_product():
    def stored(x, w, tangents_1, indices, scale):
        hidden = aten.view.default(aten.mul.Tensor(x, 2.0), [B, N])
        d = aten.permute.default(tangents_1, [1, 0])
        return aten.mm.default(hidden, w), SELECTED_MM(d, hidden, indices, scale, 1)

    def turned(x, w, tangents_1, indices, scale):
        hidden = aten.view.default(aten.mul.Tensor(x, 2.0), [B, N])
        turned = aten.permute.default(hidden, [1, 0])
        return aten.mm.default(hidden, w), SELECTED_MM(turned, tangents_1, indices, scale, 0)

    for function in (stored, turned):
        for dtype in (torch.float64, torch.float32):
            graph, changed = kept(function, *INPUTS, torch.rand(R, dtype=dtype))
            assert changed == 1 and count(graph, SELECTED_MM) == 0


def test_a_permutation_that_turns_nothing_is_none():
    def straight(x, w, tangents_1, indices):
        hidden = aten.mul.Tensor(x, 2.0)
        y = aten.mm.default(hidden, w)
        return y, SELECTED_MM(aten.permute.default(hidden, [0, 1]), tangents_1, indices, None, 0)

    inputs = (*tensors((B, B), (B, B), (B, B)), torch.arange(R))
    graph, changed = kept(straight, *inputs)
    (select,) = graph.find_nodes(op="call_function", target=SELECT)
    assert changed == 1 and select.meta["val"].shape == (R, B)


def test_a_gradient_that_asks_for_no_gradient():
    """D of one weight is kept from the forward, and the input of another."""

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, hidden):
            ctx.save_for_backward(hidden)
            return y.sin()

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0], None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))

        def forward(self, x):
            hidden = self.a(x.sin()).cos()
            other = self.c(hidden).sum()
            return Constant.apply(self.b(x.cos()), hidden).sum() + other

    model, x = Model().double(), torch.randn(40, 16, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin(x).backward()
    torch.compile(model, backend=Captured(rank=4, side="in"))(x).backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad.compact, got.grad.selection.project(want.grad))


def test_weights_that_share_x_keep_their_own_parts_of_it():
    def three(x, w, tangents_1, first, second, third):
        hidden = aten.mul.Tensor(x, 2.0)
        y, d = aten.mm.default(hidden.view(B, N), w), aten.permute.default(tangents_1, [1, 0])
        sigmas = first, second, third
        return y, *(SELECTED_MM(d, hidden.view(B, N), sigma, None, 1) for sigma in sigmas)

    for sizes, want in (((2, 2), 3), ((2, 3), 0)):  # with r = 3: 7 of 8 columns, and all of 8
        graph, changed = kept(three, *INPUTS, *map(torch.arange, sizes))
        assert changed == want == count(graph, SELECT)
        assert count(graph, SELECTED_MM) == 3 - want


def test_casts_alike_are_one_tensor():
    """Autocast makes one for each weight."""

    def cast(x, w, tangents_1, first, second):
        casts = [aten._to_copy.default(x, dtype=torch.float64) for _ in range(2)]
        y, d = [aten.mm.default(c, w) for c in casts], aten.permute.default(tangents_1, [1, 0])
        for c, sigma in zip(casts, (first, second), strict=True):
            taken = sigma.numel() > 0
            y.append(SELECTED_MM(d, c, sigma, None, 1) if taken else aten.mm.default(d, c))
        return y

    inputs = [x.float() for x in tensors((B, N))] + tensors((N, M), (B, M))
    for sizes, want in (((3, 4), 2), ((4, 4), 0), ((3, 0), 0)):
        graph, changed = kept(cast, *inputs, *map(torch.arange, sizes))
        assert changed == want == count(graph, SELECT)


def of_an_input(x, w, tangents_1, indices):
    flat = aten.view.default(x, [B, N])
    d = aten.permute.default(tangents_1, [1, 0])
    return aten.mm.default(flat, w), SELECTED_MM(d, flat, indices, None, 1)


def in_the_backward(x, w, tangents_1, indices):
    flat = aten.view.default(aten.mul.Tensor(x, 2.0), [B, N])
    d = aten.permute.default(tangents_1, [1, 0])
    below = aten.relu.default(aten.mm.default(d, flat))
    return aten.mm.default(flat, w), below, SELECTED_MM(d, flat, indices, None, 1)


def in_the_forward(x, w, tangents_1, indices):
    flat = aten.view.default(aten.mul.Tensor(x, 2.0), [B, N])
    d = aten.permute.default(tangents_1, [1, 0])
    return aten.mm.default(flat, w), aten.relu.default(flat), SELECTED_MM(d, flat, indices, None, 1)


def returned(x, w, tangents_1, indices):
    flat = aten.view.default(aten.mul.Tensor(x, 2.0), [B, N])
    d = aten.permute.default(tangents_1, [1, 0])
    return aten.mm.default(flat, w), flat, SELECTED_MM(d, flat, indices, None, 1)


def of_what_the_backward_makes(x, w, tangents_1, indices):
    d = aten.mm.default(tangents_1, aten.permute.default(w, [1, 0]))
    flat = aten.view.default(x, [B, N])
    turned = aten.permute.default(flat, [1, 0])
    return aten.mm.default(flat, w), SELECTED_MM(turned, d, indices, None, 1)


ELSEWHERE = [
    of_an_input, in_the_backward, in_the_forward, returned, of_what_the_backward_makes,
]  # fmt: skip


@pytest.mark.parametrize("function", ELSEWHERE, ids=lambda f: f.__name__)
def test_what_is_kept_anyway_stays_as_it_is(function):
    graph, changed = kept(function, *INPUTS)
    assert changed == 0 and count(graph, SELECTED_MM) == 1 and count(graph, SELECT) == 0


def test_what_checkpointing_computes_again_is_not_kept():
    graph, changed = kept(step, *INPUTS, recompute=CheckpointPolicy.MUST_RECOMPUTE)
    assert changed == 0 and count(graph, SELECTED_MM) == 1


def test_inference_graphs_stay_as_they_are():
    graph, changed = kept(lambda x, w: aten.mm.default(x, w), *tensors((B, N), (N, M)))
    assert changed == 0 and count(graph, aten.mm.default) == 1


def test_the_cache_knows_of_it():
    uuids = {GrassPasses(JointFacts(with_scores=each)).uuid() for each in (True, False)}
    assert len(uuids) == 2


# --- whole models ---------------------------------------------------------------------------------


class Gated(nn.Module):
    """A normed input of two weights, their gated product as the input of a third; used twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up = (nn.Linear(16, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, 16, bias=False)

    def once(self, x):
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, x):
        return self.once(x + self.once(x))


def saved_for_backward(compiled, x):
    """Bytes of activations that the graph keeps, and the loss."""
    kept, known = {}, {p.untyped_storage().data_ptr() for p in compiled.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(x).square().mean()
    return sum(kept.values()), loss


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_keeps_less_and_its_gradients_are_the_same(compiler, dynamic):
    torch.manual_seed(0)
    twin, x, kept = Gated().double(), torch.randn(3, 10, 16, dtype=torch.float64), {}
    twin(x).square().mean().backward()
    for rule in ("cyclic", "uniform", "top"):  # whose first step scores, which keeps all
        torch._dynamo.reset()
        model = copy.deepcopy(twin)
        model.zero_grad()
        settings = {"rank": 4, "side": "in", "replacement": rule == "uniform"}
        backend = Captured(**settings, selection=rule, compiler=compiler)
        compiled = torch.compile(model, backend=backend, dynamic=dynamic)
        kept[rule], loss = saved_for_backward(compiled, x)
        loss.backward()
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            if isinstance(got.grad, CompactGrad):
                selected = got.grad.selection.project(want.grad)
                torch.testing.assert_close(got.grad.compact, selected)
            else:
                torch.testing.assert_close(got.grad, want.grad)
    assert max(kept["cyclic"], kept["uniform"]) < kept["top"]


def test_a_checkpointed_layer_keeps_nothing_of_it(compiler):
    class Checkpointed(Gated):
        def forward(self, x):
            return checkpoint(self.once, x, use_reentrant=False)

    x, kept = torch.randn(3, 10, 16), []
    for rank in (4, 8):
        torch._dynamo.reset()
        backend = Captured(rank=rank, side="in", compiler=compiler)
        size, loss = saved_for_backward(torch.compile(Checkpointed(), backend=backend), x)
        kept.append(size)
        loss.backward()
    assert kept[0] < kept[1] + 8 * 4 * 3  # but for the indices


def test_explain_tells_that_what_is_left_are_plain_products(monkeypatch):
    monkeypatch.setattr(tracing, "way", lambda _, *rest: way("cuda", *rest))  # as on a GPU
    x = torch.randn(3, 10, 16)
    for side, kernel in (("in", GATHER), ("out", MEASURED)):
        options = {"rank": 4, "side": side, "mode": "max-autotune"}
        report = grass_fx.explain(Gated(), x, options=options)
        assert [weight.kernel for weight in report.weights if weight.taken] == [kernel] * 3


def test_explain_counts_what_is_kept():
    reports = [
        grass_fx.explain(Gated(), torch.randn(3, 10, 16), options={"rank": 4, "side": side})
        for side in ("in", "out")
    ]
    inside, outside = (str(report).split("activations")[1].split()[4] for report in reports)
    assert float(inside) < float(outside) == 1.0
