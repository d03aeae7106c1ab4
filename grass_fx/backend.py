"""The Dynamo backend "grass": it finds and taps weights, and compiles the graph for the runtime."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from grass_fx._torch_compat import (
    AFTER,
    BEFORE,
    CUDA_GRAPHS,
    SET_GRAD_ENABLED,
    compile_aot_eager,
    compile_inductor,
    current_compilation,
    inductor_patches,
    name_backend,
    named_backend,
    overlapping,
    real_value,
    selfcheck,
    uses_cuda_graphs,
)
from grass_fx.compile import lowering
from grass_fx.compile.dump import Dump, DumpStages
from grass_fx.compile.overlap import all_reduce_early
from grass_fx.compile.runtime import GrassCallable, LeftWeights
from grass_fx.compile.sources import source_hash
from grass_fx.config import GrassConfig
from grass_fx.errors import OptionError, warn
from grass_fx.passes.facts import DynamoFacts, JointFacts, TapFacts
from grass_fx.passes.find_linear_weights import FoundWeights
from grass_fx.passes.observers import PassLog, PushReport
from grass_fx.passes.pipeline import JOINT, LATE, GrassPasses, Observer, find, tapped
from grass_fx.passes.signature import REGULAR, Signature, Variant
from grass_fx.passes.taps import tap
from grass_fx.state.fsdp2 import owner_of
from grass_fx.state.registry import registry

log = logging.getLogger(__name__)

selfcheck()  # report missing interfaces of torch here, and not during a compilation

TOO_OFTEN = 5
"""Warn when one frame is compiled this often for the same weights; Dynamo gives up after 8."""

FROM_ENVIRONMENT = "GRASS_FX_OPTIONS"
"""The environment variable with options, as JSON, for "grass" where torch.compile gets none."""


def register_backend(name: str, **options: Any) -> None:
    """Make ``name`` a backend of torch.compile: "grass" with these options.

    For configuration files in which only a backend's name fits. Options that torch.compile gets
    besides replace these. Call it in every process that compiles; a second call with the same
    options does nothing.

    Raises:
        OptionError: an option is unknown or impossible, or the name is that of another backend.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(f"register_backend: name={name!r} must be a Python identifier.")
    GrassConfig.from_options(options)
    known = named_backend(name)
    if known is None:
        name_backend(name, partial(_named, name, options))
    elif getattr(known, "args", ())[:2] != (name, options):
        raise OptionError(
            f"register_backend: torch.compile knows a backend {name!r} already, with other options "
            "or of another kind. Choose another name."
        )


def _named(
    name: str,
    own: Mapping[str, Any],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that :func:`register_backend` has named."""
    log.info("backend %s: options %s", name, dict(own))
    return grass(gm, example_inputs, mode=mode, options={**own, **(options or {})})


def _options_of_environment() -> Mapping[str, Any] | None:
    text = os.environ.get(FROM_ENVIRONMENT)
    if not text:
        return None
    try:
        options = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{FROM_ENVIRONMENT}={text!r} is not JSON: {error}.") from None
    if not isinstance(options, dict):
        raise OptionError(f"{FROM_ENVIRONMENT}={text!r} must be a JSON object of options.")
    log.info("%s: options %s", FROM_ENVIRONMENT, options)
    return options


def grass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that its linear weights get compact gradients.

    ``torch.compile(model, backend="grass", options={...}, mode=...)`` calls this. ``options`` are
    the fields of :class:`~grass_fx.config.GrassConfig`; ``mode`` means the same as for Inductor.
    Since torch.compile takes only one of both, options may contain ``"mode"``. Without gradients,
    or without a weight to take, this is plain Inductor. Without ``options`` the environment
    variable ``GRASS_FX_OPTIONS`` may give some, as JSON.

    Raises:
        OptionError: an option is unknown or impossible.
    """
    config = GrassConfig.from_options(_options_of_environment() if options is None else options)
    patches = inductor_patches(mode or config.mode, config.inductor)
    compiler = _Compiler(config, patches)
    if not (torch.is_grad_enabled() or _turns_gradients_on(gm)):
        return compiler.plain(gm, example_inputs)
    start, name = time.perf_counter(), _name_of(gm.graph)
    facts = DynamoFacts(config, example_inputs)
    found = find(gm, facts, [PassLog("", gm.graph)])
    if not found.taken:
        if found.left:
            warn(
                f"grass took no weight of this graph, it trains dense. {_some(found.left)}. If one "
                "should train compact, change what its reason names, such as the options rank, "
                f"side, include or exclude. The graph: {name}."
            )
        return _telling(compiler.plain(gm, example_inputs), found)
    _check_processes(found, config)
    _warn_if_compiled_too_often(gm.graph, found, name)
    compiled = compiler.tapped(gm, example_inputs, found, name)
    _log(found, compiled.report, time.perf_counter() - start, name)
    return compiled


def _check_processes(found: FoundWeights, config: GrassConfig) -> None:
    """Raise OptionError if processes would each step by the signs of its own gradients."""
    sharded = [weight.name for weight in found.taken if weight.spec.shards is not None]
    if config.signs_every and sharded:
        raise OptionError(
            f'{sharded[0]}: rest="sign" with fully_shard: signs of all processes are not summed '
            "there yet, and each would move its part of a weight by its own. Use "
            'grass_fx.distributed.data_parallel, or rest="none".'
        )


def _turns_gradients_on(gm: fx.GraphModule) -> bool:
    """Whether the graph turns gradients on somewhere, although its caller turned them off."""
    turned = gm.graph.find_nodes(op="call_function", target=SET_GRAD_ENABLED)
    return any(node.args[0] for node in turned)


def _telling(compiled: Callable[..., Any], found: FoundWeights) -> Callable[..., Any]:
    """A plainly compiled graph that also reports the weights that it leaves dense."""
    if not found.left:
        return compiled
    left = LeftWeights(found)

    def run(*args: Any) -> Any:
        left.note(args)
        return compiled(*args)

    return run


def _name_of(graph: fx.Graph) -> str:
    """The graph's name in torch's logs, with its frame: "3/0 of forward (model.py:12)"."""
    compilation = current_compilation()
    name = "none" if compilation is None else "/".join(map(str, compilation))
    traces = (node.meta.get("stack_trace") or "" for node in graph.nodes)
    for trace in filter(None, traces):  # a trace begins with a line of the compiled frame
        if frame := re.match(r'\s*File "(.*)", line (\d+), in (.*)', trace):
            return f"{name} of {frame[3]} ({Path(frame[1]).name}:{frame[2]})"
    return name  # torch records no line for its own frames, such as that of Sequential


def _warn_if_compiled_too_often(graph: fx.Graph, found: FoundWeights, name: str) -> None:
    """Warn at the TOO_OFTEN-th graph of one frame *for the same weights*.

    One frame may be compiled for many layers. So the subspace of each weight notes compilations. It
    is made when the weight's first graph runs, so the first compilation is not among them.
    """
    compilation = current_compilation()
    if compilation is None:
        return
    placeholders, again = graph.find_nodes(op="placeholder"), []
    for weight in found.taken:
        value = real_value(placeholders[weight.position])
        subspace = None if value is None else registry.get(owner_of(value))
        if subspace is None:
            again.append(0)
            continue
        known = subspace.compilations
        new = compilation not in known
        known.add(compilation)
        again.append(sum(frame == compilation[0] for frame, _ in known) if new else 0)
    if min(again) == TOO_OFTEN - 1:
        warn(
            f"grass compiles the same weights for the {TOO_OFTEN}th time, in graph {name}. Dynamo "
            "gives up after a few more, and then they train dense. TORCH_LOGS=recompiles says what "
            "changes. If it is a size, use torch.compile(dynamic=True), or call "
            "torch._dynamo.mark_dynamic(input, dim) before the first step."
        )


def _log(found: FoundWeights, report: PushReport, seconds: float, name: str) -> None:
    """Log a line for a compilation, and a warning if a selection could not be pushed."""
    if report.stopped:
        log.warning("full weight gradients are formed for %s", _listed(report.stopped))
    if report.scored_by_gradient and _scores_inputs(found):
        log.warning("gradients, not inputs, are scored for %s", _listed(report.scored_by_gradient))
    rest = found.taken[0].spec.rest
    signs = f", with signs every {rest} steps" if rest > 1 else ", with signs" if rest else ""
    pushed = f"{len(report.pushed)} selections pushed, {len(report.stopped)} stopped"
    log.info(
        "%d weights taken%s, %d left%s; %s; %.0f ms; graph %s",
        len(found.taken),
        signs,
        len(found.left),
        f" ({_listed(found.left)})" if found.left else "",
        pushed if report.pushed or report.stopped else "graphs from the cache",
        1e3 * seconds,
        name,
    )


def _scores_inputs(found: FoundWeights) -> bool:
    return any(weight.spec.scores == "input" for weight in found.taken)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _some(reasons: Mapping[str, str], most: int = 8) -> str:
    """The first few reasons, since a warning need not name every weight of a model."""
    more = len(reasons) - most
    return _listed(dict([*reasons.items()][:most])) + (f"; and {more} more" if more > 0 else "")


class _Compiler:
    """Compiles graphs for one configuration, with Inductor or only with AOTAutograd."""

    def __init__(self, config: GrassConfig, patches: Mapping[str, Any]) -> None:
        self.config, self.patches = config, patches

    def plain(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph as torch would without grass."""
        if self.config.compiler == "aot_eager":
            return compile_aot_eager(gm, inputs, None)
        return compile_inductor(gm, inputs, self.patches)

    def tapped(
        self, gm: fx.GraphModule, inputs: Sequence[Any], found: FoundWeights, name: str
    ) -> GrassCallable:
        """Compile a graph with its taken weights tapped: one variant, or two for rules with scores.

        A process group doubles their number, because gradients of micro-batches are averaged later.
        All variants are compiled here, since Dynamo fixes its guards when the backend returns.
        """
        signature = Signature(found.taken, len(inputs))
        dump = Dump(self.config, name)
        source = dump.write("dynamo", gm.graph, "Dynamo", None, {})
        indices = {signature.places(w)["indices"]: w for w in found.taken}
        rows = {place: (w.spec.size, w.spec.block) for place, w in indices.items()}
        report = PushReport({place: w.name for place, w in indices.items()})
        averages = any(weight.spec.group is not None for weight in found.taken)
        variants = [
            Variant(scoring, local, signing)
            for local in ((False, True) if averages else (False,))
            for scoring in ((False, True) if signature.with_scores else (False,))
            for signing in ((False, True) if self.config.signs_every > 1 else (False,))
        ]
        graphs: dict[Variant, Callable[..., Any]] = {}
        for variant in variants:
            stages = DumpStages(dump, variant.name, rows, source)
            observers: list[Observer] = [PassLog(variant.name, gm.graph), stages]
            if variant == REGULAR:
                observers.append(report)
            elif variant == Variant(scoring=True):
                observers.append(report.of_norms)
            graphs[variant] = self._variant(
                gm, TapFacts(self.config, inputs, signature, variant), observers
            )
        cuda_graphs = self.config.compiler == "inductor" and uses_cuda_graphs(self.patches)
        return GrassCallable(signature, graphs, found, report, cuda_graphs)

    def _variant(
        self, gm: fx.GraphModule, facts: TapFacts, observers: Sequence[Observer]
    ) -> Callable[..., Any]:
        """Compile one variant."""
        config = self.config
        graph, extended = tapped(gm, facts, observers)
        joint = JointFacts.of(config, facts.signature)
        if config.compiler == "aot_eager":
            return compile_aot_eager(graph, extended, GrassPasses(joint, observers))
        lowering.register()
        cacheable = {f"{tap.__module__}.{tap.__name__}": source_hash()}
        patches = dict(self.patches)
        specs = [weight.spec for weight in facts.signature.weights]
        if any(spec.group or spec.shards for spec in specs):
            patches = overlapping(patches, [all_reduce_early])
        if facts.variant.scoring and uses_cuda_graphs(patches):
            patches[CUDA_GRAPHS] = False  # recording does not pay for one step in a period
        make_passes = {
            slot: partial(GrassPasses, joint, observers, passes=passes)
            for slot, passes in ((BEFORE, JOINT), (AFTER, LATE))
        }
        return compile_inductor(graph, extended, patches, make_passes, cacheable)
