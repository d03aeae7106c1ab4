"""The passes in their order, and the object for Inductor that runs them and then the user's."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import fx

from grass_fx._torch_compat import CustomGraphPass, copy_dynamo_graph, look_at_joint_graph
from grass_fx.compile.sources import source_hash
from grass_fx.config import GrassConfig
from grass_fx.passes.accumulate_lookups import accumulate_lookups_pass
from grass_fx.passes.ask_joint_graph import Answers, ask_joint_graph_pass
from grass_fx.passes.facts import AskFacts, DynamoFacts, JointFacts, Result, TapFacts
from grass_fx.passes.find_linear_weights import FoundWeights, find_linear_weights_pass
from grass_fx.passes.keep_selected import keep_selected_pass
from grass_fx.passes.push_norms import push_norms_pass
from grass_fx.passes.push_selection import push_selection_pass
from grass_fx.passes.push_signs import push_signs_pass
from grass_fx.passes.read_padded import read_padded_pass
from grass_fx.passes.signature import Signature, Variant
from grass_fx.passes.tap_weights import tap_weights_pass


@dataclass(frozen=True)
class Pass:
    """A pass: ``run(graph, facts)`` rewrites the graph and returns a ``Result``.

    ``makes`` is the name of the resulting graph in dumped files. ``when(facts)`` says whether the
    pass is for a graph.
    """

    name: str
    run: Callable[[fx.Graph, Any], Any]
    makes: str = ""
    when: Callable[[Any], bool] = lambda facts: True


FIND = Pass("find_linear_weights", find_linear_weights_pass)
ASK = Pass("ask_joint_graph", ask_joint_graph_pass)
TAP = Pass("tap_weights", tap_weights_pass, makes="tapped")
"""FIND runs on the Dynamo graph, once per compilation. Where that does not tell, ASK runs on its
joint graph, and FIND again. TAP runs on the Dynamo graph, once per variant."""

AOT = Pass("AOTAutograd", lambda graph, facts: Result(), makes="joint")
INDUCTOR = Pass("Inductor", lambda graph, facts: Result())
"""Placeholders, so that observers also see the graph as AOTAutograd made it, and as Inductor's own
passes left it."""

JOINT = (
    AOT,
    Pass("push_norms", push_norms_pass, makes="normed"),
    Pass("push_signs", push_signs_pass, makes="signed", when=lambda f: f.with_signs),
    Pass("push_selection", push_selection_pass, makes="pushed"),
    Pass("accumulate_lookups", accumulate_lookups_pass, "accumulated", lambda f: f.with_lookups),
)
"""Passes on the joint graph of AOTAutograd; they run once per variant. ``push_norms`` and
``push_signs`` come first, because after them nothing may need a full gradient any more."""

LATE = (
    INDUCTOR,
    Pass("keep_selected", keep_selected_pass, makes="kept", when=lambda f: not f.with_scores),
    Pass("read_padded", read_padded_pass, makes="padded"),
)
"""Passes on the same graph after Inductor's own passes, which pad matrix products. Inductor pads
none of the products that ``push_selection`` and ``keep_selected`` make, because it does not know
them, or not yet."""


@dataclass(frozen=True)
class Event:
    """What observers see: a pass has run, or ``disable_passes`` left it out."""

    by: Pass
    result: Result
    seconds: float = 0.0
    disabled: bool = False


class Observer(Protocol):
    """Logs, dumps and ``explain`` are observers: they see every graph of a run, and change none."""

    def __call__(self, graph: fx.Graph, event: Event) -> None: ...


def apply(graph_pass: Pass, graph: fx.Graph, facts: Any, observers: Sequence[Observer]) -> Any:
    """Run one pass, tell the observers, and return its result."""
    start = time.perf_counter()
    result = graph_pass.run(graph, facts)
    event = Event(graph_pass, result, time.perf_counter() - start)
    for observer in observers:
        observer(graph, event)
    return result


def find(
    gm: fx.GraphModule, facts: DynamoFacts, observers: Sequence[Observer] = ()
) -> FoundWeights:
    """The linear weights of a Dynamo graph; where it does not tell, its joint graph is asked."""
    found: FoundWeights = apply(FIND, gm.graph, facts, observers)
    if not found.unknown:
        return found
    answers: list[Answers] = []
    asked = AskFacts(found.unknown)

    def ask(graph: fx.Graph) -> None:
        answers.append(apply(ASK, graph, asked, observers))

    look_at_joint_graph(copy_dynamo_graph(gm), facts.inputs, ask)
    if not answers:
        return found
    again: FoundWeights = apply(FIND, gm.graph, replace(facts, answers=answers[0].of), observers)
    for name, reason in again.left.items():
        if again.positions[name] in answers[0].of:
            again.left[name] = f"{found.left[name]}; {reason}"
    return again


def tapped(
    gm: fx.GraphModule, facts: TapFacts, observers: Sequence[Observer] = ()
) -> tuple[fx.GraphModule, Sequence[Any]]:
    """A tapped copy of a Dynamo graph, and its example inputs."""
    copy = copy_dynamo_graph(gm)
    inputs = apply(TAP, copy.graph, facts, observers).inputs
    copy.recompile()
    return copy, inputs


class Prepared(NamedTuple):
    """A tapped copy of a Dynamo graph, and what its further compilation needs."""

    found: FoundWeights
    signature: Signature
    variant: Variant
    graph: fx.GraphModule
    inputs: Sequence[Any]
    facts: JointFacts


def prepare(
    gm: fx.GraphModule, inputs: Sequence[Any], config: GrassConfig, scoring: bool = False
) -> Prepared:
    """Find and tap the weights of a Dynamo graph for one variant; ``scoring`` if a rule scores."""
    found = find(gm, DynamoFacts(config, inputs))
    signature = Signature(found.taken, len(inputs))
    variant = Variant(scoring=scoring and signature.with_scores)
    graph, extended = tapped(gm, TapFacts(config, inputs, signature, variant))
    facts = JointFacts.of(config, signature)
    return Prepared(found, signature, variant, graph, extended, facts)


def run(
    passes: Sequence[Pass], graph: fx.Graph, facts: JointFacts, observers: Sequence[Observer]
) -> None:
    """Run the passes that are for this graph, in their order."""
    for graph_pass in passes:
        if graph_pass.name in facts.disabled:
            for observer in observers:
                observer(graph, Event(graph_pass, Result(), disabled=True))
        elif graph_pass.when(facts):
            apply(graph_pass, graph, facts, observers)


class GrassPasses(CustomGraphPass):
    """Runs ``passes`` and then ``users``, the passes that the user has configured in Inductor.

    Besides the graph, the passes depend only on ``facts``. ``observers`` change nothing.
    """

    def __init__(
        self,
        facts: JointFacts,
        observers: Sequence[Observer] = (),
        users: tuple[Callable[[fx.Graph], None], ...] = (),
        passes: Sequence[Pass] = JOINT + LATE,
    ) -> None:
        self.facts, self.observers, self.users, self.passes = facts, observers, users, passes

    def __call__(self, graph: fx.Graph) -> None:
        run(self.passes, graph, self.facts, self.observers)
        for user_pass in self.users:
            user_pass(graph)

    def uuid(self) -> Any:
        """A hash of everything the passes depend on: our sources, torch, facts, users' passes.

        Other options need not enter, because their effects are in the graph already. The result is
        None (no caching) if a pass of the user has no uuid.
        """
        ids = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self.users]
        if any(i is None for i in ids):
            return None
        names = [each.name for each in self.passes]
        parts = [source_hash(), repr(self.facts), names, *map(repr, ids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
