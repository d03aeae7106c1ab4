"""Runs a module that Inductor generated for a GPU on the CPU, its kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python -m grass_fx.testing.interpret FOLDER

reads ``cases.pt`` in FOLDER, pairs of a module's code and its inputs, and writes ``outputs.pt``.
Triton reads the variable when it is imported, hence a process of its own. For small tensors.
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

# What the module does with the device, and what it does instead here.
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
FOREACH_BLOCK = 1024  # what Inductor writes into kernels of several loops that it does not measure


def interpret(cases: Sequence[tuple[str, Sequence[Any]]]) -> list[list[Tensor]]:
    """The outputs of generated modules for CPU tensors, in one process that interprets Triton.

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
    """Stands for a compiled kernel: ``run`` computes the grid and interprets."""

    def __init__(self, name: str, body: str, folder: Path) -> None:
        from grass_fx.testing.kernels import kernel_of

        self.kernel = kernel_of(name, body)
        self.function = self.kernel.load(folder)
        # Of loops that were combined into one kernel.
        self.sizes = [int(size) for size in re.findall(r"'xnumel_\d+': (\d+)", body)]

    def run(self, *args: Any, stream: Any = None) -> None:
        names = [k for k, kind in self.kernel.signature.items() if kind != "constexpr"]
        given = dict(zip(names, args[: len(names)], strict=True))
        blocks = {k: BLOCKS[k] for k, v in self.kernel.signature.items() if v == "constexpr"}
        if self.kernel.is_template:
            grid = tuple(args[len(names) :])
        elif self.sizes:
            # In turn or one after the other on the grid: this is enough for both.
            block = blocks.get("XBLOCK", FOREACH_BLOCK)
            grid = (len(self.sizes) * math.ceil(max(self.sizes) / block),)
        else:
            grid = tuple(
                math.ceil(given.get(f"{axis}numel", 1) / blocks.get(f"{axis.upper()}BLOCK", 1))
                for axis in "xyz"
            )
        self.function[grid](**given, **blocks)


def _main(folder: Path) -> None:
    class AsyncCompile:
        """As Inductor's, as far as the module uses it."""

        @staticmethod
        def triton(name: str, body: str, **kwargs: Any) -> _Launcher:
            return _Launcher(name, body, folder)

    outputs = []
    for code, inputs in torch.load(folder / "cases.pt"):
        for theirs, ours in ON_CPU.items():
            code = code.replace(theirs, ours)
        module: dict[str, Any] = {"__name__": "module", "async_compile": AsyncCompile}
        exec(compile(code, "module.py", "exec"), module)
        outputs.append(list(module["call"](inputs)))
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
