"""The code that Inductor generates for a GPU, on a virtual one: what it allocates and launches,
what Triton makes of it, and its numbers in Triton's interpreter."""

import pytest
import torch
from torch import nn

from grass_fx.compile.lowering import selected_mm as rule
from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.state.units import run_length
from helpers import interpreted_by_triton

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("test_gpu.py tests it on the GPU that there is", allow_module_level=True)
from grass_fx.testing.kernels import SHARED_MEMORY, compile_kernel
from grass_fx.testing.virtual_gpu import generate, tapped_backward

B, M, N, R = 8192, 4096, 4096, 512  # 128 large tiles: the chip is full without cutting B
HALF = (torch.float16, torch.bfloat16)


def product(dim, block=1, scaled=False, transposed=False):
    """``transposed``: factors come as (m, b) and (n, b)."""

    def run(d, x, indices, *scale):
        a, b = (d, x.t()) if transposed else (d.t(), x)
        return SELECTED_MM(a, b, indices, scale[0] if scaled else None, dim, block)

    return run


def likes(dtype, b=B, m=M, n=N, r=R, scaled=False, transposed=False):
    scale = [((r,), torch.float32)] if scaled else []
    shapes = [(m, b), (n, b)] if transposed else [(b, m), (b, n)]
    return [*((shape, dtype) for shape in shapes), ((r,), torch.int64), *scale]


def assert_fits(kernel):
    """Triton compiles the kernel without spilling, into the shared memory there is."""
    for capability in (80, 90):
        compiled = compile_kernel(kernel, capability)
        assert compiled.spilled == 0
        assert compiled.shared <= SHARED_MEMORY[capability]
        yield capability, compiled


@pytest.mark.parametrize(
    ("block", "b"), [(1, B), (8, B), (8, "b")], ids=["whole rows", "blocks", "blocks, symbolic"]
)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", HALF)
def test_where_runs_of_16_bytes_are_selected_the_kernel_loads_vectors(dtype, dim, block, b):
    """A selected row that lies together is such a run; blocks are, if Inductor measures."""
    given = {"scaled": True, "transposed": block == 1}
    run = product(dim, block, **given)
    module = generate(run, likes(dtype, b, **given), max_autotune=block == 8)
    (kernel,) = module.kernels  # gather, product and ρ
    assert kernel.is_template and "grass::selected_mm" in kernel.source
    assert module.extern_calls == []
    assert module.buffers == [(str(R), str(N)) if dim == 0 else (str(M), str(R))]
    for capability, compiled in assert_fits(kernel):
        assert compiled.tensor_cores and ("wgmma" in compiled.ptx) == (capability == 90)
        # Both operands by 16 bytes: no smaller asynchronous copy, and no plain load of them.
        assert "cp.async.cg.shared.global" in compiled.ptx
        assert "cp.async.ca.shared.global" not in compiled.ptx
        assert "ld.global.b16" not in compiled.ptx


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [(torch.float16, 1), (torch.bfloat16, 8), (torch.float32, 8)],
    ids=["single rows", "blocks of eight", "float32"],
)
def test_along_the_contiguous_dimension_rows_are_gathered_for_the_vendors_gemm(dtype, block, dim):
    module = generate(product(dim, block), likes(dtype))
    assert [kernel.is_template for kernel in module.kernels] == [False]
    assert module.extern_calls == ["mm"]
    run = min(block, 16 // dtype.itemsize)
    gathered = (B, R) if run == 1 else (B, R // run, run)
    assert module.buffers == [
        tuple(map(str, gathered)),
        (str(R), str(N)) if dim == 0 else (str(M), str(R)),
    ]


def test_the_gather_is_fused_with_what_makes_its_input():
    def run(d, x, indices):
        return SELECTED_MM((d * 2).relu().t(), x, indices, None, 0)

    module = generate(run, likes(torch.bfloat16))
    assert len(module.kernels) == 1 and module.buffers[0] == (str(B), str(R))


def test_columns_for_a_float8_product_are_gathered_cast_and_laid_out_by_one_kernel():
    """What push_scaled_rules makes of X in float8: the vendor's product reads r columns of it."""
    aten, e4m3 = torch.ops.aten, torch.float8_e4m3fn

    def run(d_t, x, scales, indices, ones):
        columns = SELECT((x.float() * scales).to(e4m3), indices, None, 1)
        laid_out = aten.clone.default(columns.t(), memory_format=torch.contiguous_format)
        return aten._scaled_mm.default(d_t, laid_out.t(), ones, ones, None, None, torch.bfloat16)

    shapes = [((M, B), e4m3), ((B, N), torch.bfloat16), ((1, N), torch.float32)]
    module = generate(run, [*shapes, ((R,), torch.int64), ((), torch.float32)])
    (kernel,) = module.kernels
    assert module.extern_calls == ["_scaled_mm"]
    assert module.buffers[0] == (str(B), str(R))  # of one byte each, columns side by side
    assert "tl.float8e4nv" in kernel.source and "8192" in kernel.source
    assert compile_kernel(kernel, 90).spilled == 0  # sm_80 has no such type


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_with_max_autotune_the_kernel_and_the_gather_are_both_measured(dtype):
    module = generate(product(0), likes(dtype), max_autotune=True)
    (kernel,) = module.kernels  # the virtual GPU finds the first choice the fastest
    assert kernel.is_template
    assert len(module.measured) == len(rule.TILES) + 1
    assert module.measured[-1].name == "grass_gather_then_mm"
    assert all(choice.made == {2: (R,)} for choice in module.measured)  # σ, which zeros are not
    assert [compiled.tensor_cores for _, compiled in assert_fits(kernel)] == [dtype in HALF] * 2


@pytest.mark.parametrize("tile", rule.TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_fits(tile, dtype, monkeypatch):
    monkeypatch.setattr(rule, "TILES", (tile,))
    module = generate(product(0, block=8), likes(dtype, m=1000, n=712), max_autotune=True)
    (kernel,) = [kernel for kernel in module.kernels if kernel.is_template]
    assert f"BLOCK_M : tl.constexpr = {tile.m}" in kernel.source
    assert all(compiled.shared > 0 for _, compiled in assert_fits(kernel))


def test_a_small_compact_gradient_of_many_tokens_is_cut_along_the_tokens():
    given = {"transposed": True}
    module = generate(product(0, **given), likes(torch.bfloat16, m=512, n=256, r=64, **given))
    first, second = module.kernels
    assert "SPLIT_K : tl.constexpr = 16" in first.source and not second.is_template
    assert module.buffers[0] == ("16", "64", "256")


def test_offsets_are_64_bits_where_a_tensor_needs_them():
    given = {"transposed": True}
    small = generate(product(0, **given), likes(torch.bfloat16, **given))
    large = generate(product(0, **given), likes(torch.bfloat16, b=1 << 20, m=4096, **given))
    for module, width in ((small, 32), (large, 64)):
        assert f"INDEX_DTYPE : tl.constexpr = tl.int{width}" in module.kernels[0].source


# --- numbers --------------------------------------------------------------------------------------

SHAPES = {
    "even": (256, 128, 128, 64), "odd": (200, 72, 130, 24), "one row more": (65, 136, 129, 72),
    "split": (4096, 64, 64, 64),
}  # fmt: skip
CASES = [
    (dtype, dim, block, shape)
    for dtype in (torch.float16, torch.float32)
    for dim in (0, 1)
    for block in (1, 8)
    for shape in SHAPES
]


def case(dtype, dim, block, shape):
    """(module, inputs, expected in float64)."""
    b, m, n, r = SHAPES[shape]
    n = 136 if dim == 1 and n % 8 else n  # the gathered dimension is a multiple of the block
    symbolic = "b" if shape == "odd" else b
    scaled = shape != "even"
    gen = torch.Generator().manual_seed(b)
    inputs = [torch.randn(b, k, generator=gen).to(dtype) for k in (m, n)]
    units = torch.randperm((m, n)[dim] // block, generator=gen)[: r // block].sort().values
    inputs.append((units[:, None] * block + torch.arange(block)).flatten())
    if scaled:
        inputs.append(torch.rand(r, generator=gen) + 0.5)
    given = likes(dtype, symbolic, m, n, r, scaled)
    module = generate(product(dim, block, scaled), given, max_autotune=True, hint=b)
    want = (inputs[0].double().t() @ inputs[1].double()).index_select(dim, inputs[2])
    if scaled:
        want = want * (inputs[3][:, None] if dim == 0 else inputs[3])
    return module, inputs, want


@pytest.fixture(scope="module")
def interpreted():
    cases = [case(*each) for each in CASES]
    outputs = interpreted_by_triton([(module.code, inputs) for module, inputs, _ in cases])
    return {
        each: (module, got[0], want)
        for each, (module, _, want), got in zip(CASES, cases, outputs, strict=True)
    }


@pytest.mark.parametrize("each", CASES, ids=str)
def test_the_kernels_numbers_are_those_of_float64(interpreted, each):
    module, got, want = interpreted[each]
    dtype = each[0]
    assert module.kernels[0].is_template and module.extern_calls == []
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).norm() / want.norm()
    assert error < (2e-3 if dtype == torch.float16 else 1e-5)


# --- a whole backward -----------------------------------------------------------------------------


MODELS = [
    (dtype, side, block, tokens)
    for dtype in (*HALF, torch.float32)
    for side in ("out", "in")
    for block in (1, 8)
    for tokens in ("static", "symbolic")
    if dtype in HALF or block == 1  # in float32 blocks change nothing
]


@pytest.fixture(scope="module")
def backwards():
    """By key: (backward graph, module, a run to compare with) of a small model."""
    torch.manual_seed(0)
    made = {}
    for key in MODELS:
        dtype, side, block, tokens = key
        dynamic = tokens == "symbolic"
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(72, 136), nn.ReLU(), nn.Linear(136, 40)).to(dtype)

        def run(sequences, length, model=model, dtype=dtype, dynamic=dynamic, **options):
            x = torch.randn(sequences, length, 72).to(dtype)
            return tapped_backward(model, x, dynamic, **options)

        options = {"rank": 16, "block": block, "side": side}
        backward = run(3, 50, **options)
        module = generate(backward.graph, backward.likes, max_autotune=block == 8)
        other = run(5, 61, **options) if dynamic and dtype != torch.bfloat16 else backward
        made[key] = (backward, module, other)
    return made


@pytest.fixture(scope="module")
def outputs(backwards):
    """What the modules return; bfloat16 is wrong in Triton's interpreter."""
    keys = [key for key in MODELS if key[0] != torch.bfloat16]
    each = interpreted_by_triton(
        [(backwards[key][1].code, backwards[key][2].inputs) for key in keys]
    )
    return {key: [t for t in got if t is not None] for key, got in zip(keys, each, strict=True)}


@pytest.mark.parametrize("key", MODELS, ids=str)
def test_a_whole_backward_forms_no_full_gradient(backwards, key):
    (dtype, side, block, tokens), (backward, module, _) = key, backwards[key]
    assert backward.weights == [(136, 72), (40, 136)]
    shapes = {tuple(map(str, shape)) for shape in backward.weights}
    assert shapes.isdisjoint(module.buffers)
    named = any(character.isalpha() for shape in module.buffers for character in "".join(shape))
    assert named == (tokens == "symbolic")
    templates = [kernel for kernel in module.kernels if kernel.is_template]
    assert len(templates) == (2 if block == 8 else 0)
    assert len(templates) + module.extern_calls.count("mm") == 3  # and one for the hidden layer
    # The derivative of ReLU, and a gather per weight: one of D is fused with the derivative.
    pointwise = [kernel for kernel in module.kernels if "_poi_" in kernel.name]
    assert len(pointwise) == (1 if templates else 2 if side == "out" else 3)
    for kernel in templates:
        assert all(c.tensor_cores == (dtype in HALF) for _, c in assert_fits(kernel))


@pytest.mark.parametrize("tokens", ["static", "symbolic"])
@pytest.mark.parametrize("block", [1, 8])
def test_triton_compiles_all_kernels_of_a_backward(backwards, block, tokens):
    _, module, _ = backwards[torch.bfloat16, "out", block, tokens]
    assert len(module.kernels) >= 4
    for kernel in module.kernels:
        assert [capability for capability, _ in assert_fits(kernel)] == [80, 90]


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in MODELS if key[0] != torch.bfloat16], ids=str)
def test_a_whole_backwards_numbers_are_the_cpus(backwards, outputs, key):
    """Of symbolic sizes: for other sizes than the code was generated with."""
    _, _, ran = backwards[key]
    assert len(outputs[key]) == len(ran.outputs) == 4
    for got, want in zip(outputs[key], ran.outputs, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < (2e-3 if key[0] == torch.float16 else 1e-5)


SCORING = [
    (dtype, side, tokens)
    for dtype in (*HALF, torch.float32)
    for side in ("out", "in")
    for tokens in ("static", "symbolic")
]


@pytest.fixture(scope="module")
def scorings():
    """By key: (module, recorded backward) of a scoring step of tiles."""
    torch.manual_seed(0)
    made = {}
    for key in SCORING:
        dtype, side, tokens = key
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(72, 136), nn.ReLU(), nn.Linear(136, 40)).to(dtype)
        options = {"rank": 16, "selection": "top", "scoring": "tiles", "block": 8, "side": side}
        x = torch.randn(3, 50, 72).to(dtype)
        backward = tapped_backward(model, x, tokens == "symbolic", **options)
        made[key] = generate(backward.graph, backward.likes), backward
    return made


@pytest.fixture(scope="module")
def scored(scorings):
    keys = [key for key in SCORING if key[0] != torch.bfloat16]
    each = interpreted_by_triton([(scorings[key][0].code, scorings[key][1].inputs) for key in keys])
    return {key: [t for t in got if t is not None] for key, got in zip(keys, each, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("key", SCORING, ids=str)
def test_a_scoring_step_of_tiles_forms_no_full_gradient_either(scorings, key):
    module, backward = scorings[key]
    full = {tuple(map(str, shape)) for shape in [*backward.weights, (72, 136), (136, 40)]}
    assert full.isdisjoint(module.buffers)
    norms = [k for k in module.kernels if "grass::mm_squared_norms" in k.source]
    assert len(norms) == len(backward.weights) == 2
    for kernel in norms:
        for _, compiled in assert_fits(kernel):
            assert compiled.tensor_cores == (key[0] in HALF)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in SCORING if key[0] != torch.bfloat16], ids=str)
def test_a_scoring_steps_numbers_are_the_cpus(scorings, scored, key):
    """Gradients of two biases, two compact ones, and two score vectors."""
    _, backward = scorings[key]
    assert len(scored[key]) == len(backward.outputs) == 6
    for got, want in zip(scored[key], backward.outputs, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < (4e-3 if key[0] == torch.float16 else 1e-5)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "stride", "block", "taken", "run"),
    [
        (torch.bfloat16, 1, 1, False, 1), (torch.bfloat16, 1, 4, False, 4),
        (torch.bfloat16, 1, 8, False, 8), (torch.bfloat16, 1, 16, False, 8),
        (torch.bfloat16, 1, 24, False, 8), (torch.bfloat16, 1, 12, False, 4),
        (torch.bfloat16, 1, 64, False, 8), (torch.bfloat16, None, 64, False, 1),
        (torch.float16, 4096, 1, True, 1), (torch.float16, None, 8, False, 1),
        (torch.float32, 1, 8, False, 4), (torch.float64, 7, 8, False, 1),
    ],
)  # fmt: skip
def test_the_kernel_is_taken_where_each_selected_row_is_a_run(dtype, stride, block, taken, run):
    strides = stride, (8192 if stride == 1 else 1)
    assert rule.takes_template(dtype, strides) is taken
    assert not rule.takes_template(dtype, (stride, 2))
    assert run_length(block, stride, dtype.itemsize) == run


@pytest.mark.parametrize("sizes", [(64, 16, 1), (72, 24, 8), (100, 99, 1), (8, 8, 8)], ids=str)
def test_what_is_measured_with_selects_blocks_over_the_whole_size(sizes):
    size, r, block = sizes
    indices = rule.spread(size, r, block, torch.device("cpu"))
    assert indices.numel() == r == indices.unique().numel()
    assert torch.equal(indices, indices.sort().values)
    assert int(indices[-1]) < size and size - int(indices[-1]) <= -(-size // (r // block)) + block
    assert bool((indices.view(-1, block)[:, 0] % block == 0).all())


def test_tiles_follow_the_shape_and_parts_fill_the_chip():
    assert rule.best_tile(512, 4096) is rule.LARGE
    assert rule.best_tile(64, 4096) is rule.WIDE
    assert rule.best_tile(4096, 32) is rule.TALL
    assert rule.best_tile(64, 64) is rule.SMALL
    assert rule.split_of(512, 4096, 128, rule.LARGE, 132) == 1  # 128 tiles
    assert rule.split_of(512, 1024, 128, rule.LARGE, 132) == 4  # 32 tiles
    assert rule.split_of(64, 64, 128, rule.SMALL, 132) == 16
    assert rule.split_of(64, 64, 16, rule.SMALL, 132) == 2  # eight steps of the loop each
    assert rule.split_of(64, 64, 4, rule.SMALL, 132) == 1
