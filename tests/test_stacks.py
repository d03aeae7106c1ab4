"""Stacks of matrices, (e, m, n): each has a selection of its own."""

import copy
from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from test_push_selection import traced
from torch import nn

import grass_fx
from grass_fx.ops import SELECT
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.push_selection import push_selection_pass
from grass_fx.passes.push_stack_rules import STACK_RULES
from grass_fx.state import rules
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.selection import matrix
from helpers import Captured, text

aten = torch.ops.aten
E, M, N = 3, 12, 16
TO = torch.tensor([0, 2, 2, 1, 0])  # the matrices that tokens are sent to


class Uses(nn.Module):
    def __init__(self, use, dtype=torch.float64):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(E, M, N, dtype=dtype)), use

    def forward(self, *x):
        return self.use(self.w, *x)


def x_of(*shape):
    return torch.randn(*shape, dtype=torch.float64)


USES = {
    "bmm": (lambda w, x: torch.bmm(x, w), x_of(E, 5, M), "in"),
    "baddbmm": (lambda w, x: torch.baddbmm(x.new_ones(E, 5, N), x, w), x_of(E, 5, M), "in"),
    "x @ w": (lambda w, x: x @ w, x_of(E, 5, M), "in"),
    "w @ x": (lambda w, x: w @ x, x_of(E, N, 4), "out"),
    "x @ w.mT": (lambda w, x: x @ w.mT, x_of(E, 5, N), "out"),
    "transposed": (lambda w, x: x @ w.transpose(-2, -1), x_of(E, 5, N), "out"),
    "permuted": (lambda w, x: x @ w.permute(0, 2, 1), x_of(E, 5, N), "out"),
    "converted": (lambda w, x: (x.float() @ w.float()).double(), x_of(E, 5, M), "in"),
    "one input for all": (lambda w, x: x @ w, x_of(5, M), "in"),
    "in a loop": (lambda w, x: sum(x[k] @ w[k] for k in range(E)), x_of(E, 5, M), "in"),
    "only one": (lambda w, x: x @ w[1], x_of(5, M), "in"),
    "unbound": (
        lambda w, x: sum(x[k] @ each for k, each in enumerate(w.unbind(0))), x_of(E, 5, M), "in"
    ),
    "sent to": (lambda w, x: torch.bmm(x[:, None], w[TO]), x_of(5, M), "in"),
    "sent to, two tokens": (lambda w, x: x @ w[TO], x_of(5, 2, M), "in"),
    "einsum": (lambda w, x: torch.einsum("ebi,eio->ebo", x, w), x_of(E, 5, M), "in"),
    "einsum, tokens first": (lambda w, x: torch.einsum("bei,eoi->beo", x, w), x_of(5, E, N), "out"),
    "used twice": (lambda w, x: (x @ w) @ w.mT, x_of(E, 5, M), "in"),
}  # fmt: skip


def both(use, x, **options):
    """(backend, compact gradient, full gradient)."""
    model, backend = Uses(use), Captured(rank=4, **options)
    twin = copy.deepcopy(model)
    for each in (torch.compile(model, backend=backend), twin):
        each(*x).square().sum().backward()
    return backend.only, model.w.grad, twin.w.grad


@pytest.mark.parametrize("rule", ["cyclic", "top", "uniform with replacement"])
@pytest.mark.parametrize("name", USES)
def test_every_use_is_taken_pushed_and_right(name, rule):
    use, x, side = USES[name]
    options = {"selection": rule.split()[0], "replacement": "with" in rule}
    graph, grad, full = both(use, [x], **options)
    (weight,) = graph.found.taken
    assert (weight.spec.dim, weight.spec.side, weight.spec.stack) == (1, side, E)
    assert graph.report.pushed == ["w"] and not graph.report.stopped
    assert isinstance(grad, CompactGrad) and grad.shape == (E, M, N)
    assert grad.compact.shape == (E, 4, N)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "converted" else {}
    torch.testing.assert_close(grad.compact, grad.selection.project(full), **tolerance)
    if rule == "top":
        scores = matrix(full).square().sum(1).float()
        torch.testing.assert_close(grad.scores, scores, **tolerance)


@pytest.mark.parametrize("name", ["bmm", "in a loop", "sent to", "einsum, tokens first"])
def test_inductor_computes_the_same(name):
    use, x, _ = USES[name]
    options = {"selection": "uniform", "replacement": True, "compiler": "inductor"}
    graph, grad, full = both(use, [x], **options)
    assert not graph.report.stopped
    torch.testing.assert_close(grad.compact, grad.selection.project(full))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_product_is_pushed_with_each_tokens_rows(transposed, dynamic):
    """Tokens sorted by matrix, none for the second: how mixtures of experts are computed."""
    ends = torch.tensor([7, 7, 40], dtype=torch.int32)
    w = torch.randn(E, 32, 16, dtype=torch.bfloat16)
    model = nn.Module()
    model.w = nn.Parameter(w)
    x = torch.randn(40, 16 if transposed else 32, dtype=torch.bfloat16)

    def run(x, w):
        return torch._grouped_mm(x, w.transpose(-2, -1) if transposed else w, offs=ends)

    backend = Captured(rank=8, selection="uniform", replacement=True)
    compiled = torch.compile(lambda x: run(x, model.w), backend=backend, dynamic=dynamic)
    compiled(x).float().square().sum().backward()
    (full,) = torch.autograd.grad(run(x, model.w).float().square().sum(), model.w)
    grad = model.w.grad
    assert backend.only.report.pushed and not backend.only.report.stopped
    assert grad.compact.shape == (E, 8, 16) and not grad.compact[1].any()
    torch.testing.assert_close(grad.compact, grad.selection.project(full), rtol=2e-2, atol=2e-1)


LEFT = {
    "added to": (lambda w, x: x @ w + w.sum(), x_of(E, 5, M)),
    "another batch": (lambda w, x: torch.einsum("bi,eio->beo", x, w), x_of(5, M)),
    "a slice of rows": (lambda w, x: x @ w[:, :4], x_of(E, 5, 4)),
    "transposed with the stack": (lambda w, x: x @ w.transpose(0, 1), x_of(M, 5, E)),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_uses_train_dense(name):
    use, x = LEFT[name]
    model, backend = Uses(use), Captured(rank=2)
    with pytest.warns(grass_fx.GrassWarning, match="took no weight"):
        torch.compile(model, backend=backend)(x).square().sum().backward()
    (full,) = torch.autograd.grad(model(x).square().sum(), model.w)
    torch.testing.assert_close(model.w.grad, full)


# --- rules ----------------------------------------------------------------------------------------


def rewritten(gradient, *inputs, rows=((0, 2), (1, 3))):
    gm = traced(lambda indices, *xs: SELECT(gradient(*xs), indices, None, 1),
                torch.tensor(rows), *inputs)  # fmt: skip
    want = gm(torch.tensor(rows), *inputs)
    result = push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(torch.tensor(rows), *inputs), want)
    assert not result.stopped
    lines = text(gm.graph).replace("torch.ops.", "").replace(".default", "").splitlines()
    return "\n".join(line.strip() for line in lines[1:]) + "\n"


def test_a_batch_of_products_selects_in_one_factor():
    d, x = torch.randn(2, 6, 4), torch.randn(2, 6, 3)
    assert_expected_inline(
        rewritten(lambda d, x: aten.bmm.default(aten.permute.default(d, [0, 2, 1]), x), d, x),
        """\
permute = aten.permute(arg1_1, [0, 2, 1])
select_1 = grass.select(permute, arg0_1, None, 1)
bmm_1 = aten.bmm(select_1, arg2_1)
return bmm_1
""",
    )


def test_one_of_a_stack_selects_its_own_rows():
    def gradient(d, x):
        zeros = aten.full.default([2, 4, 3], 0.0)
        g = aten.mm.default(aten.permute.default(d, [1, 0]), x)
        return aten.select_scatter.default(zeros, g, 0, 1)

    assert_expected_inline(
        rewritten(gradient, torch.randn(6, 4), torch.randn(6, 3)),
        """\
permute = aten.permute(arg1_1, [1, 0])
full_1 = aten.full([2, 2, 3], 0.0)
select_1 = aten.select.int(arg0_1, 0, 1)
selected_mm = grass.selected_mm(permute, arg2_1, select_1, None, 0)
select_scatter_1 = aten.select_scatter(full_1, selected_mm, 0, 1)
return select_scatter_1
""",
    )


def test_tokens_sent_to_matrices_select_their_rows():
    def gradient(where, d, x):
        zeros = aten.full.default([2, 4, 3], 0.0)
        products = aten.bmm.default(aten.permute.default(d, [0, 2, 1]), x)
        return aten.index_put.default(zeros, [where], products, True)

    inputs = torch.tensor([1, 0, 1]), torch.randn(3, 1, 4), torch.randn(3, 1, 3)
    assert_expected_inline(
        rewritten(gradient, *inputs),
        """\
permute = aten.permute(arg2_1, [0, 2, 1])
index = aten.index.Tensor(arg0_1, [arg1_1])
full_1 = aten.full([2, 2, 3], 0.0)
select_1 = grass.select(permute, index, None, 1)
bmm_1 = aten.bmm(select_1, arg3_1)
index_put_1 = aten.index_put(full_1, [arg1_1], bmm_1, True)
return index_put_1
""",
    )


def test_matrices_put_together_select_one_by_one():
    def gradient(d, x):
        g = [aten.mm.default(aten.permute.default(d, [1, 0]), x) for _ in range(2)]
        return aten.view.default(aten.cat.default(g), [2, 4, 3])

    assert_expected_inline(
        rewritten(gradient, torch.randn(6, 4), torch.randn(6, 3)),
        """\
permute = aten.permute(arg1_1, [1, 0])
permute_1 = aten.permute(arg1_1, [1, 0])
select_1 = aten.select.int(arg0_1, 0, 0)
selected_mm = grass.selected_mm(permute, arg2_1, select_1, None, 0)
select_2 = aten.select.int(arg0_1, 0, 1)
selected_mm_1 = grass.selected_mm(permute_1, arg2_1, select_2, None, 0)
cat_1 = aten.cat([selected_mm, selected_mm_1])
reshape = aten.reshape(cat_1, [2, 2, 3])
return reshape
""",
    )


STOPS = {
    "no rule for aten.sin": lambda g: aten.sin.default(g),
    "moves the dimension of a stack": lambda g: aten.permute.default(g, [1, 0, 2]),
    "splits or merges": lambda g: aten.view.default(aten.view.default(g, [-1]), [3, 3, 3]),
    "broadcasts over a stack": lambda g: aten.mul.Tensor(g, torch.ones(3, 1)),
}


@pytest.mark.parametrize("reason", STOPS)
def test_what_mixes_the_matrices_stops_the_selection(reason):
    def gradient(indices, d, x):
        return SELECT(STOPS[reason](aten.bmm.default(d, x)), indices, None, 1)

    inputs = torch.tensor([[0], [1], [1]]), torch.randn(3, 3, 5), torch.randn(3, 5, 3)
    gm = traced(gradient, *inputs)
    before = text(gm.graph)
    result = push_selection_pass(gm.graph, JointFacts())
    assert reason in next(iter(result.stopped.values())) and not result.rewritten
    assert text(gm.graph) == before and aten.transpose.int in STACK_RULES


# --- training -------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, M, N, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(E, N, 4, dtype=torch.float64))

    def forward(self, x):
        return torch.relu(x @ self.up) @ self.down


def train(model, run, optimizer, steps, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        run(torch.randn(E, 7, M, dtype=torch.float64, generator=gen)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("on_refresh", ["carry", "reset"])
@pytest.mark.parametrize("rule", ["cyclic", "top", "multinomial_norm with replacement"])
def test_a_stack_trains_as_its_matrices_would(rule, on_refresh):
    """Beside one AdamW of plain tensors that is given each matrix's selection and gradient."""
    model = Experts()
    options = {"selection": rule.split()[0], "replacement": "with" in rule, "block": 2}
    options |= {"rank": 4, "refresh_every": 2}
    run = torch.compile(model, backend=Captured(**options))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 3, "on_refresh": on_refresh}
    optimizer = grass_fx.AdamW(model.parameters(), **settings)
    parts = [nn.Parameter(w.detach().clone()) for w in (*model.up, *model.down)]
    apart = grass_fx.AdamW(parts, **settings)
    for _ in range(7):
        optimizer.zero_grad()
        run(torch.randn(E, 7, M, dtype=torch.float64)).square().mean().backward()
        for whole, first in ((model.up, 0), (model.down, E)):
            grad, s = whole.grad, whole.grad.selection
            rows = s.indices.view(E, -1)
            assert bool(((rows // whole.shape[1]) == torch.arange(E)[:, None]).all())
            for k in range(E):
                scale = None if s.scale is None else s.scale.view(E, -1)[k]
                own = replace(s, indices=rows[k] - k * whole.shape[1], scale=scale, dim=0)
                each = parts[first + k]
                each.grad = CompactGrad(grad.compact[k].clone(), own, each.shape)
        optimizer.step()
        apart.step()
        stacks = [settled(optimizer, whole) for whole in (model.up, model.down)]
        for got, want in zip((*stacks[0], *stacks[1]), parts, strict=True):
            torch.testing.assert_close(got, settled(apart, want))
    assert registry.get(model.up).selection.draw >= 3


def settled(optimizer, weight):
    """The weight with all decay: without a subspace it is pending while the selection stays."""
    state, value = optimizer.state[weight], weight.detach().clone()
    rows = value.view(-1, value.shape[-1])
    others = torch.ones(len(rows), dtype=torch.bool)
    others[state["indices"]] = False
    rows[others] *= state["pending_decay"]
    return value


def test_every_matrix_draws_for_itself():
    model = Experts()
    run = torch.compile(model, backend=Captured(rank=4, refresh_every=1))
    optimizer = grass_fx.AdamW(model.parameters())
    seen = []
    for _ in range(3):  # a walk through 12 rows, four at a time
        train(model, run, optimizer, 1)
        seen.append(model.up.grad.selection.indices.view(E, -1) % M)
    for k in range(E):
        walked = torch.cat([rows[k] for rows in seen])
        assert sorted(walked.tolist()) == list(range(M))
        order = torch.randperm(M, generator=rules.stream(0, 0, 0, f"grass, matrix {k}"))
        assert torch.equal(walked[:4], order[:4].sort().values)


def test_a_matrix_without_tokens_keeps_its_rows():
    model = Experts()
    run = torch.compile(model, backend=Captured(rank=4, refresh_every=1, selection="top"))
    optimizer = grass_fx.AdamW(model.parameters())
    x = torch.randn(E, 7, M, dtype=torch.float64)
    x[1] = 0
    selections = []
    for _ in range(2):
        optimizer.zero_grad()
        run(x).square().mean().backward()
        selections.append(model.up.grad.selection.indices.view(E, -1))
        optimizer.step()
    first, second = selections
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])
    optimizer.zero_grad()
    run(torch.zeros_like(x)).square().mean().backward()
    optimizer.step()
    assert registry.get(model.up).scoring_due  # no matrix has scores: asked again


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_stacks_resumes_exactly(wrapped):
    def begin():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Experts()
        run = torch.compile(model, backend=Captured(rank=4, refresh_every=2))
        kind = grass_fx.subspace(torch.optim.AdamW) if wrapped else grass_fx.AdamW
        return model, run, kind(model.parameters(), lr=1e-2)

    whole = begin()
    train(*whole, 3)
    saved = copy.deepcopy((whole[0].state_dict(), whole[2].state_dict()))
    train(*whole, 4, seed=1)
    part = begin()
    part[0].load_state_dict(saved[0])
    part[2].load_state_dict(saved[1])
    train(*part, 4, seed=1)
    for got, want in zip(part[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_wrapped_optimizer_steps_a_stack_as_ours_does():
    finals = []
    for kind in (grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Experts()
        run = torch.compile(model, backend=Captured(rank=4, refresh_every=2))
        train(model, run, kind(model.parameters(), lr=1e-2, warmup_steps=3), 5)
        finals.append(list(model.parameters()))
    for got, want in zip(*finals, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_of_stacks_add_up_are_clipped_and_made_dense():
    _, grad, full = both(USES["bmm"][0], [USES["bmm"][1]])
    dense = grad.to_dense()
    assert dense.shape == (E, M, N)
    rows = torch.zeros(E * M, dtype=torch.bool)
    rows[grad.selection.indices] = True
    torch.testing.assert_close(matrix(dense)[rows], matrix(full)[rows])
    assert not matrix(dense)[~rows].any()
    torch.testing.assert_close((grad + grad).compact, 2 * grad.compact)
    torch.testing.assert_close(grad.norm(), grad.compact.norm())
    lifted = grad.selection.lift(grad.compact, grad.shape)
    torch.testing.assert_close(grad.selection.project(lifted), grad.compact)
