"""Decides which optimizer classes can step in the subspace, and finds their additional methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam

from grass_fx.config import SUBSPACE_DEFAULTS
from grass_fx.errors import OptionError, warn
from grass_fx.optim.base import SubspaceOptimizer
from grass_fx.optim.options import REST
from grass_fx.optim.probe import Entry, unhooked


def check_class(optimizer_class: Any) -> None:
    """Raise OptionError if the steps of a class cannot be taken in a subspace."""
    name = getattr(optimizer_class, "__name__", repr(optimizer_class))
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise OptionError(
            f"subspace({name}): it takes a class of optimizers, such as torch.optim.SGD."
        )
    if issubclass(optimizer_class, SubspaceOptimizer):
        raise OptionError(f"subspace({name}): {name} steps in the subspace already.")
    if issubclass(optimizer_class, (LBFGS, SparseAdam)):
        raise OptionError(
            f"subspace({name}): {name} does not step parameter by parameter on dense gradients. "
            "Take another optimizer, such as grass_fx.AdamW."
        )
    taken = [name for name in SUBSPACE_DEFAULTS if takes(optimizer_class, name)]
    if taken:
        raise OptionError(
            f"subspace({name}): it has arguments of its own named {', '.join(sorted(taken))}, "
            "which here control the subspace. Derive a class that fixes them, and wrap that."
        )


def takes(optimizer_class: type[Optimizer], name: str) -> bool:
    """Whether a class's constructor has an argument of this name."""
    return name in inspect.signature(optimizer_class.__init__).parameters


def check_instance(optimizer: Optimizer, name: str) -> None:
    """Raise OptionError if an optimizer uses another optimizer, which would see whole weights."""
    for attribute, value in vars(optimizer).items():
        for held in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(held, Optimizer):
                raise OptionError(
                    f"subspace({name}): it steps by another optimizer that it holds, its "
                    f"{attribute}, which would see whole weights. Wrap the class of that one."
                )


def check_elsewhere(place: str | None, name: str) -> None:
    """Raise OptionError if X keeps tensors of a weight's shape outside of its state."""
    if place is not None:
        raise OptionError(
            f"subspace({name}): it keeps a tensor of a parameter's shape outside of its state, in "
            f"{place}, which would not follow a weight to its next selection. Keep it in "
            "self.state[parameter]."
        )


def check_steps_shards(alike: bool, weight: str, name: str) -> None:
    """Raise OptionError unless X steps parts of a weight as it steps the whole."""
    if not alike:
        raise OptionError(
            f"{weight} is sharded over processes, and subspace({name}) cannot step it: it does not "
            "step a part of a weight as it steps the whole. Use grass_fx.AdamW, or an elementwise "
            "class such as torch.optim.SGD; or exclude the weight."
        )


def stepping(
    inner: type[Optimizer], evaluated: tuple[Any] | None, name: str
) -> Callable[[Optimizer], Any]:
    """X's step as a function of X alone; the closure, which has run, may be asked for once more."""
    step = unhooked(inner.step)
    if evaluated is None:
        return step

    def call(twin: Optimizer) -> Any:
        times = 0

        def closure() -> Any:
            nonlocal times
            times += 1
            if times > 1:
                raise OptionError(
                    f"subspace({name}): its step evaluates the closure again where it has moved "
                    "the weights, and here stand-ins move instead of them. Take another optimizer, "
                    "such as grass_fx.AdamW."
                )
            return evaluated[0]

        return step(twin, closure)

    return call


def check_entries(entries: Mapping[str, Entry], name: str) -> None:
    """Raise OptionError if X keeps an entry for which new rows of a weight have no start value."""
    for entry, what in entries.items():
        if what.start == "average":
            raise OptionError(
                f"subspace({name}): its state entry {entry} is an average of the weights that "
                "starts from zero, and how far it has come is not counted for each parameter: "
                "newly selected rows would be taken for zero. Take another optimizer, such as "
                "grass_fx.AdamW."
            )


def warn_of_counts(entries: Mapping[str, Entry], counts: Sequence[str], name: str) -> None:
    """Warn if X corrects second moments of new rows as though they were as old as the run."""
    if counts and any(what.start == "zero" and what.power == 2 for what in entries.values()):
        warn(
            f"subspace({name}) counts steps for all parameters together, in its group's "
            f"{', '.join(counts)}: rows that are newly selected are stepped as though they were "
            "old, by its bias correction several times too far at first. Keep warmup_steps well "
            "above 0, or take a class that counts for each parameter, as torch's do."
        )


def methods_of(optimizer_class: type[Optimizer]) -> dict[str, Callable[..., Any]]:
    """Return the methods that the class adds to torch's: they may look at weights and state."""
    found: dict[str, Callable[..., Any]] = {}
    for base in optimizer_class.__mro__:
        if base in Optimizer.__mro__:
            break
        for name, value in vars(base).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                found.setdefault(name, value)
    return {name: value for name, value in found.items() if not hasattr(Optimizer, name)}


def on_stand_ins(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of X so that it sees, and may change, stand-ins for taken weights."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_twin or not self._has_compact_state():
            return method(self, *args, **kwargs)
        return self._call(lambda twin: method(twin, *args, **kwargs))

    return call


def check_rest_scale(keeps_its_size: bool, kind: str) -> None:
    """Raise OptionError if lr does not say how far the rows that are not selected should move."""
    if not keeps_its_size:
        raise OptionError(
            f"subspace({kind}): its steps grow with gradients, so lr does not say how far signs "
            f"should go. Give {REST}: then {REST} * lr is what an element moves in a step. Or "
            'compile with rest="none".'
        )
