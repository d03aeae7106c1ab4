"""Triton kernels in generated code: saves them as modules, and compiles them without a GPU."""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_MEMORY = {80: 166912, 90: 232448}
"""Compute capability -> the most shared memory that a block of threads may use, in bytes."""


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel of a generated module."""

    name: str
    source: str
    """A Python module that defines it with a plain ``@triton.jit``."""
    signature: Mapping[str, str]
    warps: int
    stages: int

    @property
    def is_template(self) -> bool:
        """Whether it comes from a template, not from Inductor's own code generation."""
        return self.name.startswith("triton_tem")

    def save(self, folder: Path) -> Path:
        """Write the module to a file that the interpreter's process can import."""
        path = folder / f"{self.name}.py"
        path.write_text(self.source, encoding="utf-8")
        return path

    def load(self, folder: Path) -> Any:
        """The ``triton.jit`` function."""
        import importlib.util

        spec = importlib.util.spec_from_file_location(self.name, self.save(folder))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, self.name)


def kernel_of(name: str, body: str) -> Kernel:
    """Make a kernel from the text that generated code passes to ``async_compile.triton``."""
    meta = body[body.index("triton_meta=") :]
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", meta).group(1))  # type: ignore[union-attr]
    warps, stages = (
        int(match.group(1)) if (match := re.search(rf"{key}=(\d+)", body)) else default
        for key, default in (
            ("num_warps", 8 if "triton_heuristics.foreach(" in body else 4),
            ("num_stages", 1),
        )
    )
    source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", body, flags=re.S)
    source = source.replace("triton_helpers.set_driver_to_gpu()\n", "")
    return Kernel(name, source, signature, warps, stages)


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one compute capability."""

    ptx: str
    shared: int
    """Shared memory of a block of threads, in bytes."""
    spilled: int
    """Bytes of registers that are spilled to memory, stores and loads together."""

    @property
    def tensor_cores(self) -> bool:
        """Whether products run on tensor cores."""
        return "wgmma" in self.ptx or "mma.sync" in self.ptx


def compile_kernel(kernel: Kernel, capability: int, xblock: int | None = None) -> Compiled:
    """Compile a kernel with Triton for sm_80 or sm_90, and ask ptxas for its resources.

    ``xblock``: how many elements a block of threads computes; None for a size that Inductor tries.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    # Sizes that Inductor would also try: few rows for reductions, many numbers for other loops.
    rows = 8 if kernel.name.startswith(("triton_red", "triton_per")) else 256
    constants = {
        "XBLOCK": xblock or rows,
        "YBLOCK": 16,
        "ZBLOCK": 1,
        "R0_BLOCK": 256,
        "R1_BLOCK": 1,
    }
    constexprs = {k: constants[k] for k, ty in kernel.signature.items() if ty == "constexpr"}
    signature = dict(kernel.signature)
    # Torch's launcher guarantees that every buffer begins at a multiple of 16 bytes.
    aligned = [["tt.divisibility", 16]]
    attributes = {(k,): aligned for k, ty in enumerate(signature.values()) if ty[0] == "*"}
    with tempfile.TemporaryDirectory() as folder:
        source = ASTSource(kernel.load(Path(folder)), signature, constexprs, attributes)
        out = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kernel.warps, "num_stages": kernel.stages},
        )
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(out.asm["ptx"], encoding="utf-8")
        arch = re.search(r"\.target (sm_\w+)", out.asm["ptx"]).group(1)  # type: ignore[union-attr]
        ptxas = get_ptxas(capability).path  # Triton 3.9 has one of its own from sm_90 on
        report = subprocess.run(
            [ptxas, "-v", f"-arch={arch}", str(ptx), "-o", str(Path(folder, "cubin"))],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return Compiled(out.asm["ptx"], out.metadata.shared, spilled)
