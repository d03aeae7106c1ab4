"""What a training loop asks of a gradient is answered for the tensor that it stands for."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from grass_fx.errors import CompactGradError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.selection import Selection

SHAPE = torch.Size((6, 4))
F64 = {"dtype": torch.float64}

KINDS = {
    "rows": ((1, 3, 4), 0, None),
    "columns": ((0, 2), 1, None),
    "repeated": ((1, 1, 4), 0, torch.tensor([2.0, 0.5, 3.0], **F64)),
    "repeated columns": ((0, 2, 2), 1, torch.tensor([2.0, 0.5, 3.0], **F64)),
    "all": (tuple(range(6)), 0, None),
}


def grad(kind="rows", sign=None):
    rows, dim, scale = KINDS[kind]
    shape = list(SHAPE)
    shape[dim] = len(rows)
    torch.manual_seed(0)
    compact = torch.randn(shape, **F64)
    compact = compact if sign is None else sign * compact.abs()
    return CompactGrad(compact, Selection(torch.tensor(rows), scale, dim, 0, "w"), SHAPE)


LOOKS = {
    "isfinite": torch.isfinite, "isinf": torch.isinf, "isnan": torch.isnan,
    "abs": torch.abs, "max of abs": lambda g: g.abs().max(), "sign": torch.sign,
    "square": torch.square, "pow 3": lambda g: g**3, "sum of squares": lambda g: g.pow(2).sum(),
    "sum": torch.sum, "sum 0": lambda g: g.sum(0), "sum 1": lambda g: g.sum(1, keepdim=True),
    "sum 01": lambda g: g.sum((0, 1)), "mean": torch.mean, "mean 0": lambda g: g.mean(0),
    "mean 1": lambda g: g.mean(-1), "std": torch.std, "var": lambda g: g.var(correction=0),
    "var_mean": lambda g: torch.stack(torch.var_mean(g)), "max": torch.max, "min": torch.min,
    "amax 0": lambda g: g.amax(0), "amin 1": lambda g: g.amin(1, keepdim=True),
    "aminmax": lambda g: torch.stack(torch.aminmax(g)), "any": torch.any, "all": torch.all,
    "count": torch.count_nonzero, "== 0": lambda g: g == 0, "> 0.1": lambda g: g > 0.1,
    "!= itself": lambda g: g != g, "histc": lambda g: g.histc(7),
    "histc between": lambda g: g.histc(5, min=-0.5, max=1.0),
    "histogram": lambda g: torch.cat(torch.histogram(g, 6)),
    "density": lambda g: torch.histogram(g, 6, range=(-1.0, 2.0), density=True)[0],
    "nan_to_num": torch.nan_to_num, "with itself": lambda g: torch.equal(g, g),
    "numpy": lambda g: g.detach().cpu().numpy(), "asarray": np.asarray,
    "list": lambda g: g.tolist(),
    "numpy's norm": np.linalg.norm, "masked": lambda g: g * MASK, "by row": lambda g: g * MASK[0],
    "masked_fill": lambda g: g.masked_fill(MASK > 0, 0), "with w": lambda g: (g * MASK).sum(),
    "to float": lambda g: g.float().sum(), "relu": torch.relu,
    "like": lambda g: torch.ones_like(g), "filled like": lambda g: torch.full_like(g, 2.0),
    "zeros": lambda g: g.new_zeros(3), "into": lambda g: torch.ones(SHAPE, **F64).copy_(g),
}  # fmt: skip
MASK = (torch.arange(24).view(SHAPE) % 3 > 0).double()
# Norms and clamped values are those of C, as clipping takes them: with ρ the whole has others.
NORMS = {
    f"norm {order} {dim}": lambda g, o=order, d=dim: torch.linalg.vector_norm(g, o, d)
    for order in (0, 1, 2, 3, float("inf"))
    for dim in (None, 0, 1)
} | {
    "norm -1": lambda g: torch.linalg.vector_norm(g, -1),
    "norm -inf": lambda g: torch.linalg.vector_norm(g, -float("inf")),
    "method": lambda g: g.norm(), "of data": lambda g: g.data.norm(2), "fro": torch.linalg.norm,
    "clamped": lambda g: g.clamp(-0.1, 0.2),
}  # fmt: skip


def dense(value):
    return value.to_dense() if isinstance(value, CompactGrad) else value


def assert_alike(look, g):
    got, want = dense(look(g)), look(g.to_dense())
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, equal_nan=True)
    else:
        np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("look", LOOKS)
def test_an_answer_is_that_of_the_whole_matrix(look, kind):
    for sign in (None, 1, -1):  # of all signs, without a negative one, without a positive one
        assert_alike(LOOKS[look], grad(kind, sign))


@pytest.mark.parametrize("kind", ["rows", "columns", "all"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_is_that_of_the_whole_matrix(norm, kind):
    assert_alike(NORMS[norm], grad(kind))


def test_bad_numbers_are_seen():
    for bad in (float("nan"), float("inf")):
        g = grad()
        g.compact[1, 2] = bad
        for look in ("isfinite", "isinf", "isnan", "max of abs", "sum", "max", "!= itself"):
            assert_alike(LOOKS[look], g)
        g.nan_to_num_(nan=0.0, posinf=1.0)
        assert g.isfinite().all() and g.compact[1, 2] in (0.0, 1.0)
        g.compact[1, 2] = bad
        assert torch.nan_to_num(g, nan=0.0, posinf=1.0, out=g) is g and g.isfinite().all()


def test_a_mask_changes_it_in_place():
    g = grad("columns")
    want = g.to_dense() * MASK
    g *= MASK
    torch.testing.assert_close(g.to_dense(), want)
    g.masked_fill_(torch.ones(SHAPE, dtype=torch.bool).tril(), 0)
    torch.testing.assert_close(g.to_dense(), want.triu(1))
    g.fill_(0)
    assert g.zeroed and not g.compact.any()


def test_a_moving_average_of_one_selection():
    """And of two it is an error, never a mixture."""
    first, second = grad(), grad()
    second.compact.mul_(-2)
    by_sum, by_lerp, squares = first.clone(), first.clone(), first * first
    by_sum.mul_(0.9).add_(second, alpha=0.1)
    by_lerp.lerp_(second, 0.1)
    squares.mul_(0.9).addcmul_(second, second, value=0.1)
    want = 0.9 * first.to_dense() + 0.1 * second.to_dense()
    torch.testing.assert_close(by_sum.to_dense(), want)
    torch.testing.assert_close(by_lerp.to_dense(), want)
    want = 0.9 * first.to_dense() ** 2 + 0.1 * second.to_dense() ** 2
    torch.testing.assert_close(squares.to_dense(), want)
    torch.testing.assert_close((first - second).to_dense(), first.to_dense() - second.to_dense())
    other = CompactGrad(first.compact, Selection(torch.tensor([0, 2, 5]), None, 0, 1, "w"), SHAPE)
    for mixture in (
        lambda: by_lerp.lerp_(other, 0.1),
        lambda: by_sum - other,
        lambda: first * other,
    ):
        with pytest.raises((CompactGradError, RuntimeError), match="^w: "):
            mixture()


def test_arrays_of_it_cannot_be_written_to():
    array = grad().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1.0


def test_what_is_made_like_it_and_says_that_it_is_zero_is():
    torch.full((64, 64), 3.0)  # memory that may come back
    for make in (torch.empty_like, torch.zeros_like, lambda g: g.new_empty(SHAPE)):
        made = make(grad())
        assert made.zeroed and not made.compact.any()


def test_it_can_be_shared_between_processes():
    layer = nn.Linear(4, 6, bias=False, **F64)
    layer.weight.grad = g = grad("columns")
    before = g.to_dense()
    layer.share_memory()
    assert layer.weight.grad.compact.is_shared() and layer.weight.grad.is_shared()
    torch.testing.assert_close(layer.weight.grad.to_dense(), before)
    assert g.untyped_storage().nbytes() == g.compact.nbytes


def test_the_weight_cannot_become_its_gradient():
    w = nn.Parameter(torch.zeros(SHAPE, **F64))
    w.data = grad().detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="data pointer"):  # and no crash
            w.detach().add_(1)
