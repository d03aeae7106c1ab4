"""One run of the lab: its settings, and how it trains."""

import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import lab_data
import lab_lookups as lookups
import lab_methods as methods
from data import Batches, cut
from grass_fx.config import RULES, WARMUP_STEPS, GrassConfig
from grass_fx.state.subspace import Subspace
from lab_halves import Halves
from lab_model import SIZES, build, copied, split

WARM_UP, FLOOR = 0.05, 0.1  # of the steps, and of the rates
CURVE = 10  # points of the training loss
FIRST = 25  # steps of the shortest period that grows
EQUAL_STEPS = 45
EQUAL = {"float32": 1e-3, "bfloat16": 5e-2}  # at most: products differ by their order of summation


@dataclass(frozen=True)
class Job:
    """Everything that defines a run, and with it the place of its result."""

    data: str
    """The text, as lab_data names it; the tokens are its own."""
    text: str = ""
    """Another text to train on, in the tokens of the first."""
    size: str = "3.7m"
    steps: int = 600
    batch: int = 4
    seq: int = 128
    windows: int = 64
    """Held-out batches."""
    method: str = "adamw"
    lr: float = 8e-3
    """Of embedding, norms and head."""
    linear_lr: float = 1e-3
    """Of the blocks' matrices."""
    scale: float = 1.0
    """grass: its compact updates have this times the linear rate."""
    rank: float = 0.0
    """The part of the columns that grass selects, or peers project to; 0: full gradients."""
    refresh_every: int = 100
    mlp_rank: float = 0.0
    """The rank of the MLP's matrices, if it is not that of the others; every matrix has the scale
    of its own rank then."""
    head_scale: float = 0.0
    """If above 0, grass takes the head, too, at this times the linear rate."""
    selection: str = "cyclic"
    """"halves": see lab_halves. By another rule the real backend selects and projects, since norms
    of inputs are its own."""
    warm_up: int = WARMUP_STEPS
    """Steps in which the updates of new columns grow to full."""
    beta2: float = 0.999
    eps: float = 1e-8
    rest_scale: float = 0.0
    """Columns that are not selected move by this times the linear rate, against their signs."""
    rest_every: int = 1
    """In every so many steps."""
    grow: float = 0.0
    """If above 0, columns are drawn again when a turn of all of them has taken this part of the
    steps so far, and not every `refresh_every` steps."""
    rest_kind: str = ""
    """By what: see lab_methods.Rest."""
    micro_batches: int = 1
    """In so many parts a batch is read, where rest_kind is about them."""
    products: str = "float32"
    """What matrices are multiplied in; "bfloat16" is autocast's, and slow on older processors."""
    dtype: str = "float32"
    """Of the parameters that optimizers step. bfloat16: with stochastic rounding."""
    rounding: str = ""
    """Of float32 parameters, by simulation: see lab_methods."""
    start: str = ""
    """The key of the run whose weights it starts from."""
    save: bool = False
    seed: int = 0
    compiler: str = "inductor"
    tied: bool = False
    """Whether the head is the embedding."""
    lookups: str = ""
    """How the embedding is stepped: see lab_lookups. "": as the norms, from full gradients."""
    lookup_rank: float = 0.25
    lookup_scale: float = 1.0
    """Its rate is this times ``lr``."""
    lookup_every: int = 100

    @property
    def settings(self) -> dict:
        """Those that are not the defaults: a new one leaves the keys of old runs as they are."""
        return {
            each.name: value
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default
        }

    @property
    def grass(self) -> bool:
        return self.rank > 0 and self.method not in methods.PEERS

    @property
    def subspace(self) -> dict:
        """What grass is given for the matrices that it takes."""
        given: dict = {name: getattr(self, name) for name in ("rank", "refresh_every", "seed")}
        given["selection"] = "top" if self.selection == "halves" else self.selection
        if self.mlp_rank:
            given["rank"] = {"*mlp*": self.mlp_rank, "*": self.rank}
        return given

    @property
    def adamw(self) -> dict:
        """What AdamW is given beside its rates, where it is not torch's default."""
        given: dict = {}
        if self.beta2 != Job.beta2:
            given["betas"] = (0.9, self.beta2)
        if self.eps != Job.eps:
            given["eps"] = self.eps
        if self.grass and self.warm_up != Job.warm_up:
            given["warmup_steps"] = self.warm_up
        return given

    @property
    def key(self) -> str:
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_of(job: Job) -> str:
    """The size, and what is unusual about how it trains."""
    parts = [job.size]
    if job.start:
        parts.append("fine-tuning")
    if job.dtype != "float32":
        parts.append(job.dtype)
    if job.batch != Job.batch:
        parts.append(f"{job.batch * job.seq} tokens a step")
    if job.products != "float32":
        parts.append(f"products in {job.products}")
    return ", ".join(parts)


@cache
def text_of(job_data: str, job_text: str, vocab: int, cache: Path) -> lab_data.Text:
    return lab_data.load(job_text or job_data, job_data, vocab, cache)


class Training:
    """A run under way.

    The model is in float32. If parameters are to be in bfloat16, the optimizers step copies in
    bfloat16, which the model then reads.
    """

    def __init__(self, job: Job, out: Path, real: bool = False) -> None:
        """`real`: with the grass backend, in place of compact gradients that are made here."""
        self.job, self.dtype = job, getattr(torch, job.dtype)
        self.text = text_of(job.data, job.text, SIZES[job.size].vocab, out / "texts")
        self.model = build(job.size, job.seed, job.tied)
        if job.start:
            self.model.load_state_dict(torch.load(weights_file(out, job.start)))
        self.read = dict(self.model.named_parameters())
        self.stepped = self.read
        if self.dtype != torch.float32:
            self.stepped = {name: nn.Parameter(p.to(self.dtype)) for name, p in self.read.items()}
            self.read_again()
        linear, dense = split(self.stepped)
        if job.head_scale:
            linear[methods.HEAD] = dense.pop(methods.HEAD)
        scale = "auto" if job.mlp_rank else job.scale
        rates = methods.Rates(job.lr, job.linear_lr, scale, job.rest_scale, job.head_scale)
        looked_up = {name: dense.pop(name) for name in ["embed.weight"] if job.lookups}
        if peer := methods.PEERS.get(job.method):
            of = linear, dense, rates, job.rank, job.refresh_every
            self.optimizers = methods.projected(peer, *of)
        else:
            self.optimizers = methods.METHODS[job.method](
                linear, dense, rates, job.grass, **job.adamw
            )
        settings = job.lookup_scale, job.lookup_rank, job.lookup_every, job.seed
        for p in looked_up.values():
            self.optimizers.append(lookups.optimizer_of(p, job.lookups, job.lr, *settings))
        self.groups = [group for each in self.optimizers for group in each.param_groups]
        self.rates = [group["lr"] for group in self.groups]
        self.within: dict[str, Subspace] = {}
        if real:
            options = {**job.subspace, "compiler": job.compiler}
            options["exclude"] = [] if job.head_scale else ["head*"]
            options["rest"] = "sign" if job.rest_scale else "none"
            given = {"backend": "grass", "options": options}
        else:
            given = {"backend": job.compiler}
            if job.grass:
                self.within = methods.subspaces(linear, GrassConfig(**job.subspace))
        self.compiled = torch.compile(self.model, **given, dynamic=False)
        self.halves = Halves(self.model, self.within) if job.selection == "halves" else None
        self.rest = (
            methods.Rest(self.within, job.rest_kind) if job.rest_scale and not real else None
        )
        self.rounding = None
        if job.rounding:
            self.rounding = methods.Rounding(job.rounding, self.stepped, job.seed)
        self.ends = set(growing(job.steps, job.grow * job.rank)) if job.grow else set()
        self.batches = Batches(self.text.train, job.batch, job.seq, 1000 + job.seed)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.job.products == "bfloat16"):
            return self.compiled(tokens, targets)

    def step(self, number: int) -> float:
        factor = schedule(number, self.job.steps)
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        due = self.rest and number % self.job.rest_every == 0
        loss, count = 0.0, self.job.micro_batches
        batch = next(self.batches)
        scores = self.halves.scores(*batch) if self.halves else {}
        for part in zip(*(t.chunk(count) for t in batch), strict=True):
            own = self.loss(*part) / count
            own.backward()
            loss += own.item()
            if due:
                self.rest.keep(self.read)
        votes = self.rest.votes if self.rest else {}
        for name, p in self.read.items():
            of = self.within.get(name), votes.get(name), scores.get(name)
            methods.give(p, self.stepped[name], *of)
        before = {name: subspace.selection.indices for name, subspace in self.within.items()}
        if self.job.grow:
            methods.end_period(self.within, number + 1 in self.ends)
        with warnings.catch_warnings():
            if not self.job.grass:  # grass_fx.AdamW steps full gradients where it is to round
                warnings.filterwarnings("ignore", "no compact gradient")
            for optimizer in self.optimizers:
                optimizer.step()
        if self.rest:
            rate = self.job.rest_scale * self.job.linear_lr * factor
            self.rest.step(self.stepped, rate, before)
        if self.rounding:
            self.rounding.step(before, self.within)
        self.read_again()
        for p in (*self.read.values(), *self.stepped.values()):
            p.grad = None
        return loss

    @torch.no_grad()
    def read_again(self) -> None:
        if self.stepped is not self.read:
            for name, p in self.read.items():
                p.copy_(self.stepped[name])

    def held_out(self) -> float:
        """Mean nats per token of evenly spaced windows, the same in all runs."""
        held, job = self.text.held_out, self.job
        starts = torch.linspace(0, len(held) - job.seq - 1, job.batch * job.windows).long()
        parts = (cut(held, part, job.seq, "cpu") for part in starts.split(job.batch))
        return statistics.fmean(self.loss(*part).item() for part in parts)


def growing(steps: int, part: float) -> Iterator[int]:
    """The steps after which a period ends, each as long as a part of the steps before it."""
    end = FIRST
    while end < steps:
        yield end
        end += max(FIRST, round(part * end))


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    turn = math.cos(math.pi * (step - warm_up) / (steps - warm_up))
    return FLOOR + (1 - FLOOR) * (1 + turn) / 2


def weights_file(out: Path, key: str) -> Path:
    return out / "weights" / f"{key}.pt"


def train(job: Job, out: Path) -> dict:
    """The result of a run. `seconds` are of this thread's processor: others may use the machine."""
    started = time.process_time()
    run = Training(job, out, real=job.selection in RULES and job.selection != "cyclic")
    result = {"key": job.key, "job": job.settings, "text": job.text or job.data}
    if job.start:
        result["before"] = run.held_out()
    losses = []
    for number in range(job.steps):
        losses.append(run.step(number))
        if not math.isfinite(losses[-1]):
            break
    finite = math.isfinite(losses[-1])
    result["held_out"] = run.held_out() if finite else None
    result["copied"] = round(copied(run.model, run.text.held_out, job.seq), 3) if finite else None
    part = max(1, job.steps // CURVE)
    parts = [losses[k : k + part] for k in range(0, len(losses), part)]
    result["train"] = [round(statistics.fmean(part), 4) for part in parts] if finite else []
    if job.save:
        file = weights_file(out, job.key)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(run.model.state_dict(), file)
    return result | {"seconds": round(time.process_time() - started, 1)}


def compare(job: Job, out: Path) -> dict:
    """Train some steps by the real backend and by the lab; raises if they differ."""
    job = replace(job, steps=min(job.steps, EQUAL_STEPS))
    runs = [Training(job, out, real) for real in (True, False)]
    apart = [abs(a - b) for a, b in ([run.step(k) for run in runs] for k in range(job.steps))]
    assert runs[1].within and not runs[0].within
    start = dict(build(job.size, job.seed).named_parameters())
    ways = []  # of each matrix from where it started: how far they end apart, as a part of it
    for name, first in split(start)[0].items():
        real, lab = (run.read[name] for run in runs)
        ways.append(((real - lab).norm() / (real - first).norm()).item())
    # The sign of a gradient that is nearly zero follows the order of a sum.
    most = EQUAL[job.products] * (10 if job.rest_scale else 1)
    if not max(*apart, *ways) <= most:
        raise AssertionError(
            f"the lab and the real backend differ: losses by {max(apart):.2g}, weights by "
            f"{max(ways):.2g} of their way. Then nothing that the lab finds is about grass."
        )
    return {"key": "equal", "job": job.settings, "losses": max(apart), "weights": max(ways)}
