"""The lab's model: the examples' LLaMA with attention written out.

The CPU's fused attention compiles slowly, and in bfloat16 it is slow as well. Written out, one
compiled graph serves all runs of a size and dtype: the parameters are its inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Attention, Config, LLaMA

SIZES = {
    "smoke": Config(vocab=300, hidden=64, ffn=176, layers=1, heads=2),
    "0.7m": Config(vocab=1024, hidden=128, ffn=344, layers=2, heads=4),
    "8k": Config(vocab=8192, hidden=128, ffn=344, layers=2, heads=4),
    "3.7m": Config(vocab=1024, hidden=256, ffn=688, layers=4, heads=4),
}


class WrittenOut(Attention):
    """The same attention: scores, mask, softmax in float32."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v


def build(size: str, seed: int, tied: bool = False) -> LLaMA:
    torch.manual_seed(seed)
    config = SIZES[size]
    model = LLaMA(config)
    for block in model.layers:
        block.attention = WrittenOut(config)
    if tied:
        model.head.weight = model.embed.weight
    model.initialise()
    return model


Parameters = dict[str, nn.Parameter]


def split(parameters: Parameters) -> tuple[Parameters, Parameters]:
    """The matrices in the blocks, and whatever else trains: embedding, norms and head."""
    linear = {n: p for n, p in parameters.items() if p.dim() == 2 and n.startswith("layers.")}
    return linear, {name: p for name, p in parameters.items() if name not in linear}


@torch.no_grad()
def copied(model: nn.Module, text: Tensor, length: int) -> float:
    """By how many nats per token unrelated tokens of a text are easier when they come again: what a
    model has learnt of copying from its window."""
    drawn, half = torch.Generator().manual_seed(0), length // 2
    once = text[torch.randint(len(text), (64, half), generator=drawn)].long()
    twice = torch.cat((once, once), 1)
    logits = model(twice[:, :-1]).float()
    losses = F.cross_entropy(logits.transpose(1, 2), twice[:, 1:], reduction="none")
    return (losses[:, : half - 1].mean() - losses[:, half:].mean()).item()
