"""The passes in their order, and the one object that Inductor gets: ours, then the user's own."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from grass_fx._torch_compat import CustomGraphPass, copy_dynamo_graph
from grass_fx.compile.sources import source_hash
from grass_fx.passes.facts import DynamoFacts, JointFacts, Result
from grass_fx.passes.find_linear_weights import find_linear_weights_pass
from grass_fx.passes.keep_selected import keep_selected_pass
from grass_fx.passes.push_norms import push_norms_pass
from grass_fx.passes.push_selection import push_selection_pass
from grass_fx.passes.recompute_gathers import recompute_gathers_pass
from grass_fx.passes.tap_weights import tap_weights_pass


@dataclass(frozen=True)
class Pass:
    """One pass: ``run(graph, facts)`` rewrites the graph and says what it did.

    ``makes`` is what dumped files call the graph behind it. ``when`` says for which graphs it is.
    """

    name: str
    run: Callable[[fx.Graph, Any], Any]
    makes: str = ""
    when: Callable[[Any], bool] = lambda facts: True


FIND = Pass("find_linear_weights", find_linear_weights_pass)
TAP = Pass("tap_weights", tap_weights_pass, makes="tapped")
"""On the graph of Dynamo: FIND once per compilation, TAP once per variant."""

JOINT = (
    Pass("push_norms", push_norms_pass, makes="normed"),
    Pass("push_selection", push_selection_pass, makes="pushed"),
    Pass("recompute_gathers", recompute_gathers_pass, when=lambda facts: facts.reshards),
    Pass("keep_selected", keep_selected_pass, makes="kept", when=lambda f: not f.with_scores),
)
"""On the joint graph of AOTAutograd, once per variant. ``push_norms`` is first because it may free
a gradient of the need to be whole; ``keep_selected`` goes by what ``push_selection`` made."""

AOT = Pass("AOTAutograd", lambda graph, facts: Result(), makes="joint")
"""What makes the graph that JOINT gets, as observers are told of it."""


@dataclass(frozen=True)
class Step:
    """What observers are told of: a pass has run, or was left out by ``disable_passes``."""

    by: Pass
    result: Result
    seconds: float = 0.0
    disabled: bool = False


class Observer(Protocol):
    """Logs, dumps, ``explain``: each sees every graph of a run, and changes none."""

    def __call__(self, graph: fx.Graph, step: Step) -> None: ...


def apply(each: Pass, graph: fx.Graph, facts: Any, observers: Sequence[Observer]) -> Any:
    """Run one pass, tell the observers, and return its result."""
    start = time.perf_counter()
    result = each.run(graph, facts)
    step = Step(each, result, time.perf_counter() - start)
    for observer in observers:
        observer(graph, step)
    return result


def tapped(
    gm: fx.GraphModule, facts: DynamoFacts, observers: Sequence[Observer] = ()
) -> tuple[fx.GraphModule, Sequence[Any]]:
    """A tapped copy of a Dynamo graph, and its example inputs."""
    copy = copy_dynamo_graph(gm)
    inputs = apply(TAP, copy.graph, facts, observers).inputs
    copy.recompile()
    return copy, inputs


def run(
    passes: Sequence[Pass], graph: fx.Graph, facts: JointFacts, observers: Sequence[Observer]
) -> None:
    """Run those of ``passes`` that are for this graph, in their order."""
    apply(AOT, graph, facts, observers)
    for each in passes:
        if each.name in facts.disabled:
            for observer in observers:
                observer(graph, Step(each, Result(), disabled=True))
        elif each.when(facts):
            apply(each, graph, facts, observers)


class GrassPasses(CustomGraphPass):
    """:data:`JOINT` and then ``users``, the passes that the user has configured in Inductor.

    ``facts`` are all that the passes go by besides the graph. ``observers`` change nothing.
    """

    def __init__(
        self,
        facts: JointFacts,
        observers: Sequence[Observer] = (),
        users: tuple[Callable[[fx.Graph], None], ...] = (),
    ) -> None:
        self.facts, self.observers, self.users = facts, observers, users

    def __call__(self, graph: fx.Graph) -> None:
        run(JOINT, graph, self.facts, self.observers)
        for user_pass in self.users:
            user_pass(graph)

    def uuid(self) -> Any:
        """A hash of everything the passes depend on: our sources, torch, the facts, the user's.

        What other options decide is in the graph already. None (no caching) if a user's pass has no
        uuid.
        """
        ids = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self.users]
        if any(i is None for i in ids):
            return None
        parts = [source_hash(), repr(self.facts), *map(repr, ids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
