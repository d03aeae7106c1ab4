"""``grass_fx.subspace(X)``: any torch optimizer class X, stepping taken weights in their subspace.

During a step a parameter of the compact shape, PᵀW, stands in for each taken weight W, with
C as its gradient. X steps that and keeps its state for that; what it changed goes to the selected
rows of W (equation 4). X never sees a tensor of W's shape.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer, SparseAdam

from grass_fx.config import ON_REFRESH, SCALE, WARMUP_STEPS
from grass_fx.errors import OptionError
from grass_fx.gradient import CompactGrad
from grass_fx.ops import along, select
from grass_fx.optim.base import SUBSPACE_DEFAULTS, Plan, SubspaceOptimizer
from grass_fx.optim.carry import places
from grass_fx.optim.entries import Asked, Kept
from grass_fx.optim.loading import OWN
from grass_fx.optim.rowwise import (
    Cohort,
    State,
    carried_state,
    cohorts_of,
    counts,
    cut,
    joined,
    with_rows,
    without_equal_rows,
)
from grass_fx.optim.stepping import Operation
from grass_fx.optim.update import add_rows_, warmup
from grass_fx.selected import Selection, matrix


@functools.cache
def subspace(optimizer_class: type[Optimizer]) -> type[Optimizer]:
    """A subclass of ``optimizer_class`` that steps taken weights in their subspace.

    Its constructor takes what ``optimizer_class`` takes and, as ``grass_fx.AdamW`` does, ``scale``,
    ``warmup_steps`` and ``on_refresh``. Dense parameters are stepped as ``optimizer_class`` does;
    of a taken weight all state has compact shapes. Decoupled weight decay reaches the whole weight,
    lr·λ each step, if X has a rate lr; L2 decay is part of the gradient, so it reaches the selected
    rows.

    At a refresh with ``on_refresh="carry"``, floating-point state of C's shape is kept for the rows
    that stay, and rows of different ages are then stepped as parameters of their own where the
    optimizer counts steps. State of any other kind (factored moments, quantised blocks) mixes rows:
    if there is some, all state of that weight starts anew.

    Raises:
        OptionError: the class is no torch optimizer, or its steps cannot be taken in a subspace.
    """
    _check_class(optimizer_class)
    body = {"__doc__": f"{optimizer_class.__name__} in the subspace: see grass_fx.subspace.",
            "_kind": optimizer_class.__name__, "_inner": optimizer_class}  # fmt: skip
    return type(f"Subspace{optimizer_class.__name__}", (_Wrapped, optimizer_class), body)


def _check_class(optimizer_class: Any) -> None:
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
    taken = inspect.signature(optimizer_class.__init__).parameters.keys() & SUBSPACE_DEFAULTS.keys()
    if taken:
        raise OptionError(
            f"subspace({name}): it has arguments of its own named {', '.join(sorted(taken))}, "
            "which here control the subspace. Derive a class that fixes them, and wrap that."
        )


@dataclass
class _StandIn:
    """A parameter of the compact shape in the place of some rows of a taken weight."""

    weight: Tensor
    group: dict[str, Any]
    selection: Selection
    cohort: Cohort
    gradient: Tensor
    shape: torch.Size
    """C's, of all the weight's rows."""
    before: Tensor = field(init=False)
    parameter: Parameter = field(init=False)

    def __post_init__(self) -> None:
        s = self.selection
        self.before = select(matrix(self.weight), s.indices, s.scale, s.dim)
        self.parameter = Parameter(self.before.clone())
        self.parameter.grad = self.gradient


class _Wrapped(SubspaceOptimizer):
    """What all wrapped classes share; ``_inner`` is the wrapped one, a base of the subclass."""

    _inner: type[Optimizer]

    def __init__(
        self,
        params: Any,
        *args: Any,
        scale: float = SCALE,
        warmup_steps: int = WARMUP_STEPS,
        on_refresh: str = ON_REFRESH,
        **kwargs: Any,
    ) -> None:
        self._own = {"scale": scale, "warmup_steps": warmup_steps, "on_refresh": on_refresh}
        self._arguments = args, kwargs
        self._forget()
        super().__init__(params, *args, **kwargs)
        # State made in a constructor (Adagrad) has the full shape: it is made again when needed.
        self._eager = bool(self.state)
        self.state.clear()
        # GradScaler is to decide itself whether a step is skipped: a skipped one is no step.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped class's; groups may have their own ``scale``, ``warmup_steps``, ..."""
        for name, value in self._own.items():
            param_group.setdefault(name, value)
        super().add_param_group(param_group)

    def _forget(self) -> None:
        super()._forget()
        self._cohorts: dict[Tensor, list[Cohort]] = {}
        self._decoupled: dict[frozenset[tuple[str, Any]], bool] = {}

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
            return self._inner_for(p, group)

        return Asked(make, lambda inner: _unhooked(type(inner).step)(inner))

    def _kept(
        self, p: Tensor, shape: tuple[int, ...], compact: bool, groups: Any, asked: Asked
    ) -> Iterator[Kept]:
        if compact:  # X sees a stack of matrices as one
            shape = (math.prod(shape[:-1]), shape[-1])
        return asked.answers(p, shape, groups)

    # --- one step ---------------------------------------------------------------------------------

    def _prepare(self, plan: Plan) -> list[Operation]:
        ends = tuple(p for entries in plan for p, _ in entries)
        return [Operation(lambda: self._carry_out(plan), ends)]

    def _carry_out(self, plan: Plan) -> None:
        made = self._step_inner(plan)
        for weight, parts in _by_weight(made):
            shrink = self._shrink(parts[0].group)
            if shrink != 1:
                weight.mul_(shrink)
            self.state[weight]["age"] += 1
            cohorts = self._cohorts[weight]
            self._cohorts[weight] = [Cohort(c.age + 1, c.rows) for c in cohorts]
            for part in parts:
                self._write_back(part, shrink)

    def _lay_out(self, plan: Plan) -> None:
        self._step_inner(plan)

    def _step_inner(self, plan: Plan) -> list[_StandIn]:
        """X's step with stand-ins in the place of taken weights; their new state goes to those."""
        lists = [group["params"] for group in self.param_groups]
        made: list[_StandIn] = []
        try:
            for group, entries in zip(self.param_groups, plan, strict=True):
                params: list[Tensor] = []
                for p, grad in entries:
                    parts = [] if grad is None else self._stand_ins(p, grad, group)
                    params += [part.parameter for part in parts] or [p]
                    made += parts
                for p in params:
                    if self._eager and not self.state.get(p):
                        self.state[p].update(self._inner_for(p, group).state[p])
                group["params"] = params
            _unhooked(self._inner.step)(self)
        finally:
            for group, params in zip(self.param_groups, lists, strict=True):
                group["params"] = params
            states = {part.parameter: self.state.pop(part.parameter, {}) for part in made}
        for weight, parts in _by_weight(made):
            shape, dim = parts[0].shape, parts[0].selection.dim
            inner = joined([(part.cohort, states[part.parameter]) for part in parts], shape, dim)
            if clash := inner.keys() & set(OWN):
                raise OptionError(
                    f"subspace({self._kind}): its state has entries named {', '.join(clash)}, "
                    "which here tell the subspace."
                )
            own = {name: self.state[weight][name] for name in OWN if name in self.state[weight]}
            self.state[weight] = {**inner, **own}
        return made

    def _stand_ins(self, p: Tensor, grad: CompactGrad, group: dict[str, Any]) -> list[_StandIn]:
        """One for all of the weight's rows, or one for each age where X counts steps."""
        self._follow(p, grad, group["on_refresh"])
        selection, compact = grad.subspace, matrix(grad.compact)
        shape = compact.shape
        inner = {name: value for name, value in self.state[p].items() if name not in OWN}
        if p not in self._cohorts:
            self._cohorts[p] = cohorts_of(self.state[p]["age"])
        cohorts = self._cohorts[p]
        if len(cohorts) > 1 and not counts(inner, shape):
            cohorts = [Cohort(cohorts[0].age, None)]
        parts = []
        for cohort in cohorts:
            chosen, gradient = selection, compact
            if cohort.rows is not None:
                chosen = selection.part(cohort.rows)
                gradient = compact.index_select(selection.dim, cohort.rows)
            part = _StandIn(p, group, chosen, cohort, gradient, shape)
            if mine := cut(inner, cohort, shape, selection.dim):
                self.state[part.parameter] = mine
            parts.append(part)
        return parts

    def _follow(self, p: Tensor, grad: CompactGrad, on_refresh: str) -> None:
        """The weight's state moves to the selection of its gradient."""
        state, selection = self.state[p], grad.subspace
        if state.get("indices") is selection.indices:
            return
        if "indices" not in state:
            self._start_compact(p, selection)
            state["age"] = torch.zeros_like(selection.indices)
        elif (old := self._old_selection(p, selection)) is not None:
            kept, age = None, torch.zeros_like(selection.indices)
            if on_refresh == "carry" and old.indices.shape == selection.indices.shape:
                inner = {name: value for name, value in state.items() if name not in OWN}
                where = old, selection, *places(old, selection)
                kept = carried_state(inner, *where, matrix(grad.compact).shape)
                if kept is not None:
                    *_, place, fresh = where
                    age = state["age"][place].masked_fill_(fresh, 0)
            state.clear()
            if kept is not None and bool(age.any()):
                state.update(kept)
            state["age"] = age
            self._cohorts.pop(p, None)
        self._keep_selection(p, selection)

    def _write_back(self, part: _StandIn, shrink: float) -> None:
        """W[σ] += α · ρ · warm-up · (what X changed, its weight decay aside)."""
        group, selection, weight = part.group, part.selection, matrix(part.weight)
        after, steps = part.parameter.detach(), group["warmup_steps"]
        whole = part.cohort.rows is None
        youngest = self._cohorts[part.weight][0].age if whole else part.cohort.age + 1
        if group["scale"] == 1 and selection.scale is None and youngest >= steps:
            weight.index_copy_(selection.dim, selection.indices, after)
            return
        age = self.state[part.weight]["age"]
        if part.cohort.rows is not None:
            age = age[part.cohort.rows]
        factor = warmup(age, steps) * group["scale"]
        if selection.scale is not None:
            factor = factor * selection.scale
        dtype = torch.promote_types(weight.dtype, torch.float32)
        change = after.to(dtype) - part.before.to(dtype) * shrink
        add_rows_(weight, selection, change * along(factor.to(dtype), selection.dim, weight.dim()))

    # --- what X is like ---------------------------------------------------------------------------

    def _inner_for(self, p: Tensor, group: Mapping[str, Any], **changed: Any) -> Optimizer:
        """An X of its own for one parameter, with the group's options."""
        ours = ("params", "param_names", *SUBSPACE_DEFAULTS)
        options = {name: value for name, value in group.items() if name not in ours}
        args, kwargs = self._arguments
        return self._inner([{**options, **changed, "params": [p]}], *args, **kwargs)

    def _shrink(self, group: Mapping[str, Any]) -> float:
        """1 − lr·λ if X's weight decay is decoupled, else 1: L2 decay is part of the gradient."""
        if not group.get("weight_decay") or group.get("lr") is None:
            return 1.0
        # Groups may differ; rates that a schedule changes make no difference to this.
        kind = frozenset((k, v) for k, v in group.items() if isinstance(v, bool))
        if kind not in self._decoupled:
            self._decoupled[kind] = self._find_decoupled(group)
        return 1 - float(group["lr"]) * group["weight_decay"] if self._decoupled[kind] else 1.0

    @torch.enable_grad()
    def _find_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Ask X, on a weight of one number: few classes tell how they decay."""
        if "decoupled_weight_decay" in group:
            return bool(group["decoupled_weight_decay"])

        def stepped(gradient: float, decay: float) -> float:
            """After a step with these, and one with zeros, which shows what the first has left."""
            w = Parameter(torch.ones(1, 1, device="cpu"))
            w.grad = torch.full_like(w, gradient)
            inner = self._inner_for(w, group, lr=0.1, weight_decay=decay)
            inner.step()
            inner.param_groups[0]["weight_decay"] = 0.0
            w.grad.zero_()
            inner.step()
            return w.item()

        decayed, decay = stepped(1.0, 0.5), -0.5 if group.get("maximize") else 0.5
        beside = math.isclose(decayed, stepped(1.0, 0.0) - 0.1 * 0.5, abs_tol=1e-4)
        within = math.isclose(decayed, stepped(1.0 + decay, 0.0), abs_tol=1e-4)
        return beside and not within


def _by_weight(parts: list[_StandIn]) -> list[tuple[Tensor, list[_StandIn]]]:
    groups = groupby(parts, key=lambda part: id(part.weight))
    each = [list(group) for _, group in groups]
    return [(group[0].weight, group) for group in each]


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """X's step without the hooks that torch puts around it: ours has run them."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def _blank(inner: type[Optimizer]) -> Optimizer:
    """What pickle and copy fill with the state of a wrapped optimizer."""
    made = subspace(inner)  # type: ignore[arg-type]
    return made.__new__(made)
