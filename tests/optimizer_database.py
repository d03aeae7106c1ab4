"""Torch's own test configurations of its optimizers, and a few of them at hand."""

import copy
import functools
import pickle
import subprocess
import sys
from typing import Any

import torch

SOME = {
    "ASGD": [{"weight_decay": 0.1}],
    "Adadelta": [{"weight_decay": 0.1, "maximize": True}],
    "Adafactor": [{"weight_decay": 0.1, "lr": 0.01}],
    "Adagrad": [{"initial_accumulator_value": 0.1, "weight_decay": 0.1}, {"fused": True}],
    "Adam": [{"weight_decay": 0.1, "amsgrad": True}, {"fused": True}],
    "AdamW": [{"weight_decay": 0.1, "maximize": True}, {"foreach": True}, {"fused": True}],
    "Adamax": [{"weight_decay": 0.1}],
    "Muon": [{"weight_decay": 0.2}],
    "NAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1, "foreach": True}],
    "RMSprop": [{"weight_decay": 0.1, "centered": True, "momentum": 0.1}],
    "Rprop": [{}],
    "SGD": [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"lr": torch.tensor(0.001)},
            {"momentum": 0.9, "fused": True}],
}  # fmt: skip
"""For the ordinary suite; the database, for `make slow`, has about 200."""

REFUSED = ("LBFGS", "SparseAdam")
"""What grass_fx.subspace refuses: classes that do not step each parameter on a dense gradient."""

LACKS = ("amsgrad", "capturable", "differentiable")
"""What grass_fx.AdamW refuses, if it is true: it names subspace(torch.optim.AdamW) instead."""

ADDED_LATER = ("foreach", "fused", "differentiable", "maximize", "capturable")
"""Arguments that groups in checkpoints of older versions of torch lack."""


def some(name: str) -> list[dict[str, Any]]:
    return copy.deepcopy(SOME[name])


def every(name: str) -> list[dict[str, Any]]:
    """Keyword arguments of each configuration, with every implementation that a CPU has.

    Without ``differentiable``, which no optimizer of torch has for parameters that are leaves.
    """
    options, ways = pickle.loads(_database())[name]
    each: list[dict[str, Any]] = [{}]
    if "foreach" in ways:
        each = [{"foreach": False}, {"foreach": True}]
    if "fused" in ways:
        each.append({"fused": True})
    return [
        {**copy.deepcopy(given), **way}
        for given in options
        for way in each
        if not (way.get("foreach") and torch.is_tensor(given.get("lr")))  # torch refuses that
    ]


def ours(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of configurations of torch.optim.AdamW those that grass_fx.AdamW takes."""
    return [each for each in configurations if not any(each.get(name) for name in LACKS)]


def names() -> list[str]:
    return sorted(pickle.loads(_database()))


@functools.cache
def _database() -> bytes:
    """Read by another process: what it is in freezes the flags of torch.backends for good."""
    return subprocess.run([sys.executable, __file__], check=True, stdout=subprocess.PIPE).stdout


def _read() -> dict[str, tuple[list[dict[str, Any]], list[str]]]:
    from torch.testing._internal.common_optimizers import optim_db

    found = {}
    for info in optim_db:
        ways = [w for w in info.supported_impls if w != "fused" or "cpu" in info.supports_fused_on]
        options = [given.kwargs for given in info.optim_inputs_func(device="cpu")]
        found[info.optim_cls.__name__] = options, ways
    return found


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(_read()))
