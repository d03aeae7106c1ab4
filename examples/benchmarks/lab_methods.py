"""The lab's contenders: how each method steps the parameters of a run.

A method is an optimizer of the blocks' matrices. Without a rank it takes their full gradients; with
one, grass has it step r columns of each at a time, but for peers, which project. Whatever else
trains is stepped by AdamW.

    adamw   torch.optim.AdamW; with a rank grass_fx.AdamW
    adamw8bit   torchao's AdamW8bit; with a rank grass_fx.subspace of it
    sgd     torch.optim.SGD with momentum 0.9; with a rank grass_fx.subspace of it
    muon    torch.optim.Muon, its updates as large as AdamW's; with a rank grass_fx.subspace of it
    galore, apollo   the packages' own, from full gradients, of that rank (peer_optimizers.py)
    lora    W0 + s B A of that rank, A and B by AdamW (lab_lora.py)

grass runs by the project's own subspaces, compact gradients and optimizers. Only the compact
product of its graph is replaced, by columns of the full gradient, so that no method needs a graph
of its own: `lab.py` asserts that both train alike. A new contender is a function in `METHODS`.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import grass_fx
from grass_fx import CompactGrad
from grass_fx.config import GrassConfig
from grass_fx.ops import pack
from grass_fx.optim.rounding import round_stochastically, rounding_seed
from grass_fx.state.gradient.votes import Votes
from grass_fx.state.registry import registry
from grass_fx.state.spec import SubspaceSpec
from grass_fx.state.subspace import Subspace
from lab_lora import LoRA
from peer_optimizers import MODULES, apollo, galore, galore_groups

Parameters = Mapping[str, nn.Parameter]

HEAD = "head.weight"


@dataclass(frozen=True)
class Rates:
    """Of one run; the schedule multiplies all of them."""

    dense: float
    linear: float
    scale: float | str
    """Of the compact update, whose rate is `scale` times the linear one."""
    rest: float = 0.0
    """Of other columns, whose rate is this times the linear one."""
    head: float = 0.0
    """Of the head where grass takes it: this times the linear one."""


def adamw(
    linear: Parameters, dense: Parameters, rates: Rates, grass: bool, **more
) -> list[Optimizer]:
    blocks = [p for name, p in linear.items() if name != HEAD]
    groups = [{"params": list(dense.values())}, {"params": blocks, "lr": rates.linear}]
    if HEAD in linear:
        groups.append({"params": [linear[HEAD]], "lr": rates.head * rates.linear})
    settings = {"lr": rates.dense, "weight_decay": 0.0, **more}
    if next(iter(dense.values())).dtype == torch.bfloat16:  # rounds the dense step as well
        grassy = {"scale": rates.scale, "rest_scale": rates.rest}
        return [grass_fx.AdamW(groups, **settings, **grassy, stochastic_rounding=True)]
    if grass:
        grassy = {"scale": rates.scale, "rest_scale": rates.rest}
        return [grass_fx.AdamW(groups, **settings, **grassy, fused=True)]
    return [torch.optim.AdamW(groups, **settings, fused=True)]


def beside_adamw(
    inner: type[Optimizer], linear: Parameters, dense: Parameters, rates: Rates, grass: bool, **more
) -> list[Optimizer]:
    """`inner` for the blocks' matrices."""
    rest = torch.optim.AdamW(dense.values(), lr=rates.dense, weight_decay=0.0, fused=True)
    settings = {"lr": rates.linear, "weight_decay": 0.0, **more}
    if grass:
        settings |= {"scale": rates.scale, "rest_scale": rates.rest}
        optimizer = grass_fx.subspace(inner)(linear.values(), **settings)
    else:
        optimizer = inner(linear.values(), **settings)
    return [rest, optimizer]


def in_8_bits(*of) -> list[Optimizer]:
    """torchao's AdamW8bit for the blocks' matrices."""
    return beside_adamw(importlib.import_module(MODULES["adamw8bit"]).AdamW8bit, *of)


def projected(
    peer: Callable[..., Optimizer],
    linear: Parameters,
    dense: Parameters,
    rates: Rates,
    rank: float,
    refresh_every: int,
) -> list[Optimizer]:
    """One of the PEERS, which step all parameters."""
    named = {**dense, **linear}.items()
    groups = galore_groups(named, rank, lambda name, p: name in linear, refresh_every)
    for group in groups:
        if "rank" in group:
            group["lr"] = rates.linear
    return [peer(groups, lr=rates.dense, weight_decay=0.0, eps=1e-8)]


PEERS = {"galore": galore, "apollo": apollo, "lora": LoRA}

METHODS: dict[str, Callable[..., list[Optimizer]]] = {
    "adamw": adamw,
    "adamw8bit": in_8_bits,
    "sgd": partial(beside_adamw, torch.optim.SGD, momentum=0.9),
    "muon": partial(beside_adamw, torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
}


def subspaces(linear: Parameters, config: GrassConfig) -> dict[str, Subspace]:
    """What a grass graph would ask for; the optimizers must exist."""
    specs = [SubspaceSpec.of(config.of(name), p.shape[1], 1, "in") for name, p in linear.items()]
    found = registry.demand(list(linear.values()), specs, list(linear))
    return dict(zip(linear, found, strict=True))


def give(
    read: nn.Parameter,
    stepped: nn.Parameter,
    subspace: Subspace | None,
    votes: Votes | None,
    scores: Tensor | None = None,
) -> None:
    """Give the parameter that is stepped its gradient: a compact one, as of a grass graph, within a
    subspace. `read` may be the same parameter. `scores`: in place of the gradient's own."""
    full, dtype = read.grad, stepped.dtype
    if subspace is None:
        stepped.grad = full if full is None else full.to(dtype)
        return
    assert full is not None
    selection = subspace.selection
    if subspace.scoring_due and scores is None:
        scores = full.square().sum(0)
    compact = selection.project(full).to(dtype)
    stepped.grad = None
    more = {"owner": subspace, "votes": votes}
    stepped.grad = CompactGrad(compact, selection, stepped.shape, scores, **more)
    subspace.delivered = True


def end_period(within: Mapping[str, Subspace], ends: bool) -> None:
    """Say whether columns are drawn again after the next step."""
    for subspace in within.values():
        subspace.spec = replace(subspace.spec, refresh_every=1 if ends else math.inf)


class Rest:
    """What tells of the columns that are not selected.

    ""      the signs that most micro-batches have; grass_fx.AdamW steps by them
    last    the signs of the last micro-batch; likewise
    rms     the gradient over its column's root mean square, as 8 bits could carry it; by simulation
    """

    def __init__(self, within: Mapping[str, Subspace], kind: str) -> None:
        self.within, self.kind = within, kind
        self.so_far, self.changes = dict[str, Tensor](), dict[str, Tensor]()
        self.votes = dict[str, Votes]()

    def keep(self, read: Parameters) -> None:
        """After each backward of a step: gradients are sums."""
        for name in self.within:
            total = read[name].grad.clone()
            own = total - self.so_far.get(name, 0)
            self.so_far[name] = total
            if self.kind == "rms":
                rms = total.square().mean(0, keepdim=True).sqrt()
                self.changes[name] = total / (rms + 1e-12)
                continue
            votes = Votes((pack(own),))
            if self.kind != "last" and name in self.votes:
                votes = self.votes[name].plus(votes)
            self.votes[name] = votes

    @torch.no_grad()
    def step(self, stepped: Parameters, rate: float, selected: Mapping[str, Tensor]) -> None:
        """After an optimizer's step with the selections ``selected``."""
        for name, change in self.changes.items():
            stepped[name].sub_(change.index_fill(1, selected[name], 0), alpha=rate)
        for kept in (self.so_far, self.changes, self.votes):
            kept.clear()


class Rounding:
    """Keeps float32 parameters at values that bfloat16 has: weights in bfloat16, by simulation.

    nearest, stochastic   how the result of every step is rounded
    low bits              as stochastic, but the selected columns of the blocks' matrices stay as
                          the step leaves them: what bfloat16 drops is kept beside the moments.
                          They are rounded when they leave the selection

    Moments stay in float32 in all of them. (The model multiplies a selected column by all of it.)
    """

    def __init__(self, how: str, parameters: Parameters, seed: int) -> None:
        self.how, self.parameters = how, parameters
        self.seed, self.drawn = seed, 0
        for p in parameters.values():
            p.data.copy_(p.data.bfloat16())

    @torch.no_grad()
    def step(self, before: Mapping[str, Tensor], within: Mapping[str, Subspace]) -> None:
        """After an optimizer's step with the selections `before`."""
        for name, p in self.parameters.items():
            if self.how != "low bits" or name not in within:
                p.copy_(self.rounded(p))
                continue
            old, new = before[name], within[name].selection.indices
            if new is not old:
                left = old[~torch.isin(old, new)]
                p[:, left] = self.rounded(p[:, left])

    def rounded(self, values: Tensor) -> Tensor:
        if self.how == "nearest":
            return values.bfloat16().float()
        self.drawn += 1
        return round_stochastically(values, rounding_seed(self.seed, 0, self.drawn)).float()
