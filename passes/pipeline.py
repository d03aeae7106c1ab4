"""The one object that Inductor gets: our joint-graph passes, and whatever the user put there."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grass_fx._torch_compat import CustomGraphPass, input_position
from grass_fx.compile.sources import source_hash
from grass_fx.passes.keep_selected import keep_selected_pass
from grass_fx.passes.push_norms import push_norms_pass
from grass_fx.passes.push_selection import push_selection_pass
from grass_fx.passes.recompute_gathers import recompute_gathers_pass

log = logging.getLogger(__name__)

Stage = Callable[[str, fx.Graph, str], None]
"""Receives the name of a stage, its graph, and what made it."""


@dataclass
class PushReport:
    """Per weight: pushed below its matmul, or why not. Empty after a warm cache: no pass ran."""

    pushed: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)


def operations(graph: fx.Graph) -> Counter[str]:
    """How many of each operation a graph has; empty unless it will be logged."""
    if not log.isEnabledFor(logging.DEBUG):
        return Counter()
    return Counter(_operation(node) for node in graph.nodes if node.op != "output")


def _operation(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target) if node.op == "call_method" else node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def log_pass(name: str, before: Counter[str], graph: fx.Graph, start: float, note: str) -> None:
    """One line: the operations that are fewer and more than ``before``, and the time since."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    after = operations(graph)
    fewer, more = sorted((before - after).items()), sorted((after - before).items())
    changes = [f"-{count} {key}" for key, count in fewer] + [
        f"+{count} {key}" for key, count in more
    ]
    took = 1e3 * (time.perf_counter() - start)
    log.debug("%s: %s, %.1f ms (%s)", name, ", ".join(changes) or "no change", took, note)


class GrassPasses(CustomGraphPass):
    """Order: 1. ``push_norms``, which may free a gradient of the need to be whole;
    2. ``push_selection``; 3. ``recompute_gathers``, if ``reshard``; 4. ``keep_selected``, if
    ``keeps``; 5. the passes that the user has configured in Inductor.

    ``indices_of`` names the weight of each indices input, by its position among the inputs;
    ``report`` receives what was pushed, ``stage`` the graphs between the passes, and ``variant`` is
    what the log calls the graph. None of these changes what the passes do to a graph; ``reshard``
    and ``keeps`` do.
    """

    def __init__(
        self,
        report: PushReport,
        indices_of: Mapping[int, str],
        users: tuple[Callable[[fx.Graph], None], ...] = (),
        stage: Stage | None = None,
        variant: str = "regular",
        reshard: bool = False,
        keeps: bool = False,
    ) -> None:
        self.report, self.indices_of, self.users, self.stage = report, indices_of, users, stage
        self.variant, self.reshard, self.keeps = variant, reshard, keeps

    def __call__(self, graph: fx.Graph) -> None:
        self._show("joint", graph, "AOTAutograd")
        start, before = time.perf_counter(), operations(graph)
        changed = push_norms_pass(graph)
        log_pass("push_norms", before, graph, start, self.variant)
        if changed:
            self._show("normed", graph, "push_norms")
        start, before = time.perf_counter(), operations(graph)
        result = push_selection_pass(graph)
        for indices in result.pushed:
            self.report.pushed.append(self._name(indices))
        for indices, reason in result.stopped.items():
            self.report.stopped[self._name(indices)] = reason
        note = f"{self.variant}, {len(result.pushed)} pushed, {len(result.stopped)} stopped"
        log_pass("push_selection", before, graph, start, note)
        self._show("pushed", graph, "push_selection")
        if self.reshard:
            log.debug("recompute_gathers: %d gathered again", recompute_gathers_pass(graph))
        if self.keeps:
            start, before = time.perf_counter(), operations(graph)
            count = keep_selected_pass(graph)
            log_pass("keep_selected", before, graph, start, f"{self.variant}, {count} kept")
            if count:
                self._show("kept", graph, "keep_selected")
        for user_pass in self.users:
            user_pass(graph)

    def _show(self, stage: str, graph: fx.Graph, made_by: str) -> None:
        if self.stage is not None:
            self.stage(stage, graph, made_by)

    def _name(self, indices: fx.Node) -> str:
        position = input_position(indices)
        return indices.name if position is None else self.indices_of.get(position, indices.name)

    def uuid(self) -> Any:
        """Everything the passes depend on: our sources, torch, and the user's passes.

        No option of ours is in it but ``reshard`` and ``keeps``, because no pass on the joint graph
        reads one: what the others decide is in the graph already. None (no caching) if a user's
        pass has no uuid.
        """
        ids = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self.users]
        if any(i is None for i in ids):
            return None
        parts = [source_hash(), self.reshard, self.keeps, *map(repr, ids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
