"""Parameters of the compact shape, which stand in for taken weights while an optimizer X works.

X itself works as a *twin* of the wrapped optimizer, whose groups hold the stand-ins. The wrapped
optimizer adopts the twin's state after everything that can fail has been done.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from grass_fx.errors import warn
from grass_fx.ops import along, select
from grass_fx.optim.probe import Entry
from grass_fx.optim.rowwise import Cohorts, State, cut, is_row_entry, joined
from grass_fx.optim.update import add_rows_, warmup
from grass_fx.state.selection import Selection, matrix
from grass_fx.state.sharding import local

T = TypeVar("T")

Batch = list[list[tuple[Tensor, Tensor]]]
"""The parameters of one call to X: for each group, pairs of a parameter and its stand-in."""


@dataclass
class StandIn:
    """A parameter that replaces some rows of a taken weight: PᵀW, with C as its gradient."""

    parameter: Parameter
    selection: Selection
    state: State
    before: Tensor | None = None
    """A copy of PᵀW; None if X's result replaces the rows as it is."""
    factor: Tensor | None = None
    """α · ρ · warm-up of each row, by which X's change is multiplied; None for ones."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """The former values of the state's entries that hold weights."""

    def change(self, weight: Tensor, shrink: float) -> Tensor:
        """Return what to add to the weight's rows, or their new values if ``factor`` is None."""
        after = self.parameter.detach()
        if self.before is None or self.factor is None:
            return after
        dtype = torch.promote_types(weight.dtype, torch.float32)
        moved = self.before.to(dtype).mul_(-shrink).add_(after)
        return moved.mul_(along(self.factor.to(dtype), self.selection.dim, 2))

    def follow_weight(self, entries: Mapping[str, Entry]) -> None:
        """Move entries that hold weights as far as the weight moves."""
        if self.before is None or self.factor is None:
            return
        for name in weights_among(self.state, entries):
            value = self.state[name]
            if entries[name].moves and is_row_entry(value, self.before.shape):
                gain = along(self._gain(self.factor), self.selection.dim, 2).to(value.dtype)
                held = self.held.get(name, self.before).to(value.dtype)
                self.state[name] = torch.lerp(held, value, gain)

    def _gain(self, factor: Tensor) -> Tensor:
        """The ratio of PᵀW's change to X's change: copies of a row add."""
        if self.selection.scale is None:
            return factor
        _, which, copies = self.selection.indices.unique(return_inverse=True, return_counts=True)
        return factor * self.selection.scale * copies[which]


def weights_among(state: State, entries: Mapping[str, Entry]) -> list[str]:
    """Return the names of the entries that hold weights."""
    return [name for name in state if name in entries and entries[name].start == "weight"]


@dataclass
class Taken:
    """A taken weight while X works: one stand-in for all of its rows, or one for each cohort."""

    weight: Tensor
    values: Tensor
    """The weight; if it is sharded, this process's part of it."""
    selection: Selection
    cohorts: Cohorts
    shape: torch.Size
    parts: list[StandIn]
    entries: Mapping[str, Entry]
    shrink: float = 1.0
    """The factor by which decoupled weight decay multiplies the whole weight."""
    state: State = field(default_factory=dict)
    """X's state for all rows, after X has worked."""
    changes: list[Tensor] = field(default_factory=list)

    def warm_up(self, age: Tensor, scale: float, steps: int) -> None:
        """Set each row's factor for the step that raises its age (r,) by one."""
        for part, rows, youngest in zip(
            self.parts, self.cohorts.rows, self.cohorts.ages, strict=True
        ):
            if scale == 1 and self.selection.scale is None and youngest + 1 >= steps:
                continue
            ages = age if rows is None else age[rows]
            factor = warmup(ages + 1, steps) * scale
            if part.selection.scale is not None:
                factor = factor * part.selection.scale
            part.factor, part.before = factor, part.parameter.detach().clone()
            for name in weights_among(part.state, self.entries):
                part.held[name] = part.state[name].clone()

    def collect(self) -> None:
        """Compute what to write, without changing the weight or its state."""
        for part in self.parts:
            part.follow_weight(self.entries)
        states = [part.state for part in self.parts]
        self.state = joined(states, self.cohorts, self.shape, self.selection.dim)
        self.changes = [part.change(self.values, self.shrink) for part in self.parts]
        for part in self.parts:
            part.state = {}

    def writes(self) -> list[Callable[[], None]]:
        """W[σ] += α · ρ · warm-up · (X's change without weight decay), to be run after X's step."""
        found: list[Callable[[], None]] = [self._decay] if self.shrink != 1 else []
        return [*found, *(partial(self._write, k) for k in range(len(self.parts)))]

    def _decay(self) -> None:
        self.values.mul_(self.shrink)

    def _write(self, k: int) -> None:
        weight, part, change = matrix(self.values), self.parts[k], self.changes[k]
        if part.factor is None:
            weight.index_copy_(part.selection.dim, part.selection.indices, change)
        else:
            add_rows_(weight, part.selection, change)

    def put(self) -> None:
        """Write PᵀW back as X left it: this is no step, so without factor, decay and warm-up."""
        weight = matrix(self.values)
        for part, rows in zip(self.parts, self.changes, strict=True):
            assert part.before is not None
            if torch.equal(rows, part.before):
                continue
            s = part.selection
            if s.scale is not None:  # copies of a row are equal, so any may be written last
                scale = along(s.scale, s.dim, 2).to(rows.dtype)
                rows = weight.index_select(s.dim, s.indices) + (rows - part.before) / scale
            weight.index_copy_(s.dim, s.indices, rows)


def compact_shape(weight: Tensor, selection: Selection) -> torch.Size:
    """Return the shape of C as a matrix; of a sharded weight, of this process's part."""
    shape = list(matrix(local(weight)).shape)
    shape[selection.dim] = selection.indices.numel()
    return torch.Size(shape)


def take(
    weight: Tensor,
    selection: Selection,
    compact: Tensor | None,
    state: State,
    cohorts: Cohorts,
    entries: Mapping[str, Entry],
) -> Taken:
    """Make stand-ins for a weight, with C ``compact`` as gradient and X's ``state``, if any."""
    values, dim, shape = local(weight), selection.dim, compact_shape(weight, selection)
    states = cut(state, cohorts, shape, dim)
    parts = []
    for rows, own_state in zip(cohorts.rows, states, strict=True):
        chosen, gradient = selection, compact
        if rows is not None:
            chosen = selection.part(rows)
            gradient = None if compact is None else compact.index_select(dim, rows)
        parameter = Parameter(select(matrix(values), chosen.indices, chosen.scale, dim))
        parameter.grad = gradient
        parts.append(StandIn(parameter, chosen, own_state))
    return Taken(weight, values, selection, cohorts, shape, parts, entries)


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
    dense, others = _split(every, lambda stand_in: isinstance(stand_in, DTensor))
    if any(dense) and any(others):
        parts = (others, taken), (dense, ())
        return [call for part in parts for call in batches(*part, states, together)]
    known = dict(states)
    for one in (one for weights in taken for one in weights):
        known |= {part.parameter: part.state for part in one.parts}
    has_state = {
        id(p)
        for p, state in known.items()
        if isinstance(state, Mapping) and any(v is not None for v in state.values())
    }
    old, new = _split(every, lambda stand_in: id(stand_in) in has_state)
    mixed = [k for k, both in enumerate(zip(old, new, strict=True)) if all(both)]
    return [every] if together(mixed) else [old, new]


def _split(every: Batch, first: Callable[[Tensor], bool]) -> tuple[Batch, Batch]:
    """Split a batch into the stand-ins of which ``first`` says so, and the others."""
    return (
        [[entry for entry in entries if first(entry[1])] for entries in every],
        [[entry for entry in entries if not first(entry[1])] for entries in every],
    )


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
