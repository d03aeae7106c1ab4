"""Observers of the passes: a log of what each pass did, and a report about each weight."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from grass_fx._torch_compat import input_position
from grass_fx.passes.pipeline import AOT, ASK, INDUCTOR, Event

log = logging.getLogger(__name__)

DISABLED = "the option disable_passes leaves push_selection out"
NORMS_DISABLED = "the option disable_passes leaves push_norms out"


class PassLog:
    """Logs a line for each pass: the operations it removed and added, and its time.

    ``what`` names the graph. ``before`` is the graph that the first pass gets; passes of
    :data:`~grass_fx.passes.pipeline.JOINT` do not need it.
    """

    def __init__(self, what: str, before: fx.Graph | None = None) -> None:
        self._what, self._before = what, _operations(before)

    def __call__(self, graph: fx.Graph, event: Event) -> None:
        if not log.isEnabledFor(logging.DEBUG):
            return
        took = 1e3 * event.seconds
        if event.by is ASK:  # of another graph, which it leaves as it is
            log.debug("%s: %.1f ms (%s)", event.by.name, took, event.result.note)
            return
        before, self._before = self._before, _operations(graph)
        if event.by in (AOT, INDUCTOR):
            return
        if event.disabled:
            log.debug("%s: disabled (%s)", event.by.name, self._what)
            return
        fewer, more = before - self._before, self._before - before
        changes = [f"-{count} {name}" for name, count in sorted(fewer.items())]
        changes += [f"+{count} {name}" for name, count in sorted(more.items())]
        note = ", ".join(filter(None, (self._what, event.result.note)))
        log.debug(
            "%s: %s, %.1f ms (%s)", event.by.name, ", ".join(changes) or "no change", took, note
        )


def _operations(graph: fx.Graph | None) -> Counter[str]:
    """The number of each operation in a graph; empty if it would not be logged."""
    if graph is None or not log.isEnabledFor(logging.DEBUG):
        return Counter()
    return Counter(_operation(node) for node in graph.nodes if node.op != "output")


def _operation(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target) if node.op == "call_method" else node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


@dataclass
class PushReport:
    """Which selections were pushed below their matmul, and why the others were not.

    It is empty if a graph came from the cache, since no pass ran. ``names`` has each weight's name
    by the position of its indices among the graph's inputs.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    pushed: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    scored_by_gradient: dict[str, str] = field(default_factory=dict)
    """With the rule input_norm: weights that are scored by norms of gradients, and why."""

    def of_norms(self, graph: fx.Graph, event: Event) -> None:
        """Observe how a scoring variant takes norms."""
        if event.by.name == "push_norms":
            if event.disabled:
                self.scored_by_gradient.update(dict.fromkeys(self.names.values(), NORMS_DISABLED))
            stopped = event.result.stopped.items()
            self.scored_by_gradient.update({self._name(k): why for k, why in stopped})

    def __call__(self, graph: fx.Graph, event: Event) -> None:
        """Observe a run of the passes."""
        if event.by.name not in ("push_signs", "push_selection"):
            return
        if event.disabled and event.by.name == "push_selection":
            self.stopped.update(dict.fromkeys(self.names.values(), DISABLED))
        self.pushed += map(self._name, event.result.rewritten)
        self.stopped.update({self._name(k): why for k, why in event.result.stopped.items()})

    def _name(self, indices: fx.Node) -> str:
        position = input_position(indices)
        return indices.name if position is None else self.names.get(position, indices.name)
