"""Time of a training step, paired: full rank, grass in a regular step, grass in a scoring step.

    python examples/benchmarks/step_time.py --threads 2
    python examples/benchmarks/step_time.py --device cuda --size 1b --vocab 32000 --dtype bfloat16
    python examples/benchmarks/step_time.py --peers --breakdown
    python examples/benchmarks/step_time.py --smoke

All variants live in one process and take turns, one step each, in an order that reverses every
round: a machine that slows down slows all of them, and the ratio of a round hardly moves. Reported
are medians, quartiles and ratios. Every linear weight is taken, the output head included.

    full      torch.compile(Inductor) and torch.optim.AdamW, foreach on a CPU, fused on a GPU
              (of grass_fx.AdamW that says how the dense parameters are stepped)
    regular   grass with the default rule, never refreshed: what nearly every step costs
    scoring   grass with a rule that needs scores, refreshed after every step: the worst case,
              which at refresh_every=K is one step in K
    signs     (--variants) as regular, and all other columns move by signs (rest="sign")
    eager     (--variants) the model as it is, with full's optimizer

--mode is Inductor's, for all of them. With --peers, as far as they are installed, on the same model
through plain Inductor:

    galore      galore-torch's GaLoreAdamW with projectors of the same rank for the same weights, in
                a step that keeps them
    galore_svd  the same optimizer in a step that computes all projectors, by default one in 200;
                the first --svd-rounds rounds have one, since it can take minutes
    adamw8bit   torchao's AdamW8bit

Goals, on two CPU cores at rank 1/8: regular/full at most 0.78, scoring/full at most 1.10, and at
most 0.17 of the bytes of gradients and optimizer state of the weights taken. On a GPU, model 1b:
1.25 times full's tokens per second (regular/full 0.80), scoring/full at most 1.10. A fast machine
of another shape may miss or beat them, so nothing here asserts them.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from grass_fx.config import SIDES
from llama import SIZES, build
from peer_optimizers import (
    MODULES,
    adamw8bit,
    galore,
    galore_groups,
    nbytes,
    project_every,
    why_missing,
)
from pretrain import bytes_held, rank
from roofline import LARGE, Roofline, Timer

NEVER = math.inf
VARIANTS = ("full", "regular", "scoring")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
REFRESH = 100
"""Steps of which one scores, for the mean."""
PHASES = ("forward+backward", "optimizer", "step")


class Clock:
    """Marks on a timeline: the host's clock on a CPU, events on a GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        if not self.on_gpu:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


def no_times() -> dict[str, list[float]]:
    return {each: [] for each in PHASES}


@dataclass
class Variant:
    """One way to train, with weights of its own, and what was measured of it."""

    model: nn.Module
    compiled: nn.Module
    optimizer: torch.optim.Optimizer
    times: dict[str, list[float]] = field(default_factory=no_times)
    held: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes, by parameter
    peak: int = 0
    prepare: Callable[[], None] = lambda: None
    """Called before a step, while the clock stands."""
    peer: bool = False

    def step(
        self, clock: Clock, tokens: Tensor, targets: Tensor, note_bytes: bool = False
    ) -> dict[str, float]:
        self.prepare()
        start = clock.mark()
        self.compiled(tokens, targets).backward()
        middle = clock.mark()
        self.optimizer.step()
        if note_bytes:  # takes time, so never in a timed round
            self.read_bytes()
        self.optimizer.zero_grad()
        end = clock.mark()
        spans = ((start, middle), (middle, end), (start, end))
        return {phase: clock.milliseconds(*span) for phase, span in zip(PHASES, spans, strict=True)}

    def read_bytes(self) -> None:
        """Note the bytes held for each parameter, while its gradient is still there."""
        for name, parameter in self.model.named_parameters():
            if self.peer:  # projectors and quantized tensors are state, too
                state = self.optimizer.state[parameter].values()
                held = {"weights": parameter.nbytes, "gradients": nbytes(parameter.grad)}
                self.held[name] = held | {"state": sum(map(nbytes, state))}
            else:
                self.held[name] = bytes_held([parameter], self.optimizer)
            self.held[name]["taken"] = isinstance(parameter.grad, grass_fx.CompactGrad)


def made(args: argparse.Namespace, device: str) -> nn.Module:
    wanted = {"vocab": args.vocab, "layers": args.layers}
    shape = {field: value for field, value in wanted.items() if value}
    with torch.device(device):
        return build(args.size, **shape).to(getattr(torch, args.dtype))


def set_up(name: str, args: argparse.Namespace) -> Variant:
    torch.manual_seed(args.seed)  # the same weights for all
    model = made(args, args.device)
    rates = {"lr": 1e-4, "weight_decay": args.weight_decay}
    kind = {"fused": True} if args.device == "cuda" else {"foreach": True}
    if name in ("full", "eager"):
        optimizer = torch.optim.AdamW(model.parameters(), **kind, **rates)
        return Variant(model, plain(model, args) if name == "full" else model, optimizer)
    if name in MODULES:
        return set_up_peer(name, model, args, rates)
    rule = {
        "regular": {"refresh_every": NEVER},
        "scoring": {"refresh_every": 1, "selection": args.scoring_rule},
        "signs": {"refresh_every": NEVER, "rest": "sign"},
    }[name]
    options = {"rank": args.rank, "side": args.side, "block": args.block, "mode": args.mode, **rule}
    options["inductor"] = NO_PADS if args.no_pads else {}
    compiled = torch.compile(model, backend="grass", options=options, dynamic=False)
    return Variant(model, compiled, grass_fx.AdamW(model.parameters(), **kind, **rates))


NO_PADS = {"shape_padding": False}


def plain(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    if args.no_pads:
        return torch.compile(model, dynamic=False, options=NO_PADS)
    return torch.compile(model, dynamic=False, mode=args.mode)


def set_up_peer(name: str, model: nn.Module, args: argparse.Namespace, rates: dict) -> Variant:
    compiled = plain(model, args)
    if name == "adamw8bit":
        return Variant(model, compiled, adamw8bit(list(model.parameters()), **rates), peer=True)
    groups = galore_groups(model.named_parameters(), args.rank, is_taken, gap=NEVER)
    optimizer = galore(groups, **rates)
    keep = partial(project_every, optimizer, NEVER)
    return Variant(model, compiled, optimizer, prepare=keep, peer=True)


def is_taken(name: str, parameter: nn.Parameter) -> bool:
    """What grass takes of this model: every matrix that multiplies."""
    return parameter.dim() == 2 and not name.startswith("embed")


def random_tokens(args: argparse.Namespace, vocab: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """What the tokens say does not matter to the clock, only that all variants read the same."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw() -> tuple[Tensor, Tensor]:
        text = torch.randint(vocab, (args.batch, args.seq + 1), generator=generator)
        text = text.to(args.device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return draw


def measure(args: argparse.Namespace) -> dict[str, Variant]:
    device = torch.device(args.device)
    clock = Clock(device)
    variants = {name: set_up(name, args) for name in args.variants}
    if "galore" in variants:
        kept = variants["galore"]
        renew = partial(project_every, kept.optimizer, 1)
        variants["galore_svd"] = replace(kept, times=no_times(), prepare=renew)
    draw = random_tokens(args, variants["full"].model.config.vocab)

    for index in tqdm(range(-args.warmup, args.rounds), desc="rounds", leave=False):
        batch = draw()
        order = list(variants) if index % 2 else list(reversed(variants))
        for name in order:
            if name == "galore_svd" and not 0 <= index < args.svd_rounds:
                continue
            variant = variants[name]
            if clock.on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            times = variant.step(clock, *batch, note_bytes=index == -1)
            if clock.on_gpu:
                # What this step added to what was there before it, for all variants.
                variant.peak = torch.cuda.max_memory_allocated(device) - before
            if index >= 0:
                for phase, milliseconds in times.items():
                    variant.times[phase].append(milliseconds)
    return variants


def results(variants: dict[str, Variant]) -> dict[str, dict]:
    full = variants["full"]
    # The weights that grass takes, for which full rank holds dense gradients and state.
    taken = {name for each in variants.values() for name in each.held if each.held[name]["taken"]}
    answer = {}
    for name, variant in variants.items():
        row = {}
        for phase in PHASES:
            times = variant.times[phase]
            reference = full.times[phase][: len(times)]  # of the rounds that it took part in
            pairs = [time / other for time, other in zip(times, reference, strict=True)]
            low, median, high = statistics.quantiles(times, n=4, method="inclusive")
            row[phase] = {
                "median_ms": median,
                "quartiles_ms": (low, high),
                "ratio_of_rounds": statistics.median(pairs),
                "ratio_of_medians": median / statistics.median(reference),
            }
        row["taken_weights"] = len(taken)
        row["taken_bytes"] = held_bytes(variant, taken)
        row["taken_bytes_ratio"] = row["taken_bytes"] / max(1, held_bytes(full, taken))
        row["all_bytes"] = held_bytes(variant, set(variant.held))
        if variant.peak:
            weights_and_state = sum(
                each["weights"] + each["state"] for each in variant.held.values()
            )
            row["peak_bytes"] = variant.peak + weights_and_state
        answer[name] = row
    return answer


def bounds(variants: dict[str, Variant], args: argparse.Namespace) -> dict[str, dict]:
    """The two numbers of a roofline for each step: FLOPs over peak, bytes over bandwidth.

    FLOPs: what torch counts in a full-rank step, less the products that a compact gradient spares.
    Bytes, at the least: weights are read forwards and backwards and by the optimizer, which writes
    what moves; gradients are written and read; state is read and written.
    """
    # A large model would not fit beside the others: on "meta" it takes no memory.
    device = "meta" if args.device == "cuda" else args.device
    model = made(args, device)
    text = torch.zeros(args.batch, args.seq, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        model(text, text).backward()
    size = (256, 2**20) if args.smoke else LARGE[torch.device(args.device).type]
    roof = Roofline(Timer(args.device), args.device, getattr(torch, args.dtype), *size)
    answer = {}
    for name, variant in variants.items():
        flops, moved = counter.get_total_flops(), 0
        for path, parameter in variant.model.named_parameters():
            held = variant.held[path]
            written = parameter.nbytes
            if held["taken"] and name == "regular":
                written = held["gradients"]
                spared = (parameter.nbytes - written) // parameter.itemsize
                flops -= 2 * args.batch * args.seq * spared
            moved += 3 * parameter.nbytes + written + 2 * (held["gradients"] + held["state"])
        answer[name] = roof.bounds(flops, moved)
    return answer


def table_of_bounds(answer: dict[str, dict], limits: dict[str, dict]) -> str:
    lines = [
        "| bound             | GFLOP | over peak, ms | GB | over bandwidth, ms | median / larger |",
        "|:------------------|------:|--------------:|---:|-------------------:|----------------:|",
    ]
    for name, row in limits.items():
        ratio = answer[name]["step"]["median_ms"] / max(row["flop_ms"], row["byte_ms"])
        lines.append(
            f"| {name:<17} | {row['gflop']:.1f} | {row['flop_ms']:.1f} | {row['gigabytes']:.2f} "
            f"| {row['byte_ms']:.1f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def profile(variants: dict[str, Variant], args: argparse.Namespace) -> str:
    """One more step of each variant: the kernels (on a CPU the operators) that take longest."""
    device, parts = torch.device(args.device), []
    draw = random_tokens(args, variants["full"].model.config.vocab)
    known = torch.profiler.ProfilerActivity
    activity, key = (
        (known.CUDA, "self_device_time_total")
        if device.type == "cuda"
        else (known.CPU, "self_cpu_time_total")
    )
    for name, variant in variants.items():
        with torch.profiler.profile(activities=[activity]) as profiler:
            variant.step(Clock(device), *draw())  # its clock waits for the end
        parts.append(f"{name}\n{profiler.key_averages().table(sort_by=key, row_limit=60)}")
    return "\n\n".join(parts)


def held_bytes(variant: Variant, names: set[str]) -> int:
    """Gradients and optimizer state: what the method is about; the weights are the same for all."""
    return sum(variant.held[name]["gradients"] + variant.held[name]["state"] for name in names)


def table(answer: dict[str, dict], phases: tuple[str, ...]) -> str:
    lines = []
    for phase in phases:
        lines += [
            f"| {phase:<16} | median ms |    quartiles ms | ratio by round | ratio of medians |",
            "|:-----------------|----------:|----------------:|---------------:|-----------------:|",
        ]
        for name, row in answer.items():
            cell = row[phase]
            low, high = cell["quartiles_ms"]
            lines.append(
                f"| {name:<16} | {cell['median_ms']:>9.2f} | {f'{low:.1f} to {high:.1f}':>15} "
                f"| {cell['ratio_of_rounds']:>14.3f} | {cell['ratio_of_medians']:>16.3f} |"
            )
        lines.append("")
    lines += [
        f"| gradients + state | {'taken weights MB':>16} | ratio | all weights MB | GPU peak MB |",
        f"|:------------------|{'-' * 17}:|------:|---------------:|------------:|",
    ]
    for name, row in answer.items():
        peak = f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else "-"
        lines.append(
            f"| {name:<17} | {row['taken_bytes'] / 1e6:>16.2f} | {row['taken_bytes_ratio']:>5.3f} "
            f"| {row['all_bytes'] / 1e6:>14.2f} | {peak:>11} |"
        )
    return "\n".join(lines)


def throughput(answer: dict[str, dict], args: argparse.Namespace) -> str:
    """Tokens per second of each variant, and of grass where one step in `REFRESH` scores."""
    times = {name: row["step"]["median_ms"] for name, row in answer.items()}
    if "regular" in times and "scoring" in times:
        mean = ((REFRESH - 1) * times["regular"] + times["scoring"]) / REFRESH
        times[f"refresh_every={REFRESH}"] = mean
    lines = ["| tokens per second | of all steps | over full's |", "|:--|--:|--:|"]
    for name, milliseconds in times.items():
        rate = 1e3 * args.batch * args.seq / milliseconds
        lines.append(f"| {name} | {rate:,.0f} | {times['full'] / milliseconds:.3f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--size", default="bench", choices=tuple(SIZES), help="the model (default: bench)")
    add("--vocab", type=int, help="another vocabulary than the size's")
    add("--layers", type=int, help="another number of layers than the size's")
    add("--mode", choices=MODES, help="Inductor's mode (default: its default)")
    add("--no-pads", action="store_true", help="on no side Inductor pads products")
    add("--dtype", default="float32", help="of the weights, e.g. bfloat16 (default: float32)")
    add("--batch", type=int, default=8, help="sequences per step (default: 8)")
    add("--seq", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--rank", type=rank, default=0.125, help="selected columns, number or fraction (0.125)")
    add("--side", default="in", choices=SIDES, help="what is selected (default: in, columns)")
    add("--block", type=int, default=1, help="consecutive columns selected together (default: 1)")
    add("--scoring-rule", default="top", help="the rule of the scoring steps (default: top)")
    add("--weight-decay", type=float, default=1e-2, help="both optimizers' default: 0.01")
    add("--rounds", type=int, default=20, help="timed steps of each variant (default: 20)")
    add("--warmup", type=int, default=3, help="steps before that, compiling among them (3)")
    known = (*VARIANTS, "signs", "eager")
    add("--variants", nargs="+", default=VARIANTS, choices=known, help="default: the first three")
    add("--peers", action="store_true", help="GaLore and 8-bit AdamW, too, where installed")
    add("--svd-rounds", type=int, default=3, help="rounds with GaLore's SVD, at least 2 (3)")
    add("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    add("--breakdown", action="store_true", help="forward+backward and optimizer step apart, too")
    add("--profile", type=Path, metavar="FILE", help="write the time of each kernel here")
    add("--json", type=Path, metavar="FILE", help="write every time measured here")
    add("--smoke", action="store_true", help="a very small model, three rounds")
    args = parser.parse_args()
    if "full" not in args.variants:
        parser.error("--variants needs full, which the others are compared with")
    if args.warmup < 1:
        parser.error("--warmup has to be at least 1: the first steps compile")
    if args.svd_rounds < 2:
        parser.error("--svd-rounds has to be at least 2: one time has no quartiles")
    if args.smoke:
        args.size, args.batch, args.seq, args.rounds = "smoke", 2, 32, 3
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    facts = environment(args.device)
    print(as_line(facts))
    print(
        f"LLaMA {args.size}, {args.batch} x {args.seq} tokens, {args.dtype}, rank {args.rank}, "
        f"side {args.side}, block {args.block}, weight decay {args.weight_decay}, "
        f"{args.rounds} rounds\n"
    )
    for peer in MODULES if args.peers else ():
        if reason := why_missing(peer):
            print(f"{peer}: not installed ({reason})\n")
        else:
            args.variants = (*args.variants, peer)
    variants = measure(args)
    answer = results(variants)
    print(table(answer, PHASES if args.breakdown else ("step",)))
    print("\n" + throughput(answer, args))
    limits = bounds(variants, args)
    print("\n" + table_of_bounds(answer, limits))
    if args.profile:
        args.profile.parent.mkdir(parents=True, exist_ok=True)
        args.profile.write_text(profile(variants, args))
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        times = {name: variant.times for name, variant in variants.items()}
        contents = {"environment": facts, "settings": settings, "results": answer, "times": times}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(contents, indent=1))


if __name__ == "__main__":
    main()
