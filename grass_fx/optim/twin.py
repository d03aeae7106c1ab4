"""X at work on stand-ins: as a *twin* of the wrapped optimizer, whose groups hold the stand-ins.

The wrapped optimizer adopts the twin's state after everything that can fail has been done.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from grass_fx.errors import warn
from grass_fx.optim.rowwise import State
from grass_fx.optim.stand_in import StandIn, Taken

T = TypeVar("T")

Batch = list[list[tuple[Tensor, Tensor]]]
"""The parameters of one call to X: for each group, pairs of a parameter and its stand-in."""


def saved_tensors(value: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors in a state, with copies of them."""
    return [(tensor, tensor.clone()) for tensor in _tensors_in(value)]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # quantised tensors hold others
            names, _ = value.__tensor_flatten__()
            value = [getattr(value, name) for name in names]
        else:
            yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


@dataclass
class Prepared:
    """The work for X, before anything has moved."""

    batches: list[Batch]
    """One batch for each call: all, or for example first parameters with state, then the others."""
    taken: list[list[Taken]]
    """The taken weights of each group."""
    saved: list[tuple[Tensor, Tensor]]
    """The tensors among the groups' options, with copies."""

    def all(self) -> list[Taken]:
        """Return the taken weights of all groups."""
        return [taken_weight for taken in self.taken for taken_weight in taken]

    def parts(self) -> list[StandIn]:
        """Return all stand-ins."""
        return [part for taken in self.all() for part in taken.parts]

    def run(
        self, wrapped: Optimizer, others: Mapping[Any, Any], call: Callable[[Optimizer], T]
    ) -> tuple[list[Twin], T]:
        """Run ``call`` on a twin for each batch; ``others``: the state of all but taken weights.

        Returns the twins, and the result of the first call.
        """
        parts = {part.parameter: part for part in self.parts()}
        twins, results = [], []
        for batch in self.batches:
            states: dict[Any, State] = dict(others)
            states |= {parameter: part.state for parameter, part in parts.items() if part.state}
            twins.append(Twin(wrapped, batch, states))
            results.append(call(twins[-1].optimizer))
            state = twins[-1].optimizer.state
            for parameter, part in parts.items():
                part.state = dict(state.pop(parameter, {}))
        return twins, results[0]

    @contextmanager
    def restored_if_it_fails(self) -> Iterator[None]:
        """Restore the groups' options after an exception inside.

        X's state of weights may be half advanced then: restoring it would need copies in every
        step.
        """
        try:
            yield
        except BaseException as error:
            for tensor, copy in self.saved:
                tensor.copy_(copy)
            warn(
                f"a wrapped optimizer failed inside its own code ({type(error).__name__}): no "
                "taken weight has moved. Moments and dense parameters may have, if it had begun: "
                "calling step() again then moves them twice."
            )
            raise


def batches(
    every: Batch,
    taken: Sequence[Sequence[Taken]],
    states: Mapping[Any, Any],
    together: Callable[[Sequence[int]], bool],
) -> list[Batch]:
    """Split the work into calls of X.

    Sharded parameters that are dense, DTensors, go apart from stand-ins. So do parameters without
    state unless X steps them ``together`` with others in the groups of these numbers: torch's fused
    SGD, for example, takes momentum for all parameters or for none.
    """
    dense, others = _split(every, lambda p, stand_in: stand_in is p and isinstance(p, DTensor))
    if any(dense) and any(others):
        parts = (others, taken), (dense, ())
        return [call for part in parts for call in batches(*part, states, together)]
    of_parts = {
        id(part.parameter): part.state for weights in taken for one in weights for part in one.parts
    }

    def has_state(p: Tensor, stand_in: Tensor) -> bool:
        state = states.get(p) if stand_in is p else of_parts[id(stand_in)]
        return isinstance(state, Mapping) and any(v is not None for v in state.values())

    old, new = _split(every, has_state)
    mixed = [k for k, both in enumerate(zip(old, new, strict=True)) if all(both)]
    return [every] if together(mixed) else [old, new]


def _split(every: Batch, first: Callable[[Tensor, Tensor], bool]) -> tuple[Batch, Batch]:
    """Split a batch into the pairs that ``first`` chooses, and the others."""
    chosen: Batch = []
    others: Batch = []
    for entries in every:
        sides: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = [], []
        for entry in entries:
            sides[not first(*entry)].append(entry)
        chosen.append(sides[0])
        others.append(sides[1])
    return chosen, others


class Twin:
    """X over the parameters of a batch, with the options and other attributes of ``wrapped``."""

    def __init__(self, wrapped: Optimizer, batch: Batch, states: Mapping[Tensor, State]) -> None:
        self.wrapped = wrapped
        self.optimizer = twin = object.__new__(type(wrapped))
        groups = []
        for group, entries in zip(wrapped.param_groups, batch, strict=True):
            own = {**group, "params": [stand_in for _, stand_in in entries]}
            if "param_names" in group:
                names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
                own["param_names"] = [names[id(p)] for p, _ in entries]
            groups.append(own)
        state: defaultdict[Any, Any] = defaultdict(dict)
        state.update(states)
        twins = {id(wrapped.param_groups): groups, id(wrapped.state): state}
        for name, value in vars(wrapped).items():
            if isinstance(value, MethodType) and value.__self__ is wrapped:
                value = MethodType(value.__func__, twin)
            twin.__dict__[name] = twins.get(id(value), value)
        twin.__dict__["_is_twin"] = True
        # The wrapped optimizer's own step calls the hooks before and after this.
        twin._optimizer_step_pre_hooks = OrderedDict()
        twin._optimizer_step_post_hooks = OrderedDict()
        self._given = dict(vars(twin))

    def adopt(self) -> None:
        """Copy to the wrapped optimizer what has changed in its twin."""
        wrapped, twin = self.wrapped, self.optimizer
        for group, twin_group in zip(wrapped.param_groups, twin.param_groups, strict=True):
            ours = ("params", "param_names")
            group.update({name: value for name, value in twin_group.items() if name not in ours})
        for name, value in vars(twin).items():
            if name not in self._given or value is not self._given[name]:
                setattr(wrapped, name, value)
        for p, state in twin.state.items():
            if p in wrapped.state or state != {}:
                wrapped.state[p] = state
