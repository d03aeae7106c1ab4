"""Templates read the precision of float32 products, whichever of two settings of torch has it."""

import subprocess
import sys

import pytest
import torch

from grass_fx.ops import MM_SQUARED_NORMS

# Settings, one after the other, and whether a GPU's float32 products then round to TF32.
CASES = {
    "nothing": ("", False),
    "old highest": ("old('highest')", False),
    "old high": ("old('high')", True),
    "old medium": ("old('medium')", True),
    "old allow_tf32": ("matmul.allow_tf32 = True", True),
    "new tf32": ("matmul.fp32_precision = 'tf32'", True),
    "new ieee": ("matmul.fp32_precision = 'ieee'", False),
    "new, of all backends": ("torch.backends.fp32_precision = 'tf32'", True),
    "new, one against all": (
        "torch.backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'",
        False,
    ),
    "old high, new ieee": ("old('high'); matmul.fp32_precision = 'ieee'", False),
    "old highest, new tf32": ("old('highest'); matmul.fp32_precision = 'tf32'", True),
    "new tf32, old highest": ("matmul.fp32_precision = 'tf32'; old('highest')", False),
    "new ieee, old high": ("matmul.fp32_precision = 'ieee'; old('high')", True),
}

SCRIPT = """
import sys, torch
from grass_fx.compile.lowering.selected_mm import LARGE, options_of
old, matmul = torch.set_float32_matmul_precision, torch.backends.cuda.matmul
for setting in sys.argv[1:]:
    matmul.fp32_precision = "none"
    old("highest")
    torch.backends.fp32_precision = matmul.fp32_precision = "none"
    exec(setting)
    print(options_of(LARGE, 4)["ALLOW_TF32"])
"""


@pytest.fixture(scope="module")
def allowed():
    """By the name of a case, whether a template is given TF32; in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, *(setting for setting, _ in CASES.values())]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(CASES, run.stdout.split(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_template_rounds_to_tf32_where_torchs_products_do(allowed, case):
    assert allowed[case] == str(CASES[case][1])


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_kernel_is_generated_with_the_newer_setting(precision):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and the virtual one is for where there is none")
    from grass_fx.testing.virtual_gpu import generate

    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        likes = [((128, 96), torch.float32), ((96, 128), torch.float32)]
        module = generate(lambda a, b: MM_SQUARED_NORMS(a, b, 0), likes)
    finally:
        matmul.fp32_precision = before
    (kernel,) = [kernel for kernel in module.kernels if kernel.is_template]
    assert f"ALLOW_TF32 : tl.constexpr = {precision == 'tf32'}" in kernel.source
