"""How far each rule's projection is from the gradient, measured beside what theory says.

    python examples/selection_variance.py  # print the numbers, draw the figure of the documentation

The relative error E‖PPᵀG − G‖² / ‖G‖² over many selections, on a gradient with even row norms and
on one of a training step. docs/selection-rules.md has the formulas.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from data import Batches, load
from grass_fx.config import RULES
from grass_fx.state import rules
from llama import build

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "selection-variance.png"
RANKS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176)
UNEVEN = "layers.0.attention.wq.weight"  # of all block weights the one with the least κ/m
# Color, and size of the circles: where two rules agree, both show.
STYLE = {"cyclic": ("#d95f02", 8), "uniform": ("#555555", 4), "multinomial_norm": ("#1f78b4", 4)}
STYLE |= {"multinomial_norm_sq": ("#7b5fb5", 8), "top": ("#1b9e77", 4)}


def measured(rule: str, r: int, replacement: bool, s: Tensor, scores: Tensor) -> float:
    """The mean error of 400 selections by ``scores`` on a gradient of squared row norms ``s``."""
    m, total = s.numel(), 0.0
    order, position, scale = torch.arange(m), m, None
    for number in range(400):
        generator = rules.stream(0, 0, number)
        if rule == "cyclic":
            rows, order, position = rules.cyclic(order, position, r, generator)
        elif rule == "uniform":
            rows, scale = rules.multinomial(torch.ones(m), r, replacement, generator)
        else:
            norms = scores.double().sqrt()
            rows, scale = rules.select_by_norms(RULES[rule], norms, r, replacement, generator)
        weight = torch.ones_like(s[:r]) if scale is None else scale**2
        kept = torch.zeros_like(s).index_add_(0, rows, weight)  # the diagonal of PPᵀ
        total += float(((kept - 1) ** 2 * s).sum() / s.sum())
    return total / 400


def theory(rule: str, r: int, replacement: bool, s: Tensor) -> float:
    """The same by the formulas."""
    q = s ** (RULES[rule].power / 2)
    if replacement:
        return float(((s / q).sum() * q.sum() / s.sum() - 1) / r)
    kept = included(q / q.sum(), r) * s if rule != "top" else s.sort(descending=True).values[:r]
    return float(1 - kept.sum() / s.sum())


def included(q: Tensor, r: int) -> Tensor:
    """How often each row is among r that are drawn one after the other: about 1 − exp(−λq)."""
    low, high = 0.0, 1e7
    for _ in range(100):  # bisection for λ: they add up to r
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - (-middle * q).exp()).sum() < r else (low, middle)
    return 1 - (-low * q).exp()


def squared_norms(steps: int = 40) -> dict[str, list[Tensor]]:
    """s of every block weight of the example LLaMA after some steps: of one batch, and the next."""
    torch.manual_seed(0)
    model = build("tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found, batches = {}, Batches(load().train, batch=16, seq=128, seed=0)
    for step in range(steps + 2):
        optimizer.zero_grad()
        model(*next(batches)).backward()
        if step < steps:
            optimizer.step()
            continue
        for name, p in model.layers.named_parameters(prefix="layers"):
            if p.dim() == 2:
                s = p.grad.double().square().sum(int(p.shape[0] <= p.shape[1]))
                found.setdefault(name, []).append(s)
    return found


def evenness(s: Tensor) -> float:
    """κ/m: 1 if all rows have one norm, 1/m if one row has everything."""
    return float(s.sqrt().sum() ** 2 / s.sum() / s.numel())


def main() -> None:
    real = squared_norms()
    print("κ/m:", *(f"{name} {evenness(s):.2f}" for name, (s, _) in real.items()), sep="\n  ")
    s, other = real[UNEVEN]
    even = torch.randn(192, 512, dtype=torch.float64, generator=rules.stream(0, 0, 0)).square()
    panels = {"even: normal random numbers": even.sum(1), f"uneven: {UNEVEN[:-7]}": s}
    print(f"{'r = 48':<21}replacement  theory measured  uneven: theory measured  other scores")
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams |= {"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.25}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharex=True, sharey="row")
    for row, replacement in enumerate((False, True)):
        for rule in (rule for rule in STYLE if RULES[rule].replacement or not replacement):
            line, (color, size) = f"{rule:<21}{replacement!s:<11}", STYLE[rule]
            for axis, each in zip(axes[row], panels.values(), strict=True):
                found = {r: measured(rule, r, replacement, each, each) for r in RANKS}
                curve = {r: theory(rule, r, replacement, each) for r in range(4, 189, 4)}
                axis.plot(*zip(*curve.items(), strict=True), color=color)
                axis.plot(RANKS, found.values(), "o", mfc="none", ms=size, color=color, label=rule)
                line += f"{curve[48]:>14.3f}{found[48]:>9.3f}"
            print(line + f"{measured(rule, 48, replacement, s, other):>12.3f}")
    for axis, title in zip(axes[0], panels, strict=True):
        axis.set_title(f"{title}, κ/m = {evenness(panels[title]):.2f}", fontsize=10)
    axes[0, 0].set(ylabel="relative error, no replacement", ylim=(0, 1), xlim=(0, 192))
    axes[1, 0].set(ylabel="relative error, with replacement", yscale="log")
    axes[1, 0].set_yticks([0.5, 1, 2, 5, 10, 20, 50], labels=["0.5", 1, 2, 5, 10, 20, 50])
    figure.supxlabel("r, of m = 192 rows", fontsize=9)
    axes[0, 0].set_xticks(range(0, 193, 24))
    axes[0, 1].legend(frameon=False)
    figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
