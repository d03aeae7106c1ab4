"""Train a LLaMA on text, with compact weight gradients or with full ones.

    python examples/pretrain.py                      # grass, a quarter of the columns at a time
    python examples/pretrain.py --method full        # Inductor and torch.optim.AdamW
    python examples/pretrain.py --selection top --rank 0.125 --log runs/top.jsonl
    python examples/pretrain.py --save runs/tiny.pt --every 100
    python examples/pretrain.py --save runs/tiny.pt --every 100 --resume runs/tiny.pt
    python examples/pretrain.py --smoke              # a few steps of a very small model
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel data     # or sharded

docs/recipes/pretrain.md has the commands for a model of a billion weights.

`training(...)` is the loop, one record per step; compare.py runs two of them side by side.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

import checkpoints
import grass_fx
from checkpoints import Checkpoints
from data import Batches, Corpus, held_out_loss
from grass_fx.config import RULES
from grass_fx.state.sharding import local
from llama import SIZES, build
from parallel import WAYS, distribute, is_first, mean, part_of, processes
from progress import Scalars, bar, line
from token_files import corpus_of, unit, vocabulary

# The first steps compile (a rule with scores: the scoring step first, the regular one next).
UNTIMED_STEPS = 3


def option(default, text: str, choices=None, kind=None):
    """A field of `Settings` that knows how to present itself on the command line."""
    about = {"help": text, "choices": choices, "type": kind or type(default)}
    return field(default=default, metadata=about)


def rank(text: str) -> int | float:
    """`64` is a number of columns, `0.25` a fraction of them."""
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
    accumulate: int = option(1, "micro-batches into which the sequences of a step are divided")
    seq: int = option(128, "tokens per sequence; without a tokenizer bytes")
    # Embedding and head want a rate of their own: with one rate for everything AdamW is badly
    # tuned, and grass seems to beat it. Both were swept at the default size and length.
    lr: float = option(1.6e-2, "learning rate of the other weights: embedding, norms, head")
    linear_lr: float = option(
        2e-3, "learning rate of the layers' matrices (--include-head: and head)"
    )
    scale: float | str = option("auto", "grass: multiplies linear_lr; auto is n / r", kind=scale)
    weight_decay: float = option(0.0, "decoupled weight decay, both methods")
    rank: int | float = option(0.25, "grass: selected columns, a number or a fraction", kind=rank)
    selection: str = option(
        "cyclic",
        "grass: rule that selects the columns",
        tuple(RULES),
    )
    refresh_every: int = option(50, "grass: steps between two selections")
    warmup_steps: int = option(20, "grass: steps over which newly selected columns reach full rate")
    block: int = option(1, "grass: consecutive columns selected together")
    include_head: bool = option(False, "grass: take the output head as well")
    compiler: str = option("inductor", "what compiles the graphs", ("inductor", "aot_eager"))
    device: str = option("cpu", "where to train", kind=str)
    dtype: str = option("float32", "of weights and optimizer state", ("float32", "bfloat16"))
    checkpoint_activations: bool = option(False, "compute each layer again in the backward")
    parallel: str = option("none", "how the processes of torchrun share the work", WAYS)
    seed: int = option(0, "seed of weights, batches and selections")
    eval_every: int = option(30, "steps between held-out evaluations")
    data: str = option("", "a text, a folder of texts, or a .bin of tokens; else Python's library")
    tokenizer: str = option("", "a Hugging Face tokenizer's folder or tokenizer.json; else bytes")
    vocab: int = option(0, "tokens that the model knows; 0: the tokenizer's, else the size's")


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
        model = new_model(settings)
    if settings.checkpoint_activations:
        checkpoint_layers(model)
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


def new_model(settings: Settings) -> nn.Module:
    shape = SIZES[settings.size]
    largest = max(shape.max_seq, settings.seq)
    model = build(settings.size, vocab=vocabulary(settings), max_seq=largest)
    return model.to(settings.device, getattr(torch, settings.dtype))


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the layers' inputs for the backward."""
    for layer in model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


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


def training(
    settings: Settings,
    corpus: Corpus,
    parts: Parts | None = None,
    kept: Checkpoints | None = None,
) -> Iterator[dict]:
    """Train, yielding one record per step; evaluated steps also carry held-out loss and bytes.

    `seconds` is the time of the training step alone: evaluations are not in it. `parts` is what
    `set_up` returned, for a caller who keeps the model; the last gradients stay for it to see.
    """
    model, compiled, optimizer = parts or set_up(settings)
    kept = kept or Checkpoints()
    scheduler = schedule(optimizer, settings.steps)
    window = {"batch": settings.batch, "seq": settings.seq, "device": settings.device}
    batches = Batches(corpus.train, seed=settings.seed, **window)
    # The same windows, however many of them go through the model at once.
    at_once = max(1, settings.batch // settings.accumulate)
    evaluated = window | {"batch": at_once, "batches": 8 * settings.batch // at_once}
    states = {"model": model, "optimizer": optimizer, "schedule": scheduler}
    states["batches"] = batches.generator
    done, text = 0, len(corpus.train)
    if kept.resume is not None:
        done = checkpoints.read(kept.resume, settings, text, states)

    for step in range(done + 1, settings.steps + 1):
        batch = [part_of(part, settings.parallel) for part in next(batches)]
        lr = optimizer.param_groups[-1]["lr"]
        optimizer.zero_grad()
        started = time.perf_counter()
        loss = 0.0
        for tokens, targets in micro_batches(batch, settings.accumulate):
            part = compiled(tokens, targets) / settings.accumulate
            part.backward()
            loss = loss + part.detach()
        optimizer.step()
        scheduler.step()
        loss = mean(loss, settings.parallel)  # on a GPU this also waits for the step to finish
        record = {"step": step, "loss": loss, "seconds": time.perf_counter() - started, "lr": lr}
        if step % settings.eval_every == 0 or step == settings.steps:
            record["held_out"] = held_out_loss(model, corpus.held_out, **evaluated)
            record["bytes"] = bytes_held(list(model.parameters()), optimizer)
        if kept.wants(step, settings.steps):
            checkpoints.write(kept.save, settings, step, text, states)
        yield record


def micro_batches(batch: list[Tensor], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    tokens, targets = batch
    if len(tokens) % count:
        raise SystemExit(f"--accumulate {count} does not divide the {len(tokens)} sequences here")
    yield from zip(tokens.chunk(count), targets.chunk(count), strict=True)


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
    settings: Settings,
    corpus: Corpus,
    log: Path | None = None,
    parts: Parts | None = None,
    kept: Checkpoints | None = None,
    tensorboard: Path | None = None,
) -> list[dict]:
    """Run `training` to its end, writing each record as a line of JSON and to TensorBoard."""
    records, held_out = [], math.nan
    kept = kept or Checkpoints()
    records_of = training(settings, corpus, parts, kept)
    steps = bar(records_of, settings.steps, settings.method, is_first())
    file = open_log(log, "a" if kept.resume else "w") if is_first() else None
    scalars = Scalars(tensorboard if is_first() else None)
    for record in steps:
        records.append(record)
        held_out = record.get("held_out", held_out)
        steps.set_postfix(loss=f"{record['loss']:.3f}", held_out=f"{held_out:.3f}")
        if steps.disable and "held_out" in record and is_first():
            print(line(settings.method, record, settings.steps), flush=True)
        scalars.add(record, settings.batch * settings.seq)
        if file:
            file.write(json.dumps(record) + "\n")
    if file:
        file.close()
    scalars.close()
    return records


def open_log(path: Path | None, mode: str = "w"):
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open(mode, buffering=1)  # by lines, so that a run can be watched


def save(model: nn.Module, path: Path) -> None:
    """The weights alone."""
    checkpoints.put({"model": model.state_dict()}, path)
    print(f"wrote {path}")


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.every and not args.save:
        parser.error("--every needs --save")
    kept = Checkpoints(args.save, args.every, args.resume)
    with processes(args.parallel, args.device) as device:
        settings = settings_from(args, device=device)
        parts, corpus = set_up(settings), corpus_of(settings)
        records = train(settings, corpus, args.log, parts, kept, args.tensorboard)
        if is_first():
            report(summarise(records, settings), unit(settings))
            if args.save:
                print(f"wrote {args.save}")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run reads and writes, beside its settings."""
    add = partial(parser.add_argument, type=Path)
    add("--log", metavar="FILE.jsonl", help="write every record here")
    add("--tensorboard", metavar="FOLDER", help="write scalars here (pip install tensorboard)")
    add("--save", metavar="FILE.pt", help="keep weights, optimizer and place, at the end")
    parser.add_argument("--every", type=int, default=0, help="--save also in every so many steps")
    add("--resume", metavar="FILE.pt", help="go on with a saved run of the same settings")


def report(summary: dict, of: str) -> None:
    print(f"held-out loss     {summary['held_out']:.3f} {of} (best {summary['best']:.3f})")
    print(f"seconds per step  {summary['seconds_per_step']:.4f} (median)")
    print(f"tokens per second {summary['tokens_per_second']:,.0f}")
    print(f"compiling         {summary['first_steps']:.1f} s in the first {UNTIMED_STEPS} steps")
    for part, count in summary["bytes"].items():
        print(f"{part:<17} {megabytes(count)}")


if __name__ == "__main__":
    main()
