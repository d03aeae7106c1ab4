"""Data parallelism: averages gradients over processes, compact ones inside the compiled graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grass_fx._torch_compat import (
    at_end_of_backward,
    current_backward,
    ignore_in_ddp,
    running_ddp,
)
from grass_fx.errors import DistributedError, OptionError, UnsupportedGradError
from grass_fx.optim.in_backward import NOT_AVERAGED, SpentGrad
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from grass_fx.state.replicas import GroupReplicas, replicas_of

BUCKET_BYTES = 25 << 20
"""Gradients that are averaged after a backward go in buckets of this size, as in torch's DDP."""


_SAME_BATCHES = (
    "Every process must run as many micro-batches, and get gradients of the same parameters. Give "
    'each as many batches, for example by drop_last=True. With rest="sign" each must also call '
    "compiled layers as often."
)


def data_parallel(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Train ``model`` on every process of a group, and average gradients over the processes.

    Call it before the first step and before ``DistributedDataParallel``, if that is used; compile
    the model before or after. Parameters and buffers get the values of the group's first process.
    From then on every backward ends with averaged gradients. Compact gradients are averaged inside
    the compiled backward graph, m·r numbers for each weight. Dense gradients, and gradients that
    ``no_sync`` accumulated, are averaged in buckets when the backward ends.

    With ``DistributedDataParallel(model)`` around it, before or after ``torch.compile``, DDP
    averages only parameters that do not have two or three dimensions, such as biases. All weights
    of two or three dimensions, also those that a graph leaves dense, are averaged by this function.

    Args:
        model: the model; it must be the same on every process, except for its values.
        process_group: a process group of torch.distributed; None means the default group.

    Returns:
        ``model`` itself.

    Raises:
        DistributedError: there is no process group, the processes' models differ, or a part of the
            model is averaged already or over another group. Repeating a call changes nothing.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise DistributedError(
            "data_parallel: there is no process group. Call "
            "torch.distributed.init_process_group(...) first, in a process that torchrun started."
        )
    if isinstance(model, DistributedDataParallel):
        raise DistributedError(
            "data_parallel: the model is in a DistributedDataParallel already, which has its "
            "weights in buckets. Call data_parallel(model) first."
        )
    group: Any = dist.group.WORLD if process_group is None else process_group
    already = [replicas_of.get(p) for p in model.parameters()]
    first = already[0] if already else None
    if first is not None and first.group is group and all(other is first for other in already):
        return model  # frameworks call their hooks more than once
    if any(other is not None for other in already):
        raise DistributedError(
            "data_parallel: parameters of this model are averaged over processes already, by "
            "another call or another group. Call it once, with the whole model."
        )
    replicas = ModelReplicas(model, group)
    named = dict(model.named_parameters())
    described = [f"{name}: {tuple(p.shape)} {p.dtype}" for name, p in named.items()]
    replicas.agree("parameters", described, "Build the same model on every process.")
    with torch.no_grad():
        for tensor in (*named.values(), *model.buffers()):
            dist.broadcast(tensor.detach(), dist.get_global_rank(group, 0), group)
    trainable = {name: p for name, p in named.items() if p.is_floating_point() or p.is_complex()}
    matrices = [name for name, p in trainable.items() if p.dim() in (2, 3)]
    plain = [name.removeprefix("_orig_mod.") for name in matrices]
    ignore_in_ddp(model, _Ignored([*plain, *(f"_orig_mod.{name}" for name in plain)]))
    for p in trainable.values():
        replicas_of[p] = replicas
        frozen = not p.requires_grad  # registering a hook requires a gradient, so turn it on here
        p.requires_grad_().register_post_accumulate_grad_hook(replicas.on_gradient)
        p.requires_grad_(not frozen)
        if (subspace := registry.get(p)) is not None:
            subspace.replicas = replicas
    return model


class _Ignored(list[str]):
    """Names that a DistributedDataParallel of this model ignores; a copied model has none.

    The parameters of a copy have no hooks, so DDP has to average their gradients.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> list[str]:
        return []

    def __reduce__(self) -> Any:
        return list, ()


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without averaging them; use it for all micro-batches but the last.

    This is ``DistributedDataParallel.no_sync`` for a model without DDP. Run both the forward and
    the backward inside it.

    Raises:
        DistributedError: :func:`data_parallel` was not called with ``model``.
    """
    replicas = next(filter(None, map(replicas_of.get, model.parameters())), None)
    if replicas is None:
        raise DistributedError("no_sync: call grass_fx.distributed.data_parallel(model) first.")
    before, replicas.enabled = replicas.enabled, False
    try:
        yield
    finally:
        replicas.enabled = before


class ModelReplicas(GroupReplicas):
    """One process's replica of a model that ``group`` trains; a ``state.replicas.Replicas``.

    It maps the ``id`` of each parameter to its name, and so keeps no parameter alive.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        super().__init__(group)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._on_cpu = all(p.device.type == "cpu" for p in model.parameters())
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._backward = -1
        self._micro_batches = 0
        self._pending: dict[str, Tensor] = {}

    # --- when -------------------------------------------------------------------------------------

    def syncs(self) -> bool:
        """Whether gradients are averaged in the backward that belongs to the current forward."""
        if (ddp := running_ddp()) is not None:
            self._ddp = weakref.ref(ddp)
        outer = self._outer()
        return self.enabled and (outer is None or bool(outer.require_backward_grad_sync))

    def _outer(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel around the model, once its forward has run."""
        return None if self._ddp is None else self._ddp()

    def on_gradient(self, p: Tensor) -> None:
        """Called for each parameter when a backward has accumulated its gradient."""
        if (task := current_backward()) != self._backward:  # a flag would stay set if one failed
            self._backward = task
            at_end_of_backward(self._finish_backward)
        grad = p.grad
        if isinstance(grad, SpentGrad):
            raise OptionError(NOT_AVERAGED)
        if grad is None or (isinstance(grad, CompactGrad) and not grad.local):
            return
        if self._outer() is None or hasattr(p, "_ddp_ignored"):
            self._pending[self._names[id(p)]] = p

    def _finish_backward(self) -> None:
        self._micro_batches += 1
        if not self.syncs():
            return
        pending = {name: p for name, p in self._pending.items() if p.grad is not None}
        count, self._micro_batches, self._pending = self._micro_batches, 0, {}
        names = sorted(pending)
        held = [name + _votes(pending[name], count) for name in names]
        summary = [f"{count} micro-batches", *held]
        self._averaged += 1
        self._log.update("\n".join(summary).encode())
        # A comparison waits for a GPU. There, later differences show in the log's hash, which is
        # compared at the next refresh.
        if self._averaged <= 2 or self._on_cpu:
            self.agree("micro-batches and gradients", summary, _SAME_BATCHES)
        self._average([pending[name] for name in names])

    # --- what -------------------------------------------------------------------------------------

    def _average(self, params: Sequence[Tensor]) -> None:
        """Average the parameters' gradients in place, in buckets of one dtype and device."""
        buckets: dict[Any, list[list[Tensor]]] = {}
        for p in params:
            grad = p.grad
            assert grad is not None
            if grad.layout != torch.strided:
                raise UnsupportedGradError(
                    f"{self._names[id(p)]}: sparse gradients are not averaged over processes. "
                    "Build its module with sparse=False."
                )
            if isinstance(grad, CompactGrad):
                grad.mark_averaged()
                grad = grad.compact
            lists = buckets.setdefault((grad.dtype, grad.device), [[]])
            if sum(tensor.nbytes for tensor in lists[-1]) >= BUCKET_BYTES:
                lists.append([])
            lists[-1].append(grad)
        for tensors in (bucket for lists in buckets.values() for bucket in lists):
            for tensor, total in zip(tensors, self.total(tensors), strict=True):
                tensor.copy_(total.div_(self.ranks))


def _votes(p: Tensor, micro_batches: int) -> str:
    """How many votes p's gradient holds; processes send them to each other as that many bits.

    A process may leave a weight out of some micro-batches, and then has fewer than the others.
    """
    if not isinstance(p.grad, CompactGrad) or p.grad.votes is None:
        return ""
    p.grad.vote(p.grad.votes.up_to(micro_batches))
    return f" with the signs of {p.grad.votes.most} gradients"
