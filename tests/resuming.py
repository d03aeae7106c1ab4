"""One process of tests/test_resume.py: trains every case and saves, or resumes what was saved.

python resuming.py whole DIRECTORY      # trains to the end, saving after every step
python resuming.py resumed DIRECTORY    # from each checkpoint to the end; prints what differs
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import grass_fx
from helpers import Captured, mlp

STEPS, K = 8, 3
SAVED = (
    1,
    2,
    3,
    4,
    5,
)  # between two refreshes, before and on one, for rules with scores and without
RULES = [
    ("cyclic", False), ("uniform", False), ("uniform", True), ("multinomial_norm", False),
    ("multinomial_norm", True), ("multinomial_norm_sq", False), ("multinomial_norm_sq", True),
    ("top", False), ("frozen_top", False),
]  # fmt: skip
# Every rule with the first of them; the others with a rule of each sort.
KINDS = ("schedule", "rounding", "scaler", "wrapped", "two groups")
SORTS = [("cyclic", False), ("multinomial_norm", True), ("top", False)]


@dataclass(frozen=True)
class Case:
    kind: str
    rule: str
    replacement: bool

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.rule}{'-replacement' if self.replacement else ''}"


CASES = [Case(kind, *rule) for kind in KINDS for rule in (RULES if kind == KINDS[0] else SORTS)]


class Run:
    """A training run of one case: model, optimizer, schedule and scaler, and how far it is."""

    def __init__(self, case: Case, backend: Captured, seed: int) -> None:
        torch.manual_seed(seed)
        self.case, self.done = case, 0
        # 300 rows: their indices do not fit into bfloat16.
        self.model = mlp(6, 300, 4)
        if case.kind == "rounding":
            self.model.to(torch.bfloat16)
        self.compiled = torch.compile(self.model, backend=backend)
        params: list = list(self.model.named_parameters())
        if case.kind == "wrapped":
            make = grass_fx.subspace(torch.optim.AdamW)
            self.optimizer = make(params, lr=1e-2, warmup_steps=2)
        else:
            if case.kind == "two groups":
                params = [{"params": params[:2], "lr": 1e-3}, {"params": params[2:]}]
            rounds = case.kind == "rounding"
            self.optimizer = grass_fx.AdamW(
                params, lr=1e-2, warmup_steps=2, stochastic_rounding=rounds
            )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def micro_batch(self, number: int) -> None:
        gen = torch.Generator().manual_seed(10 * self.done + number)
        dtype = self.model[0].weight.dtype
        x, y = (torch.randn(5, n, generator=gen).to(dtype) for n in (6, 4))
        scaled = self.case.kind == "scaler"
        with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
            loss = (self.compiled(x) - y).float().square().mean() / 2
        if scaled and self.done == 3:
            loss = loss * float("inf")  # a step that is skipped
        (self.scaler.scale(loss) if scaled else loss).backward()

    def step(self) -> None:
        """Two micro-batches, clipping, a step, and what follows it."""
        for number in (0, 1):
            self.micro_batch(number)
        scaled = self.case.kind == "scaler"
        if scaled:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer) if scaled else self.optimizer.step()
        if scaled:
            self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.done += 1

    def parts(self) -> dict:
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "scaler")}

    def save(self, path: Path) -> None:
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**states, "done": self.done}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.done = saved["done"]


def backend_of(case: Case) -> Captured:
    options = {"rank": 0.25, "refresh_every": K, "side": "out"}
    return Captured(selection=case.rule, replacement=case.replacement, **options)


def whole(case: Case, folder: Path) -> None:
    run = Run(case, backend_of(case), seed=0)
    for _ in range(STEPS):
        run.step()
        if run.done in SAVED:
            if run.done == SAVED[2]:  # in the middle of an accumulation, which is then begun anew
                run.micro_batch(0)
                run.save(folder / f"{case.name}-{run.done}.pt")
                run.optimizer.zero_grad()
            else:
                run.save(folder / f"{case.name}-{run.done}.pt")
    torch.save(run.model.state_dict(), folder / f"{case.name}-end.pt")


def resumed(case: Case, folder: Path) -> None:
    backend = backend_of(case)
    end = torch.load(folder / f"{case.name}-end.pt", weights_only=True)
    for done in SAVED:
        run = Run(case, backend, seed=done)
        run.load(folder / f"{case.name}-{done}.pt")
        while run.done < STEPS:
            run.step()
        same = all(torch.equal(end[k], v) for k, v in run.model.state_dict().items())
        print(case.name, done, "identical" if same else "DIFFERENT", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        torch._dynamo.reset()
        {"whole": whole, "resumed": resumed}[sys.argv[1]](case, Path(sys.argv[2]))
