"""Bytes of activations before training: by a formula, or by tracing a model that has no data.

A step holds what the forward saves for the backward. With layers that are checkpointed one by one
it holds each layer's input, and what one layer saves. Attention is counted as one of the kernels
that keep no matrix of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grass_fx.config import GrassConfig
from grass_fx.inspect.explain import explain
from grass_fx.inspect.paper import without_data
from grass_fx.inspect.shapes import Decoder


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of a model of ``layers`` equal layers."""

    layers: int
    layer_input: int
    """Of one layer."""
    layer_full: int
    """What a layer saves at full rank."""
    layer_compact: Callable[[GrassConfig], int]
    """What a layer saves with these options."""
    beside: int
    """What is saved outside of the layers, without logits."""
    logits: int
    """The logits and their gradient."""
    how: str
    """A sentence for the plan."""
    width: int
    """Heads times head_dim."""

    def parts(self, config: GrassConfig | None, checkpointing: bool) -> dict[str, int]:
        """Name of a part -> bytes; ``config`` is None at full rank."""
        layer = self.layer_full if config is None else self.layer_compact(config)
        kept = self.layers * (self.layer_input if checkpointing else layer)
        again = layer if checkpointing else 0
        return {"activations": kept + again + self.beside, "logits": self.logits}


def of_decoder(it: Decoder, tokens: int, itemsize: int) -> Activations:
    """A formula for models of LLaMA's kind, with h, f (ffn) and A = heads * head_dim.

    A layer saves 4A + 4h + 3f numbers for each token at full rank: the residual stream and the
    inputs of norms, queries, keys, values and the result of attention, and three of the MLP. With
    grass it saves columns of the inputs that nothing else needs: ρ = r/n of the inputs of q, k, v,
    of gate and up, and of down instead of 2h + f. Each expert that a token uses saves its own MLP.
    """
    wide = it.heads * it.head_dim

    def layer(config: GrassConfig | None) -> int:
        saved = 4 * wide + 2 * it.hidden + 2 * it.used * it.ffn
        if it.experts:  # a token's input and result, in each expert that it uses
            saved += 2 * it.used * it.hidden
        columns = 1.0 if config is None else _share(config, it.hidden)
        inputs = (min(3 * columns, 1) + min(2 * columns, 1)) * it.hidden
        inputs += it.used * it.ffn * (1.0 if config is None else _share(config, it.ffn))
        return int(tokens * itemsize * (saved + inputs))

    size = tokens * itemsize
    return Activations(
        it.layers, size * it.hidden, layer(None), layer, 2 * size * it.hidden, 2 * size * it.vocab,
        f"activations are counted by a formula for {tokens:,} tokens", wide,
    )  # fmt: skip


def _share(config: GrassConfig, size: int) -> float:
    """The part of a layer's input that is saved: ρ, or all where something needs all of it."""
    whole = config.given_by_name or config.side == "out" or config.signs_every
    whole = whole or "gradient" in config.scores
    return 1.0 if whole else min(config.rank_of(size) / size, 1.0)


def traced(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[int, int]:
    """Bytes that the graphs of ``model(*args, **kwargs)`` save: at full rank, and with ``options``.

    The count is that of :func:`grass_fx.explain`, made without data and as on a CPU, whose
    attention saves what a GPU's does. The model may be on any device, also on "meta".
    """
    with without_data(model, args, kwargs) as (paper, drawn, named):
        found = explain(paper, *drawn, options=options, **named)
    before, after = (int(found.evaluated(amount) or 0) for amount in found.activations)
    return before, after


def of_layers(
    build: Callable[[int], nn.Module],
    layers: int,
    sizes: Mapping[str, int],
    batch: tuple[int, int],
    options: Mapping[str, Any],
) -> Activations:
    """The activations of a language model of ``layers`` layers, from models of one and of two.

    ``build`` makes a model of so many layers, on the meta device. ``sizes`` has "hidden", "vocab",
    "itemsize", and "width", heads times head_dim. ``batch`` is (sequences, tokens of each).
    """
    ids = torch.empty(batch, dtype=torch.int64, device="meta")
    one, two = (traced(build(depth), (), {"input_ids": ids}, options) for depth in (1, 2))
    full, compact = (b - a for a, b in zip(one, two, strict=True))
    size = batch[0] * batch[1] * sizes["itemsize"]
    rank = GrassConfig.from_options(options).rank
    return Activations(
        layers, size * sizes["hidden"], full, lambda config: compact, one[0] - full,
        2 * size * sizes["vocab"],
        f"activations are counted by explain, for {batch[0]} x {batch[1]} tokens at rank {rank}",
        sizes["width"],
    )  # fmt: skip
