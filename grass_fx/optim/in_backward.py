"""Steps each parameter as soon as its gradient arrives, so that not all gradients exist at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grass_fx.errors import CompactGradError, OptionError
from grass_fx.optim.base import SubspaceOptimizer
from grass_fx.state.registry import registry
from grass_fx.state.replicas import replicas_of
from grass_fx.state.sharding import sharding_of

NOT_AVERAGED = (
    "step_in_backward and data_parallel: each process would step with its own gradients, which are "
    "averaged when the backward ends. Use one of the two, or torch's fully_shard."
)


class SpentGrad(Tensor):
    """The value of ``weight.grad`` between the weight's early step and ``optimizer.step()``.

    It has the weight's shape and no memory. Any operation on it raises an error: clipping,
    unscaling and accumulation would come too late, and must not be ignored silently.
    """

    @staticmethod
    def __new__(cls: Any, weight: Tensor) -> SpentGrad:
        grad: SpentGrad = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        return grad

    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return f"SpentGrad(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise CompactGradError(
            f"{func} came after grass_fx.step_in_backward had stepped with this gradient. Stepping "
            "in backward excludes gradient accumulation, clipping and GradScaler; and every "
            "backward must be followed by optimizer.step(), which ends the step."
        )


def step_in_backward(optimizer: Optimizer) -> None:
    """Let ``optimizer`` step each parameter inside backward, and free its gradient at once.

    The training loop stays as it is. ``optimizer.step()`` after the backward steps nothing twice:
    it ends the step, and changes selections where that is due. Gradients then exist for one
    compiled graph at a time. So memory is saved if layers are compiled one by one
    (``layer.compile(backend="grass")``, with layers of your own classes: Dynamo compiles nothing of
    torch's own). In a graph of the whole model all compact gradients arrive together, and no memory
    is saved.

    The loop must call backward once per step: accumulation, clipping and ``GradScaler`` come too
    late and raise a CompactGradError.

    Raises:
        OptionError: ``optimizer`` is neither a grass_fx.AdamW nor made by grass_fx.subspace; or its
            parameters belong to a ``data_parallel`` model, which averages after the backward; or
            this was called before with this optimizer.
    """
    if not isinstance(optimizer, SubspaceOptimizer):
        raise OptionError(
            f"step_in_backward({type(optimizer).__name__}): it takes an optimizer that steps in "
            "the subspace, grass_fx.AdamW or a class made by grass_fx.subspace."
        )

    if any(p in replicas_of and p not in sharding_of for p in optimizer._parameters()):
        raise OptionError(NOT_AVERAGED)

    if optimizer.steps_in_backward:
        raise OptionError(
            "step_in_backward: it was called with this optimizer before. Call it once: parameters "
            "would step twice in each backward."
        )
    optimizer.steps_in_backward = True
    # A parameter holds its hooks and an optimizer its parameters: a strong reference from a hook
    # to the optimizer would keep all of them alive.
    held = weakref.ref(optimizer)

    def on_gradient(p: Tensor) -> None:
        if (alive := held()) is None:
            raise OptionError(
                f"{registry.name_of(p)}: the optimizer that was to step it in backward is gone. "
                "Keep the optimizer for as long as the model is trained."
            )
        alive.step_early(p)
        p.grad = SpentGrad(p)

    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(on_gradient)
