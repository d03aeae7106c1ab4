"""Compile time, cold and warm: Inductor alone, grass, and grass with a rule that needs scores.

    python examples/benchmarks/compile_time.py
    python examples/benchmarks/compile_time.py --functions
    python examples/benchmarks/compile_time.py --smoke

Every measurement is a process of its own with a cache directory of its own, and the variants take
turns. The caches are empty but for what Inductor finds out about the C++ compiler, once per machine
and the same for all. Two times are taken, both from just before the first forward:

    gradient  to the end of the first backward
    ready     to the end of the second step: a rule with scores compiles two variants of the graph,
              and its first step runs the scoring one, its second the regular one

Then the same in a second process that finds the caches of the first: "warm". It compiles nothing;
that no cache was missed or passed by is checked.

With --functions every linear layer multiplies inside of an autograd function, so that the joint
graph is asked about every weight, which is traced once more for that.

Goals: cold, grass at most 1.3 times, with functions 1.4, with scores at most 2 times Inductor
alone. Nothing asserts them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from llama import SIZES, build

VARIANTS = {"inductor": None, "grass": "cyclic", "grass + scores": "top"}
TIMES = ("gradient", "ready")
WARM = tuple(f"{name}, warm" for name in TIMES)
COMPILED = "compiled"
"""How often a process did not find in the caches what it needed."""


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        return d @ weight, d.flatten(0, -2).t() @ x.flatten(0, -2)


class InFunction(nn.Linear):
    def forward(self, x):
        return Product.apply(x, self.weight)


def measure_here(args: argparse.Namespace) -> dict[str, float]:
    """Two training steps in this process, which has compiled nothing before."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = build(args.size)
        text = torch.randint(model.config.vocab, (args.batch, args.seq + 1))
    for module in model.modules():
        if args.functions and isinstance(module, nn.Linear):
            module.__class__ = InFunction
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    rule = VARIANTS[args.child]
    if rule is None:
        compiled = torch.compile(model, dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    else:
        options = {"rank": 0.125, "selection": rule}
        compiled = torch.compile(model, backend="grass", options=options, dynamic=False)
        optimizer = grass_fx.AdamW(model.parameters(), lr=1e-4)

    times, start = {}, time.perf_counter()
    for name in TIMES:
        compiled(tokens, targets).backward()
        if args.device != "cpu":
            torch.cuda.synchronize()
        times[name] = time.perf_counter() - start
        optimizer.step()
        optimizer.zero_grad()
    counts = {**counters["aot_autograd"], **counters["inductor"]}
    misses = [n for key, n in counts.items() if key.endswith(("cache_miss", "cache_bypass"))]
    return {**times, COMPILED: sum(misses)}


def probe_compiler(cache: Path) -> None:
    """Compile one trivial kernel, which leaves Inductor's probes of the machine in `cache`."""
    code = "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(64))"
    run([sys.executable, "-c", code], cache)


def run(command: list[str], cache: Path) -> str:
    variables = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TRITON_CACHE_DIR": str(cache),
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def measure_apart(variant: str, args: argparse.Namespace, probes: Path) -> dict[str, float]:
    """The same in two fresh processes, a cold and a warm one, with a cache of their own."""
    options = ("size", "batch", "seq", "device", "threads")
    flags = [text for name in options for text in (f"--{name}", str(getattr(args, name)))]
    flags += ["--functions"] if args.functions else []
    command = [sys.executable, __file__, "--child", variant, *flags]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        shutil.copytree(probes, cache)
        cold, warm = (json.loads(run(command, cache).splitlines()[-1]) for _ in range(2))
    if not cold[COMPILED] or (warm[COMPILED] and not args.functions):  # AOTAutograd caches none
        raise AssertionError(f"{variant}: {cold[COMPILED]} and {warm[COMPILED]} compilations")
    return {**cold, **{f"{name}, warm": warm[name] for name in TIMES}}


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Medians and, since other work on a machine only ever adds, the least of the repeats."""
    lines = []
    for name in TIMES + WARM:
        lines += [
            f"| {name:<14} | median s | ratio | least s | ratio |",
            "|:---------------|---------:|------:|--------:|------:|",
        ]
        base = None
        for variant, repeats in measured.items():
            seconds = [each[name] for each in repeats]
            median, least = statistics.median(seconds), min(seconds)
            base = base or (median, least)
            lines.append(
                f"| {variant:<14} | {median:>8.1f} | {median / base[0]:>5.2f} "
                f"| {least:>7.1f} | {least / base[1]:>5.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", default="bench", choices=tuple(SIZES), help="the model (default: bench)")
    # Few tokens: the code generated hardly depends on them, and the steps' own time stays small.
    add("--batch", type=int, default=2, help="sequences per step (default: 2)")
    add("--seq", type=int, default=128, help="tokens per sequence (default: 128)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--repeats", type=int, default=3, help="processes per variant (default: 3)")
    add("--functions", action="store_true", help="linear layers inside of autograd functions")
    add("--json", type=Path, metavar="FILE", help="write every time measured here")
    add("--smoke", action="store_true", help="a very small model, once each")
    add("--child", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure_here(args)))
        return
    if args.smoke:
        args.size, args.repeats = "smoke", 1

    torch.set_num_threads(args.threads)
    facts = environment(args.device)
    print(as_line(facts))
    print(f"LLaMA {args.size}, {args.batch} x {args.seq} tokens, rank 0.125, {args.repeats} each\n")
    measured = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        probe_compiler(Path(folder))
        for variant in tqdm([*VARIANTS] * args.repeats, leave=False):
            measured[variant].append(measure_apart(variant, args, Path(folder)))
    print(table(measured))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": facts, "seconds": measured}, indent=1))


if __name__ == "__main__":
    main()
