"""The compact gradient's product alone: what the lowering picks, beside what bounds it.

    python examples/benchmarks/selected_mm.py
    python examples/benchmarks/selected_mm.py --device cuda --json runs/selected_mm.json
    python examples/benchmarks/selected_mm.py --device cuda --max-autotune --tokens 8192
    python examples/benchmarks/selected_mm.py --smoke

A layer of weight (m, n) has D (b, m), the gradient of its output, and X (b, n), its input, for b
tokens, here random. r output features (side "out") or input features ("in") are selected:

    full       DᵀX, the product that grass avoids
    floor      the product of the compact shape, on factors that lie gathered
    gather     index_select, then the product, in eager
    picked     grass::selected_mm under torch.compile, with grass_fx's lowering
    autotuned  (--max-autotune) the same with mode="max-autotune-no-cudagraphs": CUDA graphs would
               copy D and X before each product, which in a training step they need not

They take turns. Every call gets other tensors; all together fill the last-level cache four times.
On a GPU events take the time, after a long write that lets the host run ahead: launches are not in
it. Medians of --rounds calls, and medians of the rounds' ratios. In brackets: the share of the
bound, the larger of FLOPs over the peak and bytes over the bandwidth, where each element that is
needed moves once. A large square product and a large copy measure peak and bandwidth first.
Gathering is free in this bound: floor, gather and picked have the same.

Goals: picked at most 1.15 times floor and at most 1.00 times gather. Nothing asserts them; that
picked computes what gather does is checked.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

from grass_fx.compile.lowering import register
from roofline import LARGE, Roofline, Timer

GOALS = {"floor": 1.15, "gather": 1.0}
LLAMA = ["4096x4096", "11008x4096", "4096x11008", "5120x5120", "13824x5120"]
# By device: tokens, shapes, dtype, and the sizes of the large product and the large copy. A call of
# compiled code costs 50 microseconds on a CPU: the products have to be longer than that.
DEFAULTS = {
    "cuda": ([8192, 16384], LLAMA, "bfloat16", *LARGE["cuda"]),
    "cpu": ([2048], ["768x768", "2048x768", "768x2048"], "float32", *LARGE["cpu"]),
    "smoke": ([64], ["96x64"], "float32", 256, 2**20),
}

Factors = tuple[Tensor, Tensor, Tensor, Tensor]  # D, X, σ, and the selected one of D and X


def functions(dim: int, block: int, max_autotune: bool) -> dict[str, Callable]:
    """What is compared, for side "out" (dim 0) or "in" (dim 1); all take `Factors`."""

    def full(d, x, indices, gathered):
        return d.t() @ x

    def floor(d, x, indices, gathered):
        return gathered.t() @ x if dim == 0 else d.t() @ gathered

    def gather(d, x, indices, gathered):
        if dim == 0:
            return d.index_select(1, indices).t() @ x
        return d.t() @ x.index_select(1, indices)

    def picked(d, x, indices, gathered):
        # In a training step's graph D arrives transposed: architecture.md, "Why a tap".
        return torch.ops.grass.selected_mm(d.t(), x, indices, None, dim, block)

    made = {"full": full, "floor": floor, "gather": gather}
    settings = {"dynamic": False, "fullgraph": True}
    made["picked"] = torch.compile(picked, **settings)
    if max_autotune:
        made["autotuned"] = torch.compile(picked, mode="max-autotune-no-cudagraphs", **settings)
    return made


def cache_bytes(device: str) -> int:
    """Of the last level, or a guess."""
    if device == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return 2**10 * int(size.read_text().rstrip("K\n")) if size.exists() else 2**25


def factor(b: int, size: int, args) -> Tensor:
    shape = (size, b) if args.transposed else (b, size)
    made = torch.randn(shape, device=args.device, dtype=args.dtype)
    return made.t() if args.transposed else made


def rotation(b: int, m: int, n: int, dim: int, r: int, block: int, args) -> list[Factors]:
    """Enough factors that none is in the cache when its turn comes."""
    sets, held = [], b * (m + n) * args.dtype.itemsize
    for _ in range(max(2, math.ceil(4 * cache_bytes(args.device) / held))):
        d, x = (factor(b, size, args) for size in (m, n))
        units = torch.randperm((m, n)[dim] // block)[: r // block].sort().values
        indices = (units[:, None] * block + torch.arange(block)).flatten().to(args.device)
        sets.append((d, x, indices, (d, x)[dim].index_select(1, indices)))
    return sets


def kernels(function: Callable, factors: Factors) -> list[str]:
    """The names of the kernels that one call launches on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function(*factors)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == on_gpu]


def measure(case: tuple, made: dict[str, Callable], timer: Timer, roof: Roofline, args) -> dict:
    b, (m, n), dim, part, block = case
    r = int((m, n)[dim] * part) // block * block
    sets = rotation(b, m, n, dim, r, block, args)
    for factors in sets[:2]:  # compiles, tunes and warms up
        results = {name: function(*factors) for name, function in made.items()}
        expected = results.pop("gather")
        for name in results.keys() - {"full"}:
            error = (results[name] - expected).abs().max() / expected.abs().max()
            if not error <= (2e-2 if args.dtype.itemsize < 4 else 1e-4):
                raise AssertionError(f"{name} is not gather: {error:.1e} of the largest element")
    times = {name: [] for name in made}
    for turn in range(args.rounds):
        order = list(made) if turn % 2 else list(reversed(made))
        for place, name in enumerate(order):
            factors = sets[(turn * len(order) + place) % len(sets)]
            times[name].append(timer(made[name], *factors))
    compact = (r, b, n) if dim == 0 else (m, b, r)
    bounds = {name: roof.milliseconds(*compact, args.dtype.itemsize) for name in made}
    bounds["full"] = roof.milliseconds(m, b, n, args.dtype.itemsize)
    row = {"b": b, "m": m, "n": n, "side": ("out", "in")[dim], "r": r, "block": block}
    if args.device == "cuda":
        row["kernels"] = {name: kernels(function, sets[0]) for name, function in made.items()}
    return {**row, "bound_ms": bounds, "times_ms": times}


def ratio(row: dict, name: str, base: str) -> float:
    times = (row["times_ms"][each] for each in (name, base))
    return statistics.median(mine / other for mine, other in zip(*times, strict=True))


def cells(row: dict) -> dict[str, str]:
    """A row of the table, by column."""
    made = {"tokens": str(row["b"]), "m x n": f"{row['m']} x {row['n']}"}
    made |= {name: str(row[name]) for name in ("side", "r", "block")}
    for name, times in row["times_ms"].items():
        median = statistics.median(times)
        made[f"{name} ms"] = f"{median:.3f} ({row['bound_ms'][name] / median:.0%})"
    for name, base in product(list(row["times_ms"])[3:], ("floor", "gather", "full")):
        made[f"{name}/{base}"] = f"{ratio(row, name, base):.3f}"
    return made


def summary(rows: list[dict]) -> str:
    lines = []
    for name, (base, goal) in product(list(rows[0]["times_ms"])[3:], GOALS.items()):
        ratios = [ratio(row, name, base) for row in rows]
        lines.append(
            f"{name}/{base}: {min(ratios):.3f} to {max(ratios):.3f}, "
            f"median {statistics.median(ratios):.3f}; at most {goal:.2f} "
            f"in {sum(each <= goal for each in ratios)} of {len(ratios)}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--tokens", type=int, nargs="+", help="b (default: by device)")
    add("--shapes", nargs="+", metavar="MxN", help="of the weights (default: by device)")
    add("--parts", type=float, nargs="+", default=[1 / 16, 1 / 8, 1 / 4], help="r / m (or n)")
    add("--sides", nargs="+", default=["out", "in"], choices=("out", "in"))
    add("--block", type=int, nargs="+", default=[1, 8], help="default: 1 and 8")
    add("--transposed", action="store_true", help="factors whose tokens lie together in memory")
    add("--dtype", help="default: bfloat16 on cuda, float32 on a CPU")
    add("--rounds", type=int, default=50, help="timed calls of each (default: 50)")
    add("--max-autotune", action="store_true", help="measure Inductor's max-autotune as well")
    add("--json", type=Path, metavar="FILE", help="write every time measured here")
    add("--smoke", action="store_true", help="one very small shape, three rounds")
    args = parser.parse_args()
    defaults = DEFAULTS["smoke" if args.smoke else args.device]
    tokens, shapes, dtype, args.square, args.copied = defaults
    args.tokens, args.shapes = args.tokens or tokens, args.shapes or shapes
    args.dtype = getattr(torch, args.dtype or dtype)
    args.shapes = [tuple(int(size) for size in text.split("x")) for text in args.shapes]
    if args.smoke:
        args.rounds, args.parts = 3, [1 / 4]
    return args


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    register()
    facts, timer = environment(args.device), Timer(args.device)
    roof = Roofline(timer, args.device, args.dtype, args.square, args.copied)
    print(f"{as_line(facts)}, {args.dtype}")
    print(f"peak {roof.flops / 1e12:.3f} TFLOP/s, copy {roof.bandwidth / 1e9:.1f} GB/s\n")
    settings, rows = {name: str(value) for name, value in vars(args).items()}, []
    contents = {"environment": facts, "settings": settings, "roofline": vars(roof), "rows": rows}
    dims = map(("out", "in").index, args.sides)
    for case in product(args.tokens, args.shapes, dims, args.parts, args.block):
        torch.compiler.reset()  # or Dynamo gives up after some shapes, and runs picked in eager
        made = functions(case[2], case[4], args.max_autotune)
        row = measure(case, made, timer, roof, args)
        text = cells(row)
        if not rows:
            print(f"| {' | '.join(text)} |\n|{'--:|' * len(text)}")
        print(f"| {' | '.join(text.values())} |", flush=True)
        rows.append(row)
        if args.json:  # each time: what was measured stays if time runs out
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(contents, indent=1))
    print(f"\n{summary(rows)}")


if __name__ == "__main__":
    # Inductor keys its cache by the graph, not by the lowering: an old one must not be found.
    with torch.compiler.config.patch(force_disable_caches=True):
        main()
