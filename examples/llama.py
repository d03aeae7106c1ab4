"""A readable LLaMA, small enough to train on a laptop and shaped like the real ones.

RMSNorm before each half of a block, rotary positions, causal attention, SwiGLU, an output head of
its own and no biases: every matrix in a block is a plain linear weight, which is what grass-fx
takes. `build("tiny")` is the demo's model, `build("7b")` has the shape of the published one.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of a LLaMA. The vocabulary is bytes unless a size says otherwise."""

    vocab: int = 256
    hidden: int = 128
    ffn: int = 344
    layers: int = 2
    heads: int = 4
    max_seq: int = 512


SIZES = {
    "smoke": Config(hidden=64, ffn=176, layers=1, heads=2),  # only to see that everything runs
    "tiny": Config(hidden=192, ffn=512, layers=2, heads=6),
    "bench": Config(hidden=512, ffn=1376, layers=4, heads=8),
    # The shapes used for pre-training in the papers on GaLore and Grass ...
    "60m": Config(32000, hidden=512, ffn=1376, layers=8, heads=8, max_seq=1024),
    "130m": Config(32000, hidden=768, ffn=2048, layers=12, heads=12, max_seq=1024),
    "350m": Config(32000, hidden=1024, ffn=2736, layers=24, heads=16, max_seq=1024),
    "1b": Config(32000, hidden=2048, ffn=5461, layers=24, heads=32, max_seq=1024),
    # ... and those of LLaMA itself.
    "7b": Config(32000, hidden=4096, ffn=11008, layers=32, heads=32, max_seq=2048),
    "13b": Config(32000, hidden=5120, ffn=13824, layers=40, heads=40, max_seq=2048),
}


def rotary_tables(length: int, width: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, width): one angle per position and per pair of channels."""
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i together with channel i + width/2 by their position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.wq = nn.Linear(config.hidden, config.hidden, bias=False)
        self.wk = nn.Linear(config.hidden, config.hidden, bias=False)
        self.wv = nn.Linear(config.hidden, config.hidden, bias=False)
        self.wo = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        # (batch, length, hidden) -> (batch, heads, length, hidden / heads)
        q, k, v = (
            project(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = self.attend(q, k, v)
        return self.wo(y.transpose(1, 2).reshape(batch, length, hidden))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class SwiGLU(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class LLaMA(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        cos, sin = rotary_tables(config.max_seq, config.hidden // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal with deviation 0.02, smaller for the matrices that write into the residual
        stream, so that its variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # the norms stay at one
                writes_residual = name.endswith(("wo.weight", "down.weight"))
                depth = 2 * self.config.layers if writes_residual else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocab), or the mean cross entropy in nats given targets."""
        x = self.embed(tokens)
        length = tokens.shape[1]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build(size: str = "tiny", **overrides: int) -> LLaMA:
    """A model of a named size; fields of `Config` may be overridden, `build("7b", layers=2)`."""
    return LLaMA(replace(SIZES[size], **overrides))
