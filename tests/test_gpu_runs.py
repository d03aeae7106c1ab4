"""Selected columns that lie in runs: GPU code accesses them by 16 bytes, and computes the same."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_compiled_update import SETTINGS, changed, module_of, rows_of, steps_of

import grass_fx
from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.optim import compiled
from grass_fx.optim.update import adam_update_
from grass_fx.state.selection import Selection
from grass_fx.state.units import Units
from helpers import Captured, interpreted_by_triton, mlp

ELEMENTS = 1024  # of 4 warps: 8 elements a thread, which are 16 bytes of bfloat16
SHAPES = [(16, 64, 1, 16), (24, 48, 1, 32)]  # W, dim, r


def in_blocks(size, block, count, seed=0):
    """σ of ``count`` random blocks."""
    gen, units = torch.Generator().manual_seed(seed), Units(size, block)
    return units.rows(torch.randperm(units.count, generator=gen)[:count].sort().values)


def steps_in_runs(dtype, block, run, shapes=SHAPES, rounds=False):
    """Steps whose σ comes in blocks; code may rely on ``run``."""
    steps = []
    for key, step in enumerate(steps_of(dtype, rounds, shapes)):
        _, size, _, r = shapes[key]
        selection = Selection(in_blocks(size, block, r // block, key), None, 1, 0, run=run)
        steps.append(replace(step, selection=selection))
    return steps


def accesses(kernel):
    """How many accesses of which width a thread makes, and that nothing spills."""
    pytest.importorskip("triton")
    from grass_fx.testing.kernels import compile_kernel

    made = compile_kernel(kernel, 90, ELEMENTS)
    assert made.spilled == 0
    found = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)", made.ptx)
    return Counter(kind + width for kind, width in found)


# --- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_optimizers_kernel_accesses_a_run_as_one_vector(block, count):
    shapes = [(64, 512, 1, 64)] * count
    for run in (1, block):
        steps = steps_in_runs(torch.bfloat16, block, run, shapes)
        assert [each.key[1] for each in rows_of(steps)] == [min(run, 8)] * count
        module = module_of(steps, False)
        (kernel,) = module.kernels
        assert module.buffers == [] and module.extern_calls == []
        counts = accesses(kernel)
        # C and both moments by one load each, gains and floors by two; moments by one store each.
        vectors, single = 3 + 2 * 2, 0 if run > 1 else 8
        assert counts["ld.v4.b32"] == count * (vectors + (run > 1))
        assert counts["st.v4.b32"] == count * (2 + (run > 1))
        assert counts["ld.b16"] == counts["st.b16"] == count * single


@pytest.mark.parametrize(
    ("size", "block", "run"), [(64, 4, 4), (64, 24, 8), (60, 4, 4), (61, 4, 1)]
)
def test_code_relies_on_what_always_holds(size, block, run):
    """On powers of two, up to 16 bytes; and on nothing where a block does not divide the size."""
    model = torch.nn.Linear(size, 16).to(torch.bfloat16)
    backend = Captured(rank=24, block=block)
    run_model = torch.compile(model, backend=backend)
    run_model(torch.randn(4, size, dtype=torch.bfloat16)).sum().backward()
    grad = model.weight.grad
    (rows,) = rows_of([
        replace(step, w=model.weight.detach(), compact=grad.compact, selection=grad.selection)
        for step in steps_of(torch.bfloat16, shapes=[(16, size, 1, 24)])
    ])  # fmt: skip
    assert rows.key[1] == run
    assert replace(rows, w=rows.w.t().contiguous().t()).key[1] == 1  # columns lie apart


def test_what_is_rounded_stochastically_is_one_kernel_of_vectors_too():
    steps = steps_in_runs(torch.bfloat16, 16, 16, [(64, 512, 1, 64)] * 2, rounds=True)
    module = module_of(steps, True)
    (kernel,) = module.kernels
    assert module.buffers == [] and module.extern_calls == []
    counts = accesses(kernel)
    assert (counts["st.v4.b32"], counts["st.b16"], counts["ld.b16"]) == (2 * 3, 0, 0)


@pytest.fixture(scope="module")
def interpreted():
    """By dtype: what the kernels with and without runs leave in their inputs, and eager code."""
    cases, wants, dtypes = [], [], (torch.float32, torch.float16)
    for dtype in dtypes:
        for run in (8, 1):
            steps, captured = steps_in_runs(dtype, 8, run), []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    compiled, "compiled", lambda *key, kept=captured: lambda *t: kept.extend(t)
                )
                adam_update_(steps, compile=True, **{**SETTINGS, "weight_decay": 0.0})
            cases.append((module_of(steps, False).code, captured))
        eager = steps_in_runs(dtype, 8, 8)
        adam_update_(eager, compile=False, **{**SETTINGS, "weight_decay": 0.0})
        wants.append(eager)
    got = interpreted_by_triton(cases)
    return dict(zip(dtypes, zip(got[::2], got[1::2], wants, strict=True), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_numbers_are_those_without_runs_to_the_last_bit(interpreted, dtype):
    in_runs, without, eager = interpreted[dtype]
    for k, step in enumerate(eager):
        for j, want in enumerate((step.w, step.exp_avg, step.exp_avg_sq)):
            assert torch.equal(in_runs[5 * k + j], without[5 * k + j])
            torch.testing.assert_close(in_runs[5 * k + j], want, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "rounds"),
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False),
     (torch.bfloat16, True)],
)  # fmt: skip
def test_compiled_steps_in_runs_are_the_eager_steps(dtype, rounds):
    got, want = (steps_in_runs(dtype, 8, 8, rounds=rounds) for _ in range(2))
    adam_update_(got, compile=True, **SETTINGS)
    adam_update_(want, compile=False, **SETTINGS)
    tight = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for a, b in zip(changed(got), changed(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tight, atol=1e-6)


def test_a_whole_run_in_blocks_is_the_eager_run(monkeypatch):
    finals, runs, make = [], set(), compiled.compiled
    monkeypatch.setattr(
        compiled,
        "compiled",
        lambda keys, *more: runs.update(key[1] for key in keys) or make(keys, *more),
    )
    for compile in (True, False):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(16, 22, 6)  # blocks of 4 divide 16, and not 22
        run = torch.compile(model, backend=Captured(rank=8, block=4, refresh_every=2))
        optimizer = grass_fx.AdamW(model.parameters(), lr=1e-2, compile=compile)
        for _ in range(7):
            optimizer.zero_grad()
            run(torch.randn(5, 16)).square().mean().backward()
            optimizer.step()
        finals.append(list(model.parameters()))
    assert runs == {4, 2}
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b)


# --- the gather -----------------------------------------------------------------------------------


def of_product(d, x, indices, block):
    return SELECTED_MM(d.t(), x, indices, None, 1, block)


def of_saved_input(d, x, indices, block):
    return SELECT(x, indices, None, 1, block)


@pytest.mark.parametrize("block", [1, 8, 16, 32])
@pytest.mark.parametrize("gather", [of_product, of_saved_input])
def test_the_gather_loads_a_run_as_one_vector(gather, block):
    virtual = pytest.importorskip("grass_fx.testing.virtual_gpu")
    shapes = [((256, 128), torch.bfloat16), ((256, 512), torch.bfloat16), ((64,), torch.int64)]
    module = virtual.generate(lambda *args: gather(*args, block), shapes)
    (kernel,) = module.kernels
    counts = accesses(kernel)
    assert counts["ld.v4.b32"] == (block > 1) and counts["ld.b16"] == (8 if block == 1 else 0)
    assert counts["st.v4.b32"] == 1 and counts["st.b16"] == 0


@pytest.mark.parametrize("tokens", [48, "b"])
def test_what_is_gathered_are_the_columns(tokens):
    virtual = pytest.importorskip("grass_fx.testing.virtual_gpu")

    def run(x, indices):
        computed = torch.relu(x)
        return (
            SELECT(x, indices, None, 1, 8),
            SELECT(computed, indices, None, 1, 8) * 2,
            SELECT(x.t(), indices, None, 0, 8),
        )

    like = [((tokens, 64), torch.float16), ((24,), torch.int64)]
    module = virtual.generate(run, like, hint=48)
    x = torch.randn(48, 64).to(torch.float16)
    indices = in_blocks(64, 8, 3)
    (got,) = interpreted_by_triton([(module.code, [x, indices])])
    for each, want in zip(got, run(x, indices), strict=True):
        assert torch.equal(each, want)
