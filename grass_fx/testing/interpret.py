"""Runs GPU modules that Inductor generated on the CPU, with their kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python -m grass_fx.testing.interpret FOLDER

reads ``cases.pt`` in FOLDER, which holds pairs of a module's code and its inputs, and writes
``outputs.pt``. It is a process of its own, because Triton reads the variable when it is imported.
Use small tensors: the interpreter is slow.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The module's code for the device -> the code that replaces it.
ON_CPU = {
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = id",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
    "empty_strided_cuda(": "empty_strided_cpu(",
    "async_compile = AsyncCompile()": "",
    "async_compile.wait(globals())": "",
    "del async_compile": "",
}
BLOCKS = {"XBLOCK": 128, "YBLOCK": 16, "ZBLOCK": 1, "R0_BLOCK": 128, "R1_BLOCK": 1}
FOREACH_BLOCK = 1024  # Inductor's block for kernels of several loops that it does not measure


def interpret(cases: Sequence[tuple[str, Sequence[Any]]]) -> list[list[Tensor]]:
    """Run generated modules on CPU tensors, in one process that interprets Triton.

    ``cases`` holds pairs of a module's code and its inputs; the result is each module's outputs.
    Raises RuntimeError with the process's output if it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save([(code, list(inputs)) for code, inputs in cases], folder / "cases.pt")
        command = [sys.executable, "-m", "grass_fx.testing.interpret", name]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stdout + run.stderr)
        return list(torch.load(folder / "outputs.pt"))


class _Launcher:
    """Takes the place of a compiled kernel: ``run`` computes the grid and interprets the kernel."""

    def __init__(self, name: str, body: str, folder: Path) -> None:
        from grass_fx.testing.kernels import kernel_of

        self.kernel = kernel_of(name, body)
        self.function = self.kernel.load(folder)
        # The sizes of loops that were combined into one kernel.
        self.sizes = [int(size) for size in re.findall(r"'xnumel_\d+': (\d+)", body)]

    def run(self, *args: Any, stream: Any = None) -> None:
        names = [k for k, kind in self.kernel.signature.items() if kind != "constexpr"]
        values = dict(zip(names, args[: len(names)], strict=True))
        blocks = {k: BLOCKS[k] for k, v in self.kernel.signature.items() if v == "constexpr"}
        if self.kernel.is_template:
            grid = tuple(args[len(names) :])
        elif self.sizes:
            # Loops alternate on the grid or follow each other; this size is enough for both.
            block = blocks.get("XBLOCK", FOREACH_BLOCK)
            grid = (len(self.sizes) * math.ceil(max(self.sizes) / block),)
        else:
            grid = tuple(
                math.ceil(values.get(f"{axis}numel", 1) / blocks.get(f"{axis.upper()}BLOCK", 1))
                for axis in "xyz"
            )
        self.function[grid](**values, **blocks)


def _main(folder: Path) -> None:
    class AsyncCompile:
        """The part of Inductor's AsyncCompile that generated modules use."""

        @staticmethod
        def triton(name: str, body: str, **kwargs: Any) -> _Launcher:
            return _Launcher(name, body, folder)

    outputs = []
    for code, inputs in torch.load(folder / "cases.pt"):
        for on_gpu, on_cpu in ON_CPU.items():
            code = code.replace(on_gpu, on_cpu)
        module: dict[str, Any] = {"__name__": "module", "async_compile": AsyncCompile}
        exec(compile(code, "module.py", "exec"), module)
        outputs.append(list(module["call"](inputs)))
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
