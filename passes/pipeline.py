"""The one object that Inductor gets: our joint-graph passes, and whatever the user put there."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

import grass_fx
from grass_fx._torch_compat import CustomGraphPass, input_position
from grass_fx.passes.push_norms import push_norms_pass
from grass_fx.passes.push_selection import push_selection_pass

log = logging.getLogger(__name__)

Stage = Callable[[str, fx.Graph], None]


@dataclass
class PushReport:
    """Per weight: pushed below its matmul, or why not. Empty after a warm cache: no pass ran."""

    pushed: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)


@cache
def source_hash() -> str:
    """A hash of every source file of the package, so that no cache outlives a change of it."""
    root = Path(grass_fx.__file__).parent
    passes = Path(__file__).parent  # beside the package in a checkout, inside it when installed
    files = sorted({*root.rglob("*.py"), *root.rglob("*.jinja"), *passes.glob("*.py")})
    digest = hashlib.sha256(torch.__version__.encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class GrassPasses(CustomGraphPass):
    """Order: 1. ``push_norms``, which may free a gradient of the need to be whole;
    2. ``push_selection``; 3. the passes that the user has configured in Inductor.

    ``indices_of`` names the weight of each indices input, by its position among the inputs;
    ``report`` receives what was pushed. Neither changes what the passes do to a graph.
    """

    def __init__(
        self,
        report: PushReport,
        indices_of: Mapping[int, str],
        users: tuple[Callable[[fx.Graph], None], ...] = (),
        stage: Stage | None = None,
    ) -> None:
        self.report, self.indices_of, self.users, self.stage = report, indices_of, users, stage

    def __call__(self, graph: fx.Graph) -> None:
        start, count = time.perf_counter(), len(graph.nodes)
        if self.stage is not None:
            self.stage("joint", graph)
        push_norms_pass(graph)
        result = push_selection_pass(graph)
        for indices in result.pushed:
            self.report.pushed.append(self._name(indices))
        for indices, reason in result.stopped.items():
            self.report.stopped[self._name(indices)] = reason
        if self.stage is not None:
            self.stage("pushed", graph)
        log.debug(
            "push_selection: %d pushed, %d stopped, %d -> %d nodes, %.1f ms",
            len(result.pushed),
            len(result.stopped),
            count,
            len(graph.nodes),
            1e3 * (time.perf_counter() - start),
        )
        for user_pass in self.users:
            user_pass(graph)

    def _name(self, indices: fx.Node) -> str:
        position = input_position(indices)
        return indices.name if position is None else self.indices_of.get(position, indices.name)

    def uuid(self) -> Any:
        """Everything the passes depend on: our sources, torch, and the user's passes.

        No option of ours is in it, because no pass on the joint graph reads one: what the options
        decide is in the graph already. None (no caching) if a user's pass has no uuid.
        """
        ids = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self.users]
        if any(i is None for i in ids):
            return None
        return hashlib.sha256(json.dumps([source_hash(), *map(repr, ids)]).encode()).hexdigest()
