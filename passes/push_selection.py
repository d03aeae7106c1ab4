"""Push each selection of a joint graph down to the matmul that makes the weight gradient."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx

from grass_fx.ops import SELECT
from grass_fx.passes.push import Push, make_early
from grass_fx.passes.push_rules import COLLECTIVES, RULES
from grass_fx.passes.push_stack_rules import STACK_RULES


@dataclass
class PushResult:
    """What became of a joint graph's selections."""

    pushed: list[fx.Node] = field(default_factory=list)
    """The ``indices`` nodes of the selections that reached every matmul below them."""
    stopped: dict[fx.Node, str] = field(default_factory=dict)
    """``indices`` node -> why a selection stayed above something: slower, and still right."""

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return bool(self.pushed)


def push_selection_pass(graph: fx.Graph) -> PushResult:
    """Replace ``select`` of a full weight gradient by the product of what it selects.

    Before::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm = torch.ops.aten.mm.default(permute, x)                 # G = DᵀX, (m, n)
        select = torch.ops.grass.select.default(mm, indices, scale, 0)

    After::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        selected_mm = torch.ops.grass.selected_mm.default(permute, x, indices, scale, 0)

    The product stands where its factors are made. ``select`` is linear and moves through the
    operations of ``push_rules.RULES`` (equations 2 and 3 of docs/method.md). It stops, and is left
    there with its reason, at a node of another kind and at one whose full value is needed anyway
    (the scores of a scoring step). Graphs without a selection, inference graphs among them, stay as
    they are.
    """
    result = PushResult()
    for select in graph.find_nodes(op="call_function", target=SELECT):
        g, indices, scale, dim, *block = cast("tuple[Any, ...]", select.args)
        make_early(select)
        rules = RULES if indices.meta["val"].dim() == 1 else STACK_RULES
        push = Push(rules, graph, select, indices, scale, block)
        try:
            new = push.below(g, dim, select)
        except RecursionError:
            new = None
            push.stops.append("its gradient is made by more operations than can be followed")
        if push.stops:
            result.stopped[indices] = "; ".join(push.stops)
        else:
            result.pushed.append(indices)
        if new is not None:
            if any(user.target in COLLECTIVES for user in select.users):
                new = push.contiguous(new)
            select.replace_all_uses_with(new)
            _erase_unused(graph, select)
    return result


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` and what only it used."""
    waiting, gone = [node], set()
    while waiting:
        node = waiting.pop()
        parts = [user for user in node.users if user.target is operator.getitem and not user.users]
        for part in parts:
            graph.erase_node(part)
        if node in gone or node.users or node.op != "call_function":
            continue
        gone.add(node)
        waiting += node.all_input_nodes
        graph.erase_node(node)
