"""Grass as the equations say: full gradients, explicit projections, plain loops, no compiler.
It is slow and short on purpose. It shares only random streams with the library (docs/method.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grass_fx.config import ON_REFRESH, REST_SCALE, SCALE, WARMUP_STEPS, GrassConfig
from grass_fx.state.rules import stream
from grass_fx.testing import rules
from grass_fx.testing.weight import Weight


@dataclass
class Reference:
    """Trains ``model`` as if it were compiled with grass and stepped by grass_fx.AdamW.

    ``taken``: the selected dimension by parameter name. ``torch.optim.AdamW`` steps all others.
    """

    model: nn.Module
    taken: Mapping[str, int]
    config: GrassConfig
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    scale: float | str = SCALE
    warmup_steps: int = WARMUP_STEPS
    on_refresh: str = ON_REFRESH
    maximize: bool = False
    rest_scale: float = REST_SCALE

    def __post_init__(self) -> None:
        self.t, self.weights = 0, dict[str, Weight]()
        for key, (name, p) in enumerate(self.model.named_parameters()):
            if name in self.taken:
                rank = self.config.rank_of(p.shape[dim := self.taken[name]])
                self.weights[name] = Weight(p, dim, key, rank, self.config.block)
                self.refresh(self.weights[name], None)
        self.dense = [p for n, p in self.model.named_parameters() if n not in self.weights]
        settings = {k: getattr(self, k) for k in ("lr", "betas", "eps", "weight_decay", "maximize")}
        self.adamw = torch.optim.AdamW(self.dense, **settings) if self.dense else None

    def step(self, losses: Sequence[Callable[[nn.Module], Tensor]]) -> None:
        """Make one optimizer step on the sum of ``losses``, with one backward for each loss."""
        self.model.zero_grad()
        for weight in self.weights.values():
            weight.compact = weight.scores = weight.signs = None
        for loss in losses:
            for weight in self.weights.values():
                weight.w.grad = None
            loss(self.model).backward()
            for weight in self.weights.values():
                self.gather(weight)
        if self.adamw is not None:
            self.adamw.step()
        self.t += 1
        with torch.no_grad():
            for weight in self.weights.values():
                self.update(weight)
                self.finish(weight)

    def gather(self, weight: Weight) -> None:
        """C += PᵀG and, in a scoring step, s_i += ‖g_i‖²."""
        assert weight.w.grad is not None
        g = weight.turned(weight.w.grad)
        c = weight.p().T @ g
        weight.compact = c if weight.compact is None else weight.compact + c
        weight.signs = g.sign() if weight.signs is None else weight.signs + g.sign()
        due = weight.retry or self.t % self.config.refresh_every == 0
        if self.config.scores and due and not weight.frozen:
            s = g.double().square().sum(1).float()
            weight.scores = s if weight.scores is None else weight.scores + s

    def update(self, weight: Weight) -> None:
        """W[σ] ← (1 − lr λ) W[σ] − lr α P (warm-up · Adam(C)), bias-corrected by each row's age.

        All other rows are multiplied by the product of (1 − lr λ) at the end of a period.
        """
        c, (beta1, beta2) = weight.compact, self.betas
        assert c is not None
        c = -c if self.maximize else c
        first, second = weight.moments or (torch.zeros_like(c), torch.zeros_like(c))
        weight.moments = [beta1 * first + (1 - beta1) * c, beta2 * second + (1 - beta2) * c * c]
        weight.age = [age + 1 for age in weight.age]
        delta = torch.zeros_like(c)
        for j, age in enumerate(weight.age):
            m, v = (weight.moments[k][j] / (1 - self.betas[k] ** age) for k in (0, 1))
            delta[j] = min(1.0, age / (self.warmup_steps or 1)) * m / (v.sqrt() + self.eps)
        w, decay = weight.turned(weight.w), 1 - self.lr * self.weight_decay
        power = 2 / 3 if self.config.signs_every and self.rest_scale else 1
        alpha = (len(w) / weight.rank) ** power if self.scale == "auto" else float(self.scale)
        rest = [row for row in range(len(w)) if row not in weight.rows]
        w[sorted({*weight.rows})] *= decay
        w.sub_(self.lr * alpha * weight.p() @ delta)
        weight.pending *= decay
        due = self.t % self.config.refresh_every == 0
        ends = weight.scores is not None if self.config.scores else due
        signs = self.config.signs_every and (self.t - 1) % self.config.signs_every == 0
        if ends or signs or weight.pending < 1 - 2**-6:
            w[rest] *= weight.pending
            weight.pending = 1.0
        if signs:
            weight.move_rest((-1 if self.maximize else 1) * self.lr * self.rest_scale)

    def finish(self, weight: Weight) -> None:
        """Refresh if a period ends; called between two steps, when ``t`` is already the next."""
        s = weight.scores
        if not self.config.scores:
            if self.t % self.config.refresh_every == 0:
                self.refresh(weight, None)
        elif s is not None:
            weight.retry = not bool(s.isfinite().all()) or not bool((s > 0).any())
            if not weight.retry:
                self.refresh(weight, s)

    def refresh(self, weight: Weight, scores: Tensor | None) -> None:
        """Draw a selection by the rule, or by rule 10 without scores; move the moments along."""
        before, rule = (weight.rows, weight.rho, weight.age, weight.moments), self.config.selection
        gen = stream(self.config.seed, weight.key, weight.period)
        size, block, replacement = weight.w.shape[weight.dim], weight.block, self.config.replacement
        spans = rules.spans(size, block, overlap=replacement)
        total, k, rho = len(spans), weight.rank // block, [1.0] * (weight.rank // block)
        # How many units have each row: a row of two counts half in each.
        shared = [sum(row in span for span in spans) for row in range(size)]
        norms = torch.ones(total, dtype=torch.float64)
        if scores is not None:
            s = [sum(float(scores[row]) / shared[row] ** 2 for row in span) for span in spans]
            norms = torch.tensor(s, dtype=torch.float64).sqrt()
        if scores is None and rule != "uniform":
            units = rules.cyclic(weight.queue, total, k, gen)
        elif rule in rules.POWERS:
            units, rho = rules.multinomial(norms, rules.POWERS[rule], k, replacement, gen)
        else:
            units = rules.top(norms, k, gen)
            weight.frozen = rule == "frozen_top" and int((norms > 0).sum()) >= k
        pairs = sorted(zip(units, rho, strict=True))
        if replacement:
            weight.rows = [row for u, _ in pairs for row in spans[u]]
        else:
            weight.rows = rules.places(spans, [u for u, _ in pairs], block)
        each = [x for _, x in pairs for _ in range(block)]
        weight.rho = [x / shared[row] ** 0.5 for x, row in zip(each, weight.rows, strict=True)]
        weight.period += 1
        weight.carry(*before, keep=self.on_refresh == "carry")
