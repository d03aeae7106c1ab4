"""Train a small LLaMA on Python source text, with compact weight gradients or with full ones.

    python examples/pretrain.py                      # grass, a quarter of the rows at a time
    python examples/pretrain.py --method full        # Inductor and torch.optim.AdamW
    python examples/pretrain.py --selection top --rank 0.125 --log runs/top.jsonl
    python examples/pretrain.py --save runs/tiny.pt  # keep the weights, for finetune.py
    python examples/pretrain.py --smoke              # a few steps of a very small model
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel data     # or sharded

`training(...)` is the loop, one record per step; compare.py runs two of them side by side.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import grass_fx
from data import Batches, Corpus, held_out_loss, load
from grass_fx.state.sharding import local
from llama import SIZES, build
from parallel import WAYS, distribute, is_first, mean, part_of, processes, whole_state

# The first steps compile (a rule with scores: the scoring step first, the regular one next).
UNTIMED_STEPS = 3


def option(default, text: str, choices=None, kind=None):
    """A field of `Settings` that knows how to present itself on the command line."""
    about = {"help": text, "choices": choices, "type": kind or type(default)}
    return field(default=default, metadata=about)


def rank(text: str) -> int | float:
    """`64` is a number of rows, `0.25` a fraction of them."""
    return int(text) if text.isdigit() else float(text)


def scale(text: str) -> float | str:
    """`auto`, or a number."""
    return text if text == "auto" else float(text)


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run."""

    method: str = option("grass", "how to train", ("grass", "full"))
    size: str = option("tiny", "shape of the model", tuple(SIZES))
    steps: int = option(600, "optimizer steps")
    batch: int = option(16, "sequences per step")
    seq: int = option(128, "bytes per sequence")
    # Embedding and head want a rate of their own: with one rate for everything AdamW is badly
    # tuned, and grass seems to beat it. Both were swept at the default size and length.
    lr: float = option(1.6e-2, "learning rate of embedding, head and norms")
    linear_lr: float = option(2e-3, "learning rate of the linear weights")
    scale: float | str = option("auto", "grass: multiplies linear_lr; auto is n / r", kind=scale)
    weight_decay: float = option(0.0, "decoupled weight decay, both methods")
    rank: int | float = option(0.25, "grass: selected rows, a number or a fraction", kind=rank)
    selection: str = option(
        "cyclic",
        "grass: rule that selects the rows",
        ("cyclic", "top", "multinomial_norm", "multinomial_norm_sq", "uniform", "frozen_top"),
    )
    refresh_every: int = option(50, "grass: steps between two selections")
    warmup_steps: int = option(20, "grass: steps over which newly selected rows reach full rate")
    block: int = option(1, "grass: consecutive rows selected together")
    include_head: bool = option(False, "grass: take the output head as well")
    compiler: str = option("inductor", "what compiles the graphs", ("inductor", "aot_eager"))
    device: str = option("cpu", "where to train", kind=str)
    parallel: str = option("none", "how the processes of torchrun share the work", WAYS)
    seed: int = option(0, "seed of weights, batches and selections")
    eval_every: int = option(30, "steps between held-out evaluations")
    data: str = option("", "train on this file or folder instead of Python's library")


# A model, the same model compiled, and its optimizer.
Parts = tuple[nn.Module, nn.Module, torch.optim.Optimizer]

SMOKE = {"size": "smoke", "steps": 6, "batch": 2, "seq": 32, "eval_every": 3, "refresh_every": 2}


def add_arguments(
    parser: argparse.ArgumentParser, skip: Sequence[str] = (), defaults: Settings | None = None
) -> None:
    defaults = defaults or Settings()
    for each in fields(Settings):
        if each.name in skip:
            continue
        flag, about = "--" + each.name.replace("_", "-"), dict(each.metadata)
        default = getattr(defaults, each.name)
        if each.default is False:
            parser.add_argument(flag, action="store_true", help=about["help"])
        else:
            shown = f" (default: {default})" if default != "" else ""
            about["help"] = about["help"].replace("%", "%%") + shown
            parser.add_argument(flag, default=default, **about)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a very small model")


def settings_from(args: argparse.Namespace, **fixed) -> Settings:
    names = {each.name for each in fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    settings = Settings(**{**given, **fixed})
    return replace(settings, **SMOKE) if args.smoke else settings


def set_up(settings: Settings, model: nn.Module | None = None, **options) -> Parts:
    """The plain model, the same model compiled, and its optimizer.

    A given model may have frozen parameters. `options` go to grass, over those of the settings.
    """
    if model is None:
        torch.manual_seed(settings.seed)
        model = build(settings.size).to(settings.device)
    wrapped = distribute(model, settings.parallel, settings.method)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    selected = settings.method == "grass" and settings.include_head
    linear = {n: p for n, p in trained.items() if is_linear(n, p) or (selected and n[:4] == "head")}
    dense = [p for name, p in trained.items() if name not in linear]
    groups = [{"params": dense}, {"params": [*linear.values()], "lr": settings.linear_lr}]

    if settings.method == "full":
        compiled = torch.compile(wrapped, backend=settings.compiler, dynamic=False)
        optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, foreach=True
        )
        return model, compiled, optimizer

    compiled = torch.compile(
        wrapped,
        backend="grass",
        options={
            "rank": settings.rank,
            "selection": settings.selection,
            "refresh_every": settings.refresh_every,
            "block": settings.block,
            "exclude": [] if settings.include_head else ["head*"],
            "seed": settings.seed,
            "compiler": settings.compiler,
            **options,
        },
        dynamic=False,
    )
    optimizer = grass_fx.AdamW(
        groups,
        lr=settings.lr,
        scale=settings.scale,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
    )
    return model, compiled, optimizer


def is_linear(name: str, parameter: Tensor) -> bool:
    """A matrix of a block: what trains at the rate of the linear weights."""
    return parameter.dim() == 2 and name.startswith("layers.")


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up over the first twentieth of the run, then half a cosine down to a tenth."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))

    return LambdaLR(optimizer, factor)


def bytes_held(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, read off the tensors themselves.

    Call it between `backward` and `zero_grad`. The selection (which rows, and their scale) counts
    as state, and the scores that a scoring step leaves count as gradient.
    """
    weights, gradients, state = list(parameters), [], []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, grass_fx.CompactGrad):
            gradients += [gradient.compact, gradient.scores]
            state += [gradient.selection.indices, gradient.selection.scale]
        else:
            gradients.append(gradient)
        state += optimizer.state.get(parameter, {}).values()
    parts = {"weights": weights, "gradients": gradients, "state": state}
    return {name: sum_of_bytes(tensors) for name, tensors in parts.items()}


def sum_of_bytes(values: list) -> int:
    # By address, so that a tensor reached in two ways counts once.
    tensors = {value.data_ptr(): value for value in map(local, values) if isinstance(value, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def training(settings: Settings, corpus: Corpus, parts: Parts | None = None) -> Iterator[dict]:
    """Train, yielding one record per step; evaluated steps also carry held-out loss and bytes.

    `seconds` is the time of the training step alone: evaluations are not in it. `parts` is what
    `set_up` returned, for a caller who keeps the model; the last gradients stay for it to see.
    """
    model, compiled, optimizer = parts or set_up(settings)
    scheduler = schedule(optimizer, settings.steps)
    window = {"batch": settings.batch, "seq": settings.seq, "device": settings.device}
    batches = Batches(corpus.train, seed=settings.seed, **window)

    for step in range(1, settings.steps + 1):
        tokens, targets = (part_of(part, settings.parallel) for part in next(batches))
        optimizer.zero_grad()
        started = time.perf_counter()
        loss = compiled(tokens, targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss = mean(loss, settings.parallel)  # on a GPU this also waits for the step to finish
        record = {"step": step, "loss": loss, "seconds": time.perf_counter() - started}
        if step % settings.eval_every == 0 or step == settings.steps:
            record["held_out"] = held_out_loss(model, corpus.held_out, **window)
            record["bytes"] = bytes_held(list(model.parameters()), optimizer)
        yield record


def summarise(records: list[dict], settings: Settings) -> dict:
    """What a run comes down to: the numbers that are worth a line in a table."""
    held_out = [record["held_out"] for record in records if "held_out" in record]
    timed = [record["seconds"] for record in records[UNTIMED_STEPS:] or records[-1:]]
    per_step = statistics.median(timed)
    return {
        "held_out": held_out[-1],
        "best": min(held_out),
        "seconds_per_step": per_step,
        "tokens_per_second": settings.batch * settings.seq / per_step,
        "first_steps": sum(record["seconds"] for record in records[:UNTIMED_STEPS]),
        "bytes": records[-1]["bytes"],
    }


def train(
    settings: Settings, corpus: Corpus, log: Path | None = None, parts: Parts | None = None
) -> list[dict]:
    """Run `training` to its end with a progress bar, writing each record as a line of JSON."""
    records, held_out = [], math.nan
    steps = training(settings, corpus, parts)
    bar = tqdm(steps, total=settings.steps, desc=settings.method, disable=not is_first())
    file = open_log(log) if is_first() else None
    for record in bar:
        records.append(record)
        held_out = record.get("held_out", held_out)
        bar.set_postfix(loss=f"{record['loss']:.3f}", held_out=f"{held_out:.3f}")
        if file:
            file.write(json.dumps(record) + "\n")
    if file:
        file.close()
    return records


def open_log(path: Path | None):
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", buffering=1)  # by lines, so that a run can be watched


def save(model: nn.Module, path: Path) -> None:
    state = whole_state(model)  # on several processes all of them take part
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        torch.save(state, unfinished)
        unfinished.replace(path)  # whoever finds the file finds all of it
        print(f"wrote {path}")


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--log", type=Path, metavar="FILE.jsonl", help="write every record here")
    parser.add_argument("--save", type=Path, metavar="FILE.pt", help="keep the trained weights")
    args = parser.parse_args()
    with processes(args.parallel, args.device) as device:
        settings = settings_from(args, device=device)
        parts = set_up(settings)
        records = train(settings, load(settings.data), args.log, parts)
        if args.save:
            save(parts[0], args.save)
        if is_first():
            report(summarise(records, settings))


def report(summary: dict) -> None:
    print(f"held-out loss     {summary['held_out']:.3f} nats/byte (best {summary['best']:.3f})")
    print(f"seconds per step  {summary['seconds_per_step']:.4f} (median)")
    print(f"tokens per second {summary['tokens_per_second']:,.0f}")
    print(f"compiling         {summary['first_steps']:.1f} s in the first {UNTIMED_STEPS} steps")
    for part, count in summary["bytes"].items():
        print(f"{part:<17} {megabytes(count)}")


if __name__ == "__main__":
    main()
