"""Ask the joint graph about weights whose uses the Dynamo graph does not show to be linear."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grass_fx._torch_compat import backward_nodes, gradient_of_input, nodes_from_input
from grass_fx.ops import SELECT, SELECTED_MM
from grass_fx.passes.facts import Answer, AskFacts, Result
from grass_fx.passes.linear_uses import NotLinear, Use
from grass_fx.passes.push import Planned, Push, Value
from grass_fx.passes.push_lookup_rules import LOOKUP_RULES
from grass_fx.passes.push_rules import COPIES
from grass_fx.passes.push_selection import MATRIX_RULES, TOO_DEEP
from grass_fx.passes.push_stack_rules import STACK_RULES

aten = torch.ops.aten

MULTIPLIED = (aten.bmm.default, aten._grouped_mm.default, aten._scaled_mm.default)
"""Products that rules plan besides grass::selected_mm, with a select as one of their factors."""


@dataclass
class Answers(Result):
    """What the joint graph says of each weight, by its position among the graph's inputs."""

    of: dict[int, Answer] = field(default_factory=dict)


def ask_joint_graph_pass(graph: fx.Graph, facts: AskFacts) -> Answers:
    """Plan the way of a selection from a weight's gradient down to the products that make it.

    A tap is right for every use of a weight, also inside of somebody's autograd function; what
    counts is what its gradient is made of. So for each weight in ``facts.asked`` a selection of
    each dimension is planned as by ``push_selection``, and the graph stays as it is. If a plan ends
    at products, the weight is linear. One factor of a product depends on an output's gradient, or,
    if the gradient is made in the forward, on the weight: a dimension that is selected from it is
    that of the output features.
    """
    answers, backward = Answers(), backward_nodes(graph)
    for position, ranks in facts.asked.items():
        answers.of[position] = answer = Answer()
        later = backward, nodes_from_input(graph, position)
        gradient = gradient_of_input(graph, position)
        for dim, rank in ranks.items():
            try:
                if gradient is None:
                    raise NotLinear("no gradient reaches it")
                plan = _plan(graph, gradient, dim, rank)
                answer.uses += _uses(plan, dim, gradient.meta["val"].dim(), later)
            except NotLinear as reason:
                answer.stops[dim] = str(reason)
    linear = sum(bool(answer.uses) for answer in answers.of.values())
    answers.note = f"{linear} linear, {len(answers.of) - linear} not"
    return answers


def _plan(graph: fx.Graph, gradient: fx.Node, dim: int, rank: int) -> list[Planned]:
    """The nodes that a selection of ``gradient`` would need; raises NotLinear where it stops."""
    value, rules = gradient.meta["val"], MATRIX_RULES
    shape: tuple[int, ...] = (rank,)
    if value.dim() == 3:
        shape, rules = (value.shape[0], rank), STACK_RULES
    with graph.inserting_before(next(iter(graph.nodes))):
        indices = graph.placeholder("indices")
    with graph.inserting_after(gradient):
        select = graph.call_function(SELECT, (gradient, indices, None, dim))
    with value.fake_mode:
        indices.meta["val"] = torch.empty(shape, dtype=torch.int64, device=value.device)
        select.meta["val"] = SELECT(value, indices.meta["val"], None, dim)
    # Only the selection leaves the graph, as it does where the weight is tapped.
    gradient.replace_all_uses_with(select, delete_user_cb=lambda user: user.op == "output")
    push = Push(rules, graph, select, indices, None, [])
    try:
        planned = push.needed(push.of(gradient, dim, select))
    except RecursionError:
        raise NotLinear(TOO_DEEP) from None
    finally:
        select.replace_all_uses_with(gradient)
        graph.erase_node(select)
        graph.erase_node(indices)
    if stops := [_unnumbered(each.stop) for each in planned if each.stop is not None]:
        raise NotLinear("; ".join(dict.fromkeys(stops)))
    return planned


def _unnumbered(reason: str) -> str:
    """A reason with "view" for "view_12", so that equal layers have the same."""
    return re.sub(r"\b(\w+?)_\d+\b", r"\1", reason)


def _uses(
    plan: Sequence[Planned], dim: int, ndim: int, later: Sequence[Collection[fx.Node]]
) -> list[Use]:
    """The products and lookups at the end of a plan; ``later`` tells its factors apart."""
    other = 1 - dim if ndim == 2 else 3 - dim

    def order(factor: Value) -> list[bool]:
        return [not _made_of(factor).isdisjoint(nodes) for nodes in later]

    uses = []
    for product in plan:
        for factor, beside in _factors(product):
            uses.append(Use(dim if order(factor) > order(beside) else other))
    if any(each.target in LOOKUP_RULES for each in plan):
        uses.append(Use(other, "a lookup"))
    if not uses:
        opaque = (_opaque_maker(each.args[0]) for each in plan if each.target is SELECT)
        names = ", ".join(dict.fromkeys(filter(None, opaque)))
        raise NotLinear("no matrix product makes its gradient" + (names and f", but {names}"))
    return uses


def _opaque_maker(x: Any) -> str:
    """The name of an operator that is not torch's own and whose result ``x`` is; "" for others."""
    while x.target in COPIES or x.target is operator.getitem:
        x = x.args[0]
    namespace = getattr(x.target, "namespace", "aten")
    return "" if namespace in ("aten", "prims", "grass") else str(x.target)


def _factors(product: Planned) -> list[tuple[Value, Value]]:
    """The factor of a planned product that rows or columns are selected from, and the other one."""
    if product.target is SELECTED_MM:
        a, b = product.args[:2]
        return [(a, b) if product.args[4] == 0 else (b, a)]
    if product.target not in MULTIPLIED:
        return []
    a, b = product.args[:2]
    pairs = ((a, b), (b, a))
    return [pair for pair in pairs if _is_selected(pair[0])]


def _is_selected(factor: Value) -> bool:
    """Whether a factor is planned, and is a select or its layout."""
    while isinstance(factor, Planned) and factor.target is not SELECT:
        factor = factor.args[0]
    return isinstance(factor, Planned)


def _made_of(value: Value) -> set[fx.Node]:
    """The nodes of the graph that a value is planned from."""
    if isinstance(value, fx.Node):
        return {value}
    found: set[fx.Node] = set()
    fx.node.map_aggregate(
        value.args,
        lambda x: found.update(_made_of(x)) if isinstance(x, (fx.Node, Planned)) else None,
    )
    return found
