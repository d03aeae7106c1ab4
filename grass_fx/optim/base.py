"""What every optimizer that steps in the subspace shares: gradients, steps, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grass_fx.errors import OptionError, SelectionChangedError, StateError, warn
from grass_fx.optim.agreement import check_selections, with_common_scores
from grass_fx.optim.checkpoint import CheckpointedOptimizer
from grass_fx.optim.coverage import warn_if_little_is_taken, warn_if_none_is_taken
from grass_fx.optim.stepping import Operation, Step
from grass_fx.optim.telemetry import stats_of
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.refresh import Finished, finish_steps, scores_on_host
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection
from grass_fx.state.sharding import local
from grass_fx.state.subspace import Subspace

Plan = list[list[tuple[Tensor, "CompactGrad | None"]]]
"""For each parameter group, the parameters to step, with their compact gradients if they have."""


MOST = 8
"""Weights that an error names."""


class SubspaceOptimizer(CheckpointedOptimizer):
    """Base of ``grass_fx.AdamW`` and of ``grass_fx.subspace(...)``.

    A subclass says how a :data:`Plan` is carried out. State of a taken weight: ``indices`` (r,),
    ``generation`` and, with replacement, ``scale`` (r,), the selection that the rest belongs to,
    and ``age`` (r,), each row's steps since it was last new.
    """

    _kind = "grass_fx"
    _met_compact = _warned_dense = _warned_little = _warned_projected = False
    _early: Mapping[Tensor, Finished] = {}
    """Parameters that have stepped already, inside backward (in_backward.py)."""
    steps_in_backward = False
    """Whether :func:`~grass_fx.step_in_backward` was called with it."""
    _under_way: Step | None = None
    """A step that an exception has interrupted."""
    _built_after = -1
    """The last backward of any model before this optimizer was built."""

    def _prepare(self, plan: Plan) -> list[Operation]:
        """The operations that will update the parameters of ``plan``, their state included.

        Here state follows the gradients' selections, weight by weight: if it fails for one, those
        before it have followed, no parameter has moved, and another call goes on.
        """
        raise NotImplementedError

    def _lay_out(self, plan: Plan) -> None:
        """Make the state that a first step with ``plan`` would make, and move nothing."""
        raise NotImplementedError

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise OptionError for a hyper-parameter that is impossible."""
        check_ranges(
            self._kind,
            ("scale", group["scale"], group["scale"] > 0),
            ("warmup_steps", group["warmup_steps"], group["warmup_steps"] >= 0),
        )
        if group["on_refresh"] not in ("carry", "reset"):
            value = group["on_refresh"]
            raise OptionError(f'{self._kind}: on_refresh={value!r}: valid: "carry", "reset".')

    def _forget(self) -> None:
        super()._forget()
        self._under_way = None  # it was of the state before

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the parameters' order in the optimizer keys their random streams."""
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if not self.records:
            self._built_after = registry.latest_backward()
        self.records = [*self.records, *self._announce(self.param_groups[-1:], len(self.records))]

    # --- one step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; afterwards, where a period ends, the selections change.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.

        Raises:
            StateError: gradient and state of a weight do not fit each other; nothing has changed.
            OptionError: the gradients are on other parameters than this optimizer's.
            DistributedError: processes that train one model have selected differently.
        """
        if torch.compiler.is_dynamo_compiling():
            # Resuming after a graph break, Dynamo would take two weights' states for one.
            return torch.compiler.disable(self.step)(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_layout_step():
            self._lay_out(self._layout_plan())
            return loss
        interrupted, self._under_way = self._under_way, None
        if interrupted is None or not interrupted.goes_on():
            interrupted = self._begin()
        self._under_way = interrupted
        interrupted.apply()
        interrupted.commit()
        self._under_way = None
        self._warn_if_none()
        return loss

    def _begin(self) -> Step:
        """The next step, prepared. Whatever can fail for the user's doing has not: see _plan."""
        plan = self._plan([p for p in self._parameters() if p not in self._early])
        operations = self._prepare(plan)
        finished = self._finished(plan)
        for earlier in self._early.values():
            finished += earlier
        on_host = scores_on_host(with_common_scores(finished))

        def end() -> None:
            for subspace, _ in finished:
                subspace.settle()  # of the step before: a GPU is still busy with this one
            finish_steps(on_host(), check_selections)  # here, and nowhere else, selections change
            for p in self._early:
                p.grad = None
            self._early = {}

        return Step(operations, end, self._used)

    @torch.no_grad()
    def step_early(self, p: Tensor) -> None:
        """Step ``p`` alone, now; the next :meth:`step` leaves it out, and ends its step."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.step_early)(p)
        plan = self._plan([p])
        operations, finished = self._prepare(plan), self._finished(plan)
        Step(operations, lambda: None, self._used).apply()
        self._early = {**self._early, p: finished}

    def _finished(self, plan: Plan) -> Finished:
        """Whose steps end with ``plan``, with their scores: once for each gradient that arrived."""
        return [
            (subspace, grad.scores)
            for group in plan
            for p, grad in group
            if grad is not None
            and (subspace := grad.owner or registry.get(p)) is not None
            and not (isinstance(p.grad, CompactGrad) and p.grad.used)
        ]

    def _plan(self, params: list[Tensor]) -> Plan:
        """What a step of ``params`` has to do."""
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
        return plan

    def _compact_grad(self, p: Tensor) -> CompactGrad | None:
        """p's gradient as a compact one, projected if it came dense; None if p trains dense."""
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
            if grad.zeroed and subspace is not None:  # zeros of a selection that may be gone
                selection = subspace.own(subspace.selection_on(p.device))
                shape, compact = subspace.spec.own_compact_shape(p.shape), grad.compact
                if compact.shape != shape:  # of another rank or side
                    compact = compact.new_zeros(shape)
                return CompactGrad(compact, selection, p.shape, zeroed=True, owner=subspace)
            return grad
        known = "indices" in self.state.get(p, {})
        # A dense gradient may have met a compact one, which cannot change its type.
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
        """Raise if a dense gradient was projected onto rows that are not selected any more."""
        if subspace is not None and grad.selection.generation != subspace.selection.generation:
            raise SelectionChangedError(
                f"{subspace.name}: a dense gradient was added to a compact one of selection "
                f"{grad.selection.generation}, and the selection is "
                f"{subspace.selection.generation} now. Call optimizer.zero_grad(), with "
                "set_to_none=True, and run the backward again."
            )

    def _own_part(self, grad: CompactGrad, subspace: Subspace) -> CompactGrad:
        """This process's part of a sharded weight's gradient: what it steps with."""
        selection, compact = subspace.own(grad.selection), local(grad.compact)
        return CompactGrad(
            compact, selection, grad.shape, grad.scores, grad.zeroed, owner=grad.owner
        )

    def _check_shards(self, subspace: Subspace) -> None:
        """Raise if the optimizer cannot step with a sharded weight."""
        raise OptionError(
            f"{subspace.name} is sharded over processes, which {self._kind} cannot step. Use "
            "grass_fx.AdamW, or exclude the weight."
        )

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
        """No parameter has a gradient: an error if compact ones wait where no optimizer looks."""
        strays = registry.strays(self._built_after)
        if strays:
            names = ", ".join(strays[:MOST]) + (", ..." if len(strays) > MOST else "")
            raise OptionError(
                "none of this optimizer's parameters has a gradient, but weights that no optimizer "
                f"holds have: {names}. Build the optimizer from the parameters of the "
                "model that is compiled, not from a copy."
            )

    def _start_compact(self, p: Tensor, selection: Selection) -> None:
        """p's first step in a subspace: state it may have is of the whole weight, and goes."""
        if self.state[p]:
            warn(  # first: where warnings are errors nothing is lost
                f"{selection.name} has trained dense until now: its optimizer state starts anew in "
                "the subspace."
            )
            self.state[p].clear()

    def _keep_selection(self, p: Tensor, selection: Selection) -> None:
        """Note the selection that p's state belongs to."""
        self.state[p].pop("scale", None)
        self.state[p].update(selection_entries(selection))

    def _old_selection(self, p: Tensor, new: Selection) -> Selection | None:
        """The selection that p's state belongs to, or None if ``new`` is still the same."""
        state = self.state[p]
        draw = int(state["generation"])
        old = Selection(state["indices"], state.get("scale"), new.dim, -1, new.name, draw)
        return None if old.draw == new.draw and old.same_rows(new) else old

    # --- telemetry --------------------------------------------------------------------------------

    def stats(self) -> dict[str, dict[str, float]]:
        """What can be told of each taken weight now: ``{name: {metric: value}}``, plain floats.

        ``age``: steps since its selection was drawn. ``coverage``: share of its rows (columns for
        side "in") ever selected. ``overlap``: share of the selection that was in the one before.
        ``captured``: share of the gradient's norm in the rows that the last scores selected.
        ``update_norm`` (``grass_fx.AdamW``): norm of the last update, weight decay aside. What is
        not known is left out; {} before the compiled model has run. See docs/telemetry.md.
        """
        return stats_of(self._parameters(), self._update_norm)

    def _update_norm(self, p: Tensor) -> Tensor | None:
        """The norm of p's last update in its subspace, () on its device, if it can be known."""
        return None

    def _warn_if_none(self) -> None:
        """Once, at the first step with gradients: what trains dense though it might not."""
        if self._met_compact:
            if not self._warned_little:
                self._warned_little = True
                warn_if_little_is_taken(self)
        elif not self._warned_dense and any(p.grad is not None for p in self._parameters()):
            self._warned_dense = True
            warn_if_none_is_taken(self)

    # --- the step by which torch.distributed.checkpoint lays out an empty optimizer ---------------

    def _is_layout_step(self) -> bool:
        """A step that can move nothing: no state yet, lr = 0, and dense gradients of zeros."""
        rates = [group.get("lr", 1) for group in self.param_groups]
        if self.state or any(rate is None or float(rate) != 0 for rate in rates):
            return False
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        return bool(grads) and not any(
            isinstance(g, CompactGrad) or bool(local(g).any()) for g in grads
        )

    def _layout_plan(self) -> Plan:
        """All parameters, taken ones with a gradient of zeros; nothing while none is known taken.

        Which weights are taken, and with it the shapes, is known once the compiled model has run.
        """
        subspaces = {p: registry.get(p) for p in self._parameters()}
        self._layout_unknown = not any(subspaces.values())
        plan: Plan = []
        for group in self.param_groups:
            entries: list[tuple[Tensor, CompactGrad | None]] = []
            for p in group["params"]:
                subspace = subspaces[p]
                if p.grad is None or self._layout_unknown:
                    continue
                if subspace is None:
                    entries.append((p, None))
                else:
                    selection = subspace.own(subspace.selection_on(p.device))
                    compact = selection.project(local(p.grad))
                    entries.append((p, CompactGrad(compact, selection, p.shape, zeroed=True)))
            plan.append(entries)
        return plan


def selection_entries(selection: Selection) -> dict[str, Tensor]:
    """What a weight's state notes of the selection that the rest belongs to."""
    draw = torch.tensor(selection.draw, device="cpu")
    entries = {"indices": selection.indices, "generation": draw}
    return entries if selection.scale is None else {**entries, "scale": selection.scale}


def check_ranges(kind: str, *values: tuple[str, Any, Any]) -> None:
    """Raise OptionError for the first (name, value, whether it is in range) that is not."""
    for name, value, good in values:
        if not good:
            raise OptionError(f"{kind}: {name}={value!r} is out of range.")
