"""Tap each linear weight of a Dynamo graph: its value stays, and its gradient becomes compact."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import fx

from grass_fx._torch_compat import fake_mode_of, mark_added_placeholder
from grass_fx.passes.averaging import collectives_of
from grass_fx.passes.facts import Result, TapFacts
from grass_fx.passes.signature import LinearWeight
from grass_fx.passes.taps import INPUT, TapSpec, tap


class Tapped(Result):
    """``rewritten`` has the taps; ``inputs`` the tapped graph's inputs, the added ones as fakes."""

    inputs: Sequence[Any] = ()


def tap_weights_pass(graph: fx.Graph, facts: TapFacts) -> Tapped:
    """Let every use of a linear weight go through its tap.

    Before::

        linear = torch._C._nn.linear(x, weight, bias)

    After::

        tap = grass_fx_passes_taps_tap(weight, dim=1, d=weight_d, indices=weight_indices)
        linear = torch._C._nn.linear(x, tap, bias)

    ``facts.signature`` lists the added inputs. For a rule with scores both variants have the same
    inputs and the same forward; the taps of the scoring variant also yield scores. Taps average
    gradients over the weights' process groups, except in a local variant. They select first, so
    that only compact gradients are sent.
    """
    placeholders = graph.find_nodes(op="placeholder")
    last, body = placeholders[-1], placeholders[-1].next
    result, added = Tapped(), []
    taps: list[tuple[fx.Node, dict[str, Any]]] = []
    with fake_mode_of(facts.inputs):
        for weight in facts.signature.weights:
            w = placeholders[weight.position]
            arguments = _settings(weight, facts)
            examples = facts.signature.examples(weight, facts.inputs[weight.position])
            for role, example in examples.items():
                with graph.inserting_after(last):
                    last = graph.placeholder(f"{w.name.strip('_')}_{role}")
                last.meta["example_value"] = example
                mark_added_placeholder(last)
                arguments[role] = last
                added.append(example)
            taps.append((w, arguments))
    result.inputs = [*facts.inputs, *added]
    for node in placeholders:  # Dynamo clears this in its graph; in the copy it would keep tensors
        node.meta.pop("grapharg", None)
    for w, arguments in taps:
        with graph.inserting_before(body):
            tapped = graph.call_function(tap, (w,), arguments)
        tapped.meta["example_value"] = w.meta.get("example_value")
        w.replace_all_uses_with(tapped, delete_user_cb=partial(operator.is_not, tapped))
        result.rewritten.append(tapped)
    graph.lint()
    return result


def _settings(weight: LinearWeight, facts: TapFacts) -> dict[str, Any]:
    """The fields of a tap's TapSpec that differ from their defaults, in plain types."""
    spec, config, variant = weight.spec, facts.config, facts.variant
    collectives = () if variant.local else collectives_of(spec)
    averaged = variant.scoring and config.score_sync == "gradient" and spec.scores == "gradient"
    if spec.shards is not None and not averaged:
        collectives = ()  # C is averaged after the graph, together with those of all its weights
    settings: dict[str, Any] = {
        "dim": spec.dim,
        "block": spec.run,
        "collectives": tuple(map(tuple, collectives)),
    }
    if variant.scoring and spec.scores:
        of_input = spec.scores == "input"
        settings["scoring"] = INPUT if of_input else config.scoring
        settings["score_sync"] = config.score_sync if collectives and not of_input else "norms"
    if spec.rest and (variant.signing or spec.rest == 1):
        settings["signs"] = True
    defaults = TapSpec._field_defaults
    return {k: v for k, v in settings.items() if k not in defaults or v != defaults[k]}
