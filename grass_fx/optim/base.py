"""What all optimizers that step in the subspace share: gradients, steps and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import OptionError, SelectionChangedError, StateError, warn
from grass_fx.optim.agreement import (
    check_selections,
    check_synchronised,
    share_votes,
    with_common_scores,
)
from grass_fx.optim.coverage import (
    check_patterns,
    warn_if_little_is_taken,
    warn_if_none_is_taken,
)
from grass_fx.optim.decay import PENDING, nothing
from grass_fx.optim.layout import Plan, is_layout_step, layout_plan
from grass_fx.optim.loading import selection_entries
from grass_fx.optim.options import REST, ROUNDING, check_ranges, is_least_zero, is_scale
from grass_fx.optim.stepping import Operation, Step
from grass_fx.optim.telemetry import stats_of
from grass_fx.optim.unselected import UnselectedRows
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.refresh import Finished, finish_steps, scores_on_host
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection
from grass_fx.state.sharding import local
from grass_fx.state.subspace import Subspace

MOST = 8
"""The largest number of weights that an error names."""


class SubspaceOptimizer(UnselectedRows):
    """Base of ``grass_fx.AdamW`` and of ``grass_fx.subspace(...)``.

    A subclass says how to carry out a :data:`Plan`. The state of a taken weight has ``age`` (r,),
    the steps of each row since it was last new, and the selection to which the state belongs:
    ``indices`` (r,), ``generation`` and, with replacement, ``scale`` (r,).
    """

    _kind = "grass_fx"
    _met_compact = _warned_dense = _warned_little = _warned_projected = False
    _checked = -1  # the registry's version when patterns of names were checked
    _early: Mapping[Tensor, Finished] = {}
    """Parameters that have already stepped, inside backward (in_backward.py)."""
    steps_in_backward = False
    """Whether :func:`~grass_fx.step_in_backward` was called with this optimizer."""
    _under_way: Step | None = None
    """The step that an exception has interrupted."""
    _evaluated: tuple[Any] | None = None
    """What this step's closure has returned."""
    _built_after = -1
    """The number of the last backward of any model before this optimizer was built."""

    def _prepare(self, plan: Plan) -> list[Operation]:
        """Return the operations that will update the parameters of ``plan`` and their state.

        This moves each weight's state to the selection of its gradient. If that fails for a weight,
        the states before it have moved but no parameter has, and another call continues.
        """
        raise NotImplementedError

    def _lay_out(self, plan: Plan) -> None:
        """Make the state that a first step with ``plan`` would make, without moving parameters."""
        raise NotImplementedError

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise OptionError for an impossible hyper-parameter."""
        check_ranges(
            self._kind,
            ("scale", group["scale"], is_scale(group["scale"])),
            ("warmup_steps", group["warmup_steps"], group["warmup_steps"] >= 0),
            (ROUNDING, group.get(ROUNDING), isinstance(group.get(ROUNDING), bool | None)),
            (REST, group[REST], group[REST] is None or is_least_zero(group[REST])),
        )
        if group["on_refresh"] not in ("carry", "reset"):
            value = group["on_refresh"]
            raise OptionError(f'{self._kind}: on_refresh={value!r}: valid: "carry", "reset".')

    def _forget(self) -> None:
        super()._forget()
        self._under_way = None  # it belonged to the former state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. The parameters' order in the optimizer keys their random streams."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if not self.records:
            self._built_after = registry.latest_backward()
        self.records = [*self.records, *self._announce(self.param_groups[-1:], len(self.records))]

    # --- one step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one optimizer step; if a period ends, change the selections afterwards.

        Args:
            closure: re-evaluates the model and returns the loss; ``step`` returns that loss.

        Raises:
            StateError: gradient and state of a weight do not fit; nothing has changed.
            OptionError: the gradients are on other parameters than those of this optimizer, or a
                pattern of names among the backend's options has matched no parameter.
            DistributedError: processes that train one model have selected differently.
        """
        if torch.compiler.is_dynamo_compiling():
            # Resuming after a graph break, Dynamo would confuse the states of two weights.
            return torch.compiler.disable(self.step)(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._evaluated = None if closure is None else (loss,)
        if is_layout_step(self):
            plan = layout_plan(self)
            self._layout_unknown = plan is None
            if plan is None:
                self._lay_out_from_source()
            else:
                self._lay_out(plan)
            return loss
        interrupted, self._under_way = self._under_way, None
        if interrupted is None or not interrupted.goes_on():
            interrupted = self._begin()
        self._evaluated, self._under_way = None, interrupted
        interrupted.apply()
        interrupted.commit()
        self._under_way = None
        self._warn_if_none()
        return loss

    def _begin(self) -> Step:
        """Prepare the next step. Errors that users can cause are raised here: see :meth:`_plan`."""
        check_synchronised(self._parameters())
        plan = self._plan([p for p in self._parameters() if p not in self._early])
        share_votes(plan)
        operations = [*self._prepare(plan), *self._of_the_rest(plan)]
        finished = self._finished(plan)
        for earlier in self._early.values():
            finished += earlier
        on_host = scores_on_host(with_common_scores(finished))

        def end() -> None:
            for subspace, _ in finished:
                subspace.settle()  # record the step before while a GPU is busy with this one
            finish_steps(on_host(), check_selections)  # the only place where selections change
            for p in self._early:
                p.grad = None
            self._early = {}

        return Step(operations, end, self._used)

    @torch.no_grad()
    def step_early(self, p: Tensor) -> None:
        """Step ``p`` alone now; the next :meth:`step` does not move it again, but ends its step."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.step_early)(p)
        plan = self._plan([p])
        operations = [*self._prepare(plan), *self._of_the_rest(plan)]
        finished = self._finished(plan)
        Step(operations, lambda: None, self._used).apply()
        self._early = {**self._early, p: finished}

    def _finished(self, plan: Plan) -> Finished:
        """The subspaces whose steps end with ``plan``, and their scores, once per gradient."""
        return [
            (subspace, grad.scores)
            for group in plan
            for p, grad in group
            if grad is not None
            and (subspace := grad.owner or registry.get(p)) is not None
            and not (isinstance(p.grad, CompactGrad) and p.grad.used)
        ]

    def _plan(self, params: list[Tensor]) -> Plan:
        """Return the plan of a step of ``params``."""
        chosen = {id(p) for p in params}
        plan: Plan = [
            [
                (p, self._compact_grad(p))
                for p in group["params"]
                if p.grad is not None and id(p) in chosen
            ]
            for group in self.param_groups
        ]
        for group in plan:
            for p, grad in group:
                if grad is None:
                    self._check_dense(p)
                else:
                    self._met_compact = True
                    self._check_place(p, grad)
        if params and not any(plan):
            self._check_whose_gradients()
        if not self._warned_little and self._checked != registry.version:
            check_patterns(self)
            self._checked = registry.version
        return plan

    def _compact_grad(self, p: Tensor) -> CompactGrad | None:
        """Return p's gradient as a compact one, projected if it is dense; None if p stays dense."""
        grad, subspace = p.grad, registry.get(p)
        if isinstance(grad, CompactGrad):
            if subspace is None and grad.owner is not None:
                registry.adopt(p, subspace := grad.owner)
            if grad.projected:
                self._warn_projected(p)
                self._check_projected(grad, subspace)
            if subspace is not None and subspace.sharding is not None:
                self._check_shards(subspace)
                grad = self._own_part(grad, subspace)
            if grad.zeroed and subspace is not None:  # its selection may be outdated
                selection = subspace.own(subspace.selection_on(p.device))
                shape, compact = subspace.spec.own_compact_shape(p.shape), grad.compact
                if compact.shape != shape:  # it had another rank or side
                    compact = compact.new_zeros(shape)
                return CompactGrad(compact, selection, p.shape, zeroed=True, owner=subspace)
            return grad
        known = "indices" in self.state.get(p, {})
        # A dense gradient stays dense, even if a compact one was added to it.
        if grad is None or not (known or (subspace is not None and subspace.delivered)):
            return None
        if subspace is None:
            raise StateError(
                f"{registry.name_of(p)}: its optimizer state is in a subspace, but its gradient is "
                "dense and no compiled graph has taken it. Compile the model with the options of "
                "the saved run before the step; to train the weight dense from here on, delete "
                "optimizer.state[weight]."
            )
        self._warn_projected(p)
        selection = subspace.own(subspace.selection_on(p.device))
        return CompactGrad(selection.project(local(grad)), selection, p.shape, owner=subspace)

    def _warn_projected(self, p: Tensor) -> None:
        if self._warned_projected:
            return
        self._warned_projected = True
        warn(
            f"{registry.name_of(p)} is stepped in a subspace, but its gradient came dense, at "
            "least in part, from code outside the compiled graph, from a graph that leaves it "
            "dense, or from weight.grad.add_(a dense tensor), such as noise: it was projected. Run "
            "all of the training step through the compiled model, or "
            "exclude the weight; to train it dense from here on, make a new optimizer."
        )

    def _check_projected(self, grad: CompactGrad, subspace: Subspace | None) -> None:
        """Raise if a dense gradient was projected onto rows that are no longer selected."""
        if subspace is not None and grad.selection.generation != subspace.selection.generation:
            raise SelectionChangedError(
                f"{subspace.name}: a dense gradient was added to a compact one of selection "
                f"{grad.selection.generation}, and the selection is "
                f"{subspace.selection.generation} now. Call optimizer.zero_grad(), with "
                "set_to_none=True, and run the backward again."
            )

    def _own_part(self, grad: CompactGrad, subspace: Subspace) -> CompactGrad:
        """Return this process's part of a sharded weight's gradient, with which it steps."""
        selection, compact = subspace.own(grad.selection), local(grad.compact)
        return CompactGrad(
            compact, selection, grad.shape, grad.scores, grad.zeroed, owner=grad.owner
        )

    def _check_shards(self, subspace: Subspace) -> None:
        """Raise OptionError if the optimizer cannot step a sharded weight; by default it can."""

    def _check_dense(self, p: Tensor) -> None:
        """Raise if the optimizer cannot step with p's ordinary gradient; by default it can."""

    def _check_place(self, p: Tensor, grad: CompactGrad) -> None:
        """Raise StateError if the model has moved since p's state was made."""
        state, name, shape = self.state.get(p, {}), grad.selection.name, tuple(p.shape)
        if grad.device.type == "meta":
            raise StateError(
                f"{name} is on the meta device and has no values: give it some first, by "
                "module.to_empty(device=...) and initialising or loading it."
            )
        if grad.shape != p.shape:
            raise StateError(
                f"{name} has shape {shape}, its gradient {tuple(grad.shape)}: the weight was "
                "replaced after the forward. Call optimizer.zero_grad(), and run it again."
            )
        dtype, former = self._layouts.setdefault(p, (grad.dtype, p.shape))
        if "indices" not in state:
            self._layouts[p] = grad.dtype, p.shape
        elif former != p.shape:
            raise StateError(
                f"{name} has shape {shape} now, its optimizer state was made for "
                f"{tuple(former)}. Make a new optimizer."
            )
        elif state["indices"].device != grad.device:
            raise StateError(
                f"{grad.selection.name} is on {grad.device} now, its optimizer state on "
                f"{state['indices'].device}. Move the model before its first step, or move the "
                "state along: optimizer.load_state_dict(optimizer.state_dict())."
            )
        elif dtype != grad.dtype:
            raise StateError(
                f"{grad.selection.name} has a gradient of {grad.dtype}, its optimizer state is of "
                f"{dtype}. Convert the model before its first step, or make a new optimizer."
            )

    def _check_whose_gradients(self) -> None:
        """Raise if no parameter has a gradient, but weights of no optimizer have compact ones."""
        strays = registry.strays(self._built_after)
        if strays:
            names = ", ".join(strays[:MOST]) + (", ..." if len(strays) > MOST else "")
            raise OptionError(
                "none of this optimizer's parameters has a gradient, but weights that no optimizer "
                f"holds have: {names}. Build the optimizer from the parameters of the "
                "model that is compiled, not from a copy."
            )

    def _start_compact(self, p: Tensor, selection: Selection) -> None:
        """Start p's state in a subspace: any state of the whole weight is dropped."""
        if self.state[p]:
            warn(  # warn first: if warnings are errors, nothing is lost
                f"{selection.name} has trained dense until now: its optimizer state starts anew in "
                "the subspace."
            )
            self.state[p].clear()

    def _keep_selection(self, p: Tensor, selection: Selection) -> None:
        """Note the selection to which p's state belongs."""
        self.state[p].pop("scale", None)
        self.state[p].update(selection_entries(selection))
        self.state[p].setdefault(PENDING, nothing())

    # --- telemetry --------------------------------------------------------------------------------

    def stats(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each taken weight now: ``{name: {metric: value}}``, plain floats.

        ``age``: steps since its selection was drawn. ``coverage``: share of its rows (columns for
        side "in") that were ever selected. ``overlap``: share of the selection that was also in the
        selection before. ``captured``: share of the gradient's norm in the rows that the last
        scores selected. ``update_norm`` (``grass_fx.AdamW``): norm of the last update, without
        weight decay. Unknown metrics are left out; {} before the compiled model has run. See
        docs/telemetry.md.
        """
        return stats_of(self._parameters(), self._update_norm)

    def _update_norm(self, p: Tensor) -> Tensor | None:
        """The norm of p's last update in its subspace, () on its device, or None if unknown."""
        return None

    def _warn_if_none(self) -> None:
        """Warn once, at the first step with gradients, about weights that train dense."""
        if self._met_compact:
            if not self._warned_little:
                self._warned_little = True
                warn_if_little_is_taken(self)
        elif not self._warned_dense and any(p.grad is not None for p in self._parameters()):
            self._warned_dense = True
            warn_if_none_is_taken(self)
