"""Autograd's running backward, and the DistributedDataParallel whose forward is running."""

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
    """The parameters whose gradients a DistributedDataParallel averages in its buckets."""
    return cast("Sequence[Tensor]", ddp._module_parameters)


def ignore_in_ddp(model: torch.nn.Module, names: list[str]) -> None:
    """Make a DistributedDataParallel around ``model`` ignore these parameters."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def current_backward() -> int:
    """The number by which autograd identifies the running backward."""
    return int(torch._C._current_graph_task_id())


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward has accumulated all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
