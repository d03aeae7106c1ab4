"""What peers.py compares: how each method is set up, and one training run of it.

Every run starts from the same weights for the same seed, reads the same batches and follows the
same schedule (pretrain.py); only what the method needs differs. `linear_lr` is the rate of the
matrices in the blocks in every method, `lr` that of whatever else trains (embedding, norms, head).

    adamw       torch.optim.AdamW
    adamw8bit   torchao's AdamW8bit
    galore      galore-torch's GaLoreAdamW, with projectors for the matrices in the blocks
    apollo      apollo-torch's APOLLOAdamW: scaling by channel, random projections and scale 1, as
                its README advises. Its licence is CC-BY-NC: it is used only where it is installed
    lora        adapters of peft on frozen matrices, with about as many numbers as a compact
                gradient of the same rank has; embedding, norms and head train. From random weights
                the matrices stay random but for a change of low rank: no method of pretraining
    grass       grass_fx.AdamW
    grass8bit   grass_fx.subspace(torchao's AdamW8bit)

All have betas (0.9, 0.999), eps 1e-8 and no weight decay.
"""

import gc
import hashlib
import importlib
import json
import logging
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import FunctionType, MethodType

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grass_fx
from data import (
    HELD_OUT_EVERY,
    SKIPPED,
    Corpus,
    as_tensor,
    held_out_loss,
    language_reference,
    load,
)
from finetune import matches
from llama import build
from peer_optimizers import MODULES, adamw8bit, apollo, galore, galore_groups, rows
from pretrain import Parts, Settings, is_linear, training
from pretrain import set_up as set_up_example

NEEDS = {
    "adamw8bit": MODULES["adamw8bit"],
    "grass8bit": MODULES["adamw8bit"],
    "galore": MODULES["galore"],
    "apollo": MODULES["apollo"],
    "lora": "peft",
}
EPS = {"eps": 1e-8}  # GaLore and APOLLO would take 1e-6
EVALUATIONS = 5  # of a run, evenly spaced, the last after its last step
LARGE_LIMIT = 256_000_000  # bytes


@dataclass(frozen=True)
class Run(Settings):
    """Everything that defines a training run, and with it the place of its result in the file."""

    scale: float = 1.0
    """Not read: it is `linear_lr` over `lr`."""
    shape: dict[str, int] = field(default_factory=dict)
    """Over those of `size`."""
    dtype: str = "float32"
    on_refresh: str = "carry"
    side: str = "in"
    take: tuple[str, ...] = ()
    """Patterns of the matrices that grass takes; none: those of all blocks."""
    untaken_lr: float = 0.0
    """The rate of those in the blocks that `take` leaves."""
    start: str = ""
    """The key of the run whose weights it starts from, for finetuning."""
    old_data: str = ""
    """What those were trained on: as `data`."""
    windows: int = 256
    """Held-out sequences."""
    keep: bool = False
    """Whether its weights are saved."""

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def why_missing(method: str) -> str:
    """What keeps a method's package from being imported; empty if nothing does."""
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of packages about their optional parts
    try:
        importlib.import_module(NEEDS.get(method, "torch"))
    except Exception as error:  # a package for another torch can fail in any way
        return f"{type(error).__name__}: {error}"
    finally:
        logging.disable(logged)
    return ""


def set_up(run: Run, folder: Path) -> Parts:
    torch.manual_seed(run.seed)
    model = build(run.size, **run.shape)
    if run.start:
        model.load_state_dict(torch.load(folder / f"{run.start}.pt", map_location="cpu"))
    model.to(run.device, getattr(torch, run.dtype))
    if run.method == "lora":
        model = with_adapters(model, run)
    # Dynamo keeps compiled code by code object, and looks through all of one's at every call:
    # models that take turns, or follow each other in one process, get a code object each.
    forward = type(model).forward
    twin = FunctionType(
        forward.__code__.replace(), forward.__globals__, "forward", forward.__defaults__
    )
    model.forward = MethodType(twin, model)
    if run.method in ("grass", "grass8bit"):
        return set_up_grass(run, model)
    compiler = run.compiler if run.compiler == "inductor" else "eager"  # no graph to look at
    if run.method in ("adamw", "lora"):
        return set_up_example(replace(run, method="full", compiler=compiler), model)
    compiled = torch.compile(model, backend=compiler, dynamic=False)
    return model, compiled, peer_optimizer(run, model)


def set_up_grass(run: Run, model: nn.Module) -> Parts:
    options = {"side": run.side} | ({"include": list(run.take)} if run.take else {})
    model, compiled, _ = set_up_example(replace(run, method="grass"), model, **options)
    groups = [{"params": []}, {"params": [], "lr": run.untaken_lr}]
    for name, p in model.named_parameters():
        left = run.take and is_linear(name, p) and not matches(name, run.take)
        groups[bool(left)]["params"].append(p)
    settings = {
        "lr": run.lr,
        "scale": run.linear_lr / run.lr,
        "warmup_steps": run.warmup_steps,
        "on_refresh": run.on_refresh,
        "weight_decay": run.weight_decay,
    }
    if run.method == "grass":
        return model, compiled, grass_fx.AdamW(groups, **settings)
    inner = importlib.import_module(NEEDS["grass8bit"]).AdamW8bit
    optimizer = grass_fx.subspace(inner)(groups, **EPS, **settings)
    return model, compiled, without_inductor(optimizer, run)


def peer_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    settings = {"lr": run.lr, "weight_decay": run.weight_decay, **EPS}
    if run.method == "adamw8bit":
        named = list(model.named_parameters())
        dense = [p for name, p in named if not is_linear(name, p)]
        linear = [p for name, p in named if is_linear(name, p)]
        groups = [{"params": dense}, {"params": linear, "lr": run.linear_lr}]
        return without_inductor(adamw8bit(groups, **settings), run)
    named = model.named_parameters()
    groups = galore_groups(named, run.rank, is_linear, gap=run.refresh_every)
    for group in groups:
        if "rank" in group:
            group["lr"] = run.linear_lr
    return {"galore": galore, "apollo": apollo}[run.method](groups, **settings)


def without_inductor(optimizer: torch.optim.Optimizer, run: Run) -> torch.optim.Optimizer:
    """torchao compiles its step with Inductor: not where the model is not compiled with it."""
    if run.compiler != "inductor":
        eager = torch.compiler.set_stance("force_eager")(type(optimizer).step)
        optimizer.step = MethodType(eager, optimizer)
    return optimizer


def with_adapters(model: nn.Module, run: Run) -> nn.Module:
    peft = importlib.import_module(NEEDS["lora"])
    linear = {name: p for name, p in model.named_parameters() if is_linear(name, p)}
    trained = [p for name, p in model.named_parameters() if name not in linear]
    rank = adapter_rank(linear.values(), run.rank)
    names = [name.removesuffix(".weight") for name in linear]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    model = peft.inject_adapter_in_model(config, model)
    for parameter in trained:  # peft has frozen all that is not an adapter
        parameter.requires_grad_(True)
    return model


def adapter_rank(matrices: Iterable[nn.Parameter], rank: int | float) -> int:
    """The rank at which adapters have about as many numbers as compact gradients of `rank`."""
    matrices = list(matrices)
    compact = sum(rows(each, rank) * max(each.shape) for each in matrices)
    return max(1, round(compact / sum(sum(each.shape) for each in matrices)))


@cache
def text(source: str) -> Corpus:
    if source == "reference":
        return language_reference()
    if source == "large":
        return every_text([Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc")])
    return load(source)


def every_text(roots: Iterable[Path]) -> Corpus:
    """The texts under several folders, one file in twelve held out, up to a limit."""
    train, held_out, kept = bytearray(), bytearray(), 0
    for path in (path for root in roots for path in sorted(root.rglob("*"))):
        if not SKIPPED.isdisjoint(path.parts) or not path.is_file():
            continue
        if b"\0" in (each := path.read_bytes()) or len(train) + len(held_out) > LARGE_LIMIT:
            continue
        part = held_out if kept % HELD_OUT_EVERY == 0 else train
        part += each
        kept += 1
    return Corpus(as_tensor(train), as_tensor(held_out))


def train_once(run: Run, folder: Path) -> dict:
    """The result of a run: a line of results.jsonl. Saved weights go to, and come from, `folder`.

    Held-out losses are of the same windows in every run; the curve's of a quarter as many.
    """
    started = time.perf_counter()
    gc.collect()  # of the run before: compiled models are in cycles, and may fill a GPU
    parts = model, _, _ = set_up(run, folder)
    corpus = text(run.data)

    def evaluate(text: Corpus, batches: int) -> float:
        window = {"batch": run.windows // 8, "seq": run.seq, "device": run.device}
        return held_out_loss(model, text.held_out, batches=batches, **window)

    marks = {round(run.steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
    curve, losses = [(0, evaluate(corpus, 2))] if run.start else [], []
    for record in training(replace(run, eval_every=run.steps), corpus, parts):
        losses.append(record["loss"])
        if record["step"] in marks:
            curve.append((record["step"], evaluate(corpus, 2)))
    result = {"key": run.key, "run": asdict(run), "held_out": evaluate(corpus, 8), "curve": curve}
    result["train"] = statistics.fmean(losses[-20:])
    result["finite"] = all(map(math.isfinite, losses))
    if run.start:
        result["old_text"] = evaluate(text(run.old_data), 8)
    if run.keep:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / f"{run.key}.pt")
    return result | {"seconds": time.perf_counter() - started}
