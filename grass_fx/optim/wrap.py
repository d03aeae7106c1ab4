"""``grass_fx.subspace(X)``: any torch optimizer class X, stepping taken weights in their subspace.

During a step a parameter of the compact shape, PᵀW, stands in for each taken weight W, with
C as its gradient. X steps the stand-in and keeps state for it; its change is applied to the
selected rows of W (equation 4). X never sees a tensor of W's shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from grass_fx.config import ON_REFRESH, REST_SCALE, SCALE, WARMUP_STEPS
from grass_fx.errors import OptionError
from grass_fx.optim import probe, wrappable
from grass_fx.optim.base import SubspaceOptimizer
from grass_fx.optim.carry import places
from grass_fx.optim.decay import PENDING, keep, nothing
from grass_fx.optim.entries import Asked, Kept
from grass_fx.optim.layout import Plan
from grass_fx.optim.loading import OWN, selection_entries
from grass_fx.optim.options import REST, ROUNDING, rounds, scale_of
from grass_fx.optim.rowwise import (
    Cohorts,
    State,
    carried_state,
    cohorts_of,
    with_rows,
    without_equal_rows,
)
from grass_fx.optim.stand_in import Taken, compact_shape, grow_older, inner_state, is_compact, take
from grass_fx.optim.stepping import Operation
from grass_fx.optim.twin import Batch, Prepared, batches, saved_tensors
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection, matrix
from grass_fx.state.sharding import local
from grass_fx.state.subspace import Subspace, selects_rows

T = TypeVar("T")

Work = list[tuple[Tensor, "Selection | None", "Tensor | None"]]
"""A group's parameters to work on; taken weights with their selection and C, if they have it."""


@functools.cache
def subspace(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """A subclass of ``optimizer_class`` that steps taken weights in their subspace.

    Its constructor takes the arguments of ``optimizer_class`` and, like ``grass_fx.AdamW``,
    ``scale``, ``warmup_steps``, ``on_refresh``, ``rest_scale`` (which has no default where X's
    steps grow with gradients) and ``stochastic_rounding``, which here is about the taken weights.
    Dense parameters are stepped as ``optimizer_class`` does. All state of a taken weight has
    compact shapes. Decoupled weight decay reaches the whole weight if X has a rate lr: selected
    rows as they move, all others once a period. L2 decay is part of the gradient, so it reaches the
    selected rows.

    At a refresh with ``on_refresh="carry"``, rows that stay keep their floating-point state of C's
    shape; new rows start it from zero, or from PᵀW if it holds weights. If the optimizer counts
    steps, rows of different ages are then stepped as separate parameters. State of any other kind
    (factored moments, quantised blocks) mixes rows: if there is any, all state starts anew.

    Raises:
        OptionError: the class is no torch optimizer, or its steps cannot be taken in a subspace.
    """
    wrappable.check_class(optimizer_class)
    body: dict[str, Any] = {
        "__doc__": f"{optimizer_class.__name__} in the subspace: see grass_fx.subspace.",
        "_kind": optimizer_class.__name__,
        "_inner": optimizer_class,
        "_known": {},
    }
    methods = {
        name: wrappable.on_stand_ins(method)
        for name, method in wrappable.methods_of(optimizer_class).items()
    }
    return type(f"Subspace{optimizer_class.__name__}", (_Wrapped, optimizer_class), body | methods)


class _Wrapped(SubspaceOptimizer):
    """The base of all wrapped classes; ``_inner`` is the wrapped class, also a base."""

    _inner: type[Optimizer]
    _known: dict[Hashable, Any]
    """What has been found out about X."""
    _warned_counts = False
    _steps_shards = False
    """Whether it has been asked if X can step shards, and it can."""
    _is_twin = False
    """Whether this is X over stand-ins, which exists only during a step."""

    def __init__(
        self,
        params: Any,
        *args: Any,
        scale: float | str = SCALE,
        warmup_steps: int = WARMUP_STEPS,
        on_refresh: str = ON_REFRESH,
        stochastic_rounding: bool | None = None,
        rest_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._own = {"scale": scale, "warmup_steps": warmup_steps, "on_refresh": on_refresh}
        self._own[REST] = rest_scale
        if not wrappable.takes(self._inner, ROUNDING):
            self._own[ROUNDING] = stochastic_rounding
        elif stochastic_rounding is not None:
            kwargs[ROUNDING] = stochastic_rounding  # both mean one thing
        self._arguments = args, kwargs
        self._forget()
        super().__init__(params, *args, **kwargs)
        # State made in a constructor (Adagrad) has the full shape: it is made again when needed.
        states = [self.state.pop(p) for p in self._parameters() if p in self.state]
        self._eager = any(states)
        wrappable.check_instance(self, self._kind)
        # GradScaler itself must decide whether to skip a step: a skipped step does not count.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped class's; groups may have their own ``scale``, ``warmup_steps``, ..."""
        for name, value in self._own.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)

    @property
    def _x(self) -> probe.Wrapped:
        args, kwargs = self._arguments
        return probe.Wrapped(self._inner, args, kwargs, self._known)

    def _forget(self) -> None:
        super()._forget()
        self._cohorts: dict[Tensor, Cohorts] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_own", "_arguments", "_eager", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._inner,), self.__getstate__()  # the class has no importable name

    def _saved(self, state: State) -> State:
        inner = {name: value for name, value in state.items() if name not in OWN}
        own = {name: value for name, value in state.items() if name in OWN}
        return {**with_rows(inner, own["age"].numel()), **own}

    def _unsaved(self, state: State) -> State:
        return without_equal_rows(state)

    def _asking(self) -> Asked:
        def make(p: Tensor, group: Mapping[str, Any]) -> Optimizer:
            return self._x.make([p], group)

        return Asked(make, lambda inner: probe.unhooked(type(inner).step)(inner))

    def _kept(
        self, p: Tensor, shape: tuple[int, ...], compact: bool, groups: Any, asked: Asked
    ) -> Iterator[Kept]:
        if compact:  # X sees a stack of matrices as one
            shape = (math.prod(shape[:-1]), shape[-1])
        return asked.answers(p, shape, groups)

    # --- one step ---------------------------------------------------------------------------------

    def _prepare(self, plan: Plan) -> list[Operation]:
        prepared = self._with_stand_ins(plan)
        dense = tuple(p for entries in plan for p, grad in entries if grad is None)
        step = wrappable.stepping(self._inner, self._evaluated, self._kind)
        operations = [Operation(partial(self._run, prepared, step), dense)]
        operations.append(Operation(partial(grow_older, prepared.all())))
        for taken in prepared.all():
            *others, last = taken.writes()
            operations += map(Operation, others)
            operations.append(Operation(partial(self._finish, taken, last), (taken.weight,)))
        return operations

    def _decay_factor(self, group: Mapping[str, Any]) -> float:
        return self._x.shrink(group)

    def _rest_scale(self, group: Mapping[str, Any]) -> float:
        wrappable.check_rest_scale(self._x.ask(probe.keeps_its_size, group), self._kind)
        return REST_SCALE

    def _check_shards(self, subspace: Subspace) -> None:
        if self._steps_shards:
            return
        for group in self.param_groups:
            alike = self._x.ask(probe.steps_parts_alike, group)
            wrappable.check_steps_shards(alike, subspace.name, self._kind)
        self._steps_shards = True

    def _finish(self, taken: Taken, last: Callable[[], None]) -> None:
        """Make the ``last`` write of a weight, and update its state."""
        last()
        assert taken.age is not None
        self._keep(taken, age=taken.age)
        keep(self.state[taken.weight], taken.shrink)
        self._cohorts[taken.weight] = self._cohorts[taken.weight].older()

    def _with_stand_ins(self, plan: Plan) -> Prepared:
        """The stand-ins of a step; states of taken weights move to their gradients' selections."""
        work: list[Work] = []
        for group, entries in zip(self.param_groups, plan, strict=True):
            work.append([])
            for p, grad in entries:
                if grad is None:
                    work[-1].append((p, None, None))
                else:
                    self._follow(p, grad, group)
                    work[-1].append((p, grad.selection, matrix(grad.compact)))
        prepared = self._stand_ins(work, for_step=True)
        for group, taken in zip(self.param_groups, prepared.taken, strict=True):
            if not taken:
                continue
            wrappable.check_elsewhere(self._x.ask(probe.keeps_elsewhere, group), self._kind)
            shrink, scale = self._x.shrink(group), group["scale"]
            if scale == "auto" and not self._x.ask(probe.keeps_its_size, group):
                scale = 1.0
            for each in taken:
                each.shrink = shrink
                others = self._others_move(each.weight, group)
                alpha = scale_of(scale, each.weight, each.selection, others)
                each.warm_up(alpha, group["warmup_steps"])
                if rounds(each.weight, group):
                    each.seed = self._seed(each.weight, group)
        return prepared

    def _lay_out(self, plan: Plan) -> None:
        prepared = self._with_stand_ins(plan)
        self._run(prepared, probe.unhooked(self._inner.step))
        for taken in prepared.all():
            self._keep(taken)

    def _call(self, method: Callable[[Optimizer], T]) -> T:
        """Call a method of X, which sees PᵀW of the selection to which the state belongs.

        If there is a gradient, state first moves to its selection, as in the next step.
        """
        work: list[Work] = []
        for group in self.param_groups:
            work.append([])
            for p in group["params"]:
                selection, compact = None, None
                if is_compact(self.state.get(p)):
                    if isinstance(p.grad, CompactGrad) and not p.grad.zeroed:
                        grad = self._compact_grad(p)
                        assert grad is not None
                        self._check_place(p, grad)
                        self._follow(p, grad, group)
                        compact = matrix(grad.compact)
                    selection = self._selection_of(p)
                work[-1].append((p, selection, compact))
        prepared = self._stand_ins(work, for_step=False)
        for part in prepared.parts():
            part.before = part.parameter.detach().clone()
        with torch.no_grad():
            result = self._run(prepared, method)
            for taken in prepared.all():
                taken.put()
                self._keep(taken)
        return result

    def _stand_ins(self, work: list[Work], for_step: bool) -> Prepared:
        """Make stand-ins for the taken weights of each group's ``work``.

        In a step they may hold zeros, if X moves them by as much wherever they are.
        """
        every: Batch = []
        taken: list[list[Taken]] = []
        for group, entries in zip(self.param_groups, work, strict=True):
            every.append([])
            taken.append([])
            known: Mapping[str, probe.Entry] = {}
            from_zero = False
            if any(selection is not None for _, selection, _ in entries):
                known = self._x.ask(probe.entries, group)
                wrappable.check_entries(known, self._kind)
                from_zero = for_step and self._x.ignores_weights(group)
            for p, selection, compact in entries:
                if selection is None:
                    every[-1].append((p, p))
                    continue
                narrow = None
                if for_step and rounds(p, group) and not from_zero:
                    narrow = self._x.ask(probe.narrow_entries, group)
                if p not in self._cohorts:
                    self._cohorts[p] = cohorts_of(self.state[p]["age"])
                of = self.state[p], self._cohorts[p], known, from_zero, narrow
                taken[-1].append(take(p, selection, compact, *of))
                every[-1] += [(p, part.parameter) for part in taken[-1][-1].parts]
        options = [probe.options_of(group) for group in self.param_groups]
        calls = batches(every, taken, self.state, self._together)
        return Prepared(calls, taken, saved_tensors(options))

    def _run(self, prepared: Prepared, call: Callable[[Optimizer], T]) -> T:
        """Let X's code work on stand-ins, and compute what follows for their weights."""
        others = {p: state for p, state in self.state.items() if not is_compact(state)}

        def of_twin(twin: Optimizer) -> T:
            self._make_eager_state(twin)
            return call(twin)

        with prepared.restored_if_it_fails():
            twins, result = prepared.run(self, others, of_twin)
            for taken in prepared.all():
                taken.collect()
                if clash := taken.state.keys() & set(OWN):
                    raise OptionError(
                        f"subspace({self._kind}): its state has entries named {', '.join(clash)}, "
                        "which here tell the subspace."
                    )
        for twin in reversed(twins):  # so that the groups get the first twin's counts
            twin.adopt()
        return result

    def _make_eager_state(self, twin: Optimizer) -> None:
        """Make the state that X makes in its constructor, for parameters that have none."""
        for group in twin.param_groups if self._eager else ():
            for p in group["params"]:
                if not twin.state.get(p):
                    twin.state[p].update(self._x.make([p], group).state[p])

    def _keep(self, taken: Taken, **own: Tensor) -> None:
        """Store the weight's state: X's new entries, and ours."""
        ours = {name: value for name, value in taken.former.items() if name in OWN}
        self.state[taken.weight] = {**taken.state, **ours, **own}

    def _together(self, groups: Sequence[int]) -> bool:
        """Whether X steps parameters with and without state in one call, in these groups."""
        asked = (self._x.ask(probe.steps_together, self.param_groups[k]) for k in groups)
        return self._eager or all(asked)

    def _follow(self, p: Tensor, grad: CompactGrad, group: dict[str, Any]) -> None:
        """Move the weight's state to the selection of its gradient, all at once."""
        state, selection = self.state.get(p, {}), grad.selection
        if state.get("indices") is selection.indices:
            return
        if "indices" not in state:
            if state:
                self._start_compact(p, selection)
            kept: State = {"age": torch.zeros_like(selection.indices)}
        elif (old := self._left_selection(p, selection, group)) is None or (
            # An unchanged selection is no refresh, except with on_refresh="reset".
            group["on_refresh"] == "carry" and old.same_rows(selection)
        ):
            kept = {**inner_state(state), "age": state["age"]}
        else:
            kept = self._followed(p, old, selection, group)
        kept |= {**selection_entries(selection), PENDING: self.state[p].get(PENDING, nothing())}
        if kept["age"] is not state.get("age"):
            self._cohorts.pop(p, None)
        self.state[p] = kept

    def _followed(
        self, p: Tensor, old: Selection, selection: Selection, group: dict[str, Any]
    ) -> State:
        """Return the part of a weight's state that is kept at a refresh, and the rows' ages."""
        entries = self._x.ask(probe.entries, group)
        if not self._warned_counts:
            wrappable.warn_of_counts(entries, self._x.ask(probe.group_counts, group), self._kind)
            self._warned_counts = True
        anew: State = {"age": torch.zeros_like(selection.indices)}
        if group["on_refresh"] != "carry" or old.indices.shape != selection.indices.shape:
            return anew
        place, fresh = places(old, selection)
        age = self.state[p]["age"][place].masked_fill_(fresh, 0)
        if not bool(age.any()):
            return anew
        inner = inner_state(self.state[p])
        where = old, selection, place, fresh, matrix(local(p)), compact_shape(p, selection)
        kept = carried_state(inner, *where, entries)
        return anew if kept is None else {**kept, "age": age}

    # --- the state of a weight --------------------------------------------------------------------

    def _has_compact_state(self) -> bool:
        state = vars(self).get("state", {})  # an X may call its methods in its constructor
        return any(map(is_compact, state.values()))

    def _selection_of(self, p: Tensor) -> Selection:
        """Return the selection to which the state of p belongs."""
        state, subspace = self.state[p], registry.get(p)
        if subspace is not None:
            dim = subspace.selection.dim
        else:  # loaded before anything was compiled
            dim = 0 if selects_rows(registry.saved_state(p), p) else 1
        known = state["indices"], state.get("scale"), dim, -1, registry.name_of(p)
        return Selection(*known, int(state["generation"]))


def _blank(inner: type[Optimizer]) -> Optimizer:
    """Make the empty wrapped optimizer that pickle and copy fill with its state."""
    wrapped_class = subspace(inner)  # type: ignore[arg-type]
    return wrapped_class.__new__(wrapped_class)
