"""The optimizer's step alone: grass_fx.AdamW beside torch.optim.AdamW on tensors of compact size.

    python examples/benchmarks/optimizer_step.py
    python examples/benchmarks/optimizer_step.py --dtype bfloat16 --compile
    python examples/benchmarks/optimizer_step.py --smoke

Ours holds the linear weights of a LLaMA and steps r columns (--side out: rows) of each. Torch's,
with foreach, holds parameters of the compact sizes and steps all of them: the same numbers of
elements move. Ours must also find the columns in the weights. They take turns in one process; a
ratio is taken in every round, the table has medians. bfloat16 is rounded stochastically unless a
row says otherwise.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from grass_fx.config import GrassConfig
from grass_fx.state.registry import registry
from grass_fx.state.spec import SubspaceSpec
from llama import SIZES, build


def weights_of(args: argparse.Namespace) -> list[Tensor]:
    with torch.device(args.device):
        model = build(args.size).to(getattr(torch, args.dtype))
    return [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers")]


def give_compact_gradient(weight: Tensor, config: GrassConfig) -> None:
    """What a compiled backward leaves: C of the weight's current selection."""
    dim = 1 if config.side == "in" else 0
    spec = SubspaceSpec.of(config, weight.shape[dim], dim, config.side)
    (subspace,) = registry.demand([weight], [spec], ["weight"])
    selection = subspace.selection_on(weight.device)
    compact = torch.randn(spec.compact_shape(weight.shape), dtype=weight.dtype).to(weight.device)
    weight.grad = grass_fx.CompactGrad(compact, selection, weight.shape)


def seconds(step, device: str) -> float:
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="bench", choices=tuple(SIZES), help="the LLaMA")
    parser.add_argument("--rank", type=float, default=0.125)
    parser.add_argument("--side", default="in", choices=("in", "out"), help="columns or rows")
    parser.add_argument("--block", type=int, default=1, help="columns that lie together")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="also ours with compile=True")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="a few steps of a very small model")
    args = parser.parse_args()
    if args.smoke:
        args.size, args.rounds = "smoke", 3
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    config = GrassConfig(rank=args.rank, refresh_every=10**9, side=args.side, block=args.block)
    weights = weights_of(args)
    for weight in weights:
        give_compact_gradient(weight, config)
    small = [torch.nn.Parameter(torch.randn_like(w.grad.compact)) for w in weights]
    for parameter, weight in zip(small, weights, strict=True):
        parameter.grad = weight.grad.compact.clone()
    settings = {"lr": 1e-4, "weight_decay": 0.0}
    decayed = {**settings, "weight_decay": 0.01}
    wrapped = grass_fx.subspace(torch.optim.AdamW)
    optimizers = {
        "torch.optim.AdamW(foreach=True)": torch.optim.AdamW(small, foreach=True, **settings),
        "grass_fx.AdamW": grass_fx.AdamW(weights, compile=False, **settings),
        "grass_fx.AdamW, weight decay": grass_fx.AdamW(weights, compile=False, **decayed),
        "grass_fx.subspace(AdamW)": wrapped(weights, foreach=True, **settings),
        "grass_fx.subspace(AdamW), weight decay": wrapped(weights, foreach=True, **decayed),
    }
    if args.dtype == "bfloat16":
        nearest = grass_fx.AdamW(weights, stochastic_rounding=False, compile=False, **settings)
        optimizers["grass_fx.AdamW, rounding to nearest"] = nearest
    if args.compile:
        for name, kind in (("", settings), (", weight decay", decayed)):
            optimizer = grass_fx.AdamW(weights, compile=True, **kind)
            optimizers[f"grass_fx.AdamW, compiled{name}"] = optimizer

    print(as_line(environment(args.device)))
    count = sum(p.numel() for p in small)
    print(f"{len(weights)} weights, {count / 1e6:.2f} M compact elements, {args.dtype}")
    for optimizer in optimizers.values():
        for _ in range(3):
            optimizer.step()
    times = {name: [] for name in optimizers}
    for _ in tqdm(range(args.rounds)):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step, args.device))
    base = times["torch.optim.AdamW(foreach=True)"]
    print("| optimizer | median ms | ratio |\n|:--|--:|--:|")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        print(f"| {name} | {statistics.median(taken) * 1e3:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
