"""The Dynamo backend "grass": find, tap, compile with the passes, and hand over to the runtime."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from grass_fx import lowering
from grass_fx._torch_compat import (
    CUDA_GRAPHS,
    compile_aot_eager,
    compile_inductor,
    inductor_patches,
    uses_cuda_graphs,
)
from grass_fx.config import GrassConfig
from grass_fx.dump import Dump
from grass_fx.errors import GrassWarning
from grass_fx.passes.find_linear_weights import FoundWeights, find_linear_weights_pass
from grass_fx.passes.pipeline import GrassPasses, PushReport, source_hash
from grass_fx.passes.tap_weights import scoring_tap, tap, tap_weights_pass
from grass_fx.runtime import GrassCallable

log = logging.getLogger(__name__)


def grass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that its linear weights get compact gradients.

    Called by ``torch.compile(model, backend="grass", options={...}, mode=...)``. ``options`` are
    the fields of :class:`~grass_fx.config.GrassConfig`; ``mode`` means what it means for Inductor
    (``options={"mode": ...}`` where there are options: torch.compile takes one or the other).
    Without gradients, or without a weight to take, this is plain Inductor.

    Raises:
        OptionError: an option is unknown or impossible.
    """
    config = GrassConfig.from_options(options)
    patches = inductor_patches(mode or config.mode, config.inductor)
    compiler = _Compiler(config, patches)
    if not torch.is_grad_enabled():
        return compiler.plain(gm, example_inputs)
    start = time.perf_counter()
    found = find_linear_weights_pass(gm, example_inputs, config=config)
    if not found.taken:
        if found.left:
            warnings.warn(
                f"grass took no weight of this graph, it trains dense. {_listed(found.left)}.",
                GrassWarning,
                stacklevel=2,
            )
        return compiler.plain(gm, example_inputs)
    compiled = compiler.tapped(gm, example_inputs, found)
    _log(found, compiled.report, time.perf_counter() - start)
    return compiled


def _log(found: FoundWeights, report: PushReport, seconds: float) -> None:
    """One line per compilation; and a warning if a selection could not be pushed."""
    if report.stopped:
        log.warning("full weight gradients are formed for %s", _listed(report.stopped))
    pushed = f"{len(report.pushed)} selections pushed, {len(report.stopped)} stopped"
    log.info(
        "%d weights taken, %d left (%s); %s; %.0f ms",
        len(found.taken),
        len(found.left),
        _listed(found.left),
        pushed if report.pushed or report.stopped else "graphs from the cache",
        1e3 * seconds,
    )


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


class _Compiler:
    """The compiler of one configuration: Inductor, or AOTAutograd alone."""

    def __init__(self, config: GrassConfig, patches: Mapping[str, Any]) -> None:
        self.config, self.patches = config, patches
        self.dump = Dump(config.dump_dir)

    def plain(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What torch would do without us."""
        if self.config.compiler == "aot_eager":
            return compile_aot_eager(gm, inputs, None)
        return compile_inductor(gm, inputs, self.patches)

    def tapped(
        self, gm: fx.GraphModule, inputs: Sequence[Any], found: FoundWeights
    ) -> GrassCallable:
        """The graph with its taken weights tapped: one variant, or two for rules with scores.

        Both are compiled here: once the backend has returned, Dynamo's guards are fixed.
        """
        self.dump.write("dynamo", gm.graph)
        report = PushReport()
        regular = self._variant(gm, inputs, found, report)
        scoring = None
        if self.config.needs_scores:
            scoring = self._variant(gm, inputs, found, PushReport(), self.config.scoring)
        cuda_graphs = self.config.compiler == "inductor" and uses_cuda_graphs(self.patches)
        return GrassCallable(found, report, regular, scoring, cuda_graphs)

    def _variant(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        found: FoundWeights,
        report: PushReport,
        scoring: str | None = None,
    ) -> Callable[..., Any]:
        with_scores = self.config.needs_scores
        tapped, extended = tap_weights_pass(
            gm, inputs, found.taken, with_scores=with_scores, scoring=scoring
        )
        variant = "regular" if scoring is None else "scoring"
        self.dump.write(f"tapped_{variant}", tapped.graph)
        stride = (len(extended) - len(inputs)) // len(found.taken)
        first = len(inputs) + (2 if with_scores else 1)
        indices_of = {first + stride * k: w.name for k, w in enumerate(found.taken)}
        make_pass = partial(
            GrassPasses,
            report,
            indices_of,
            stage=lambda stage, graph: self.dump.write(f"{stage}_{variant}", graph),
        )
        if self.config.compiler == "aot_eager":
            return compile_aot_eager(tapped, extended, make_pass(()))
        lowering.register()
        names = (f"{f.__module__}.{f.__name__}" for f in (tap, scoring_tap))
        cacheable = dict.fromkeys(names, source_hash())
        patches = dict(self.patches)
        if scoring is not None and uses_cuda_graphs(patches):
            patches[CUDA_GRAPHS] = False  # one step in a period would not repay the recording
        return compile_inductor(tapped, extended, patches, make_pass, cacheable)
