"""LoRA in the lab (arXiv 2106.09685): W = W0 + s B A, of which A and B alone train.

No model is changed for it: the gradients follow from W's, dA = s Bᵀ dW and dB = s dW Aᵀ.
"""

import math

import torch
from torch import Tensor

SCALING = 2.0
"""s, the α/r of most recipes."""


class LoRA(torch.optim.AdamW):
    """AdamW of A (r, n) and B (m, r) for each matrix (m, n) of a group with a "rank"; of all else
    as it is. A begins as torch's linear layers do, and B at zero. All matrices are float32."""

    def __init__(self, groups: list[dict], **settings) -> None:
        generator = torch.Generator().manual_seed(0)
        self.factors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        own = []
        for group in groups:
            if "rank" not in group:
                own.append(group)
                continue
            within = []
            for w in group["params"]:
                a, bound = torch.empty(group["rank"], w.shape[1]), 1 / math.sqrt(w.shape[1])
                a.uniform_(-bound, bound, generator=generator)
                b = torch.zeros(w.shape[0], group["rank"])
                within += [a, b]
                self.factors.append((w, w.detach().clone(), a, b))
            own.append({"params": within, "lr": group["lr"]})
        super().__init__(own, **settings)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for w, _, a, b in self.factors:
            a.grad, b.grad = SCALING * b.T @ w.grad, SCALING * w.grad @ a.T
        super().step(closure)
        for w, start, a, b in self.factors:
            w.copy_(torch.addmm(start, b, a, alpha=SCALING))
