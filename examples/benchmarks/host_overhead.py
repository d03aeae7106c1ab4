"""What the runtime costs on the host, per taken weight and step, with the compute taken away.

    python examples/benchmarks/host_overhead.py
    python examples/benchmarks/host_overhead.py --device cuda --compiler inductor
    python examples/benchmarks/host_overhead.py --smoke

A stand-in takes the place of the compiled graph: one autograd node that computes nothing and
gives back gradients made before the clock starts. Ours has it inside a GrassCallable, which finds
the subspaces, makes the proxies and puts a CompactGrad on each weight; plain has it on the weights
themselves. They take turns in one process. The table has medians over the rounds of ours minus
plain, in microseconds per weight; the parts below it are timed one by one, "the rest" is what they
leave. For reference, the same difference between really compiled models of tiny layers, whose
graphs differ too: ours selects for each weight. Python's garbage collector is off, as in timeit.

Goal: at most 20 microseconds in total, better 10. Nothing asserts it.
"""

import argparse
import gc
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from grass_fx.compile.runtime import GrassCallable
from grass_fx.config import GrassConfig
from grass_fx.passes.find_linear_weights import FoundWeights
from grass_fx.passes.observers import PushReport
from grass_fx.passes.signature import REGULAR, LinearWeight, Signature
from grass_fx.state.registry import Demand, registry
from grass_fx.state.spec import SubspaceSpec
from roofline import LARGE, Roofline, Timer

SIZE, RANK, BATCH = 16, 4, 4
CONFIG = GrassConfig(rank=RANK, refresh_every=10**9)


class NoCompute(torch.autograd.Function):
    """A graph without work. Its backward hands over the gradients that wait in ``ready``."""

    @staticmethod
    def forward(ctx, ready: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.ready = ready
        return torch.empty((), device=inputs[0].device)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None, *ctx.ready)
        ctx.ready.clear()
        return gradients


class Side:
    """The stand-in on the weights themselves, and the gradients that it hands over."""

    def __init__(self, weights: list[nn.Parameter], shape: tuple[int, int]) -> None:
        self.weights, self.ready = weights, []
        self.stored = [torch.randn(shape, device=w.device) for w in weights]

    def prepare(self) -> None:
        self.ready[:] = [tensor.detach() for tensor in self.stored]
        for weight in self.weights:
            weight.grad = None

    def __call__(self) -> Tensor:
        return NoCompute.apply(self.ready, *self.weights)


class Ours(Side):
    """The same behind a GrassCallable, as the backend "grass" makes one."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.spec = SubspaceSpec.of(CONFIG, SIZE, 0, "out")
        super().__init__(weights, self.spec.compact_shape((SIZE, SIZE)))
        taken = [LinearWeight(k, f"{k}", (SIZE, SIZE), self.spec) for k in range(len(weights))]
        signature, found = Signature(taken, len(taken)), FoundWeights(taken=taken)
        self.demand = Demand(registry, [self.spec] * len(weights), [""] * len(weights))
        self.callable = GrassCallable(signature, {REGULAR: self.compiled}, found, PushReport())

    def compiled(self, *inputs: Tensor) -> Tensor:
        return NoCompute.apply(self.ready, *inputs[len(self.weights) :: 2])

    def __call__(self) -> Tensor:
        return self.callable(*self.weights)

    def parts(self) -> dict[str, float]:
        """Seconds of what a step consists of, each alone and for all weights."""
        device = self.weights[0].device
        subspaces, demanded = timed(lambda: self.demand(self.weights))
        selections, selected = timed(lambda: [s.selection_on(device) for s in subspaces])
        pairs, shape = list(zip(self.stored, selections, strict=True)), self.weights[0].shape
        made, wrapped = timed(lambda: [grass_fx.CompactGrad(c, s, shape) for c, s in pairs])
        _, taken = timed(lambda: [grad.detach() for grad in made])
        return {"demand": demanded, "select": selected, "CompactGrad": wrapped, "detach": taken}


def timed(work):
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def step(side: Side) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    side.prepare()
    loss, forward = timed(side)
    _, backward = timed(loss.backward)
    assert all(weight.grad is not None for weight in side.weights)
    return forward, backward


def without_compute(count: int, rounds: int, device: str) -> dict[str, float]:
    """Microseconds per weight: each direction, ours minus plain, and the parts of ours."""
    weights = [nn.Parameter(torch.randn(SIZE, SIZE, device=device)) for _ in range(count)]
    plain, ours = Side(weights, (SIZE, SIZE)), Ours(weights)
    rows = []
    for k in range(rounds + 5):
        before, after = step(plain), step(ours)
        row = {"forward": after[0] - before[0], "backward": after[1] - before[1]}
        row |= {"total": sum(row.values()), **ours.parts(), "plain": sum(before)}
        if k >= 5:
            rows.append(row)
    return {key: 1e6 * statistics.median(row[key] for row in rows) / count for key in rows[0]}


def compiled_difference(count: int, rounds: int, device: str, compiler: str) -> float:
    """Microseconds per weight of a really compiled step: ours minus torch's."""
    options = {"rank": RANK, "refresh_every": 10**9, "compiler": compiler}
    x, runs = torch.randn(BATCH, SIZE, device=device), []
    for settings in ({"backend": compiler}, {"backend": "grass", "options": options}):
        model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(count)))
        runs.append((model, torch.compile(model.to(device), **settings)))
    differences = []
    for _ in tqdm(range(rounds + 5), desc=f"compiled, {count} weights"):
        taken = []
        for model, compiled in runs:
            model.zero_grad()
            taken.append(timed(partial(full_step, compiled, x))[1])
        differences.append(taken[1] - taken[0])
    return 1e6 * statistics.median(differences[5:]) / count


def full_step(model, x: Tensor) -> None:
    model(x).sum().backward()
    if x.device.type != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--compiled", type=int, default=16, help="weights of the compiled models")
    parser.add_argument("--compiler", default="aot_eager", choices=("aot_eager", "inductor"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few rounds of few weights")
    args = parser.parse_args()
    if args.smoke:
        args.weights, args.compiled, args.rounds = [4], 2, 3
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(as_line(environment(args.device)))
    gc.disable()
    counts = tqdm(args.weights, desc="without compute")
    columns = {n: without_compute(n, args.rounds, args.device) for n in counts}
    labels = {
        "forward": "forward, ours minus plain",
        "demand": "- Demand",
        "select": "- Subspace.selection_on",
        "forward rest": "- the rest: proxies, node, arguments",
        "backward": "backward, ours minus plain",
        "CompactGrad": "- CompactGrad(...)",
        "detach": "- its detach, as AccumulateGrad takes it",
        "backward rest": "- the rest",
        "total": "**total, ours minus plain**",
        "plain": "plain itself",
    }
    for c in columns.values():
        c["forward rest"] = c["forward"] - c["demand"] - c["select"]
        c["backward rest"] = c["backward"] - c["CompactGrad"] - c["detach"]
    print("| µs per weight | " + " | ".join(f"{n} weights" for n in columns) + " |")
    print("|:--" + "|--:" * len(columns) + "|")
    for key, label in labels.items():
        print(f"| {label} | " + " | ".join(f"{c[key]:.1f}" for c in columns.values()) + " |")
    more = compiled_difference(args.compiled, args.rounds, args.device, args.compiler)
    print(f"compiled by {args.compiler}, {args.compiled} weights, ours minus plain: {more:.1f} µs")
    size = (256, 2**20) if args.smoke else LARGE[args.device]
    roof = Roofline(Timer(args.device), args.device, torch.float32, *size)
    flops, moved = (4 + 2 * RANK / SIZE) * BATCH * SIZE**2, 4 * (3 * SIZE**2 + 6 * BATCH * SIZE)
    bound = roof.bounds(flops, moved)
    print(
        f"of which products, per weight: {1e3 * bound['flop_ms']:.4f} µs of FLOPs over peak, "
        f"{1e3 * bound['byte_ms']:.4f} µs of bytes over bandwidth; without compute both are 0"
    )


if __name__ == "__main__":
    main()
