"""The calling convention of a tapped graph: which inputs tapping adds, and where they stand.

They follow the graph's own inputs, weight by weight. :data:`ROLES` lists them. All other code that
names or orders added inputs uses :class:`Signature`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from grass_fx.ops.bits import packed_shape
from grass_fx.state.spec import SubspaceSpec, scale_dtype


@dataclass(frozen=True)
class LinearWeight:
    """A parameter that gets a compact gradient."""

    position: int
    """Its position among the graph's inputs."""
    name: str
    """Its name, relative to the compiled region."""
    shape: tuple[int, ...]
    spec: SubspaceSpec
    asked: bool = False
    """Whether the joint graph has told that it is linear, and not the Dynamo graph."""


class Role(NamedTuple):
    """A kind of input that tapping adds for a weight."""

    name: str
    example: Callable[[SubspaceSpec, Tensor], Tensor]
    """Makes an input of the right shape, dtype and device from the weight's spec and value."""
    is_proxy: bool = False
    """A proxy only receives a gradient, and is never read. Other inputs hold the selection."""
    present: Callable[[SubspaceSpec], bool] = lambda spec: True
    """Whether a weight with this spec has this input."""


def proxy_of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with one element of memory and this ``shape``; it only receives a gradient."""
    return torch.empty_strided(tuple(shape), (0,) * len(shape), dtype=dtype, device=device)


def _compact(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return proxy_of(spec.compact_shape(w.shape), w.dtype, w.device)


def _scores(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return proxy_of([spec.rows], torch.float32, w.device)


def _bits(spec: SubspaceSpec, w: Tensor) -> Tensor:
    *rows, columns = w.shape  # a stack is like one matrix with the rows of all its matrices
    m, n = math.prod(rows), columns
    shape = packed_shape(m, n) if spec.dim == 1 and w.dim() == 2 else packed_shape(n, m)
    return proxy_of(shape, torch.float32, w.device)


def _indices(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return torch.empty(spec.indices_shape, dtype=torch.int64, device=w.device)


def _scale(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return torch.empty(spec.indices_shape, dtype=scale_dtype(w.dtype), device=w.device)


ROLES = (
    Role("d", _compact, is_proxy=True),
    Role("e", _scores, is_proxy=True, present=lambda spec: bool(spec.scores)),
    Role("b", _bits, is_proxy=True, present=lambda spec: spec.rest > 0),
    Role("indices", _indices),
    Role("scale", _scale, present=lambda spec: spec.replacement),
)
"""d receives the compact gradient C, e the scores s, and b the signs of G, packed as bits. Then
come σ and, with replacement, ρ."""


class Signature:
    """The added inputs of a graph, which follow its own ``count`` inputs.

    ``weights`` are the taken ones. Both variants of a graph have the same signature.
    """

    ROLES: ClassVar[tuple[Role, ...]] = ROLES

    def __init__(self, weights: Sequence[LinearWeight], count: int) -> None:
        self.weights = tuple(weights)
        self.with_scores = any(weight.spec.scores for weight in self.weights)
        self._roles = {
            weight.position: [r for r in self.ROLES if r.present(weight.spec)]
            for weight in self.weights
        }
        places = itertools.count(count)
        self._places = {
            position: {role.name: next(places) for role in roles}
            for position, roles in self._roles.items()
        }
        self._are_proxies = [r.is_proxy for roles in self._roles.values() for r in roles]
        order = itertools.count()
        self.proxy_places = [
            {r.name: next(order) for r in roles if r.is_proxy} for roles in self._roles.values()
        ]
        """For each weight, role -> place among all proxies."""

    def places(self, weight: LinearWeight) -> Mapping[str, int]:
        """Role -> position among the tapped graph's inputs, in the order of positions."""
        return self._places[weight.position]

    def examples(self, weight: LinearWeight, value: Tensor) -> dict[str, Tensor]:
        """Role -> an example of the input for a weight with this value; proxies need gradients."""
        roles = self._roles[weight.position]
        return {r.name: r.example(weight.spec, value).requires_grad_(r.is_proxy) for r in roles}

    def proxies(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The proxies of a call for weights with these values; similar weights share them."""
        shared: dict[Any, list[Tensor]] = {}
        all_proxies: list[Tensor] = []
        for weight, w in zip(self.weights, values, strict=True):
            spec = weight.spec
            roles = tuple(role for role in self._roles[weight.position] if role.is_proxy)
            alike = (w.shape, w.dtype, w.device, spec.dim, spec.rank, roles)
            if alike not in shared:
                shared[alike] = [role.example(weight.spec, w) for role in roles]
            all_proxies += shared[alike]
        return all_proxies

    def added(self, proxies: Sequence[Tensor], selections: Sequence[Sequence[Tensor]]) -> list[Any]:
        """The added inputs of a call: its proxies, and each weight's [σ] or [σ, ρ], in order."""
        proxy, selected = iter(proxies), itertools.chain.from_iterable(selections)
        return [next(proxy if is_proxy else selected) for is_proxy in self._are_proxies]


class Variant(NamedTuple):
    """Which of the up to two graphs of a compilation it is; processes, and signs in some steps,
    double their number."""

    scoring: bool = False
    """Whether the graph is for scoring steps and also yields scores."""
    local: bool = False
    """Whether its gradients are averaged over processes only afterwards (micro-batches)."""
    signing: bool = False
    """Whether it yields the signs of gradients, where not every graph does (``rest_every``)."""

    @property
    def name(self) -> str:
        """The name in logs and dumped files."""
        kind = "scoring" if self.scoring else "regular"
        return kind + ("_signing" if self.signing else "") + ("_local" if self.local else "")


REGULAR = Variant()
