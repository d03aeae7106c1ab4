"""One small model, and how it trains under a backend and an optimizer: see compile_uses.py."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame

from grass_fx.state.gradient import CompactGrad

SIZE, TOKENS = 8, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass
class World:
    """A backend and an optimizer, and one model that trains with them."""

    how: dict[str, Any]
    """Arguments of torch.compile."""
    make: Callable[..., torch.optim.Optimizer]
    force: Any
    """What set_stance(force_backend=...) takes to the same end."""
    compact: list[int] = field(default_factory=list)
    """How many of the four matrices had a compact gradient, each step."""
    done: int = 0

    def start(self) -> "World":
        torch._dynamo.reset()
        eval_frame._EXAMPLE_INPUTS = None  # what was called before, which a reset leaves
        torch.manual_seed(0)
        self.model = Model().double()
        self.optimizer = self.make(self.model.parameters(), lr=1e-2)
        return self

    def compile(self, what: Any = None, **more: Any) -> Any:
        return torch.compile(self.model if what is None else what, **{**self.how, **more})

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def batch(self, tokens: int = TOKENS) -> torch.Tensor:
        gen = torch.Generator().manual_seed(self.done)
        return torch.randn(tokens, SIZE, generator=gen, dtype=torch.float64)

    def loss(self, call: Any, x: torch.Tensor) -> torch.Tensor:
        return (call(x) - x.flip(-1)).square().mean()

    def steps(self, backward: Any, steps: int = 7, tokens: Any = lambda k: TOKENS, **step) -> list:
        """Losses of steps whose gradients ``backward(x)`` makes; it returns the loss."""
        losses = []
        for k in range(steps):
            self.optimizer.zero_grad()
            losses.append(backward(self.batch(tokens(k))).item())
            grads = [p.grad for p in self.parameters() if p.dim() == 2]
            self.compact.append(sum(isinstance(g, CompactGrad) for g in grads))
            step.get("step", self.optimizer.step)()
            self.done += 1
        return losses

    def train(self, call: Any, steps: int = 7, **more: Any) -> list[float]:
        def backward(x):
            loss = self.loss(call, x)
            loss.backward()
            return loss

        return self.steps(backward, steps, **more)


@dataclass
class Use:
    run: Callable[[World], list[float]]
    compact: int
    """Of the four matrices, how many have compact gradients in every step but dense ones."""
    plain: bool
    """Whether it is the plain training: the same losses as without the use."""
    quick: bool
    """In the ordinary suite."""
    why: str
    """Where it is not all four and not the plain training: the reason."""
    differs: str
    """Why its losses at full rank are not the ordinary optimizer's."""
    warns: str | None
    rounding: float
    """How near its losses come to those."""


USES: dict[str, Use] = {}


def use(why="", compact=4, quick=False, differs="", warns=None, rounding=1e-10):
    def add(run):
        plain = not why and not differs
        USES[run.__name__] = Use(run, compact, plain, quick, why, differs, warns, rounding)
        return run

    return add


def under(*contexts, quick=False):
    """The plain training while these configurations are set."""

    def run(w):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return w.train(w.compile())

    return Use(run, 4, True, quick, "", "", None, 1e-10)
