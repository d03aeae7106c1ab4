"""The lab's contenders for an embedding, tied to a head or not.

Few tokens occur in a step, and most are rare. So a method is asked what becomes of rows that have a
gradient once in a while.

    plain     as any other weight: as grass_fx.AdamW steps it in its subspace
    row       one second moment for each row: the mean over its selected columns. It survives a
              refresh, since it belongs to no column
    started   a second moment for each element; that of a new column starts from its row's
    counted   as plain, but a row's moments and age advance only in steps in which it occurs
    signs     as plain, and all other columns move against their signs, as by rest="sign"
    factored  full gradients, by torch.optim.Adafactor: a number of state for each row and column
    frozen    it does not move

`row`, `started` and `counted` are simulations, which are no part of the project.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WARM_UP = 20  # steps of a new column
BETAS, EPS = (0.9, 0.999), 1e-8
REST = 0.25  # of the rate: that of columns that move by signs


class Columns(Optimizer):
    """Steps r columns of one matrix (V, n) at a time, by turns, from its full gradient."""

    def __init__(
        self, p: nn.Parameter, kind: str, lr: float, rank: float, every: int, seed: int
    ) -> None:
        super().__init__([p], {"lr": lr})
        self.p, self.kind, self.every = p, kind, every
        self.turns = self._turns(round(rank * p.shape[1]), seed)
        self.count = 0
        self.of_row = torch.zeros(len(p), 1)

    def _turns(self, rank: int, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(self.p.shape[1], generator=generator).split(rank)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        p, (beta1, beta2) = self.p, BETAS
        if self.count % self.every == 0:
            self.columns = next(self.turns)
            shape = len(p), len(self.columns)
            self.first, self.second = torch.zeros(shape), torch.zeros(shape)
            self.age = torch.zeros(len(p), 1)
            if self.kind == "started":
                self.second += self.of_row
        self.count += 1
        g = p.grad[:, self.columns]
        square = g.square()
        met = torch.ones_like(self.age)
        if self.kind == "counted":
            met = (g != 0).any(1, keepdim=True).to(g.dtype)
        self.age += met
        self.first.lerp_(g, (1 - beta1) * met)
        self.second.lerp_(square, (1 - beta2) * met)
        self.of_row.lerp_(square.mean(1, keepdim=True), 1 - beta2)
        age = self.age.clamp(min=1)
        if self.kind == "row":
            second = self.of_row / (1 - beta2**self.count)
        elif self.kind == "started":
            second = self.second / (1 - beta2**self.count)
        else:
            second = self.second / (1 - beta2**age)
        change = self.first / (1 - beta1**age) / (second.sqrt() + EPS)
        since = 1 + (self.count - 1) % self.every
        rate = self.param_groups[0]["lr"] * min(1.0, since / WARM_UP)
        if self.kind == "signs":
            signs = p.grad.sign().index_fill(1, self.columns, 0)
            p.sub_(signs, alpha=REST * self.param_groups[0]["lr"])
        p[:, self.columns] -= rate * change * met


def optimizer_of(
    p: nn.Parameter, kind: str, lr: float, scale: float, rank: float, every: int, seed: int
) -> Optimizer:
    if kind == "frozen":
        return torch.optim.SGD([p], lr=0.0)
    if kind == "factored":
        return torch.optim.Adafactor([p], lr=lr * scale)
    return Columns(p, kind, lr * scale, rank, every, seed)
