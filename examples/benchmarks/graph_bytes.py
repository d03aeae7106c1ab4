"""The bytes that a block's forward and backward move on a GPU, counted from code without one.

    python examples/benchmarks/graph_bytes.py                  # a LLaMA of 1B, r = 1/8, bfloat16
    python examples/benchmarks/graph_bytes.py --size 7b --batch 4 --rank 0.25 --blocks 1 16
    python examples/benchmarks/graph_bytes.py --smoke

Inductor generates the code of a model of two blocks and of one, in the real size, for an H100 that
is not there; a block is the difference. Counted are the kernels that Inductor writes: what each
reads and writes, the whole tensor once. From X a gather reads the granules of 64 bytes in which the
columns of drawn selections lie, once for all gathers of one kernel. `pads` says whether Inductor
pads every product with a size that is no multiple of 16 bytes, or none; on a GPU it measures each.
Matrix products and attention are the libraries'. `scoring` is a scoring step, and `no read_padded`
leaves that pass out. `kept` is what a block's forward saves for the backward. Needs triton.
"""

import argparse
import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

from grass_fx.config import GrassConfig
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace
from grass_fx.testing.launches import Launch, Memory, launches, outputs
from grass_fx.testing.training_code import training_code
from llama import SIZES, build
from pretrain import rank

GRANULE = 64  # bytes


def blocks(size: str, layers: int) -> nn.Module:
    """A model without embedding and head."""
    model = build(size, layers=layers).bfloat16()
    model.embed = model.head = nn.Identity()
    return model


@functools.cache
def columns(size: int, selected: int, block: int, number: int) -> Tensor:
    """The columns of a drawn selection."""
    config = GrassConfig(rank=selected, block=block, seed=number)
    spec = SubspaceSpec.of(config, size, 1, "in")
    return Subspace(spec, 1, "W", torch.device("cpu"), torch.bfloat16).selection.indices


def gathered(x: Memory, launch: Launch, size: int, block: int) -> float:
    """The bytes of x that a kernel reads, which gathers some of its `size` columns."""
    indices = [memory.shape[0] for memory in launch.reads if memory.dtype == torch.int64]
    drawn = [columns(size, selected, block, k) for k, selected in enumerate(indices)]
    touched = (torch.cat(drawn) * x.dtype.itemsize // GRANULE).unique().numel()
    return x.bytes * min(1.0, touched * GRANULE / (size * x.dtype.itemsize))


def count(size: str, layers: int, batch: int, options: dict | None, pads: bool) -> Counter[str]:
    """Bytes and kernels of a model with so many blocks."""
    config = SIZES[size]
    shape = batch, min(config.max_seq, 1024), config.hidden
    x = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    found: Counter[str] = Counter()
    scoring = "selection" in (options or {})
    modules = training_code(blocks(size, layers), [x], options, pads=pads, scoring=scoring)
    widths = config.ffn, config.hidden
    for launch in (launch for module in modules for launch in launches(module)):
        if not launch.name.startswith("triton"):
            found["products"] += 1
            continue
        kind = "gathers" if launch.gathers else "others"
        rank_of = (options or {}).get("block", 1)
        found[kind] += sum(memory.bytes for memory in (*launch.reads, *launch.writes))
        for x in launch.gathers:
            (width,) = [w for w in widths if w <= x.shape[-1] < w + 8][:1] or [x.shape[-1]]
            found[kind] += gathered(x, launch, width, rank_of)
        found[f"kernels, {kind}"] += 1
    found["kept"] = sum(memory.bytes for memory in outputs(modules[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--batch", type=int, default=16, help="of sequences of at most 1024 tokens")
    parser.add_argument("--rank", type=rank, default=0.125)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--smoke", action="store_true", help="a very small model")
    args = parser.parse_args()
    print(as_line(environment()))
    size = "smoke" if args.smoke else args.size
    ways = [("full rank", None)]
    ways += [
        (f"grass, block {block}", {"rank": args.rank, "block": block})
        for block in ([1] if args.smoke else args.blocks)
    ]
    ways.append(("scoring, input_norm", {"rank": args.rank, "selection": "input_norm"}))
    ways.append(("no read_padded", {"rank": args.rank, "disable_passes": ["read_padded"]}))
    print(f"One block of {size}, r = {args.rank}, {args.batch} sequences, bfloat16.\n")
    print("| | pads | gathers, GB | in kernels | others, GB | in kernels | kept, MB |")
    print("|---|---|---|---|---|---|---|")
    for pads in (False, True):
        for name, options in ways:
            one, two = (count(size, layers, args.batch, options, pads) for layers in (1, 2))
            two.subtract(one)
            sizes = [f"{two['gathers'] / 1e9:.3f} | {two['kernels, gathers']}"]
            sizes += [f"{two['others'] / 1e9:.3f} | {two['kernels, others']}"]
            print(f"| {name} | {pads} | {' | '.join(sizes)} | {two['kept'] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
