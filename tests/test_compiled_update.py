"""The subspace update as generated code: its kernels on a virtual GPU and their numbers, and whole
training runs through Inductor on the CPU."""

import copy
import io
import re
from dataclasses import replace

import pytest
import torch

import grass_fx
from grass_fx import _torch_compat as compat
from grass_fx.errors import OptionError
from grass_fx.ops import ADD_ROWS
from grass_fx.optim import compiled
from grass_fx.optim.rounding import noise, rounding_seed
from grass_fx.optim.update import CompactStep, _add_in_order, adam_update_, add_rows_
from grass_fx.state.selection import Selection
from helpers import Captured, interpreted_by_triton, mlp

SETTINGS = {
    "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
    "warmup_steps": 4,
}  # fmt: skip
SHAPES = [(40, 24, 0, 8), (16, 64, 1, 9), (33, 17, 0, 5), (24, 40, 1, 6)]  # W, dim, r


def steps_of(dtype, rounds=False, shapes=SHAPES):
    """Weights in the middle of a run: rows of different ages, both dims."""
    gen, steps = torch.Generator().manual_seed(1), []
    for key, (m, n, dim, r) in enumerate(shapes):
        shape = (r, n) if dim == 0 else (m, r)
        w, compact, first = (
            torch.randn(s, generator=gen).to(dtype) for s in ((m, n), shape, shape)
        )
        second = torch.rand(shape, generator=gen).to(dtype)
        indices = torch.randperm((m, n)[dim], generator=gen)[:r].sort().values
        selection, age = Selection(indices, None, dim, 0), torch.randint(9, (r,), generator=gen)
        seed = rounding_seed(0, key, 0) if rounds else None
        steps.append(CompactStep(w, compact, selection, first, second, age, None, 0.5, seed))
    return steps


def changed(steps):
    return [t for step in steps for t in (step.w, step.exp_avg, step.exp_avg_sq, step.age)]


# --- on a CPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rounds"),
    [(torch.float64, False), (torch.float32, False), (torch.float16, False),
     (torch.bfloat16, False), (torch.bfloat16, True)],
)  # fmt: skip
def test_compiled_steps_are_the_eager_steps(dtype, rounds):
    got, want = steps_of(dtype, rounds), steps_of(dtype, rounds)
    adam_update_(got, compile=True, **SETTINGS)
    adam_update_(want, compile=False, **SETTINGS)
    # Half precision is rounded once on both ways, and the noise is the same. But what is rounded
    # was computed in float32: another last digit there may round to the other neighbour.
    tight = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    pairs = list(zip(changed(got), changed(want), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tight, atol=1e-6)
    if dtype.itemsize == 2:
        assert sum(int((a != b).sum()) for a, b in pairs) <= sum(b.numel() for _, b in pairs) / 1000


def test_only_shapes_compile():
    compiled.compiled.cache_clear()
    steps = steps_of(torch.float32)
    for k in range(4):
        changes = {"lr": 0.1 / (k + 1), "beta1": 0.9 + k / 100}
        steps = [replace(step, scale=1 + k) for step in steps]
        adam_update_(steps, compile=True, **{**SETTINGS, **changes})
    assert compiled.compiled.cache_info().misses == 1
    before = [t.clone() for t in changed(steps)]
    adam_update_(steps, compile=True, **{**SETTINGS, "lr": 0.0})  # by eager code
    assert compiled.compiled.cache_info().misses == 1
    moves = [not torch.equal(a, b) for a, b in zip(changed(steps), before, strict=True)]
    assert moves == [False, True, True, True] * len(steps)


def test_layers_of_one_shape_share_their_code():
    keys = [(0, "a")] * 20 + [(0, "b")] * 17 + [(1, "a")] * 3
    parts = list(compiled.together(keys))
    assert sorted(k for part in parts for k in part) == list(range(40))
    assert [len(part) for part in parts] == [8] * 5
    assert len({tuple(keys[k] for k in part) for part in parts}) == 3


def train(model, run, optimizer, steps, seed=0):
    gen, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
    for _ in range(steps):
        x, y = (torch.randn(7, n, generator=gen).to(dtype) for n in (8, 6))
        optimizer.zero_grad()
        (run(x) - y).float().square().mean().backward()
        optimizer.step()


def trained(compile, dtype, steps=7, **settings):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mlp(8, 12, 6).to(dtype)
    run = torch.compile(model, backend=Captured(rank=3, refresh_every=2, selection="uniform"))
    optimizer = grass_fx.AdamW(
        model.parameters(), lr=1e-2, weight_decay=0.1, warmup_steps=3, compile=compile, **settings
    )
    train(model, run, optimizer, steps)
    return model, run, optimizer


@pytest.mark.parametrize("on_refresh", ["carry", "reset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_run_is_the_eager_run(dtype, on_refresh):
    rounds = dtype == torch.bfloat16
    runs = [
        trained(compile, dtype, on_refresh=on_refresh, stochastic_rounding=rounds)
        for compile in (True, False)
    ]
    (got, _, optimizer), (want, _, eager) = runs
    differ = total = 0
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        state, other = dict(optimizer.state[a]), dict(eager.state[b])
        if not rounds:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(state, other)
            continue
        # A number that is rounded the other way once changes a little of all that comes later.
        differ, total = differ + int((a != b).sum()), total + a.numel()
        for name in ("exp_avg", "exp_avg_sq"):
            mine, theirs = state.pop(name).float(), other.pop(name).float()
            assert (mine - theirs).norm() <= 0.02 * theirs.norm()
        torch.testing.assert_close(state, other)
    assert differ <= 0.05 * total  # other noise would round every other one the other way


@pytest.mark.parametrize("change", [{"compile": False}, {"lr": 0.0}])
def test_eager_steps_after_generated_ones_know_the_ages(change):
    """Of rows that are all of one age torch's fused kernel steps many weights at once."""
    model, run, optimizer = trained(True, torch.float32, steps=2, on_refresh="reset")
    optimizer.param_groups[0].update(change)
    train(model, run, optimizer, 1)
    ages = [age for _, age in optimizer._common_ages.values()]
    assert ages == [1, 1]  # the second step was followed by a refresh


def test_stepping_in_backward_compiles_too():
    finals = []
    for compile in (True, False):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(8, 12, 6)
        optimizer = grass_fx.AdamW(model.parameters(), compile=compile)
        grass_fx.step_in_backward(optimizer)
        train(model, torch.compile(model, backend=Captured(rank=3)), optimizer, 3)
        finals.append(list(model.parameters()))
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_rounding_is_unbiased():
    (start,) = steps_of(torch.bfloat16, shapes=SHAPES[1:2])
    indices, count = start.selection.indices, 2000
    total = torch.zeros(16, 9, dtype=torch.float64)
    settings = {**SETTINGS, "weight_decay": 0.0, "lr": 1e-3}
    for k in range(count):
        step = {**copy.deepcopy(vars(start)), "seed": rounding_seed(0, 0, k)}
        adam_update_([CompactStep(**step)], compile=True, **settings)
        total += step["w"][:, indices].double()
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in copy.deepcopy(vars(start)).items()}  # fmt: skip
    adam_update_([CompactStep(**exact)], compile=False, **settings)
    want = exact["w"][:, indices]
    unit = torch.maximum(want.abs(), torch.tensor(2.0**-20)).log2().floor().exp2() * 2.0**-7
    assert bool(((total / count - want).abs() < 5 * unit / count**0.5).all())


def test_a_compiled_rounded_run_resumes_to_the_last_bit():
    settings = {"stochastic_rounding": True}
    whole, run, optimizer = trained(True, torch.bfloat16, steps=3, **settings)
    buffer = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(whole, run, optimizer, 3, seed=1)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    part, run, optimizer = trained(True, torch.bfloat16, steps=0, **settings)
    part.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(part, run, optimizer, 3, seed=1)
    for a, b in zip(part.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_of_before_the_option_load():
    _, _, optimizer = trained(False, torch.float32, steps=1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["compile"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["compile"] is False  # what it was made with


def test_only_true_false_and_none_are_options():
    for bad in ("yes", 1, 0):
        with pytest.raises(OptionError, match="compile"):
            grass_fx.AdamW(mlp(8, 6).parameters(), compile=bad)


def test_by_default_gpus_with_triton_compile():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compiled.compiles(c, cpu) for c in (None, True, False)] == [False, True, False]
    with virtual().virtual_gpu():
        assert [compiled.compiles(c, cuda) for c in (None, True, False)] == [True, True, False]


@pytest.mark.parametrize("rounds", [False, True])
def test_the_operator_without_inductor_adds_rows_as_eager_steps_do(rounds):
    for k, step in enumerate(steps_of(torch.bfloat16)):
        change, want = torch.randn(step.compact.shape), step.w.clone()
        change.view(-1)[0] = float("nan")
        seed = rounding_seed(0, k, 0) if rounds else None
        bits = [] if seed is None else [noise(seed, change.shape)]
        add_rows_(want, step.selection, change, seed, decay=0.25)
        kept, selection = torch.tensor(0.75), step.selection
        ADD_ROWS([step.w], [selection.indices], [change], bits, [selection.dim], [1], kept)
        torch.testing.assert_close(step.w, want, rtol=0, atol=0, equal_nan=True)


def test_compiled_rounding_keeps_what_is_not_finite():
    (step,) = steps_of(torch.bfloat16, rounds=True, shapes=SHAPES[:1])
    step.compact[:, :3] = torch.tensor([float("nan"), float("inf"), 0.0])
    step.w[step.selection.indices, 4] = float("inf")
    adam_update_([step], compile=True, **SETTINGS)
    rows = step.w[step.selection.indices]
    assert bool(rows[:, :2].isnan().all() and rows[:, 2].isfinite().all())
    assert bool((rows[:, 4] == float("inf")).all())


# --- on a virtual GPU -----------------------------------------------------------------------------

DTYPES = [
    (torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True),
]  # fmt: skip


def rows_of(steps):
    return [
        compiled.Rows(s.w, s.exp_avg, s.exp_avg_sq, on.indices, s.compact, on.dim, on.run)
        for s in steps
        for on in (s.selection,)
    ]


def module_of(steps, rounds):
    generate_in_place = virtual().generate_in_place
    keys = [each.key for each in rows_of(steps)]
    dtype = torch.promote_types(steps[0].w.dtype, torch.float32)
    function = compiled.update_function([key[:2] for key in keys], rounds)
    patches = compat.combined_kernels(compiled.TOGETHER)
    return generate_in_place(function, compiled.layouts(keys, dtype, rounds), patches)


def virtual():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py tests it on the GPU that there is")
    from grass_fx.testing import virtual_gpu

    return virtual_gpu


@pytest.mark.parametrize(("dtype", "rounds"), DTYPES)
@pytest.mark.parametrize("count", [4, pytest.param(compiled.TOGETHER, marks=pytest.mark.slow)])
def test_the_weights_of_a_function_are_one_kernel_without_memory(dtype, rounds, count):
    virtual()
    from grass_fx.testing.kernels import compile_kernel

    steps = steps_of(dtype, rounds, [SHAPES[k % len(SHAPES)] for k in range(count)])
    module = module_of(steps, rounds)
    assert len(re.findall(r"\.run\(", module.code)) == 1
    (kernel,) = module.kernels
    assert module.extern_calls == [] and module.buffers == []
    if count == compiled.TOGETHER and dtype != torch.float16:  # bfloat16's is of the same size
        for capability in (80, 90):
            assert compile_kernel(kernel, capability).spilled == 0


@pytest.fixture(scope="module")
def interpreted():
    """(what the kernels left in their inputs, the same by eager code in float64)."""
    virtual()
    cases, wants = [], []
    for dtype in (torch.float32, torch.float16):
        steps, captured = steps_of(dtype), []
        with pytest.MonkeyPatch.context() as patch:
            # The kernel's inputs are those of the compiled function on a CPU.
            patch.setattr(
                compiled, "compiled", lambda *key, kept=captured: lambda *t: kept.extend(t)
            )
            adam_update_(steps, compile=True, **{**SETTINGS, "weight_decay": 0.0})
        cases.append((module_of(steps, False).code, captured))
        exact = steps_of(torch.float64)
        for each, rough in zip(exact, steps_of(dtype), strict=True):
            for name in ("w", "compact", "exp_avg", "exp_avg_sq"):
                getattr(each, name).copy_(getattr(rough, name))
        adam_update_(exact, compile=False, **{**SETTINGS, "weight_decay": 0.0})
        wants.append(exact)
    return list(zip(interpreted_by_triton(cases), wants, strict=True))


@pytest.mark.parametrize("each", [0, 1], ids=["float32", "float16"])
def test_the_kernels_numbers_are_those_of_float64(interpreted, each):
    got, want = interpreted[each]
    limit = (1e-6, 1e-3)[each]
    for k, step in enumerate(want):
        for a, b in zip(
            got[5 * k : 5 * k + 3], (step.w, step.exp_avg, step.exp_avg_sq), strict=True
        ):
            assert (a.double() - b).norm() < limit * b.norm()


@pytest.mark.parametrize("dim", [0, 1])
def test_repeated_rows_add_in_a_fixed_order_where_they_would_not(dim):
    """The way of a GPU, whose index_add_ adds in any order, in numbers that do not round."""
    w, places = torch.randint(9, (6, 8)).double(), torch.tensor([1, 1, 1, 4, 0, 4])
    change = torch.randint(9, (6, 8) if dim == 0 else (6, 6)).double()
    want = w.clone().index_add_(dim, places, change)
    _add_in_order(w, dim, places, change)
    assert torch.equal(w, want)
