"""Autocast, GradScaler, bfloat16 weights and stochastic rounding."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import StateError
from grass_fx.optim.rounding import noise, round_stochastically, rounding_seed
from grass_fx.optim.update import add_rows_
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection
from helpers import Captured, mlp


def batches(steps, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return [[torch.randn(7, n, generator=gen).to(dtype) for n in (8, 6)] for _ in range(steps)]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).float().square().mean()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_autocast_gives_the_selected_rows_of_autocasts_gradient(compiler, dtype, rule):
    if compiler == "inductor" and rule == "cyclic":
        pytest.skip("the rule with scores compiles this variant too")
    model = mlp(8, 12, 6)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=Captured(rank=4, selection=rule, compiler=compiler))
    with torch.autocast("cpu", dtype):
        loss_of(compiled, batches(1)[0]).backward()
        loss_of(twin, batches(1)[0]).backward()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        if isinstance(got.grad, grass_fx.CompactGrad):
            want = got.grad.selection.project(want.grad)
            torch.testing.assert_close(got.grad.compact, want, rtol=2e-2, atol=2e-3)
            assert got.grad.dtype == torch.float32
        else:
            torch.testing.assert_close(got.grad, want.grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("make", [grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)])
@pytest.mark.parametrize("rule", ["cyclic", "top"])
def test_a_skipped_step_ages_no_row_and_loses_no_refresh(rule, make):
    """float16 with GradScaler: the run is the run without the batch that overflows."""
    finals = []
    for broken in (None, 2, 3):  # with K = 3, step 3 is a scoring step and ends a period
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 12, 6)
        compiled = torch.compile(
            model, backend=Captured(rank=4, refresh_every=3, selection=rule, side="out")
        )
        optimizer = make(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
        data = batches(6)
        if broken is not None:
            data.insert(broken, [torch.full((7, 8), float("inf")), data[0][1]])
        for k, batch in enumerate(data):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(compiled, batch)
            scaler.scale(loss).backward()
            ages = optimizer.state[model[0].weight].get("age", torch.zeros(4)).clone()
            scaler.step(optimizer)
            scaler.update(2.0**10)
            if k == broken:
                assert torch.equal(optimizer.state[model[0].weight]["age"], ages)
        assert registry.get(model[0].weight).step == 6
        finals.append([p.detach() for p in model.parameters()])
    for got in finals[1:]:
        for a, b in zip(got, finals[0], strict=True):
            assert torch.equal(a, b)


def test_a_fused_optimizer_leaves_skipping_to_the_scaler():
    optimizer = grass_fx.subspace(torch.optim.AdamW)(mlp(8, 6).parameters(), fused=True)
    assert not optimizer._step_supports_amp_scaling


# --- stochastic rounding --------------------------------------------------------------------------


def test_rounding_goes_to_one_of_the_two_neighbours_and_is_unbiased():
    gen = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=gen) * 10.0 ** torch.randint(-6, 6, (64,), generator=gen)
    draws = 20_000
    seed = rounding_seed(0, 0, 0)
    rounded = round_stochastically(values.expand(draws, 64).contiguous(), seed).double()
    bits = values.view(torch.int32) & -(1 << 16)
    near, far = (b.view(torch.float32).double() for b in (bits, bits + (1 << 16)))
    assert bool(((rounded == near) | (rounded == far)).all())
    share = ((values.double() - near) / (far - near)).clamp(0, 1)
    got = (rounded == far).double().mean(0)
    # Five standard deviations of the mean of `draws` Bernoulli variables.
    assert bool(((got - share).abs() <= 5 * (share * (1 - share) / draws).sqrt() + 1e-9).all())


def test_what_is_exact_or_not_finite_stays():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan")])
    values = torch.cat([values, torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)])
    values = torch.cat([values, values.neg()])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = round_stochastically(values.repeat(100, 1), rounding_seed(0, 0, 0), dtype)
        want = values.to(dtype).expand_as(rounded)
        torch.testing.assert_close(rounded, want, rtol=0, atol=0, equal_nan=True)


def test_seeds_differ_by_seed_parameter_and_step_alone():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, "decay")]
    assert len({tuple(rounding_seed(*key).tolist()) for key in keys}) == 5
    assert torch.equal(rounding_seed(0, 1, 2), rounding_seed(0, 1, 2))


@pytest.mark.parametrize("shape", [(40, 30), (1, 900), (900, 1), (900,), (5, 6, 30), ()])
def test_the_noise_of_elements_is_uniform_and_independent_over_the_seeds(shape):
    """Sums over rows, columns and all vary as those of independent numbers do."""
    draws = torch.stack([noise(rounding_seed(0, 0, k), shape) for k in range(1000)])
    assert int(draws.min()) >= 0 and int(draws.max()) < 1 << 16
    u = (draws.double() + 0.5) / (1 << 16) - 0.5
    u = u.reshape(len(u), -1, *shape[-1:] or [1]) * 12**0.5  # of variance 1
    n = u.shape[0]
    assert float(u.mean(0).abs().max()) < 5 / n**0.5
    for sums in (u.sum(1) / u.shape[1] ** 0.5, u.sum(2) / u.shape[2] ** 0.5, u.sum((1, 2))):
        sums = sums if sums.dim() > 1 else sums.unsqueeze(1) / (u[0].numel()) ** 0.5
        # The variance of a variance of n normal numbers is 2 / n; sums of one draw may correlate.
        assert float((sums.var(0).mean() - 1).abs()) < 5 * (2 / n) ** 0.5


def test_parts_of_a_tensor_have_the_noise_of_the_whole():
    seed, shape = rounding_seed(0, 0, 0), (6, 2, 5)
    whole, of_part = noise(seed, shape), noise(seed, (3, 2, 5), first=3 * 2)
    assert torch.equal(whole[3:], of_part)


def train(model, compiled, optimizer, steps):
    for batch in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()
        optimizer.step()


class Looks(torch.optim.AdamW):
    """A class of which grass does not know that it ignores weights: it steps float32 copies."""


MAKES = {
    "AdamW": grass_fx.AdamW,
    "compiled": partial(grass_fx.AdamW, compile=True),
    "wrapped": grass_fx.subspace(torch.optim.AdamW),
    "wrapped, looks": grass_fx.subspace(Looks),
}


@pytest.mark.parametrize(
    ("name", "warmup_steps"),
    [
        ("AdamW", 0),
        ("AdamW", 5),
        ("wrapped", 5),
        ("wrapped, looks", 0),
        ("wrapped, looks", 5),
        pytest.param("compiled", 5, marks=pytest.mark.slow),
    ],
)
def test_small_updates_move_bfloat16_weights_unless_they_are_rounded_to_nearest(name, warmup_steps):
    """Updates of 1e-4 of a weight are below half a unit in the last place of bfloat16 (2e-3)."""
    moved = {}
    for rounding in (False, None):
        torch._dynamo.reset()
        model = mlp(8, 64, 6).to(torch.bfloat16)
        nn.init.ones_(model[0].weight)
        nn.init.ones_(model[0].bias)
        compiled = torch.compile(model, backend=Captured(rank=8, side="out", refresh_every=1000))
        optimizer = MAKES[name](
            model.parameters(), lr=1e-4, weight_decay=0.0, warmup_steps=warmup_steps,
            stochastic_rounding=rounding, scale=1.0,
        )  # fmt: skip
        train(model, compiled, optimizer, 30)
        rows = model[0].weight.grad.selection.indices
        moved[rounding] = [
            (t.float() - 1).abs().mean().item() for t in (model[0].weight[rows], model[0].bias)
        ]
        others = torch.ones(64, dtype=torch.bool)
        others[rows] = False
        assert bool((model[0].weight[others] == 1).all())
        kept = {v.dtype for k, v in optimizer.state[model[0].weight].items() if "exp_avg" in k}
        assert kept == {torch.bfloat16}
    assert moved[False] == [0.0, 0.0]
    weight, bias = moved[None]
    assert 1e-4 < weight < 30e-4
    assert bias == 0 if "wrapped" in name else 1e-4 < bias < 30e-4  # X steps dense parameters


@pytest.mark.parametrize(
    ("shape", "compile"),
    [
        *[(shape, False) for shape in ((), (7,), (40, 30), (3, 4, 5, 6), (0, 4))],
        ((), True),
        *[
            pytest.param(shape, True, marks=pytest.mark.slow)
            for shape in ((7,), (40, 30), (3, 4, 5, 6), (0, 4))
        ],
    ],
)
def test_a_dense_bfloat16_parameter_makes_torchs_step_and_is_rounded_once(shape, compile):
    """In parts too: moments are torch's in float32, and the parameter is one of two neighbours."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape).to(torch.bfloat16))
    want = nn.Parameter(p.detach().double())
    optimizer = grass_fx.AdamW([p], lr=1e-2, weight_decay=0.1, compile=compile)
    exact = torch.optim.AdamW([want], lr=1e-2, weight_decay=0.1)
    p.grad = torch.randn(shape).to(torch.bfloat16)
    want.grad = p.grad.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no weight is taken
        optimizer.step()
    exact.step()
    unit = torch.finfo(torch.bfloat16).eps * want.detach().abs()
    assert bool(((p.detach().double() - want.detach()).abs() <= unit).all())
    assert optimizer.state[p]["step"].item() == 1
    for name in ("exp_avg", "exp_avg_sq"):
        near = optimizer.state[p][name].double()
        torch.testing.assert_close(near, exact.state[want][name], rtol=2**-8, atol=0)


def test_the_mean_of_rounded_steps_is_the_step_in_float32():
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(6, 40, generator=gen).to(torch.bfloat16)
    change = torch.randn(6, 16, generator=gen) * 1e-3
    indices = torch.arange(40)[::2][:16]
    selection = Selection(indices, None, 1, 0)
    total, count = torch.zeros(6, 16, dtype=torch.float64), 4000
    for k in range(count):
        w = start.clone()
        add_rows_(w, selection, change, rounding_seed(0, 0, k))
        total += w[:, indices].double()
    want = start[:, indices].double() + change.double()
    unit = torch.maximum(want.abs(), torch.tensor(2.0**-20)).log2().floor().exp2() * 2.0**-7
    assert bool(((total / count - want).abs() < 5 * unit / count**0.5).all())


@pytest.mark.parametrize("seed", [None, rounding_seed(0, 0, 0)])
def test_repeated_rows_of_a_bfloat16_weight_add_before_they_are_rounded(seed):
    w = torch.zeros(4, 3, dtype=torch.bfloat16)
    selection = Selection(torch.tensor([1, 1, 3]), torch.ones(3), 0, 0)
    add_rows_(w, selection, torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 3), seed)
    assert w.tolist() == [[0.0] * 3, [3.0] * 3, [0.0] * 3, [4.0] * 3]


def test_rounded_runs_repeat_and_seeds_differ():
    finals = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 12, 6).to(torch.bfloat16)
        optimizer = grass_fx.AdamW(model.parameters(), stochastic_rounding=True, seed=seed)
        train(model, torch.compile(model, backend=Captured(rank=4)), optimizer, 4)
        finals.append([p.detach() for p in model.parameters()])
    same = [[torch.equal(a, b) for a, b in zip(finals[0], f, strict=True)] for f in finals[1:]]
    assert all(same[0]) and not any(same[1])


def test_rounding_leaves_float32_weights_alone():
    finals = []
    for rounding in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 12, 6)
        optimizer = grass_fx.AdamW(model.parameters(), stochastic_rounding=rounding)
        train(model, torch.compile(model, backend=Captured(rank=4)), optimizer, 3)
        finals.append([p.detach() for p in model.parameters()])
    for a, b in zip(*finals, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("rule", ["cyclic", "uniform"])
def test_bfloat16_training_follows_float32(rule, rounding):
    """The same run with bfloat16 weights and moments stays close to the one in float32."""
    finals = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 64, 6).to(torch.bfloat16).to(dtype)
        options = {"rank": 8, "refresh_every": 3, "selection": rule}
        compiled = torch.compile(model, backend=Captured(**options))
        optimizer = grass_fx.AdamW(
            model.parameters(), lr=1e-2, warmup_steps=2, stochastic_rounding=rounding
        )
        start = copy.deepcopy(model)
        train(model, compiled, optimizer, 8)
        finals.append([(p - q).float() for p, q in zip(model.parameters(), start.parameters(),
                                                       strict=True)])  # fmt: skip
    for exact, rough in zip(*finals, strict=True):
        assert (exact - rough).norm() < 0.15 * exact.norm()


def test_a_model_converted_after_its_first_step_is_an_error_that_names_the_weight():
    for make in (grass_fx.AdamW, grass_fx.subspace(torch.optim.AdamW)):
        torch._dynamo.reset()
        model = mlp(8, 12, 6)
        compiled = torch.compile(model, backend=Captured(rank=4))
        optimizer = make(model.named_parameters())
        train(model, compiled, optimizer, 2)
        model.to(torch.bfloat16)
        before = copy.deepcopy(model)
        with pytest.raises(StateError, match=r"^0\.weight .*bfloat16.*float32"):
            train(model, compiled, optimizer, 1)
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(p, q)


def test_state_left_on_another_device_is_an_error_that_names_the_weight():
    model = mlp(8, 12, 6)
    compiled = torch.compile(model, backend=Captured(rank=4))
    optimizer = grass_fx.AdamW(model.named_parameters())
    train(model, compiled, optimizer, 2)
    state = optimizer.state[model[0].weight]
    state.update({k: v.to("meta") for k, v in state.items() if isinstance(v, torch.Tensor)})
    with pytest.raises(StateError, match=r"^0\.weight is on cpu now, its optimizer state on meta"):
        train(model, compiled, optimizer, 1)
