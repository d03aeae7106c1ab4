"""Decoupled weight decay: selected rows decay as they move, all others once a period."""

import copy
import io
import math

import pytest
import torch

import grass_fx
from grass_fx.config import GrassConfig
from grass_fx.errors import GrassWarning, StateError
from grass_fx.optim import compiled, decay
from grass_fx.optim.rounding import rounding_seed
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection
from grass_fx.state.spec import SubspaceSpec
from helpers import Captured, mlp

LR, DECAY = 1e-3, 0.1


def weight_with(gradient, shape=(24, 32), dtype=torch.float32, dim=1, **options):
    """A taken weight, and a function that gives it a compact gradient of the current selection."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape).to(dtype))
    config = GrassConfig(rank=8, side="in" if dim == 1 else "out", **options)
    spec = SubspaceSpec.of(config, shape[dim], dim, config.side)

    def backward():
        (subspace,) = registry.demand([w], [spec], ["w"])
        selection = subspace.selection_on(w.device)
        compact = torch.full(spec.compact_shape(shape), gradient, dtype=dtype)
        w.grad = grass_fx.CompactGrad(compact, selection, w.shape)

    return w, backward


def others(w):
    """Which rows of a weight are not selected, as a mask along the selected dimension."""
    selection = w.grad.selection
    mask = torch.ones(w.shape[selection.dim], dtype=torch.bool)
    mask[selection.indices] = False
    return mask


ROUNDED = {
    "AdamW": grass_fx.AdamW,
    "compiled": lambda params, **options: grass_fx.AdamW(params, compile=True, **options),
    "wrapped": grass_fx.subspace(torch.optim.AdamW),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("make", [ROUNDED["AdamW"], ROUNDED["wrapped"]], ids=["AdamW", "wrapped"])
def test_two_thousand_bfloat16_steps_shrink_the_weight_by_two_percent(make, dim):
    w, backward = weight_with(0.0, (64, 96), torch.bfloat16, dim)
    optimizer = make([w], lr=1e-4, weight_decay=0.1)  # lr λ = 1e-5: nothing in a bfloat16
    before = w.detach().double().norm()
    for _ in range(2000):
        backward()
        optimizer.step()
    assert 1 - float(w.detach().double().norm() / before) == pytest.approx(0.02, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refresh_every", [3, math.inf])
def test_a_pass_shrinks_what_is_not_selected_without_bias(dtype, refresh_every):
    """Also where the period never ends, and where the user has chosen rounding to nearest."""
    w, backward = weight_with(0.0, (256, 64), dtype, refresh_every=refresh_every)
    optimizer = grass_fx.AdamW([w], lr=1e-3, weight_decay=0.1, stochastic_rounding=False)
    before, steps = (
        w.detach().clone(),
        3 if refresh_every == 3 else 158,
    )  # (1 - 1e-4)^158 < 1 - 2^-6
    for k in range(1, steps + 1):
        backward()
        optimizer.step()
        assert (optimizer.state[w]["pending_decay"] == 1) == (k == steps)
    rest = others(w)
    mean = w.detach().double()[:, rest].abs().mean() / before.double()[:, rest].abs().mean()
    assert 1 - float(mean) == pytest.approx(steps * 1e-4, rel=0.2)
    if dtype == torch.float32:
        kept = w.detach()[:, rest] / before[:, rest]
        torch.testing.assert_close(kept, torch.full_like(kept, (1 - 1e-4) ** steps))


def test_selected_rows_decay_at_once_and_all_others_at_the_end_of_a_period():
    w, backward = weight_with(1.0, refresh_every=4)
    optimizer = grass_fx.AdamW([w], lr=LR, weight_decay=DECAY, scale=1.0)
    plain = torch.nn.Parameter(w.detach().clone())
    exact = torch.optim.AdamW([plain], lr=LR, weight_decay=DECAY)
    plain.grad = torch.ones_like(plain)
    optimizer.param_groups[0]["warmup_steps"] = 0
    start = w.detach().clone()
    for k in range(1, 5):
        backward()
        selected, rest = w.grad.selection.indices, others(w)
        optimizer.step()
        exact.step()
        torch.testing.assert_close(w[:, selected], plain[:, selected])
        decayed = (1 - LR * DECAY) ** 4 if k == 4 else 1.0
        torch.testing.assert_close(w[:, rest], start[:, rest] * decayed)
    assert optimizer.state[w]["pending_decay"] == 1


def test_every_rate_of_a_schedule_counts():
    w, backward = weight_with(0.0, refresh_every=4)
    optimizer = grass_fx.AdamW([w], lr=0.0, weight_decay=DECAY)
    start, product = w.detach().clone(), 1.0
    for lr in (0.1, 0.0, 0.05, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        product *= 1 - lr * DECAY
        backward()
        rest = others(w)
        optimizer.step()
    torch.testing.assert_close(w[:, rest], start[:, rest] * product)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (ROUNDED["AdamW"], torch.float32),
        (ROUNDED["AdamW"], torch.bfloat16),
        (ROUNDED["wrapped"], torch.bfloat16),
        pytest.param(ROUNDED["compiled"], torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=["AdamW, float32", "AdamW, bfloat16", "wrapped, bfloat16", "compiled, bfloat16"],
)
def test_a_run_that_is_saved_while_decay_is_pending_resumes_to_the_last_bit(dtype, make):
    def run(model, optimizer, first, last):
        torch._dynamo.reset()
        compiled_model = torch.compile(model, backend=Captured(rank=4, refresh_every=4))
        for k in range(first, last):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(k)).to(dtype)
            compiled_model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = mlp(8, 12, 6).to(dtype)
        return model, make(model.parameters(), lr=0.01, weight_decay=DECAY)

    whole, optimizer = fresh()
    run(whole, optimizer, 0, 2)
    pending = [s["pending_decay"].item() for s in optimizer.state.values() if "indices" in s]
    assert pending == [pytest.approx((1 - 0.001) ** 2)] * 2
    buffer = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    run(whole, optimizer, 2, 7)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    part, optimizer = fresh()
    part.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(part, optimizer, 2, 7)
    torch.testing.assert_close(part.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_without_pending_decay_loads_and_a_damaged_one_does_not():
    w, backward = weight_with(1.0)
    optimizer = grass_fx.AdamW([("w", w)])
    backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["pending_decay"]
    optimizer.load_state_dict(saved)
    backward()
    optimizer.step()
    assert optimizer.state[w]["pending_decay"] == 1 - 1e-3 * 1e-2
    for bad in (torch.tensor(math.nan), torch.tensor(math.inf), torch.ones(2), "1", None):
        saved["state"][0]["pending_decay"] = bad
        with pytest.raises(StateError, match="w: its saved state is damaged: pending_decay"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("make", [ROUNDED["AdamW"], ROUNDED["wrapped"]], ids=["AdamW", "wrapped"])
def test_decay_is_not_lost_if_the_selection_changes_within_a_period(make):
    w, backward = weight_with(0.0)
    optimizer = make([w], lr=LR, weight_decay=DECAY)
    start = w.detach().clone()
    backward()
    optimizer.step()
    former = others(w)
    other = Selection(torch.arange(8), None, 1, -2, "w", draw=9)
    w.grad = grass_fx.CompactGrad(torch.zeros(24, 8), other, w.shape)
    optimizer.step()
    still = former & others(w)
    kept = w.detach()[:, still] / start[:, still]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 - LR * DECAY))
    assert optimizer.state[w]["pending_decay"].item() == pytest.approx(1 - LR * DECAY)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generated_code_rounds_a_pass_as_eager_code_does(dtype, dim):
    torch.manual_seed(0)
    w = torch.randn(40, 24).to(dtype)
    want, selected = w.clone(), torch.tensor([1, 5, 7])
    for target, compile in ((w, True), (want, False)):
        for run in decay.passes(target, dim, selected, 0.99, rounding_seed(0, 0, 0), compile):
            run()
    torch.testing.assert_close(w, want, rtol=0, atol=0)
    assert compiled._scaling.cache_info().currsize > 0


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_pass_that_was_interrupted_is_finished_and_decays_nothing_twice(at, monkeypatch):
    results = []
    for interrupted in (True, False):
        w, backward = weight_with(0.0, (64, 32), torch.bfloat16, refresh_every=2)
        optimizer = grass_fx.AdamW([w], lr=0.1, weight_decay=0.5)
        for k in range(2):
            backward()
            if interrupted and k == 1:
                real, calls = decay.round_stochastically, []

                def fails(*args, real=real, calls=calls):
                    calls.append(1)
                    if len(calls) == at:
                        raise torch.OutOfMemoryError("no memory")
                    return real(*args)

                with monkeypatch.context() as patch:
                    patch.setattr(decay, "round_stochastically", fails)
                    with pytest.raises(torch.OutOfMemoryError), pytest.warns(GrassWarning):
                        optimizer.step()
            optimizer.step()
        assert optimizer.state[w]["pending_decay"] == 1
        results.append(w.detach().clone())
    torch.testing.assert_close(*results, rtol=0, atol=0)
