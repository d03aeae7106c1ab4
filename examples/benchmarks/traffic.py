"""What two processes exchange in a training step, and what that costs over a slow link, paired.

    python examples/benchmarks/traffic.py                          # over 1 Gbit/s, needs root
    python examples/benchmarks/traffic.py --rate none --batch 4    # over the loopback
    python examples/benchmarks/traffic.py --keep-gathered          # reshard_after_forward=False
    python examples/benchmarks/traffic.py --micro-batches 4
    python examples/benchmarks/traffic.py --smoke

    ddp               torch.compile(DistributedDataParallel(model)), torch.optim.AdamW
    fsdp2             torch.compile of a model under torch's fully_shard, layer by layer; the same
    data              grass_fx.distributed.data_parallel in a regular step
    data_scoring      the same with a rule that needs scores, refreshed after every step
    sharded           grass under torch's fully_shard, layer by layer, in a regular step
    sharded_scoring   the same with scores

With --micro-batches, gradients of all but a step's last one are not synchronised.

Two processes, one thread each, on a CPU with gloo, in network namespaces of this machine that a
virtual cable joins; `tc` lets it carry --rate in each direction. All ways train the same LLaMA from
the same weights on batches of --batch sequences a process, and take turns, a step each, in an order
that reverses every round.

Bytes are counted at the collective operators, after what a process hands to them: the larger of
input and output. "sent" is what the interface of the first process sent in a step, headers
included: of an all-reduce between two processes as much as was handed in, of a gathering half.
Gloo does a reduce-scatter by an all-reduce, so it sends twice what it has to.
"mean" is a period of --refresh-every steps, one of which scores.
"""

import argparse
import datetime
import json
import math
import os
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
import llama
from grass_fx.distributed import data_parallel, no_sync
from link import LOOPBACK, End, throttled, why_not
from llama import SIZES
from pretrain import rank as rank_of

FULL, REGULAR = ("ddp", "fsdp2"), ("data", "sharded")
SCORING = {"data": "data_scoring", "sharded": "sharded_scoring"}
WAYS = (*FULL, *REGULAR, *SCORING.values())
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
RANKS = 2
OPERATORS = {
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", RANKS),
    "c10d::_allgather_base_": ("all_gather", 1),
    "gloo:all_reduce": ("all_reduce", 1),  # and the work of every reduce-scatter
}
"""Operator -> kind, and how many times its largest argument a process ends with."""


@dataclass
class Way:
    """One way to train, with weights of its own, and what was measured of it."""

    model: nn.Module
    compiled: nn.Module
    optimizer: torch.optim.Optimizer
    micro_batches: int
    seconds: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    sent: int = 0

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        dist.barrier()
        start = time.perf_counter()
        parts = zip(*(t.chunk(self.micro_batches) for t in (tokens, targets)), strict=True)
        for k, part in enumerate(parts, 1):
            with self.synchronised(k == self.micro_batches):
                self.compiled(*part).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Whether gradients of this micro-batch are reduced, or only added."""
        if self.micro_batches == 1:
            return nullcontext()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        if last:
            return nullcontext()
        ddp = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if ddp else no_sync(self.model)


def set_up(name: str, args: argparse.Namespace) -> Way:
    torch.manual_seed(args.seed)  # the same weights for all
    # Code of its own: how Dynamo deals with one way's frames is not to matter to the next.
    model = runpy.run_path(llama.__file__)["build"](args.size)
    rates = {"lr": 1e-4, "weight_decay": 0.0}
    way, _, scoring = name.partition("_")
    if way == "ddp":
        model = DistributedDataParallel(model)
    elif way == "data":
        model = data_parallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=not args.keep_gathered)
    if name in FULL:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True, **rates)
        compiled = torch.compile(model, backend=args.compiler, dynamic=False)
        return Way(model, compiled, optimizer, args.micro_batches)
    rule = {"selection": args.scoring_rule, "refresh_every": 1} if scoring else {}
    options = {"rank": args.rank, "refresh_every": 10**9, **rule, "compiler": args.compiler}
    compiled = torch.compile(model, backend="grass", options=options, dynamic=False)
    optimizer = grass_fx.AdamW(model.parameters(), **rates)
    return Way(model, compiled, optimizer, args.micro_batches)


def random_tokens(args: argparse.Namespace) -> Callable[[], tuple[Tensor, Tensor]]:
    """What the tokens say does not matter, only that each process has its own."""
    generator = torch.Generator().manual_seed(args.seed + dist.get_rank())
    vocab = SIZES[args.size].vocab

    def draw() -> tuple[Tensor, Tensor]:
        count = args.batch * args.micro_batches
        text = torch.randint(vocab, (count, args.seq + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return draw


def sent_bytes(interface: str) -> int:
    """What an interface has sent so far."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def worker(args: argparse.Namespace) -> None:
    """One of the processes; the first writes what was measured to `args.result`."""
    torch.set_num_threads(1)
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))  # one may compile longer
    ways, draw = {name: set_up(name, args) for name in args.ways}, random_tokens(args)
    for way in ways.values():
        for _ in range(args.warmup):
            way.step(*draw())
    for index in range(args.rounds):
        batch = draw()
        order = list(ways) if index % 2 else list(reversed(ways))
        for name in order:
            before = sent_bytes(interface)
            ways[name].seconds.append(ways[name].step(*batch))
            ways[name].sent += sent_bytes(interface) - before
    for way in ways.values():
        way.sent //= args.rounds
        way.bytes = counted(way, draw)
    if dist.get_rank() == 0:
        contents = {
            name: {"seconds": way.seconds, "bytes": way.bytes, "sent": way.sent}
            for name, way in ways.items()
        }
        args.result.write_text(json.dumps(contents))
    dist.barrier()
    dist.destroy_process_group()


def counted(way: Way, draw: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Bytes of a step by kind of collective, read off the profiler's record of their operators.

    The profiler tells shapes; all that trains here is float32. Messages of some bytes, by which
    processes compare what they do, are not among them.
    """
    batch = draw()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        way.step(*batch)
    numbers = dict.fromkeys(KINDS, 0)
    for event in profiler.events():
        if event.name in OPERATORS:
            kind, group = OPERATORS[event.name]
            numbers[kind] += group * max(math.prod(shape) for shape in event.input_shapes if shape)
    numbers["all_reduce"] -= numbers["reduce_scatter"]
    return {kind: 4 * count for kind, count in numbers.items()}


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("", 0))
        return int(it.getsockname()[1])


def run(args: argparse.Namespace, ends: list[End]) -> dict[str, dict]:
    """Start a process at each end, wait for both, and read what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        result, port = Path(folder) / "result.json", free_port()
        processes = []
        for rank, end in enumerate(ends):
            variables = {
                "RANK": rank, "WORLD_SIZE": len(ends), "MASTER_ADDR": ends[0].address,
                "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": end.interface, "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            command = [*end.command, sys.executable, *sys.argv, "--result", str(result)]
            settings = {name: str(value) for name, value in variables.items()}
            processes.append(subprocess.Popen(command, env={**os.environ, **settings}))
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"processes ended with {codes}")
        return json.loads(result.read_text())


def results(measured: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """A row for each way, and for a period of grass's, with ratios to ddp."""
    rows = {}
    for name, way in measured.items():
        rows[name] = {
            "ms": 1e3 * statistics.median(way["seconds"]),
            "rate": statistics.median(
                other / mine
                for mine, other in zip(way["seconds"], measured["ddp"]["seconds"], strict=True)
            ),
            **way["bytes"],
            "sum": sum(way["bytes"].values()),
            "sent": way["sent"],
        }
    share = 1 / args.refresh_every
    for name, scoring in SCORING.items():
        if name in rows and scoring in rows:
            regular, scored = rows[name], rows[scoring]
            mean = {key: regular[key] + share * (scored[key] - regular[key]) for key in regular}
            rows[f"{name}, mean"] = mean | {"rate": rows["ddp"]["ms"] / mean["ms"]}
    return rows


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| MB a step       | all_reduce | reduce_scatter | all_gather |   sum | / ddp |  sent "
        "| median ms | steps per ddp's |",
        "|:----------------|-----------:|---------------:|-----------:|------:|------:|------:"
        "|----------:|----------------:|",
    ]
    for name, row in rows.items():
        kinds = " | ".join(f"{row[kind] / 1e6:>{len(kind)}.2f}" for kind in KINDS)
        lines.append(
            f"| {name:<15} | {kinds} | {row['sum'] / 1e6:>5.2f} "
            f"| {row['sum'] / rows['ddp']['sum']:>5.3f} | {row['sent'] / 1e6:>5.2f} "
            f"| {row['ms']:>9.1f} | {row['rate']:>15.2f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rate", default="1gbit", help="of the link, in tc's words, or none (default: 1gbit)")
    add("--size", default="bench", choices=tuple(SIZES), help="the model (default: bench)")
    add("--batch", type=int, default=1, help="sequences of a process in a micro-batch (default: 1)")
    add("--micro-batches", type=int, default=1, help="micro-batches of a step (default: 1)")
    add("--keep-gathered", action="store_true", help="under FSDP2, reshard_after_forward=False")
    add("--seq", type=int, default=256, help="tokens of a sequence (default: 256)")
    add("--rank", type=rank_of, default=0.125, help="selected columns, number or fraction (0.125)")
    add("--scoring-rule", default="top", help="the rule of the scoring steps (default: top)")
    add("--refresh-every", type=int, default=100, help="steps of a period, for the mean (100)")
    add("--ways", nargs="+", default=WAYS, choices=WAYS, help="default: all")
    add("--compiler", default="inductor", choices=("inductor", "aot_eager"), help="inductor")
    add("--rounds", type=int, default=12, help="timed steps of each way (default: 12)")
    add("--warmup", type=int, default=3, help="steps before that, compiling among them (3)")
    add("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write what was measured here")
    add("--smoke", action="store_true", help="a very small model, two rounds")
    add("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "ddp" not in args.ways:
        parser.error("--ways needs ddp, which the others are compared with")
    if args.smoke:
        args.size, args.seq, args.rounds = "smoke", 32, 2
    return args


def main() -> None:
    args = parse()
    if args.result:
        worker(args)
        return
    facts = environment()
    print(as_line({**facts, "threads": "1 of each of 2 processes"}))
    link = nullcontext(LOOPBACK)
    if args.rate == "none":
        print("loopback, not throttled")
    elif reason := why_not():
        print(f"loopback, NOT THROTTLED to {args.rate}: {reason}")
    else:
        link = throttled(args.rate)
        print(f"{args.rate} in each direction")
    print(
        f"LLaMA {args.size}, {args.micro_batches} x {args.batch} x {args.seq} tokens a process, "
        f"rank {args.rank}, reshard_after_forward={not args.keep_gathered}, {args.rounds} rounds\n"
    )
    with link as ends:
        measured = run(args, ends)
    rows = results(measured, args)
    print(table(rows))
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        contents = {"environment": facts, "settings": settings, "results": rows}
        contents["measured"] = measured
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(contents, indent=1))


if __name__ == "__main__":
    main()
