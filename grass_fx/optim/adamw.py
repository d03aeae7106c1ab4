"""AdamW in the subspace for weights with a CompactGrad, and torch's AdamW for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grass_fx.config import ON_REFRESH, SCALE, WARMUP_STEPS
from grass_fx.errors import OptionError, StateError, UnsupportedGradError
from grass_fx.optim.base import SubspaceOptimizer
from grass_fx.optim.carry import Move, carried, carried_rows
from grass_fx.optim.decay import keep
from grass_fx.optim.dense import Rounded, count_as_torch, rounded_operations, step_as_torch
from grass_fx.optim.entries import Kept
from grass_fx.optim.layout import Plan
from grass_fx.optim.options import REST, check_ranges, is_least_zero, rounds, scale_of
from grass_fx.optim.rounding import rounding_seed
from grass_fx.optim.stepping import Operation
from grass_fx.optim.telemetry import adam_update_norm
from grass_fx.optim.update import CompactStep, adam_operations, in_code
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.selection import Selection, matrix
from grass_fx.state.sharding import local


class AdamW(SubspaceOptimizer):
    """AdamW for a model compiled with ``backend="grass"``.

    A weight whose gradient is a :class:`~grass_fx.CompactGrad` is stepped in its subspace
    (equation 4 of docs/method.md): its moments have the compact shape (r, n) or (m, r), and only
    its selected rows move. Every other parameter is stepped as ``torch.optim.AdamW`` would.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate of the dense parameters; the compact update's is ``scale * lr``.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: λ; decoupled, lr·λ of the weight each step. The selected rows of a taken
            weight decay as they move, all others once a period, by the product of what was due.
        scale: α, multiplies the compact update only. "auto" is n / r for each weight, the number
            of its columns (rows) over that of the selected ones; with the backend's option
            ``rest="sign"``, where the others move too, (n / r)^(2/3).
        warmup_steps: a row's update grows linearly to full over this many steps of its own.
        on_refresh: "carry" keeps moments and age of a row that stays selected; "reset" starts all
            rows anew, as the paper does.
        stochastic_rounding: round updated bfloat16 parameters, compact and dense, up or down at
            random, without bias. None is True; False rounds to nearest, by which most small
            changes are lost. Other dtypes are not affected.
        rest_scale: of gradients with signs (the backend's option ``rest="sign"``): rows that are
            not selected move by rest_scale * lr against them. None is 0.5.
        foreach, fused: for the dense parameters, as in ``torch.optim.AdamW``.
        maximize: go up the gradient, compact and dense.
        amsgrad, capturable, differentiable: as arguments of ``torch.optim.AdamW``, False or None
            alone. True is an OptionError that says why, and what to use.
        compile: step taken weights by code that Inductor generates: on a GPU one Triton kernel for
            up to 8 weights, rounding included. None: on CUDA devices where Triton is installed;
            True: on every device, a CPU too; False: nowhere. Compiled once for each set of shapes.
            With replacement rows repeat, and this has no effect.
        seed: of stochastic rounding.

    The state of a taken weight is plain tensors: ``exp_avg`` and ``exp_avg_sq`` (compact), ``age``
    (r,), and the selection to which the moments belong: ``indices`` (r,), ``generation`` and, with
    replacement, ``scale`` (r,).

    Raises:
        OptionError: a hyper-parameter is out of range or not supported.
        StateError: state and weight do not fit: in ``step`` if the model has moved to another
            dtype or device, in ``load_state_dict`` if names, shapes or selections differ.
    """

    _kind = "AdamW"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        scale: float | str = SCALE,
        warmup_steps: int = WARMUP_STEPS,
        on_refresh: str = ON_REFRESH,
        stochastic_rounding: bool | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        compile: bool | None = None,
        seed: int = 0,
        rest_scale: float | None = None,
        amsgrad: bool | None = False,
        capturable: bool | None = False,
        differentiable: bool | None = False,
    ) -> None:
        self._forget()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "warmup_steps": warmup_steps,
            "on_refresh": on_refresh,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "compile": compile,
            "seed": seed,
            REST: rest_scale,
            "amsgrad": amsgrad,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _forget(self) -> None:
        super()._forget()
        self._common_ages: dict[Tensor, tuple[Tensor, int | None]] = {}
        self._applied: dict[Tensor, tuple[Selection, dict[str, Any]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # as torch's AdamW does
            for p in group["params"]:
                if "step" in (own := self.state.get(p, {})):
                    own["step"] = count_as_torch(own["step"], p, _is_fused(p, group))

    def _check_switches(self, group: Mapping[str, Any]) -> None:
        for name, why in _NOT_HERE.items():
            if group.get(name):
                raise OptionError(f"{self._kind} does not take {name}={group[name]!r}: {why}")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check_switches(group)
        if isinstance(group["scale"], bool):
            raise OptionError(
                f"{self._kind}: scale={group['scale']!r} is no number. The sixth argument is "
                "scale, where torch.optim.AdamW has amsgrad: name the arguments."
            )
        super()._check_group(group)
        lr, betas, foreach = group["lr"], group["betas"], group["foreach"]
        pair = isinstance(betas, Sequence) and len(betas) == 2
        check_ranges(
            self._kind,
            ("lr", lr, is_least_zero(lr)),
            ("betas", betas, pair and all(is_least_zero(beta) and beta < 1 for beta in betas)),
            ("eps", group["eps"], is_least_zero(group["eps"])),
            ("weight_decay", group["weight_decay"], is_least_zero(group["weight_decay"])),
            ("maximize", group["maximize"], isinstance(group["maximize"], bool | None)),
            ("compile", group["compile"], isinstance(group["compile"], bool | None)),
        )  # fmt: skip
        # torch's dense step would raise these too, but only after the taken weights have stepped.
        if foreach and group["fused"]:
            raise OptionError(f"{self._kind}: foreach=True and fused=True exclude each other.")
        if foreach and isinstance(lr, Tensor):
            raise OptionError(f"{self._kind}: foreach=True does not take lr as a tensor.")

    def _prepare(self, plan: Plan) -> list[Operation]:
        operations: list[Operation] = []
        for group, entries in zip(self.param_groups, plan, strict=True):
            taken = [(p, g) for p, g in entries if g is not None]
            self._follow(taken, group)
            lr = float(group["lr"])
            compact = [self._compact_step(p, g, group, lr) for p, g in taken]
            beta1, beta2 = group["betas"]
            settings: dict[str, Any] = {
                "lr": lr,
                "beta1": beta1,
                "beta2": beta2,
                **{k: group[k] for k in ("eps", "warmup_steps")},
            }
            whole = {k: group[k] for k in ("weight_decay", "compile")}
            decay = self._decay_factor(group)
            for (p, _), step in zip(taken, compact, strict=True):
                self._applied[p] = step.selection, {**settings, "scale": step.scale}
            parameter_of = {id(step): p for (p, _), step in zip(taken, compact, strict=True)}
            for run, ended in adam_operations(compact, **whole, **settings):
                moved = [(parameter_of[id(step)], step) for step in ended]
                operations.append(self._compact_operation(run, moved, group, lr, decay))
            dense = [p for p, g in entries if g is None]
            plain = [p for p in dense if not rounds(p, group)]
            operations += self._dense_operations(plain, group, self._step_dense)
            operations += self._rounded_operations([p for p in dense if rounds(p, group)], group)
        return operations

    def _compact_operation(
        self,
        run: Callable[[], None],
        moved: Sequence[tuple[Tensor, CompactStep]],
        group: Mapping[str, Any],
        lr: float,
        decay: float,
    ) -> Operation:
        """Return an operation that calls ``run`` and notes what it has done with the weights."""

        def operation() -> None:
            run()
            for p, step in moved:
                keep(self.state[p], decay)
                if not in_code(group["compile"], step.selection, lr, p.device):
                    common = None if step.common_age is None else step.common_age + 1
                    self._common_ages[p] = step.age, common

        return Operation(operation, tuple(p for p, _ in moved))

    def _decay_factor(self, group: Mapping[str, Any]) -> float:
        return 1 - float(group["lr"]) * group["weight_decay"]

    def _dense_operations(
        self,
        params: Sequence[Tensor],
        group: Mapping[str, Any],
        step: Callable[[Sequence[Tensor], Mapping[str, Any]], None],
    ) -> list[Operation]:
        """Return torch's step of dense parameters; if it fails, their counts are restored."""
        alone = not (group["foreach"] or group["fused"] or any(p.is_cuda for p in params))
        if len(params) > 1 and alone:  # as torch steps them
            return [each for p in params for each in self._dense_operations([p], group, step)]

        def operation() -> None:
            memory = [torch.empty_like(p) for p in params for _ in range(2)]
            del memory  # torch takes as much after it has moved moments
            counts = [self._dense_state(p, bool(group["fused"]))["step"] for p in params]
            before = torch._foreach_add(counts, 0)
            try:
                step(params, group)
            except BaseException:
                for count, old in zip(counts, before, strict=True):
                    count.copy_(old)
                raise

        return [Operation(operation, tuple(params))] if params else []

    def _lay_out(self, plan: Plan) -> None:
        for group, entries in zip(self.param_groups, plan, strict=True):
            self._follow([(p, g) for p, g in entries if g is not None], group)
            for p, grad in entries:
                if grad is None:
                    self._dense_state(p, _is_fused(p, group))

    def _check_dense(self, p: Tensor) -> None:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise UnsupportedGradError(
                f"{registry.name_of(p)}: AdamW does not support sparse gradients. Build its module "
                "with sparse=False, or give it a torch.optim.SparseAdam of its own."
            )

    def _check_place(self, p: Tensor, grad: CompactGrad) -> None:
        if "indices" in self.state.get(p, {}):  # loaded state may have another dtype
            former = self._layouts.get(p, (None, p.shape))[1]
            self._layouts[p] = self.state[p]["exp_avg"].dtype, former
        super()._check_place(p, grad)

    # --- taken weights ----------------------------------------------------------------------------

    def _compact_step(
        self, p: Tensor, grad: CompactGrad, group: Mapping[str, Any], lr: float
    ) -> CompactStep:
        state = self.state[p]
        seed = self._seed(p, group) if rounds(p, group) else None
        first, second = matrix(state["exp_avg"]), matrix(state["exp_avg_sq"])
        ages, common = state["age"], None
        if in_code(group["compile"], grad.selection, lr, p.device):
            self._common_ages.pop(p, None)  # generated code does not use it
        else:
            common = self._common_age(p, ages)
        compact = matrix(grad.compact)
        return CompactStep(
            matrix(local(p)),
            -compact if group["maximize"] else compact,
            grad.selection,
            first,
            second,
            ages,
            common,
            scale_of(group["scale"], p, grad.selection, self._others_move(p, group)),
            seed,
        )

    def _update_norm(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p, {})
        if p not in self._applied or "indices" not in state:
            return None
        selection, settings = self._applied[p]
        first, second = matrix(state["exp_avg"]), matrix(state["exp_avg_sq"])
        return adam_update_norm(selection, first, second, state["age"], **settings)

    def _common_age(self, p: Tensor, ages: Tensor) -> int | None:
        """The age of all rows of p if it is the same; read from the device once per selection."""
        known, age = self._common_ages.pop(p, (None, None))  # unknown during a step
        if known is not ages:
            different = ages.unique().tolist()
            age = different[0] if len(different) == 1 else None
        return age

    def _follow(
        self, taken: Sequence[tuple[Tensor, CompactGrad]], group: Mapping[str, Any]
    ) -> None:
        """Move each weight's state to the selection of its gradient."""
        moving: list[tuple[Tensor, Move]] = []
        for p, grad in taken:
            state, selection = self.state[p], grad.selection
            if state.get("indices") is selection.indices:
                continue
            if "indices" not in state:
                self._start_compact(p, selection)
            elif (old := self._left_selection(p, selection, group)) is None:
                self._keep_selection(p, selection)
                continue
            elif group["on_refresh"] == "carry" and state["exp_avg"].shape == grad.compact.shape:
                size = matrix(local(p)).shape[selection.dim]
                moving.append((p, Move(old, selection, state["age"], size)))
                continue
            zeros = {k: torch.zeros_like(grad.compact) for k in ("exp_avg", "exp_avg_sq")}
            state.update(zeros, age=torch.zeros_like(selection.indices))
            self._keep_selection(p, selection)
        rows = carried([move for _, move in moving])
        for (p, move), (place, fresh, age) in zip(moving, rows, strict=True):
            state, where = self.state[p], (move.old, move.new, place, fresh)
            # One weight after the other, so that only one has old and new moments in memory.
            first, second = (
                carried_rows(matrix(state[k]), *where, power).view(state[k].shape)
                for k, power in (("exp_avg", 1), ("exp_avg_sq", 2))
            )
            state.update(exp_avg=first, exp_avg_sq=second, age=age)
            self._keep_selection(p, move.new)

    # --- dense parameters -------------------------------------------------------------------------

    def _step_dense(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        states = [self._dense_state(p, bool(group["fused"])) for p in params]
        firsts, seconds = ([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq"))
        steps = [s["step"] for s in states]
        step_as_torch(params, [p.grad for p in params], firsts, seconds, steps, group)

    def _rounded_operations(
        self, params: Sequence[Tensor], group: Mapping[str, Any]
    ) -> Iterator[Operation]:
        """Yield the steps of dense bfloat16 parameters that are rounded stochastically."""
        steps = {}
        for p in params:
            state = self._dense_state(p, fused=False)  # the host reads its count
            assert p.grad is not None
            w, grad, m, v = (local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
            seed = rounding_seed(group["seed"], registry.key_of(p), int(state["step"]))
            steps[p] = Rounded(w, grad, m, v, state["step"], seed)
        for run, ended in rounded_operations(steps, group):
            yield Operation(run, ended)

    def _dense_state(self, p: Tensor, fused: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if fused and "step" in state:
            state["step"] = count_as_torch(state["step"], p, fused)
        elif "step" not in state:
            first, second = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in "12")
            new = {"step": count_as_torch(0, p, fused), "exp_avg": first, "exp_avg_sq": second}
            state.clear()  # here, when there is memory for all of it
            state.update(new)
        return state

    def _check_shape(self, p: Tensor, state: Mapping[str, Any], name: str) -> None:
        super()._check_shape(p, state, name)
        moment = state.get("exp_avg")
        if isinstance(moment, Tensor) and "indices" not in state and moment.shape != p.shape:
            raise StateError(
                f"{name} has shape {tuple(p.shape)}, but its state was saved for "
                f"shape {tuple(moment.shape)}. Load it into the model that it was saved from."
            )

    def _kept(
        self, p: Tensor, shape: tuple[int, ...], compact: bool, groups: Any, asked: Any
    ) -> Iterator[Kept]:
        shapes = {"exp_avg": shape, "exp_avg_sq": shape}
        dtypes = dict.fromkeys(shapes, p.dtype)
        yield Kept(shapes if compact else {**shapes, "step": ()}, dtypes)


_NOT_HERE = {
    "amsgrad": "its maximum of second moments is not kept here. "
    "grass_fx.subspace(torch.optim.AdamW) takes amsgrad=True.",
    "capturable": "the step looks at ages and selections on the host, which no CUDA graph can "
    'record. torch.compile(model, backend="grass", mode="reduce-overhead") records the model.',
    "differentiable": "selected rows change in place, outside autograd. Differentiate through "
    "steps of torch.optim.AdamW on a model that is not compiled.",
}
"""Arguments of torch.optim.AdamW that are refused, with the reason and what to use instead."""


def _is_fused(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether torch's fused kernel steps a dense parameter, and wants its count on p's device."""
    return bool(group["fused"]) and not rounds(p, group)
