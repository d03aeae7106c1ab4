"""AdamW in the subspace for weights with a CompactGrad, torch's AdamW for all others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grass_fx.config import ON_REFRESH, SCALE, WARMUP_STEPS
from grass_fx.errors import GrassWarning, OptionError
from grass_fx.gradient import CompactGrad, Selection
from grass_fx.optim.update import adam_update_, carried
from grass_fx.subspace import registry

log = logging.getLogger(__name__)

_SUBSPACE = "subspace_"  # keys of Subspace.state(), which live in the registry between checkpoints


class AdamW(torch.optim.Optimizer):
    """AdamW for a model compiled with ``backend="grass"``.

    A weight whose gradient is a :class:`~grass_fx.CompactGrad` is stepped in its subspace
    (equation 4 of docs/method.md): its moments have the compact shape (r, n) or (m, r), and only
    its selected rows move. Every other parameter is stepped as ``torch.optim.AdamW`` would.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate of the dense parameters; the compact update's is ``scale * lr``.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: λ; decoupled, lr·λ on the whole weight each step.
        scale: α, multiplies the compact update only.
        warmup_steps: a row's update grows linearly to full over this many steps of its own.
        on_refresh: "carry" keeps moments and age of a row that stays selected; "reset" starts all
            rows anew, as the paper does.
        foreach, fused: for the dense parameters, as in ``torch.optim.AdamW``.

    State of a taken weight, all plain tensors: ``exp_avg``, ``exp_avg_sq`` (compact), ``age`` (r,),
    ``indices`` (r,), ``generation`` and, with replacement, ``scale`` (r,): the selection that its
    moments belong to.

    Raises:
        OptionError: a hyper-parameter is impossible.
        StateError: ``load_state_dict`` got a selection that does not fit the compiled weight.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        scale: float = SCALE,
        warmup_steps: int = WARMUP_STEPS,
        on_refresh: str = ON_REFRESH,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "warmup_steps": warmup_steps,
            "on_refresh": on_refresh,
            "foreach": foreach,
            "fused": fused,
        }
        _check(defaults)
        self._met_compact = self._warned_dense = self._warned_projected = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the parameters' order in the optimizer keys their random streams."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = [p for group in self.param_groups for p in group["params"]]
        names = [
            name
            for group in self.param_groups
            for name in group.get("param_names", [None] * len(group["params"]))
        ]
        registry.announce(params, names)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; afterwards, where a period ends, the selections change.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compact: list[tuple[Tensor, CompactGrad]] = []
        for group in self.param_groups:
            dense = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = self._compact_grad(p)
                if grad is None:
                    dense.append(p)
                else:
                    compact.append((p, grad))
                    self._step_compact(p, grad, group)
            self._step_dense(dense, group)
        for p, grad in compact:
            subspace = registry.get(p)
            if subspace is not None:
                subspace.finish_step(grad.scores)
        self._warn_if_none(bool(compact))
        return loss

    def _compact_grad(self, p: Tensor) -> CompactGrad | None:
        """p's gradient as a compact one, projected if it came dense; None if p trains dense."""
        grad, subspace = p.grad, registry.get(p)
        if isinstance(grad, CompactGrad):
            if grad.zeroed and subspace is not None:  # zeros of a selection that may be gone
                selection = subspace.selection_on(p.device)
                return CompactGrad(grad.compact, selection, p.shape, zeroed=True)
            return grad
        if grad is None or subspace is None or p not in self.state:
            return None
        if "indices" not in self.state[p]:
            return None
        if not self._warned_projected:
            self._warned_projected = True
            warnings.warn(
                f"{subspace.name} has its optimizer state in a subspace, but its gradient came "
                "dense, from code outside the compiled graph: it was projected. Run all of the "
                "training step through the compiled model; to train the weight dense from here "
                "on, make a new optimizer.",
                GrassWarning,
                stacklevel=4,
            )
        selection = subspace.selection_on(p.device)
        return CompactGrad(selection.project(grad), selection, p.shape)

    def _step_compact(self, p: Tensor, grad: CompactGrad, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        selection = grad.subspace
        if "indices" not in state:
            # New, or dense until now: moments of the compact shape only.
            state.clear()
            state["exp_avg"] = torch.zeros_like(grad.compact)
            state["exp_avg_sq"] = torch.zeros_like(grad.compact)
            state["age"] = torch.zeros_like(selection.indices)
            self._keep_selection(p, selection)
        elif state["indices"] is not selection.indices:
            self._move_to(p, selection, group["on_refresh"])
        beta1, beta2 = group["betas"]
        adam_update_(
            p,
            grad.compact,
            selection,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["age"],
            beta1=beta1,
            beta2=beta2,
            **{k: group[k] for k in ("lr", "eps", "weight_decay", "scale", "warmup_steps")},
        )

    def _keep_selection(self, p: Tensor, selection: Selection) -> None:
        state = self.state[p]
        state["indices"] = selection.indices
        state["generation"] = torch.tensor(selection.generation)
        state.pop("scale", None)
        if selection.scale is not None:
            state["scale"] = selection.scale

    def _move_to(self, p: Tensor, selection: Selection, on_refresh: str) -> None:
        """Moments follow the selection of the gradient."""
        state = self.state[p]
        refreshed = int(state["generation"]) != selection.generation
        old = Selection(state["indices"], state.get("scale"), selection.dim, -1)
        moments = state["exp_avg"], state["exp_avg_sq"], state["age"]
        if refreshed or not _equal(old, selection):
            shape = list(p.shape)
            shape[selection.dim] = old.indices.numel()
            if on_refresh == "carry" and moments[0].shape == torch.Size(shape):
                moments = carried(old, selection, *moments)
            else:
                shape[selection.dim] = selection.indices.numel()
                moments = (
                    moments[0].new_zeros(shape),
                    moments[1].new_zeros(shape),
                    torch.zeros_like(selection.indices),
                )
            state["exp_avg"], state["exp_avg_sq"], state["age"] = moments
        self._keep_selection(p, selection)

    def _step_dense(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        if not params:
            return
        states = [self._dense_state(p, bool(group["fused"])) for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            **{k: group[k] for k in ("lr", "eps", "weight_decay", "foreach", "fused")},
        )

    def _dense_state(self, p: Tensor, fused: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if "step" not in state:
            exact = torch.get_default_dtype() == torch.float64
            dtype = torch.float64 if exact else torch.float32
            state.clear()
            state["step"] = torch.zeros((), dtype=dtype, device=p.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _warn_if_none(self, met: bool) -> None:
        self._met_compact = self._met_compact or met
        any_grad = any(p.grad is not None for g in self.param_groups for p in g["params"])
        if any_grad and not self._met_compact and not self._warned_dense:
            self._warned_dense = True
            warnings.warn(
                "no compact gradient has arrived: every parameter trains dense. Call the compiled "
                'model (torch.compile(model, backend="grass")) in the training step, and see '
                'TORCH_LOGS="+grass_fx" for the weights that were not taken.',
                GrassWarning,
                stacklevel=4,
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each taken weight's selection and schedule among its state."""
        result = super().state_dict()
        for p, key in self._keys(result):
            if "indices" in result["state"].get(key, {}):
                result["state"][key] = {**result["state"][key], **registry.saved_state(p)}
        return result

    def _keys(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
        """Each parameter with its key in a state dict."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            yield from zip(group["params"], saved["params"], strict=False)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; selections and schedules go to the weights' subspaces.

        Raises StateError, and changes nothing, if a saved selection does not fit.
        """
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for p, key in self._keys(state_dict):
            state = state_dict["state"].get(key, {})
            if "indices" in state:
                # Torch would cast to the weight's dtype: an index 257 is 256 in bfloat16.
                loaded[p] = {k: v.to(p.device, copy=True) for k, v in state.items()}
        subspaces = {p: _popped(state, _SUBSPACE) for p, state in loaded.items()}
        for p, state in subspaces.items():
            if state:
                registry.check(p, state)
        super().load_state_dict(state_dict)
        for p, state in subspaces.items():
            self.state[p] = loaded[p]
            if state:
                registry.restore(p, state)


def _equal(old: Selection, new: Selection) -> bool:
    if (old.scale is None) != (new.scale is None) or not torch.equal(old.indices, new.indices):
        return False
    return old.scale is None or new.scale is None or torch.equal(old.scale, new.scale)


def _popped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = [key for key in state if key.startswith(prefix)]
    return {key: state.pop(key) for key in keys}


def _check(values: Mapping[str, Any]) -> None:
    """Raise OptionError for a hyper-parameter that is impossible."""
    beta1, beta2 = values["betas"]
    for name, value, good in (
        ("lr", values["lr"], bool(values["lr"] >= 0)),
        ("betas", values["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", values["eps"], values["eps"] >= 0),
        ("weight_decay", values["weight_decay"], values["weight_decay"] >= 0),
        ("scale", values["scale"], values["scale"] > 0),
        ("warmup_steps", values["warmup_steps"], values["warmup_steps"] >= 0),
    ):
        if not good:
            raise OptionError(f"AdamW: {name}={value!r} is out of range.")
    if values["on_refresh"] not in ("carry", "reset"):
        raise OptionError(f'AdamW: on_refresh={values["on_refresh"]!r}: valid: "carry", "reset".')
