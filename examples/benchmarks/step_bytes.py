"""The bytes that an optimizer's step moves on a GPU, counted from its generated code without one.

    python examples/benchmarks/step_bytes.py                   # a LLaMA of 1B, r = 1/8, bfloat16
    python examples/benchmarks/step_bytes.py --size 7b --rank 0.25 --blocks 1 16
    python examples/benchmarks/step_bytes.py --smoke

For every shape of taken weights Inductor generates the kernel of a step, in the real size, for an
H100 that is not there. Each load and store in its code is counted: of C, both moments and what
belongs to a column, the whole tensor once; of W, the sectors of 32 bytes in which the columns of a
drawn selection lie, in every row. Unlike in a measurement, caches hold nothing but a sector that is
in use. `before` is a step that multiplies the whole W by 1 - lr * decay beside that kernel, as
grass_fx.AdamW did before `pending_decay`. `signs` is what rest="sign" adds: a kernel that moves
all other columns. Needs triton.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

from grass_fx import _torch_compat as compat
from grass_fx.config import GrassConfig
from grass_fx.ops.bits import packed_shape
from grass_fx.optim import compiled
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace
from grass_fx.testing.virtual_gpu import generate_in_place
from llama import SIZES, build
from pretrain import rank

SECTOR = 32  # bytes


def step_of(shape: tuple[int, int], config: GrassConfig) -> compiled.Rows:
    """A step of one bfloat16 weight of this shape, without memory."""
    m, n = shape
    spec = SubspaceSpec.of(config, n, 1, "in")
    selection = Subspace(spec, 1, "W", torch.device("cpu"), torch.bfloat16).selection
    w = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    moments = [torch.empty(m, spec.rank, dtype=w.dtype, device="meta") for _ in range(3)]
    return compiled.Rows(w, *moments[:2], selection.indices, moments[2], 1, selection.run)


def accesses(code: str) -> Iterator[tuple[str, str, str]]:
    """("load" or "store", the argument of the call, the index) of each access of the one kernel."""
    (call,) = re.findall(r"\.run\((.*), stream=", code)
    (names,) = re.findall(r"@triton\.jit\ndef \w+\((.*)\):", code)
    arguments = dict(zip(re.findall(r"\w+", names), call.split(", "), strict=False))
    found = re.findall(r"tl\.(load|store)\((\w+) \+ \((.*?)\), ?\S", code)
    found += re.findall(r"tl\.(load)\((\w+) \+ \((\d+)\)\)", code)
    if len(found) != len(re.findall(r"tl\.(?:load|store)\(", code)):
        raise AssertionError("an access of the kernel is written in a form that is not counted")
    for kind, pointer, index in set(found):
        yield kind, arguments[pointer], index


def count(rows: compiled.Rows) -> Counter[str]:
    """The bytes of a step of one weight: of W, and of all that has the shape of C or less."""
    function = compiled.update_function([rows.key[:2]], True)
    layouts = compiled.layouts([rows.key], torch.float32, True)
    patches = compat.combined_kernels(compiled.TOGETHER)
    code, sizes = one_kernel(function, layouts, patches)
    found: Counter[str] = Counter()
    for kind, name, index in accesses(code):
        if name == "arg0_1":
            touched = (rows.indices * rows.w.itemsize // SECTOR).unique().numel()
            found[f"W, {kind}"] += touched * SECTOR * rows.w.shape[0]
        elif not index.isdigit():  # one number for all
            found["C and moments"] += sizes[name]
    return found


def one_kernel(function, layouts, patches) -> tuple[str, dict[str, int]]:
    """The generated code, and the bytes of each of its inputs."""
    module = generate_in_place(function, layouts, patches)
    if module.buffers or module.extern_calls or len(module.kernels) != 1:
        raise AssertionError("the step is more than one kernel")
    return module.code, {
        f"arg{k}_1": shape.numel() * dtype.itemsize
        for k, (shape, _, dtype, _) in enumerate(layouts)
    }


def count_signs(m: int, n: int) -> int:
    """The bytes by which all columns move that are not selected: W twice, and one bit each."""
    kinds = [((m, n), torch.bfloat16), *[((1, n), torch.float32)] * 2, ((m, 1), torch.bool)]
    kinds += [((2,), torch.int32), (packed_shape(m, n), torch.float32)]
    layouts = [
        (torch.Size(shape), torch.empty(shape, device="meta").stride(), dtype, torch.device("cpu"))
        for shape, dtype in kinds
    ]
    code, sizes = one_kernel(compiled.move_rest, layouts, {})
    return sum(sizes[name] for _, name in {(kind, name) for kind, name, _ in accesses(code)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rank", type=rank, default=0.125)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--smoke", action="store_true", help="a very small model")
    args = parser.parse_args()
    print(as_line(environment()))
    size = "smoke" if args.smoke else args.size
    with torch.device("meta"):
        model = build(size)
    lookups = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in lookups]
    shapes = Counter(tuple(p.shape) for p in matrices)
    taken = sum(m * n * times for (m, n), times in shapes.items())
    print(f"{size}, r = {args.rank}, bfloat16: {taken / 1e9:.3g} billion parameters taken.\n")
    signs = sum(count_signs(*shape) * times for shape, times in shapes.items())
    print("| block | C and moments, GB | W, load | W, store | sum | before | signs, more |")
    print("|---|---|---|---|---|---|---|")
    for block in args.blocks:
        config = GrassConfig(rank=args.rank, block=block)
        total: Counter[str] = Counter()
        for shape, times in shapes.items():
            for name, size in count(step_of(shape, config)).items():
                total[name] += size * times
        parts = [total[name] for name in ("C and moments", "W, load", "W, store")]
        before = sum(parts) + 2 * taken * 2
        shown = " | ".join(f"{size / 1e9:.2f}" for size in (*parts, sum(parts), before, signs))
        print(f"| {block} | {shown} |")


if __name__ == "__main__":
    main()
