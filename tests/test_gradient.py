"""CompactGrad: what a gradient that stores only its selected rows can and cannot do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from grass_fx.errors import CompactGradError, SelectionChangedError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.selection import Selection

SHAPE = torch.Size((6, 4))
F64 = {"dtype": torch.float64}


def selection(rows=(1, 3, 4), dim=0, generation=0, scale=None):
    return Selection(torch.tensor(rows), scale, dim, generation, "layer.weight")


def grad(dim=0, scores=False, chosen=None, **options):
    chosen = chosen or selection(dim=dim, **options)
    if dim == 1 and "rows" not in options:
        chosen = selection((0, 1, 3), dim=1)
    shape = list(SHAPE)
    shape[dim] = 3
    s = torch.rand(SHAPE[dim]) if scores else None
    return CompactGrad(torch.randn(shape, **F64), chosen, SHAPE, s)


class Deliver(torch.autograd.Function):
    """Gives ``w`` the gradient that ``make`` returns."""

    @staticmethod
    def forward(ctx, w, make):
        ctx.make = make
        return w.sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.make(), None


def backward(w, make):
    Deliver.apply(w, make).backward()


def test_it_looks_like_the_weights_gradient_and_stores_the_rows():
    g = grad(scores=True)
    assert (g.shape, g.dtype, g.compact.shape) == (SHAPE, torch.float64, (3, 4))
    assert repr(g) == (
        "CompactGrad(shape=(6, 4), compact=(3, 4), dim=0, dtype=torch.float64, with scores)"
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_to_dense_is_p_c(dim):
    g = grad(dim)
    dense = torch.zeros(SHAPE, **F64)
    dense.index_copy_(dim, g.selection.indices, g.compact)
    torch.testing.assert_close(g.to_dense(), dense)


def test_to_dense_of_repeated_scaled_rows_adds_them():
    scale = torch.tensor([2.0, 3.0, 0.5], **F64)
    g = grad(rows=(1, 1, 4), scale=scale)
    p = torch.zeros(6, 3, **F64)
    p[1, 0], p[1, 1], p[4, 2] = scale
    torch.testing.assert_close(g.to_dense(), p @ g.compact)


@pytest.mark.parametrize("scores", [False, True])
def test_accumulation_adds_rows_and_scores(scores):
    w, chosen = nn.Parameter(torch.zeros(SHAPE, **F64)), selection()
    first, second = grad(chosen=chosen, scores=scores), grad(chosen=chosen)
    want = first.compact + second.compact
    backward(w, lambda: first)
    backward(w, lambda: second)
    torch.testing.assert_close(w.grad.compact, want)
    assert (w.grad.scores is not None) == scores


def test_accumulation_out_of_place_leaves_the_first_as_it_was():
    chosen = selection()
    first, second = grad(chosen=chosen, scores=True), grad(chosen=chosen, scores=True)
    before, scores = first.compact.clone(), first.scores.clone()
    total = first + second
    torch.testing.assert_close(total.compact, before + second.compact)
    torch.testing.assert_close(total.scores, scores + second.scores)
    torch.testing.assert_close(first.compact, before, rtol=0, atol=0)
    torch.testing.assert_close(first.scores, scores, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [None, torch.tensor([2.0, 2.0, 0.5], **F64)])
def test_dense_meets_compact(scale):
    """A dense gradient is projected; a compact one becomes what projects back to it."""
    chosen = selection(rows=(1, 1, 4), scale=scale) if scale is not None else selection()
    full = torch.randn(SHAPE, **F64)
    g = CompactGrad(chosen.project(torch.randn(SHAPE, **F64)), chosen, SHAPE)
    for w, makes in [
        (nn.Parameter(torch.zeros(SHAPE, **F64)), [lambda: g.clone(), lambda: full.clone()]),
        (nn.Parameter(torch.zeros(SHAPE, **F64)), [lambda: full.clone(), lambda: g.clone()]),
    ]:
        for make in makes:
            backward(w, make)
        got = w.grad
        got = got.compact if isinstance(got, CompactGrad) else chosen.project(got)
        torch.testing.assert_close(got, g.compact + chosen.project(full))
    before, sent = g.compact.clone(), g.clone()
    sent.add_(full)
    torch.testing.assert_close(sent.compact, chosen.project(full) + g.compact)
    for written_by_hand in (
        lambda: full + g,
        lambda: g + full,
        lambda: full - 0.1 * g,
        lambda: full.clone().add_(g),
        lambda: full.clone().sub_(0.1 * g),
        lambda: full.clone().add_(g, alpha=-0.1),
        lambda: nn.Parameter(full).data.add_(-0.1 * g),
    ):
        with pytest.raises(CompactGradError, match=r"^layer\.weight: .*to_dense.*grass_fx\.AdamW"):
            written_by_hand()
    assert torch.equal(g.compact, before)


def test_different_selections_never_add():
    with pytest.raises(SelectionChangedError, match=r"layer.weight: .*zero_grad"):
        grad(generation=0).add_(grad(generation=1))
    with pytest.raises(SelectionChangedError):
        grad(generation=1) + grad(generation=0)


def test_a_zeroed_gradient_adopts_the_newer_selection():
    w = nn.Parameter(torch.zeros(SHAPE, **F64))
    backward(w, lambda: grad(generation=0, scores=True))
    torch.optim.SGD([w]).zero_grad(set_to_none=False)
    assert w.grad.zeroed and w.grad.scores is None and not w.grad.compact.any()
    newer = grad(generation=1, rows=(0, 2, 5), scores=True)
    backward(w, lambda: newer.clone())
    assert w.grad.selection.generation == 1 and not w.grad.zeroed
    torch.testing.assert_close(w.grad.compact, newer.compact)
    torch.testing.assert_close(w.grad.scores, newer.scores)
    with pytest.raises(SelectionChangedError):
        backward(w, lambda: grad(generation=0))


def test_zeroed_gradient_of_an_older_selection_adds_nothing():
    g = grad(generation=1)
    before = g.compact.clone()
    g.add_(grad(generation=0).zero_())
    torch.testing.assert_close(g.compact, before)


def test_hooks_see_it_and_may_change_or_keep_it():
    w, seen = nn.Parameter(torch.zeros(4, 6, **F64).t()), []  # not contiguous
    w.register_hook(lambda g: seen.append(g) or g * 2)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    first = grad()
    backward(w, lambda: first)
    assert all(isinstance(g, CompactGrad) for g in seen) and len(seen) == 2
    torch.testing.assert_close(w.grad.compact, 2 * first.compact)
    kept = seen[0].compact.clone()
    backward(w, lambda: grad())
    torch.testing.assert_close(seen[0].compact, kept, rtol=0, atol=0)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("norm_type", [2.0, float("inf"), 1.0])
def test_clip_grad_norm_uses_the_compact_entries(foreach, norm_type):
    w, b = nn.Parameter(torch.zeros(SHAPE, **F64)), nn.Parameter(torch.zeros(5, **F64))
    g = grad(scores=True)
    before, scores = g.compact.clone(), g.scores.clone()
    w.grad, b.grad = g, torch.randn(5, **F64)
    entries = torch.cat([before.flatten(), b.grad])
    norm = torch.nn.utils.clip_grad_norm_([w, b], 0.5, norm_type, foreach=foreach)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(entries, norm_type))
    factor = 0.5 / (norm + 1e-6)
    torch.testing.assert_close(w.grad.compact, before * factor)
    torch.testing.assert_close(w.grad.scores, scores * factor.float() ** 2)  # squared norms


def test_foreach_lists_of_compact_and_dense():
    g, dense = grad(scores=True), torch.randn(5, **F64)
    before = g.compact.clone()
    norms = torch._foreach_norm([g, dense])
    torch.testing.assert_close(norms[0], before.norm())
    torch._foreach_mul_([g, dense], 3.0)
    torch._foreach_div_([g, dense], torch.tensor(2.0, **F64))
    torch.testing.assert_close(g.compact, before * 1.5)
    torch._foreach_add_([g], [g.clone()])
    torch.testing.assert_close(g.compact, before * 3)
    torch._foreach_clamp_min_([g, dense], -0.1)
    torch._foreach_clamp_max_([g, dense], 0.1)
    torch.testing.assert_close(g.compact, (before * 3).clamp(-0.1, 0.1))
    torch._foreach_zero_([g, dense])
    assert g.zeroed and not g.compact.any() and not dense.any()


@pytest.mark.parametrize("foreach", [None, False])
def test_clip_grad_value(foreach):
    w = nn.Parameter(torch.zeros(SHAPE, **F64))
    w.grad = g = grad()
    want = g.compact.clamp(-0.2, 0.2)
    torch.nn.utils.clip_grad_value_([w], 0.2, foreach=foreach)
    torch.testing.assert_close(w.grad.compact, want)


@pytest.mark.parametrize("bad", [None, float("inf")])
def test_grad_scaler_unscales_and_finds_infinities(bad):
    w = nn.Parameter(torch.zeros(SHAPE))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD([w])
    scaler.scale(torch.ones(()))
    chosen = selection()
    w.grad = CompactGrad(torch.full((3, 4), 8.0), chosen, SHAPE, torch.full((6,), 16.0))
    if bad is not None:
        w.grad.compact[0, 0] = bad
    scaler.unscale_(optimizer)
    found = sum(scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())
    assert bool(found) == (bad is not None)
    assert w.grad.compact[1, 1] == 2.0 and w.grad.scores[0] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_to_converts_a_gradient_that_is_present(dtype):
    layer = nn.Linear(4, 6, bias=False, **F64)
    layer.weight.grad = g = grad(scores=True)
    before = g.compact.clone()
    layer.to(dtype)
    got = layer.weight.grad
    assert isinstance(got, CompactGrad) and got.dtype == got.compact.dtype == dtype
    torch.testing.assert_close(got.compact, before.to(dtype))
    assert got.scores.dtype == torch.float32


@pytest.mark.parametrize("weights_only", [True, False])
def test_it_is_pickled_whole(weights_only):
    scale = torch.tensor([2.0, 3.0, 0.5], **F64)
    g, buffer = grad(scale=scale, scores=True, generation=7), io.BytesIO()
    torch.save({"g": g}, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=weights_only)["g"]
    for got in (other, copy.deepcopy(g), g.clone()):
        assert isinstance(got, CompactGrad) and got.selection.generation == 7
        torch.testing.assert_close(got.compact, g.compact, rtol=0, atol=0)
        torch.testing.assert_close(got.scores, g.scores, rtol=0, atol=0)
        torch.testing.assert_close(got.to_dense(), g.to_dense(), rtol=0, atol=0)
        assert got.compact.data_ptr() != g.compact.data_ptr()


def test_arithmetic_with_numbers():
    g = grad(scores=True)
    before = g.compact.clone()
    torch.testing.assert_close((g * 2).compact, before * 2)
    torch.testing.assert_close((2 * g).scores, g.scores * 4)
    torch.testing.assert_close((g / 2).scores, g.scores / 4)
    torch.testing.assert_close((-g).compact, -before)
    torch.testing.assert_close(g.norm(), before.norm())
    torch.testing.assert_close(g.data.compact, before, rtol=0, atol=0)
    g.mul_(3).div_(torch.tensor(2.0, **F64)).neg_()
    torch.testing.assert_close(g.compact, before * -1.5)


def test_isnan_has_the_weights_shape():
    g = grad(rows=(1, 1, 4), scale=torch.ones(3, **F64))
    assert g.isnan().shape == SHAPE and not g.isnan().any()
    g.compact[0, 2] = g.compact[2, 1] = float("nan")
    assert torch.isnan(g).nonzero().tolist() == [[1, 2], [4, 1]]


@pytest.mark.filterwarnings("ignore:Anomaly Detection|Error detected")
def test_anomaly_detection_passes_good_gradients_and_finds_bad_ones():
    w, bad = nn.Parameter(torch.zeros(SHAPE, **F64)), grad()
    bad.compact[0, 0] = float("nan")
    with torch.autograd.detect_anomaly(check_nan=True):
        backward(w, grad)
        with pytest.raises(RuntimeError, match="returned nan values"):
            backward(w, lambda: bad)


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g.exp(),
        lambda g: g * torch.ones(7, 6, 4, **F64),
        lambda g: 1.0 / g,
        lambda g: g.clamp(min=0.1),
        lambda g: g.masked_fill_(torch.ones(SHAPE, dtype=torch.bool), 1.0),
        lambda g: g.reshape(-1),
        lambda g: g.copy_(torch.zeros(SHAPE, **F64)),
        lambda g: g.data_ptr(),
        lambda g: g.storage(),
        lambda g: torch.from_dlpack(g),
        lambda g: g @ torch.ones(4, 1, **F64),
        lambda g: g[0],
        lambda g: torch.zeros(SHAPE, **F64).lerp_(g, 0.1),
    ],
)
def test_what_has_no_meaning_says_what_to_do(operation):
    with pytest.raises(CompactGradError, match=r"layer\.weight.*\.compact.*\.to_dense\(\)"):
        operation(grad())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_that_knows_no_subspace_is_an_error(optimizer, foreach):
    w = nn.Parameter(torch.zeros(SHAPE, **F64))
    w.grad = grad()
    with pytest.raises((CompactGradError, RuntimeError)):
        optimizer([w], lr=0.1, foreach=foreach).step()
    assert not w.any()  # and nothing moved


@pytest.mark.parametrize("alias", [lambda g: g.data, lambda g: g.detach()])
def test_what_is_done_to_an_alias_in_place_is_done_to_it(alias):
    g = grad(scores=True)
    compact, scores = g.compact.clone(), g.scores.clone()
    alias(g).mul_(2)
    assert torch.equal(g.compact, compact * 2) and torch.equal(g.scores, scores * 4)
    alias(g).zero_()
    assert not g.compact.any() and g.scores is None and g.zeroed
    newer = grad(generation=1)
    alias(g).add_(newer)
    assert g.selection is newer.selection and torch.equal(g.compact, newer.compact)
    other = g.clone()
    other.zero_()
    assert not g.zeroed and g.compact.any()


def test_that_a_part_of_it_came_dense_is_remembered():
    mixed = grad()
    assert not mixed.projected
    mixed += torch.ones(SHAPE, **F64)
    again = pickle.loads(pickle.dumps(mixed))
    for each in (mixed, mixed.clone(), mixed * 2, mixed.to(torch.float32), grad() + mixed, again):
        assert each.projected
    assert not mixed.zero_().projected
