"""Peak memory of training steps, method by method, on the same model and batch.

    python examples/benchmarks/memory.py --checkpointing --picture runs/memory.png
    python examples/benchmarks/memory.py --device cuda --size 13b --dtype bfloat16 --checkpointing \
        --limit-gb 40 --methods grass grass_scores --json runs/13b.json
    python examples/benchmarks/memory.py --smoke

    full                Inductor and torch.optim.AdamW(fused=True)
    grass               the default rule, refreshed every two steps; the output head is dense
    grass_scores        selection="top", refreshed every two steps: every other step scores
    grass_tiles         as grass_scores, with scoring="tiles"
    grass_in_backward   as grass, with grass_fx.step_in_backward
    galore              Inductor and galore-torch (--galore-no-svd: its SVD takes minutes at 7B)
    galore_in_backward  one GaLoreAdamW per weight, stepped by a hook as in GaLore's own script
    adamw8bit           Inductor and torchao

Each is a process: a forward and backward that compile, two "first" steps that make the state, and
three that count, as "scoring" if gradients carry scores. --checkpointing compiles each layer by
itself and calls it through torch.utils.checkpoint. Peaks are torch.cuda.max_memory_allocated, or on
a CPU the most that torch's allocator holds by torch.profiler's record, without scratch memory
inside oneDNN and MKL. --limit-gb leaves torch what a card of that size would: 0.75 GiB less.
"predicted" is docs/method.md's sum: full rank has 4mn numbers per weight, grass mn + 3rm + 3r (here
without ρ). Peaks have activations and temporaries besides; a scoring step adds n numbers per weight
and, but with tiles, one layer's G. Goals: 13B within 40 GB at ranks 64 and 1/8, 7B within 24 GB.

Below stand the two numbers of a roofline for a regular step, FLOPs over peak and bytes over
bandwidth: the time that a step takes at least on this machine.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environment import as_line, environment

import grass_fx
from grass_fx.config import GrassConfig
from llama import SIZES, build
from peer_optimizers import adamw8bit, galore, galore_groups, nbytes
from pretrain import is_linear, rank
from roofline import LARGE, Roofline, Timer

GRASS = {
    "grass": {},
    "grass_scores": {"selection": "top", "scoring": "gradient"},
    "grass_tiles": {"selection": "top", "scoring": "tiles"},
    "grass_in_backward": {},
}
METHODS = ("full", *GRASS, "galore", "galore_in_backward", "adamw8bit")
HELD, KINDS = ("weights", "gradients", "state"), ("first", "regular", "scoring")
COLUMNS = (*HELD, "sum", "predicted", "peak: first", *KINDS[1:], "regular/full", "scoring/full")
STEPS, FIRST = 5, 2


def set_up(method: str, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The model, and what to call."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))  # 13B in float32 first would not fit
    with torch.device(args.device):
        model = build(args.size)
    torch.set_default_dtype(torch.float32)
    options = {"rank": args.rank, "exclude": ["head*"], "refresh_every": 2}
    settings = {"dynamic": False}
    if method in GRASS:
        settings |= {"backend": "grass", "options": {**GRASS[method], **options}}
    if not args.checkpointing:
        return model, torch.compile(model, **settings)
    for layer in model.layers:
        forward = torch.compile(layer.forward, **settings)
        layer.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return model, model


def optimizers(method: str, model: nn.Module, args) -> list[torch.optim.Optimizer]:
    parameters, settings = list(model.parameters()), {"lr": 1e-4, "weight_decay": 1e-2}
    if method == "full":
        return [torch.optim.AdamW(parameters, fused=True, **settings)]
    if method == "adamw8bit":
        return [adamw8bit(parameters, **settings)]
    if method in GRASS:
        made = grass_fx.AdamW(parameters, **settings)
        if method == "grass_in_backward":
            grass_fx.step_in_backward(made)
        return [made]
    if args.galore_no_svd:
        from galore_torch.galore_projector import GaLoreProjector

        GaLoreProjector.get_orthogonal_matrix = lambda self, g, rank, type: (
            g[:, :rank] if type == "left" else g[:rank]
        ).clone()
    groups = galore_groups(model.named_parameters(), args.rank, is_linear)
    if method == "galore":
        return [galore(groups, **settings)]
    own = {group["params"][0]: galore([group], **settings) for group in groups}
    for p in parameters:  # both return None, as a hook has to
        p.register_post_accumulate_grad_hook(lambda p: own[p].step() or own[p].zero_grad())
    return list(own.values())


def predicted(method: str, model: nn.Module, args: argparse.Namespace) -> int:
    """Bytes of weights, gradients and state; method.md says nothing of the peers."""
    total, parts = 0, 2 if method == "grass_in_backward" else 3
    for name, p in model.named_parameters() if method in ("full", *GRASS) else ():
        r = columns(p, args.rank) if method in GRASS and is_linear(name, p) else 0
        compact = r * p.shape[0] * p.itemsize or p.nbytes
        total += p.nbytes + parts * compact + 16 * r  # σ and ages
    return total


def columns(weight: nn.Parameter, rank: int | float) -> int:
    return GrassConfig(rank=rank).rank_of(weight.shape[1])


def history_of_gpu() -> list[tuple[float, int]]:
    """(microsecond, bytes more or less) by time, since the recording began."""
    events = itertools.chain(*torch.cuda.memory._snapshot()["device_traces"])
    signs = {"alloc": 1, "free_completed": -1}
    return [(e["time_us"], signs.get(e["action"], 0) * e["size"]) for e in events]


def history_of_cpu(profiler: torch.profiler.profile) -> tuple[list, list]:
    """The same of torch's CPU allocator, and the steps' beginnings and lengths."""
    profiler.stop()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = ((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return sorted(changes), sorted((e["ts"], e["dur"]) for e in events if e["name"] == "a step")


def measure(method: str, args: argparse.Namespace) -> dict:
    on_gpu = args.device == "cuda"
    if args.limit_gb:
        part = (args.limit_gb - 0.75) * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, part))
    model, compiled = set_up(method, args)
    parameters, kinds = list(model.parameters()), []
    text = torch.randint(model.config.vocab, (args.batch, args.seq + 1), device=args.device)
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    compiled(*batch).backward()
    model.zero_grad()
    steppers = optimizers(method, model, args)
    held = sum(each.nbytes for each in (*parameters, *model.buffers()))
    profiler, peaks = torch.profiler.profile(profile_memory=True), []
    if on_gpu:
        held = torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history(context=None)
    else:
        profiler.start()
    for k in range(STEPS):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.profiler.record_function("a step"):
            compiled(*batch).backward()
            scored = any(getattr(p.grad, "scores", None) is not None for p in parameters)
            for stepper in steppers if method != "galore_in_backward" else ():
                stepper.step()
        peaks.append(torch.cuda.max_memory_allocated() if on_gpu else 0)
        kinds.append("first" if k < FIRST else "scoring" if scored else "regular")
        gradients = sum(nbytes(p.grad) for p in parameters)
        model.zero_grad()
    changes, spans = (history_of_gpu(), []) if on_gpu else history_of_cpu(profiler)
    line = [(at, held := held + change) for at, change in changes]
    for k, (start, length) in enumerate(spans):
        peaks[k] = max(size for at, size in line if start <= at <= start + length)
    states = (state.values() for stepper in steppers for state in stepper.state.values())
    state = sum(map(nbytes, itertools.chain(*states)))
    return {
        "held": [sum(map(nbytes, parameters)), gradients, state],
        "predicted": predicted(method, model, args),
        "peaks": list(zip(kinds, peaks, strict=True)),
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        "line": line if args.picture else None,
    }


def line_of(method: str, result: dict, full: dict, unit: float) -> str:
    if "skipped" in result:
        return f"| {method} | skipped: {result['skipped']} |"
    most, base = (dict(sorted(each.get("peaks", ()))) for each in (result, full))
    sizes = [*result["held"], sum(result["held"]), result["predicted"]]
    sizes += [most.get(kind, 0) for kind in KINDS]
    cells = [f"{size / unit:.2f}" if size else "-" for size in sizes]
    cells += [f"{size / base['regular']:.3f}" if size and base else "-" for size in sizes[-2:]]
    return f"| {method} | {' | '.join(cells)} |"


def bounds(results: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """The roofline of a regular step, peak and bandwidth measured here.

    FLOPs: what torch counts at full rank (a forward more with checkpointing), less what compact
    gradients spare. Bytes: as in step_time.py.
    """
    with torch.device("meta"):
        model = build(args.size)
        text = torch.zeros(args.batch, args.seq, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = model(text, text)
        forward = counter.get_total_flops() if args.checkpointing else 0
        loss.backward()
    size = (256, 2**20) if args.smoke else LARGE[args.device]
    dtype = getattr(torch, args.dtype)
    roof = Roofline(Timer(args.device), args.device, dtype, *size)
    answer = {}
    for method in (method for method, result in results.items() if "skipped" not in result):
        spared = 0
        for name, p in model.named_parameters() if method in GRASS else ():
            if is_linear(name, p):
                spared += p.numel() - columns(p, args.rank) * p.shape[0]
        flops = counter.get_total_flops() + forward - 2 * args.batch * args.seq * spared
        weights, gradients, state = results[method]["held"]
        moved = 4 * weights - spared * dtype.itemsize + 2 * (gradients + state)
        answer[method] = roof.bounds(flops, moved)
    return answer


def draw(lines: dict[str, list], unit: float, name: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    plt.figure(figsize=(10, 4.5), layout="constrained")
    for method, line in lines.items():
        places = [STEPS * k / len(line) for k in range(len(line))]  # compiling takes no width
        plt.step(places, [held / unit for _, held in line], where="post", label=method)
    plt.gca().set(xlabel=f"allocations and releases in {STEPS} steps", ylabel=f"{name} allocated")
    plt.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(file, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--size", default="bench", choices=tuple(SIZES), help="the model (default: bench)")
    add("--dtype", default="float32", help="of all parameters (default: float32)")
    add("--batch", type=int, default=1, help="sequences per step (default: 1)")
    add("--seq", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--rank", type=rank, default=0.125, help="selected columns, number or fraction (0.125)")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="default: all")
    add("--checkpointing", action="store_true", help="keep only the layers' inputs")
    add("--limit-gb", type=float, help="act as a GPU of this size")
    add("--galore-no-svd", action="store_true", help="random projectors of the same shape")
    add("--picture", type=Path, metavar="FILE", help="draw the memory over the steps")
    add("--json", type=Path, metavar="FILE", help="write every peak measured here")
    add("--smoke", action="store_true", help="a very small model, full rank and grass")
    add("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.size, args.seq, args.methods = "smoke", 32, ("full", "grass_scores")
    return args


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    contents = {"environment": environment(args.device), "settings": vars(args), "results": {}}
    unit, name = (2**30, "GiB") if args.device == "cuda" else (1e6, "MB")
    print(as_line(contents["environment"]), args, sep="\n", end="\n\n")
    print(f"| {name} | {' | '.join(COLUMNS)} |\n|:--|{'--:|' * len(COLUMNS)}")
    results, lines = contents["results"], {}
    for method in args.methods:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", method]
        done = subprocess.run(command, capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or ["killed"]
        failed = {"skipped": errors[-1][:160], "log": done.stderr}
        result = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
        results[method] = result
        if line := result.pop("line", None):
            lines[method] = line
        print(line_of(method, result, results.get("full", {}), unit), flush=True)
        if args.json:  # each time: what was measured stays if time runs out
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(contents, indent=1, default=str))
    print("\n| bound | GFLOP | over peak, ms | GB | over bandwidth, ms |\n|:--|--:|--:|--:|--:|")
    for method, row in bounds(results, args).items():
        print(f"| {method} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
    if args.picture:
        draw(lines, unit, name, args.picture)


if __name__ == "__main__":
    main()
