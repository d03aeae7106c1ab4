"""The bytes of each part of a training step, summed over a model's parameters."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from grass_fx.config import GrassConfig
from grass_fx.inspect.candidates import Candidate
from grass_fx.inspect.cost import MOMENTS, LinearCost


@dataclass(frozen=True)
class Setting:
    """How gradients live, and how many processes share everything."""

    in_backward: bool
    gpus: int


def layer_of(name: str) -> str:
    """A parameter's layer: "layers.3" for "layers.3.mlp.up.weight"; without a number, its name."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name


def measure(
    parameters: list[Candidate], config: GrassConfig, moments: int, setting: Setting
) -> tuple[dict[str, int], dict[str, LinearCost]]:
    """The bytes of each part, without buffers and activations, and the taken weights' costs."""
    taken: dict[str, LinearCost] = {}
    compact, dense, signs, scores = 0, 0, 0, 0
    together, weights = Counter[str](), Counter[str]()
    compact_state = dense_state = inputs = 0
    temporary = [0]
    for p in parameters:
        cost = p.cost(config, moments)
        layer = layer_of(p.name)
        weights[layer] += cost.weight_bytes
        if p.candidate and (rank := config.of(p.name).rank_of(cost.selected)) <= cost.selected:
            cost = taken[p.name] = replace(cost, r=rank)
            compact += cost.gradient_bytes
            together[layer] += cost.gradient_bytes + cost.sign_bytes
            signs += cost.sign_bytes
            compact_state += cost.state_bytes
            inputs += cost.graph_input_bytes
            scores += cost.score_bytes
        elif p.trains:
            dense += cost.full_gradient_bytes
            together[layer] += cost.full_gradient_bytes
            dense_state += cost.full_state_bytes
            temporary.append(cost.weight_bytes)
    n = setting.gpus
    if setting.in_backward:  # a graph's gradients exist together, and are freed before the next's
        gradients = {"gradients of a layer": max(together.values(), default=0)}
    else:
        gradients = {"compact gradients": -(-compact // n), "dense gradients": -(-dense // n)}
        if config.signs_every:
            gradients["signs"] = -(-signs // n)
    parts = {
        "weights": -(-weights.total() // n),
        **gradients,
        "compact state": -(-compact_state // n),
        "dense state": -(-dense_state // n),
        "selections": inputs,
    }
    if n > 1:  # two layers are gathered, and all that is in no layer; one gradient is not reduced
        root = sum(size for name, size in weights.items() if not name[-1:].isdigit())
        layers = [size for name, size in weights.items() if name[-1:].isdigit()]
        parts["gathered weights"] = 2 * max(layers, default=0) + root
        if not setting.in_backward:
            parts["gradients of a layer"] = max(together.values(), default=0)
    if any(cost.scoring for cost in taken.values()):
        transient = max((cost.scoring_transient_bytes for cost in taken.values()), default=0)
        parts["scoring step"] = transient + scores
    if taken and moments == MOMENTS["adamw"]:  # what a step of the dense weights makes and frees
        parts["optimizer step"] = -(-max(sum(temporary), 2 * max(temporary)) // n)
    return parts, taken


def with_activations(parts: dict[str, int], activations: dict[str, int]) -> dict[str, int]:
    """All parts. Activations are gone when the optimizer's temporary tensors are there."""
    temporary = parts.pop("optimizer step", 0) - sum(activations.values())
    more = {"optimizer step": temporary} if temporary > 0 else {}
    return {**parts, **{name: size for name, size in activations.items() if size}, **more}
