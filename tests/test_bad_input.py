"""Input that nobody meant: an error that names the weight and the remedy, or training that is dense
and right. Either way nothing is lost: weights, state and selections are as before."""

import copy
import gc
import io
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch.testing._internal.two_tensor import TwoTensor

import grass_fx
from grass_fx.errors import CompactGradError, GrassWarning, OptionError, StateError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from helpers import Captured, mlp

X = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
WAYS = [(r, w) for r in ("top", "multinomial_norm") for w in ("gradient", "tiles")]
SCORED = [{"selection": rule, "scoring": way} for rule, way in WAYS]


def momentum(params):
    return grass_fx.subspace(torch.optim.SGD)(params, lr=0.1, momentum=0.9)


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def begin(model=None, **options):
    model = mlp(8, 12, 6) if model is None else model
    backend = Captured(**{"rank": 2, **options})
    return model, torch.compile(model, backend=backend), backend


def loss_of(model, x):
    return model(x).square().sum()


def everything(model, optimizer=None):
    """A copy of all that a failed call could change."""
    subspaces = {n: registry.saved_state(p) for n, p in model.named_parameters()}
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return copy.deepcopy({"weights": {**model.state_dict()}, "of": subspaces, "state": state})


def assert_gradients(model, x):
    """Compact gradients are the selected rows of the eager model's, dense ones are equal to its."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p, want in zip(params, torch.autograd.grad(loss_of(model, x), params), strict=True):
        got = p.grad
        if isinstance(got, CompactGrad):
            got, want = got.compact, got.selection.project(want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.flat = nn.Linear(8, 12), nn.Parameter(torch.randn(12 * 12))
        self.complex = nn.Parameter(torch.randn(12, 6, dtype=torch.complex64))
        self.int8 = nn.Parameter(torch.randint(-2, 2, (6, 6), dtype=torch.int8), False)
        self.register_buffer("int64", torch.randint(-2, 2, (6, 4)))

    def forward(self, x):
        y = (self.linear(x) @ self.flat.view(12, 12)).to(torch.complex64) @ self.complex
        return y.abs() @ self.int8.float() @ self.int64.float() / 100


def test_complex_flat_and_integer_matrices_train_dense_or_not_at_all():
    model, compiled, backend = begin(Kinds())
    twin, optimizer = copy.deepcopy(model), grass_fx.AdamW(model.parameters(), lr=0.1)
    loss_of(compiled, X).backward()
    found = backend.only.found
    assert [w.name for w in found.taken] == ["linear.weight"]
    assert found.left == {"complex": "dtype torch.complex64 is not a real floating-point type"}
    assert found.unfit["int8"] == "frozen"
    assert found.unfit["flat"] == "1 dimension, only matrices are taken"
    assert_gradients(model, X)
    twin.complex.grad, twin.flat.grad = model.complex.grad.clone(), model.flat.grad.clone()
    optimizer.step()
    torch.optim.AdamW(twin.parameters(), lr=0.1).step()
    for name in ("complex", "flat", "int8", "int64"):
        torch.testing.assert_close(getattr(model, name), getattr(twin, name))


def test_weights_that_are_views_of_one_buffer_move_their_own_rows_of_it():
    model, flat = mlp(8, 12, 6), torch.randn(12 * 8 + 6 * 12)
    model[0].weight = nn.Parameter(flat[:96].view(12, 8))
    model[2].weight = nn.Parameter(flat[96:].view(6, 12))
    model, compiled, _ = begin(model)
    optimizer, before = grass_fx.AdamW(model.parameters(), weight_decay=0.0), flat.clone()
    loss_of(compiled, X).backward()
    optimizer.step()
    for layer, moved in zip(model[::2], (flat != before).split([96, 72]), strict=True):
        moved = moved.view_as(layer.weight)
        selected = registry.get(layer.weight).selection.project(moved)
        assert bool(selected.all()) and int(moved.sum()) == selected.numel()


@pytest.mark.parametrize(("block", "reason"), [(1, "rank 5"), (5, "block 5")])
def test_a_rank_or_block_that_does_not_fit_leaves_the_weight(block, reason):
    model, compiled, backend = begin(mlp(8, 12, 4), rank=5, block=block, side="auto")
    optimizer, before = grass_fx.AdamW(model.parameters()), model[2].weight.detach().clone()
    loss_of(compiled, X).backward()
    (spec,) = [weight.spec for weight in backend.only.found.taken]
    assert (spec.rank, spec.block) == (5, block)
    assert backend.only.found.left == {"2.weight": f"{reason} exceeds its 4 output features"}
    assert_gradients(model, X)
    optimizer.step()
    assert bool((model[2].weight != before).all())


def test_a_subclass_parameter_trains_dense_and_does_not_keep_the_model_from_converting():
    """Torch swaps such parameters, which it refuses for a tensor that anybody refers to weakly, as
    Dynamo does once it has compiled."""
    model = mlp(8, 12, 6)
    model[0].weight = nn.Parameter(TwoTensor(*[model[0].weight.detach().clone()] * 2))
    grass_fx.AdamW(model.parameters())
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model, compiled, backend = begin(model.float())
    loss_of(compiled, X).backward()
    assert backend.only.found.left == {"0.weight": "a tensor subclass, TwoTensor"}
    assert [type(layer.weight.grad) for layer in model[::2]] == [TwoTensor, CompactGrad]


@pytest.mark.parametrize("options", [{}, *SCORED[:3]], ids=str)
def test_an_empty_batch_gives_zeros_and_keeps_the_selection(options, compiler):
    model, compiled, _ = begin(compiler=compiler, refresh_every=2, **options)
    optimizer, seen = grass_fx.AdamW(model.parameters()), []
    for tokens in (0, 0, 7, 7, 0):
        optimizer.zero_grad()
        loss_of(compiled, X[:tokens]).backward()
        grad = model[0].weight.grad
        assert grad.compact.shape == (12, 2) and bool(grad.compact.any()) == (tokens > 0)
        seen.append((grad.selection.draw, grad.scores is not None))
        optimizer.step()
    scored = [(0, True), (0, True), (0, True), (1, False), (1, True)]  # twice in vain
    assert seen == (scored if options else [(k, False) for k in (0, 0, 1, 1, 2)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("skipped", [True, False])
@pytest.mark.parametrize("options", SCORED, ids=str)
def test_scores_that_are_not_finite_cost_no_selection_and_no_weight(options, skipped, bad):
    """Of a bad activation, which GradScaler skips, or of a bad row that is not selected."""
    model, compiled, _ = begin(nn.Linear(8, 12, bias=False), side="out", refresh_every=2, **options)
    optimizer = grass_fx.AdamW(model.parameters())
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for step in range(5):
        optimizer.zero_grad()
        x, extra = X.clone(), torch.zeros(12)
        if step < 2 and skipped:
            x[2, 3] = bad
        y = compiled(x)
        if step < 2 and not skipped:
            rows = registry.get(model.weight).selection.indices
            extra[next(k for k in range(12) if k not in rows)] = bad
        y.register_hook(lambda g, extra=extra: g + extra)
        scaler.scale(y.square().mean()).backward()
        grad = model.weight.grad
        seen.append((grad.selection.draw, grad.scores is not None))
        before = everything(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step < 2 and skipped:
            assert_same(everything(model, optimizer), before)
        else:
            assert not torch.equal(model.weight, before["weights"]["weight"])
            assert bool(model.weight.isfinite().all())
    assert seen == [(0, True), (0, True), (0, True), (1, False), (1, True)]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_input_runs_eagerly_and_says_that_nothing_is_compact(layout):
    """Dynamo does not trace sparse tensors: the whole model falls back to torch's own."""
    model, compiled, backend = begin()
    optimizer = grass_fx.AdamW(model.parameters())
    loss_of(compiled, X.to_sparse(layout=layout)).backward()
    assert not backend.graphs and registry.get(model[0].weight) is None
    assert_gradients(model, X)
    with pytest.warns(GrassWarning, match="no compact gradient has arrived"):
        optimizer.step()


def test_a_sparse_weight_trains_eagerly_beside_a_taken_one():
    model, backend = nn.Linear(8, 8), Captured(rank=2)
    model.sparse = nn.Parameter(torch.randn(6, 8).to_sparse())

    def both(x):
        y = nn.Linear.forward(model, x)
        torch._dynamo.graph_break()
        return torch.sparse.mm(model.sparse, y.t())

    loss_of(torch.compile(both, backend=backend), X).backward()
    assert len(backend.only.found.taken) == 1 and registry.get(model.sparse) is None
    dense, sparse = torch.autograd.grad(loss_of(both, X), [model.weight, model.sparse])
    grad = model.weight.grad
    torch.testing.assert_close(grad.compact, grad.selection.project(dense))
    torch.testing.assert_close(model.sparse.grad, sparse)


def test_a_sparse_gradient_is_refused_before_any_weight_moves():
    """As torch.optim.AdamW does. An nn.Embedding(sparse=True) makes one."""
    table = nn.Embedding(10, 8, sparse=True)
    model, compiled, _ = begin()
    both = nn.ModuleList([model, table])
    optimizer = grass_fx.AdamW(both.parameters(), lr=0.1)
    loss_of(compiled, table(torch.arange(5))).backward()
    before = everything(both, optimizer)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert_same(everything(both, optimizer), before)


def test_a_penalty_on_the_inputs_gradient_is_torchs_error_and_eager_code_is_the_way():
    model, compiled, _ = begin()
    x = X.clone().requires_grad_()
    loss = loss_of(compiled, x)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    before = everything(model)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        (loss + slope.square().sum()).backward()
    assert all(p.grad is None for p in model.parameters())
    assert_same(everything(model), before)
    # The loss through the compiled model, the penalty through the original: compact plus dense.
    loss_of(compiled, X).backward()
    (slope,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    slope.square().sum().backward()
    grad, total = model[0].weight.grad, loss_of(model, x)
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    (whole,) = torch.autograd.grad(total + slope.square().sum(), model[0].weight)
    torch.testing.assert_close(grad.compact, grad.selection.project(whole))


PENALTIES = {"to_dense": lambda g: g.to_dense().square().sum(), "norm": lambda g: g.norm()}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_on_a_weights_gradient_is_an_error_and_never_lost(penalty):
    model, compiled, _ = begin()
    weight, loss = model[0].weight, loss_of(compiled, X)
    with pytest.raises(CompactGradError, match=r"0\.weight.*create_graph"):
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        (loss + penalty(grad)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_forward_mode_is_right_or_torchs_error_and_training_goes_on():
    """Up to 2.14 torch refuses it for compiled code; from 2.15 on it runs eagerly."""
    model, compiled, _ = begin()
    tangent = torch.autograd.forward_ad
    with tangent.dual_level():
        dual = tangent.make_dual(X, torch.ones_like(X))
        try:
            got = tangent.unpack_dual(compiled(dual)).tangent
        except NotImplementedError as error:
            assert "jvp function" in str(error)
        else:
            torch.testing.assert_close(got, tangent.unpack_dual(model(dual)).tangent)
    loss_of(compiled, X).backward()
    assert_gradients(model, X)


def test_function_transforms_run_eagerly_around_the_model_and_compiled_inside_it():
    model, compiled, backend = begin()
    torch.testing.assert_close(torch.func.vmap(compiled)(X), model(X))
    tangents = torch.func.jvp(compiled, (X,), (torch.ones_like(X),))
    torch.testing.assert_close(tangents, torch.func.jvp(model, (X,), (torch.ones_like(X),)))
    slope = torch.func.grad(lambda x: loss_of(compiled, x))(X)
    torch.testing.assert_close(slope, torch.func.grad(lambda x: loss_of(model, x))(X))
    assert not backend.graphs and all(registry.get(p) is None for p in model.parameters())
    loss_of(torch.compile(lambda x: torch.func.vmap(model)(x), backend=backend), X).backward()
    assert len(backend.only.found.taken) == 2
    assert_gradients(model, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "128"}, "rank='128' must be a number of rows, or a fraction"),
        ({"rank": True}, "rank=True must be a number of rows"),
        ({"rank": 8, "block": 3}, "block=3 does not divide rank=8: make rank a multiple"),
        ({"refresh_every": 0}, "refresh_every=0 must be a number of optimizer steps >= 1"),
        ({"selection": "topp"}, "selection='topp' is not known: did you mean 'top'"),
        ({"rnk": 3}, "grass has no option 'rnk': did you mean 'rank'"),
    ],
    ids=str,
)
def test_a_bad_option_reaches_the_user_at_the_first_call(options, message):
    model = mlp(8, 12, 6)
    before = everything(model)
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        torch.compile(model, backend="grass", options=options)(X)
    assert isinstance(caught.value.inner_exception, OptionError)
    assert_same(everything(model), before)
    assert all(registry.get(p) is None for p in model.parameters())


def test_a_weight_that_is_assigned_anew_gets_its_own_subspace_and_frees_the_old_one():
    model, compiled, backend = begin()
    optimizer = grass_fx.AdamW(model.parameters())
    loss_of(compiled, X).backward()
    optimizer.step()
    optimizer.zero_grad()
    old, kept = weakref.ref(registry.get(model[0].weight)), registry.get(model[2].weight)
    model[0].weight = nn.Parameter(torch.randn(12, 8))
    optimizer = grass_fx.AdamW(model.parameters())
    gc.collect()
    loss_of(compiled, X).backward()
    assert old() is None and registry.get(model[2].weight) is kept
    assert registry.get(model[0].weight).step == 0
    assert_gradients(model, X)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("make", [grass_fx.AdamW, momentum])
@pytest.mark.parametrize("when", ["before the forward", "before the step"])
def test_data_of_another_shape_is_an_error_that_names_the_weight(make, when):
    """The selected rows may fit it by chance; moments of the old shape do not."""
    model, compiled, _ = begin(nn.Linear(8, 6, bias=False), side="out")
    optimizer = make(model.parameters())
    loss_of(compiled, X).backward()
    optimizer.step()
    if when == "before the forward":
        optimizer.zero_grad()
    model.weight.data = torch.randn(6, 4)
    if when == "before the forward":
        loss_of(compiled, X[:, :4]).backward()
    before = everything(model, optimizer)
    with pytest.raises(StateError, match=r"^weight .*shape \(6, 4\)"):
        optimizer.step()
    assert_same(everything(model, optimizer), before)


def test_a_model_converted_between_forward_and_backward_is_torchs_error():
    model, compiled, _ = begin()
    optimizer = grass_fx.AdamW(model.parameters())
    loss = loss_of(compiled, X)
    model.double()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="same dtype"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert_same(everything(model, optimizer), before)
    loss_of(compiled, X.double()).backward()
    assert_gradients(model, X.double())


def test_on_the_meta_device_a_step_names_the_weight_and_the_model_trains_once_it_has_values():
    with torch.device("meta"):
        model, compiled, backend = begin(mlp(8, 12, 6))
    optimizer = grass_fx.AdamW(model.parameters())
    with pytest.raises(TorchRuntimeError, match="device"):
        compiled(X)  # an input with values
    assert not backend.graphs and all(registry.get(p) is None for p in model.parameters())
    loss_of(compiled, X.to("meta")).backward()
    old = weakref.ref(registry.get(model[0].weight))
    with pytest.raises(StateError, match=r"^0\.weight is on the meta device.*to_empty"):
        optimizer.step()
    assert not optimizer.state and old().step == 0
    model.zero_grad()
    model.to_empty(device="cpu").load_state_dict(mlp(8, 12, 6).state_dict())
    optimizer = grass_fx.AdamW(model.parameters())
    gc.collect()
    assert old() is None
    loss_of(compiled, X).backward()
    assert_gradients(model, X)
    optimizer.step()
    assert registry.get(model[0].weight).step == 1


def test_to_empty_moves_a_model_that_holds_compact_gradients():
    model, compiled, _ = begin()
    loss_of(compiled, X).backward()
    model.to_empty(device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("selection", ["cyclic", "top"])
def test_a_copied_model_is_a_model_of_its_own(selection, way):
    model, compiled, _ = begin(selection=selection)
    settings = {"weight_decay": 0.0}  # what is pending waits for a period's end, if one is known
    optimizer = grass_fx.AdamW(model.parameters(), **settings)
    loss_of(compiled, X).backward()
    pair, before = (model, [p.grad for p in model.parameters()]), everything(model)
    if way == "deepcopy":
        other, grads = copy.deepcopy(pair)
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other, grads = torch.load(file, weights_only=False)
    assert all(p.grad is registry.get(p) is None for p in other.parameters())  # as torch copies
    for p, grad in zip(other.parameters(), grads, strict=True):
        p.grad = grad
    grass_fx.AdamW(other.parameters(), **settings).step()
    assert_same(everything(model), before)  # the copy shares nothing with it
    optimizer.step()
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
