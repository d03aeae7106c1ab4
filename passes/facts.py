"""The inputs of a pass besides its graph, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from grass_fx.config import GrassConfig
from grass_fx.passes.signature import Signature, Variant


@dataclass(frozen=True)
class DynamoFacts:
    """Inputs of the pass that finds weights in the Dynamo graph, once per compilation."""

    config: GrassConfig
    inputs: Sequence[Any]
    """The graph's example inputs."""


@dataclass(frozen=True)
class TapFacts(DynamoFacts):
    """Inputs of the pass that taps them, once per variant."""

    signature: Signature
    """The signature of the tapped graph."""
    variant: Variant


@dataclass(frozen=True)
class JointFacts:
    """Inputs of passes on the joint graph of AOTAutograd. All of them are part of cache keys."""

    with_scores: bool = False
    """Whether the selection rule needs scores."""
    disabled: tuple[str, ...] = ()
    """The option ``disable_passes``."""
    with_signs: bool = False
    """Whether the option ``rest`` wants signs."""
    with_lookups: bool = False
    """The option ``lookups``."""

    @classmethod
    def of(cls, config: GrassConfig) -> JointFacts:
        """The facts of graphs that are compiled with these options."""
        signs = config.rest != "none"
        return cls(config.needs_scores, config.disable_passes, signs, config.lookups)


@dataclass
class Result:
    """The result of a pass."""

    rewritten: list[fx.Node] = field(default_factory=list)
    """One node for each rewrite; the docstring of a pass says which nodes these are."""
    stopped: dict[fx.Node, str] = field(default_factory=dict)
    """Node -> why it was not rewritten. The graph is then slower, but still correct."""
    note: str = ""
    """Additional text for the log."""

    @property
    def count(self) -> int:
        """The number of rewrites."""
        return len(self.rewritten)
