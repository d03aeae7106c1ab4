"""What a pass may know besides its graph, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from grass_fx.config import GrassConfig
from grass_fx.passes.signature import Signature, Variant


@dataclass(frozen=True)
class DynamoFacts:
    """For passes on the graph of Dynamo, which run once per compilation or variant."""

    config: GrassConfig
    inputs: Sequence[Any]
    """The graph's example inputs."""
    signature: Signature | None = None
    """Of the graph that tapping makes, once the weights are known."""
    variant: Variant | None = None


@dataclass(frozen=True)
class JointFacts:
    """For passes on the joint graph of AOTAutograd. All of it is part of the caches' key."""

    with_scores: bool = False
    """The selection rule needs scores."""
    reshards: bool = False
    """Sharded parameters are to be gathered again in the backward."""
    disabled: tuple[str, ...] = ()
    """The option ``disable_passes``."""


@dataclass
class Result:
    """What a pass did."""

    rewritten: list[fx.Node] = field(default_factory=list)
    """What was rewritten: for each pass its docstring says which nodes stand for it."""
    stopped: dict[fx.Node, str] = field(default_factory=dict)
    """What was not, and why: slower, and still right."""
    note: str = ""
    """More for the log."""

    @property
    def count(self) -> int:
        """How many rewrites."""
        return len(self.rewritten)
