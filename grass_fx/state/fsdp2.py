"""Weights that torch's own ``fully_shard`` (FSDP2) gathers, as graphs and optimizers see them.

A graph is given the gathered parameter, its gradient belongs to the sharded one. Both are found
through the FSDPParam (``_torch_compat/fsdp.py``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grass_fx._torch_compat import FSDPWeight, fsdp_weight, fsdp_weight_of_shard
from grass_fx.errors import CompactGradError, DistributedError
from grass_fx.state.replicas import GroupReplicas, replicas_of
from grass_fx.state.sharding import Sharding, sharding_of

_REFUSES = "_grass_fx_refuses"


def owner_of(parameter: Tensor) -> Tensor:
    """The parameter that optimizers have of what a graph is given; mostly the same one."""
    weight = fsdp_weight(parameter)
    return parameter if weight is None else adopted(weight)


def adopted(weight: FSDPWeight) -> Tensor:
    """The sharded parameter, with the records of how it is sharded and who trains it."""
    parameter = weight.sharded
    if parameter not in sharding_of:
        mesh = weight.mesh
        found = _of_mesh(mesh, tuple(mesh.get_all_groups()))
        sharding_of[parameter], replicas_of[parameter] = found
    return parameter


def adopt_shard(parameter: Tensor) -> None:
    """The same for a parameter that FSDP2 may not have gathered yet; nothing if it is not its."""
    weight = fsdp_weight_of_shard(parameter)
    if weight is not None and weight.shards_rows:
        adopted(weight)


@lru_cache(maxsize=64)
def _of_mesh(mesh: Any, groups: tuple[Any, ...]) -> tuple[Sharding, GroupReplicas]:
    """One for all weights of a mesh, so that what is compared is compared together.

    Meshes are equal by their ranks. With its ``groups`` a mesh is told from one of an earlier
    process group, which has been destroyed.
    """
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif mesh.size() == dist.get_world_size():
        group = dist.group.WORLD
    else:
        group = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    return Sharding(mesh), GroupReplicas(group)


def check_call(weight: FSDPWeight, gathered: Tensor, name: str) -> None:
    """Raise DistributedError if a setting of FSDP2 does not work with compact gradients.

    Also makes a later dense gradient of the gathered parameter raise our error instead of FSDP2's
    assertion. It would be reduced beside the compact one.
    """
    if (conflict := weight.conflict) is not None:
        raise DistributedError(
            f"{name} gets a compact gradient, and {conflict}. Call that before the model is "
            "compiled, and the weight trains dense; or not at all."
        )
    if _REFUSES not in gathered.__dict__:

        def refuse(parameter: Tensor) -> None:
            if parameter.grad is None:  # autograd has come by without a gradient
                return
            parameter.grad = None
            raise CompactGradError(
                f"{name} gets a compact gradient from its compiled graph, and here a dense one "
                "from outside of it, which FSDP2 cannot reduce together. Compile the whole use of "
                f"the weight as one graph, or leave it dense with exclude={[name]!r}."
            )

        gathered.__dict__[_REFUSES] = gathered.register_post_accumulate_grad_hook(refuse)


def accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Add to a parameter's gradient outside of autograd, and call its hooks, as FSDP2 does."""
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    for hook in hooks.values():
        hook(parameter)
