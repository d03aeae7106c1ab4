"""The graphs of one layer, before and after each pass: ``python -m grass_fx graphs``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from grass_fx._torch_compat import compile_aot_eager, module_source
from grass_fx.compile.dump import graph_text
from grass_fx.config import GrassConfig
from grass_fx.errors import OptionError
from grass_fx.passes.pipeline import AOT, INDUCTOR, Event, GrassPasses, prepare


def layer_graphs(
    model: nn.Module,
    layer: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Stage -> the lines of the joint graph that belong to the modules that ``layer`` matches.

    ``layer`` is a module's name or a pattern, as ``layers.0.mlp.gate`` or ``*.gate``; modules
    within it count. What belongs to no module, such as selections, is shown where it uses something
    that is. Stages are "joint", as AOTAutograd made it, and the names of the passes that changed
    the graph. The model's forward runs once, and nothing is trained.

    Raises:
        OptionError: no module of the traced graphs has such a name.
    """
    config = GrassConfig.from_options(options)
    stages: dict[str, list[str]] = {}
    modules: set[str] = set()

    def observe(graph: fx.Graph, event: Event) -> None:
        changed = event.by is AOT or event.result.count or event.result.stopped
        if event.by is INDUCTOR or not changed:
            return
        modules.update(filter(None, map(_module_of, graph.nodes)))
        name = "joint" if event.by is AOT else event.by.name
        stages.setdefault(name, []).extend(_lines(graph, layer))

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tapped = prepare(gm, inputs, config)
        if not tapped.found.taken:
            return gm.forward
        passes = GrassPasses(tapped.facts, [observe])
        compiled = compile_aot_eager(tapped.graph, tapped.inputs, passes)
        more = [(each.shape, each.dtype, each.device) for each in tapped.inputs[len(inputs) :]]

        def run(*values: Any) -> Any:
            zeros = (torch.zeros(shape, dtype=dtype, device=on) for shape, dtype, on in more)
            return compiled(*values, *zeros)

        return run

    torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
    if not any(stages.values()):
        named = ", ".join(sorted(modules)) or "none: grass took no weight"
        raise OptionError(
            f"layer {layer!r}: no module of the graphs has such a name. They are {named}."
        )
    return {name: "\n".join(lines) for name, lines in stages.items()}


def _module_of(node: fx.Node) -> str:
    """The name of the innermost module that a node belongs to, or whose backward it is part of."""
    return re.sub(r"^L\[[^]]*\]\.?|^_orig_mod\.?", "", module_source(node))


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "grass"


def _lines(graph: fx.Graph, layer: str) -> list[str]:
    shown: set[fx.Node] = set()
    for node in graph.nodes:
        name = _module_of(node)
        parts = name.split(".")
        outer = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        own = any(fnmatchcase(each, layer) for each in outer)
        ours = not name or _is_ours(node)
        if own or (ours and node.op == "call_function" and shown & {*node.all_input_nodes}):
            shown.add(node)
    shown.update(x for node in [*shown] for x in node.all_input_nodes if _is_ours(x))
    names = {node.name for node in shown}
    found = []
    for line in graph_text(graph).splitlines():
        match = re.match(r"\s*(\w+)(?:: \"[^\"]*\")? = ", line)
        if match and match[1] in names:
            found.append(re.sub(r";\s+[\w\s=]+ = None$", "", line.strip()))
    return found
