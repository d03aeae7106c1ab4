"""The inputs of a pass besides its graph, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from grass_fx.config import GrassConfig
from grass_fx.passes.linear_uses import Use
from grass_fx.passes.signature import Signature, Variant


@dataclass(frozen=True)
class DynamoFacts:
    """Inputs of the pass that finds weights in the Dynamo graph, once per compilation."""

    config: GrassConfig
    inputs: Sequence[Any]
    """The graph's example inputs."""
    answers: Mapping[int, Answer] = field(default_factory=dict)
    """What the joint graph says of weights, by their positions among the inputs."""


@dataclass
class Answer:
    """What the joint graph says of one weight."""

    uses: list[Use] = field(default_factory=list)
    """The products that make its gradient."""
    stops: dict[int, str] = field(default_factory=dict)
    """Dimension -> why no selection along it reaches such products."""


@dataclass(frozen=True)
class AskFacts:
    """Inputs of the pass that asks a joint graph."""

    asked: Mapping[int, Mapping[int, int]]
    """Position of a weight -> dimension -> the number of rows that would be selected."""


@dataclass(frozen=True)
class TapFacts:
    """Inputs of the pass that taps them, once per variant."""

    config: GrassConfig
    inputs: Sequence[Any]
    """The graph's example inputs."""
    signature: Signature
    """The signature of the tapped graph."""
    variant: Variant


@dataclass(frozen=True)
class JointFacts:
    """Inputs of passes on the joint graph of AOTAutograd. All of them are part of cache keys."""

    with_scores: bool = False
    """Whether the selection rule of any of its weights needs norms of the gradient."""
    disabled: tuple[str, ...] = ()
    """The option ``disable_passes``."""
    with_signs: bool = False
    """Whether the option ``rest`` wants signs."""
    with_lookups: bool = False
    """The option ``lookups``."""

    @classmethod
    def of(cls, config: GrassConfig, signature: Signature) -> JointFacts:
        """The facts of graphs that are compiled with these options and weights."""
        signs = config.rest != "none"
        with_scores = any(weight.spec.scores == "gradient" for weight in signature.weights)
        return cls(with_scores, config.disable_passes, signs, config.lookups)


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
