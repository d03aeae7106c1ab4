"""The calling convention of a tapped graph: which inputs tapping adds, and in which order.

They follow the graph's own inputs, weight by weight. :data:`ROLES` lists them; everything else that
names or orders added inputs asks :class:`Signature`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from grass_fx.state.spec import SubspaceSpec, scale_dtype

T = TypeVar("T")


@dataclass(frozen=True)
class LinearWeight:
    """A parameter that is taken."""

    position: int
    """Its position among the graph's inputs."""
    name: str
    """Its name, relative to the compiled region."""
    shape: tuple[int, ...]
    spec: SubspaceSpec


class Role(NamedTuple):
    """One added input of a weight."""

    name: str
    example: Callable[[SubspaceSpec, Tensor], Tensor]
    """The input's shape, dtype and device, from the weight's spec and value."""
    is_proxy: bool = False
    """A proxy only receives a gradient, and is never read. The others hold the selection."""
    present: Callable[[SubspaceSpec, bool], bool] = lambda spec, with_scores: True
    """Whether a weight has this input, from its spec and whether the rule needs scores."""


def proxy_of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element that claims ``shape``: what receives a gradient and is never read."""
    return torch.empty_strided(tuple(shape), (0,) * len(shape), dtype=dtype, device=device)


def _compact(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return proxy_of(spec.graph_compact_shape(w.shape), w.dtype, w.device)


def _scores(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return proxy_of([spec.rows], torch.float32, w.device)


def _indices(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return torch.empty(spec.indices_shape, dtype=torch.int64, device=w.device)


def _scale(spec: SubspaceSpec, w: Tensor) -> Tensor:
    return torch.empty(spec.indices_shape, dtype=scale_dtype(w.dtype), device=w.device)


ROLES = (
    Role("d", _compact, is_proxy=True),
    Role("e", _scores, is_proxy=True, present=lambda spec, with_scores: with_scores),
    Role("indices", _indices),
    Role("scale", _scale, present=lambda spec, with_scores: spec.replacement),
)
"""d receives the compact gradient C, e the scores s; then σ and, with replacement, ρ."""


class Signature:
    """The added inputs of one graph, behind ``count`` inputs of its own.

    ``weights`` are those that are taken; ``with_scores``: the selection rule needs scores. Both
    variants of a graph have the same signature.
    """

    ROLES: ClassVar[tuple[Role, ...]] = ROLES

    def __init__(self, weights: Sequence[LinearWeight], count: int, with_scores: bool) -> None:
        self.weights, self.count, self.with_scores = tuple(weights), count, with_scores
        self._roles = {
            weight.position: [r for r in self.ROLES if r.present(weight.spec, with_scores)]
            for weight in self.weights
        }
        places = itertools.count(count)
        self._places = {
            position: {role.name: next(places) for role in roles}
            for position, roles in self._roles.items()
        }
        self._are_proxies = [r.is_proxy for roles in self._roles.values() for r in roles]
        self._proxies = [[r.name for r in roles if r.is_proxy] for roles in self._roles.values()]

    def places(self, weight: LinearWeight) -> Mapping[str, int]:
        """Role -> position among the tapped graph's inputs, in their order."""
        return self._places[weight.position]

    def examples(self, weight: LinearWeight, value: Tensor) -> dict[str, Tensor]:
        """Role -> an example of the input, for a weight of that value; proxies need gradients."""
        roles = self._roles[weight.position]
        return {r.name: r.example(weight.spec, value).requires_grad_(r.is_proxy) for r in roles}

    def proxies(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The proxies of a call, for weights of these values; weights that are alike share them."""
        shared: dict[Any, list[Tensor]] = {}
        made: list[Tensor] = []
        for weight, w in zip(self.weights, values, strict=True):
            alike = (w.shape, w.dtype, w.device, weight.spec.dim, weight.spec.rank)
            if alike not in shared:
                proxies = (role for role in self._roles[weight.position] if role.is_proxy)
                shared[alike] = [role.example(weight.spec, w) for role in proxies]
            made += shared[alike]
        return made

    def added(self, proxies: Sequence[Tensor], selections: Sequence[Sequence[Tensor]]) -> list[Any]:
        """The added inputs of a call: its proxies, and each weight's [σ] or [σ, ρ], in order."""
        proxy, selected = iter(proxies), itertools.chain.from_iterable(selections)
        return [next(proxy if is_proxy else selected) for is_proxy in self._are_proxies]

    def split(self, per_proxy: Sequence[T]) -> Iterator[dict[str, T]]:
        """For each weight, role -> what belongs to its proxy, such as the gradient."""
        values = iter(per_proxy)
        for names in self._proxies:
            yield {name: next(values) for name in names}


class Variant(NamedTuple):
    """Which graph of a compilation this is."""

    scoring: bool = False
    """A scoring step's, which yields scores too."""
    local: bool = False
    """A micro-batch's, whose gradients are averaged over processes afterwards."""

    @property
    def name(self) -> str:
        """As logs and dumped files call it."""
        return ("scoring" if self.scoring else "regular") + ("_local" if self.local else "")


REGULAR = Variant()
