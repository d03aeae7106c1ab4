"""Grass as a torch.compile graph transformation: compact gradients for every linear weight.

    backend.py      the Dynamo backend "grass": find, tap, compile, hand over
    runtime.py      the callable Dynamo runs: variants, selections in, CompactGrads out
    optim/          optimizers that step in the subspace: AdamW, and subspace(X) for any class X
    passes/         the graph passes, one per file
    lowering/       how Inductor lowers grass::select and grass::selected_mm
    registry.py     from a Parameter to its subspace
    subspace.py     each weight's selection and schedule
    selection.py    the selection rules: numbers in, numbers out
    history.py      which rows a weight has had selected
    gradient/       CompactGrad, the gradient on weight.grad
    records.py      what is known of a Parameter
    spec.py         what a graph demands of a weight's subspace
    selected.py     Selection, which rows of a weight it holds
    distributed/    several processes: data_parallel
    pictures.py     coverage_plot
    config.py       options and defaults
    explain/        explain: what was rewritten, what was not and why, what it saves
    planning.py     plan, the largest rank that fits into a memory
    cost.py         what a linear weight costs, as formulas
    ops.py          the operators grass::select and grass::selected_mm
    testing/        a plain eager reference

Importing this does not import Inductor.
"""

import importlib
from typing import Any

from grass_fx.errors import GrassError, GrassWarning
from grass_fx.explain import explain as explain  # the function; the room keeps its own path
from grass_fx.gradient import CompactGrad
from grass_fx.optim import AdamW, step_in_backward
from grass_fx.optim import subspace as subspace  # the function; the module keeps its own path
from grass_fx.pictures import coverage_plot
from grass_fx.planning import plan
from grass_fx.selected import Selection

__all__ = [
    "AdamW",
    "CompactGrad",
    "GrassError",
    "GrassWarning",
    "Selection",
    "__version__",
    "coverage_plot",
    "explain",
    "plan",
    "step_in_backward",
    "subspace",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``grass_fx.distributed``, which needs Inductor, when it is first used."""
    if name == "distributed":
        return importlib.import_module("grass_fx.distributed")
    raise AttributeError(f"module 'grass_fx' has no attribute {name!r}")
