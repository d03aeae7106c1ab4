"""Autograd and DistributedDataParallel: the backward and the wrapper that run now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def running_ddp() -> Any:
    """The DistributedDataParallel whose forward is running, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()


def averaged_by(ddp: Any) -> Sequence[Tensor]:
    """The parameters that a DistributedDataParallel has in its buckets."""
    return cast("Sequence[Tensor]", ddp._module_parameters)


def ignore_in_ddp(model: torch.nn.Module, names: list[str]) -> None:
    """Let a DistributedDataParallel of ``model`` leave these parameters alone."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def current_backward() -> int:
    """The number of the backward that is running."""
    return int(torch._C._current_graph_task_id())


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward has accumulated all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
