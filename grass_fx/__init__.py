"""Grass as a torch.compile graph transformation: compact gradients for every linear weight.

    backend.py      the Dynamo backend "grass": find, tap, compile, hand over
    config.py       options and defaults
    passes/         the graph passes, one per file
    compile/        from a graph to what runs: lowering, dumps, the callable that Dynamo runs
    ops.py          the operators grass::select and grass::selected_mm
    state/          what is known of each weight: selection, schedule, gradient, other processes
    optim/          optimizers that step in the subspace: AdamW, and subspace(X) for any class X
    distributed/    several processes: data_parallel
    inspect/        explain, plan and coverage_plot; ``python -m grass_fx`` is their command line
    testing/        a plain eager reference, and GPU code without a GPU
    _torch_compat/  all that touches private torch
    errors.py       one class per mistake a user can make

Importing this does not import Inductor.
"""

import importlib
from typing import Any

from grass_fx.errors import GrassError, GrassWarning
from grass_fx.inspect.explain import explain
from grass_fx.inspect.pictures import coverage_plot
from grass_fx.inspect.planning import plan
from grass_fx.optim import AdamW, lay_out_from, step_in_backward, subspace
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.selection import Selection

__all__ = [
    "AdamW",
    "CompactGrad",
    "GrassError",
    "GrassWarning",
    "Selection",
    "__version__",
    "coverage_plot",
    "explain",
    "lay_out_from",
    "plan",
    "register_backend",
    "step_in_backward",
    "subspace",
]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """What needs Inductor, when it is first used."""
    if name == "distributed":
        return importlib.import_module("grass_fx.distributed")
    if name == "register_backend":
        return importlib.import_module("grass_fx.backend").register_backend
    raise AttributeError(f"module 'grass_fx' has no attribute {name!r}")
