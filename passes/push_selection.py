"""Push each selection of a joint graph down to the matmul that makes a weight gradient."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from grass_fx.ops import SELECT
from grass_fx.passes.facts import JointFacts, Result
from grass_fx.passes.push import Planned, Push, emit, erase_unused, make_early
from grass_fx.passes.push_lookup_rules import LOOKUP_RULES
from grass_fx.passes.push_rules import COLLECTIVES, RULES
from grass_fx.passes.push_scaled_rules import SCALED_RULES
from grass_fx.passes.push_stack_rules import STACK_RULES

MATRIX_RULES = {**RULES, **LOOKUP_RULES, **SCALED_RULES}
TOO_DEEP = "its gradient is made by more operations than can be followed"


def push_selection_pass(graph: fx.Graph, facts: JointFacts) -> Result:
    """Replace ``select`` of a full weight gradient by a product that computes only those rows.

    Before::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        mm = torch.ops.aten.mm.default(permute, x)                 # G = DᵀX, (m, n)
        select = torch.ops.grass.select.default(mm, indices, scale, 0)

    After::

        permute = torch.ops.aten.permute.default(d, [1, 0])
        selected_mm = torch.ops.grass.selected_mm.default(permute, x, indices, scale, 0)

    The product stands where its factors are made. ``select`` is linear and moves through the
    operations of ``MATRIX_RULES`` (equations 2 and 3 of docs/method.md). It stops at any other
    operation, and at a node whose full value is needed anyway (for the scores of a scoring step);
    there it stays, and the reason is reported. Each path down is planned before the graph changes.
    Graphs without a selection, such as those for inference, stay as they are.

    Rewritten: the ``indices`` nodes of selections that reached every matmul below them. Stopped:
    those of the other selections.
    """
    result = Result()
    for select in graph.find_nodes(op="call_function", target=SELECT):
        g, indices, scale, dim, *block = cast("tuple[Any, ...]", select.args)
        make_early(select)
        rules = MATRIX_RULES if indices.meta["val"].dim() == 1 else STACK_RULES
        push = Push(rules, graph, select, indices, scale, block)
        try:
            plan = push.of(g, dim, select)
        except RecursionError:
            result.stopped[indices] = TOO_DEEP
            continue
        stops = [planned.stop for planned in push.needed(plan) if planned.stop is not None]
        if stops:
            result.stopped[indices] = "; ".join(stops)
        else:
            result.rewritten.append(indices)
        if cast(Planned, plan).stop is not None and plan.args[0] is g:
            continue  # it stays where it is
        if any(user.target in COLLECTIVES for user in select.users):
            plan = push.contiguous(plan)
        select.replace_all_uses_with(emit(cast(Planned, plan), push))
        erase_unused(graph, select)
    result.note = f"{result.count} pushed, {len(result.stopped)} stopped"
    return result
